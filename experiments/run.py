"""One experiment of one seed on this machine: its networks and jobs, where they lie, and which settings make them."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import flops, start
from .arms import ARMS
from .config import TEACHER, Config, split_arm
from .data import Splits
from .distributed import ALONE, Ranks
from .machine import Arithmetic, choose_arithmetic
from .models.speedrun import SpeedRun
from .training import Job

PLACES = ("root", "cache", "workers", "download")  # keys of the data that say where they are, and not which
# Keys of the schedule that concern other stages, or that `stage_config` has put in place for this one.
OTHER_STAGES = ("teacher_epochs", "teacher_decay", "teacher_augment")


@dataclass(frozen=True)
class Run:
    """One experiment of one seed: configuration, images and machine."""

    config: Config
    splits: Splits
    device: torch.device
    console: Console
    ranks: Ranks = ALONE

    @property
    def experiment(self) -> Path:
        """The folder of all seeds of the experiment."""
        return Path(self.config.runs) / self.config.name

    @property
    def folder(self) -> Path:
        """The folder of the seed's stages."""
        return self.experiment / f"seed{self.config.seed}"

    @cached_property
    def channels(self) -> int:
        """Number of channels of the images."""
        return next(self.splits.test.ordered(1))[0].shape[1]

    def make_network(self, student: str | None) -> nn.Module:
        """Return a student with freshly drawn weights, or the teacher for None."""
        network = start.make_network(self.config, student, self.splits.classes, self.channels)
        if isinstance(network, SpeedRun):
            count = min(1000, len(self.splits.train))
            batches = self.splits.train.batches(count, epoch=0, seed=self.config.seed, augment=False)
            network.set_from_data(next(batches)[0])
        return network

    def images(self, count: int) -> Tensor:
        """Return the first `count` training images of the run's own order and augmentation (all if there are fewer)."""
        count = min(count, len(self.splits.train))
        return next(self.splits.train.batches(count, epoch=0, seed=self.config.seed))[0]

    def job(self, name: str, student: str | None, rate: float, folder: Path | None = None) -> Job:
        """Return the training run of one stage; `rate` multiplies schedule.lr."""
        arm = split_arm(name)[1]
        config = stage_config(self.config, arm)
        return Job(
            folder=folder or self.folder / name,
            config=config,
            splits=self.splits,
            device=self.device,
            arithmetic=self.arithmetic,
            rate=rate * config.schedule.lr,
            epochs=config.schedule.epochs,
            flops=self.costs[student][1] + (self.costs[None][0] if arm != TEACHER and ARMS[arm].is_guided else 0),
            name=name,
            ranks=self.ranks,
            augment=config.schedule.teacher_augment or arm != TEACHER,
        )

    def epochs(self, name: str) -> str:
        """Return the length of the training of a stage, or of a student."""
        schedule = self.config.schedule
        return (schedule.teacher_epochs or schedule.epochs) if name == TEACHER else schedule.epochs

    @cached_property
    def costs(self) -> dict[str | None, tuple[int, int]]:
        """FLOPs per image of a forward pass and of a training step, of the teacher (None) and each student."""
        return {
            student: flops.count(self.make_network(student), self.channels, self.config.data.size)
            for student in (None, *self.config.students)
        }

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of every training step, as rank 0 chooses it."""
        wanted = (self.config.precision, self.config.layout, self.config.compile)
        return self.ranks.on_first(partial(choose_arithmetic, self.device, *wanted))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images."""
        return self.splits.fingerprint()

    def settings(self, arm: str, student: str | None) -> dict[str, Any]:
        """Return all that determines the product of a stage, and nothing else."""
        settings = stage_settings(self.config, arm, student) | asdict(self.arithmetic)
        settings["data"] |= {"description": self.splits.description, "fingerprint": self.fingerprint}
        if self.ranks.count > 1:  # batch norm sees a share of each batch
            settings["ranks"] = self.ranks.count
        if arm != TEACHER and ARMS[arm].needs_teacher:
            settings["teacher"] = self.teacher
        return settings

    @cached_property
    def teacher(self) -> str:
        """The teacher's name among all teachers: a hash of all that determines it."""
        return digest(self.settings(TEACHER, None))


def stage_config(config: Config, arm: str) -> Config:
    """Return the configuration with the schedule of one stage, which may differ from the students'."""
    schedule = config.schedule
    if arm == TEACHER:
        length, decay = schedule.teacher_epochs or schedule.epochs, schedule.teacher_decay or schedule.decay
        schedule = replace(schedule, epochs=length, decay=decay)
    elif ARMS[arm].starts_from_teacher:
        schedule = replace(schedule, warmup=config.growth.warmup or schedule.warmup)
    return replace(config, schedule=schedule)


def stage_rate(config: Config, arm: str) -> float:
    """Return the initial learning rate of a stage as a multiple of schedule.lr."""
    return 1.0 if arm == TEACHER else config.rates[arm]


def stage_settings(config: Config, arm: str, student: str | None) -> dict[str, Any]:
    """Return what the configuration says of the product of a stage; images, machine and teacher are missing."""
    tree = asdict(stage_config(config, arm))
    settings: dict[str, Any] = {
        "seed": config.seed,
        "data": {key: value for key, value in tree["data"].items() if key not in PLACES and value != {}},
        "network": config.model | (config.teacher if student is None else config.students[student]),
        "schedule": {key: value for key, value in tree["schedule"].items() if key not in OTHER_STAGES},
    }
    if arm == TEACHER:
        return settings | {"augment": config.schedule.teacher_augment}
    settings["rate"] = stage_rate(config, arm)
    if reads := ARMS[arm].reads:
        settings["growth"] = {key: tree["growth"][key] for key in reads}
    return settings


def digest(settings: dict[str, Any]) -> str:
    """Return the hash that names what these settings determine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
