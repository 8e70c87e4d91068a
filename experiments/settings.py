"""What determines a run, and which of it runs share: what may be averaged, and what cases change."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from .analysis.curves import STARTS_FROM_TEACHER
from .config import CONTINUED, TEACHER, Config, flatten

# Of the schedule: what a stage has by another name, or another stage alone.
OTHER_STAGES = ("teacher_epochs", "first_epochs", "teacher_decay", "teacher_augment")
# Settings that may differ between seeds of one experiment without making their mean meaningless.
PER_RUN = {
    "seed",
    "arms",
    "claim",
    "device",
    "logger",
    "runs",
    "checkpoint_seconds",
    "data.root",
    "data.cache",
    "data.workers",
    # What the scale makes of the paper's network: it stands in `model`, too, where the network is that one.
    "inception.slim",
    "inception.stem",
    "first",  # a teacher's hash of the network that it is grown from, its seed's
}


def trained_with(config: Config, arm: str) -> Config:
    """The configuration with the schedule of one stage, where the teacher's or its heirs' is another."""
    schedule = config.schedule
    if arm == TEACHER:
        length, decay = schedule.teacher_epochs or schedule.epochs, schedule.teacher_decay or schedule.decay
        schedule = replace(schedule, epochs=length, decay=decay)
    if arm in STARTS_FROM_TEACHER or (arm == TEACHER and config.first):
        schedule = replace(schedule, warmup=config.growth.warmup or schedule.warmup)
    return replace(config, schedule=schedule)


def rate(config: Config, arm: str) -> float:
    """The initial rate of a stage, a multiple of schedule.lr; that of a grown network for a teacher that is one."""
    if arm == TEACHER:
        return config.rates["net2net"] if config.first else 1.0
    return config.rates[arm]


def determined(config: Config, arm: str, student: str | None) -> dict[str, Any]:
    """What the configuration says of the product of a stage, and nothing else: images, machine, teacher are missing."""
    tree = asdict(trained_with(config, arm))
    settings: dict[str, Any] = {
        "seed": config.seed,
        "data": {key: value for key, value in tree["data"].items() if key not in ("root", "cache", "workers")},
        "network": config.model | (config.teacher if student is None else config.students[student]),
        "schedule": {key: value for key, value in tree["schedule"].items() if key not in OTHER_STAGES},
    }
    if arm == TEACHER:
        settings["augment"] = config.schedule.teacher_augment
    if arm != TEACHER or config.first:
        settings["rate"] = rate(config, arm)
    if arm == "net2net" or (arm == TEACHER and config.first):
        settings["growth"] = tree["growth"]
    if arm == CONTINUED:
        settings["optimizer_state"] = config.growth.optimizer_state
    return settings


def digest(settings: dict[str, Any]) -> str:
    """The name of what these settings determine: a hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def varied(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Each setting that should be the same in all of these manifests and is not, with its different values."""
    # A precision of "auto" is another one on another device.
    settings = [flatten(_decisive(record)) | {"precision": record.get("precision")} for record in records]
    keys = dict.fromkeys(key for one in settings for key in one if key not in PER_RUN)
    found = {key: distinct(one.get(key) for one in settings) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
    """A teacher's own settings: the rest of its configuration is that of whichever case happened to train it."""
    return record["settings"] if record.get("arm") == TEACHER else record["config"]


def mixed(records: Iterable[dict[str, Any]]) -> list[str]:
    """The same as text: `schedule.lr (0.01, 0.02)` for each."""
    return [f"`{key}` ({', '.join(values)})" for key, values in varied(records).items()]


def distinct(values: Iterable[Any]) -> list[str]:
    """The different ones among `values` as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))
