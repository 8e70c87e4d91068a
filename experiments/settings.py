"""Which settings runs share: what may be averaged, and what cases change."""

from collections.abc import Iterable
from typing import Any

from .config import flatten

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
}


def varied(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Each setting that should be the same in all of these manifests and is not, with its different values."""
    # A precision of "auto" is another one on another device.
    settings = [flatten(_decisive(record)) | {"precision": record.get("precision")} for record in records]
    keys = dict.fromkeys(key for one in settings for key in one if key not in PER_RUN)
    found = {key: distinct(one.get(key) for one in settings) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
    """A teacher's own settings: the rest of its configuration is that of whichever case happened to train it."""
    return record["settings"] if record.get("arm") == "teacher" else record["config"]


def mixed(records: Iterable[dict[str, Any]]) -> list[str]:
    """The same as text: `schedule.lr (0.01, 0.02)` for each."""
    return [f"`{key}` ({', '.join(values)})" for key, values in varied(records).items()]


def distinct(values: Iterable[Any]) -> list[str]:
    """The different ones among `values` as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))
