"""One experiment of one seed on this machine: what its stages are made of, and where they lie."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import arms, flops
from .choice import Choice, choose
from .config import CONTINUED, STARTS_FROM_TEACHER, TEACHER, Config, split_arm
from .data import Splits
from .distributed import ALONE, Ranks
from .training import Job

# Of the schedule: what a stage has by another name, or another stage alone.
OTHER_STAGES = ("teacher_epochs", "first_epochs", "teacher_decay", "teacher_augment")


@dataclass(frozen=True)
class Run:
    """One experiment of one seed: configuration, images and machine."""

    config: Config
    splits: Splits
    device: torch.device
    console: Console
    ranks: Ranks = ALONE
    later: "Run | None" = None  # the run whose teacher is this one's student

    @property
    def folder(self) -> Path:
        """Where the seed's stages are written."""
        return self.experiment / f"seed{self.config.seed}"

    @property
    def experiment(self) -> Path:
        """Where all seeds of the experiment are written."""
        return Path(self.config.runs) / self.config.name

    @cached_property
    def earlier(self) -> "Run | None":
        """The run whose student is the teacher of this one; None if the teacher starts from random weights."""
        config, schedule = self.config, self.config.schedule
        if not config.first:
            return None
        schedule = replace(schedule, teacher_epochs=schedule.first_epochs or self.epochs(TEACHER), first_epochs=None)
        changed = replace(config, teacher=config.first, first={}, students={TEACHER: config.teacher}, schedule=schedule)
        return replace(self, config=changed, later=self)

    def fresh(self, student: str | None) -> nn.Module:
        """A network as its constructor draws it; the teacher for None."""
        images, _ = next(self.splits.test.ordered(1))
        return arms.fresh(self.config, student, self.splits.classes, images.shape[1])

    def images(self, count: int) -> Tensor:
        """The first `count` training images of the run's own order and augmentation (all, if there are fewer)."""
        data, count = self.config.data, min(count, len(self.splits.train))
        batches = self.splits.train.batches(
            count, epoch=0, seed=self.config.seed, augment=True, pad=data.pad, flip=data.flip
        )
        return next(iter(batches))[0]

    def job(
        self,
        name: str,
        student: str | None,
        rate: float,
        folder: Path | None = None,
        before: Mapping[str, float] | None = None,
    ) -> Job:
        """The training run of one stage, written into the folder, or else where its name says.

        What was spent `before` counts as its own.
        """
        arm = split_arm(name)[1]
        config = trained_with(self.config, arm)
        return Job(
            folder or self.folder / name,
            config,
            self.splits,
            self.device,
            self.choice.arithmetic,
            rate * config.schedule.lr,
            config.schedule.epochs,
            self.costs[student][1],
            name,
            self.ranks,
            config.schedule.teacher_augment or arm != TEACHER,
            before or {},
        )

    def epochs(self, name: str) -> str:
        """How long a stage trains."""
        return trained_with(self.config, split_arm(name)[1]).schedule.epochs

    @cached_property
    def costs(self) -> dict[str | None, tuple[int, int]]:
        """FLOPs an image, of a forward pass and of a training step, of the teacher (None) and each student."""
        images, _ = next(self.splits.test.ordered(1))
        return {
            student: flops.count(self.fresh(student), images.shape[1], self.config.data.size)
            for student in (None, *self.config.students)
        }

    @cached_property
    def choice(self) -> Choice:
        """In which arithmetic all of it is trained."""
        if self.later is not None:
            return self.later.choice
        largest = max(self.costs, key=lambda student: self.costs[student][1])

        def batch(count: int) -> tuple[Tensor, Tensor]:
            return next(iter(self.splits.train.batches(count, epoch=0, seed=0, augment=False)))

        return self.ranks.first(lambda: choose(self.config, self.device, lambda: self.fresh(largest), batch))

    @cached_property
    def fingerprint(self) -> str:
        """What tells the images from any others."""
        return self.splits.fingerprint()

    def settings(self, arm: str, student: str | None) -> dict[str, Any]:
        """All that determines the product of a stage, and nothing else."""
        settings = determined(self.config, arm, student) | asdict(self.choice.arithmetic)
        settings["data"] |= {"description": self.splits.description, "fingerprint": self.fingerprint}
        if self.ranks.count > 1:  # batch norm sees a share of each batch
            settings["ranks"] = self.ranks.count
        if arm == TEACHER and self.earlier is not None:
            settings["first"] = self.earlier.teacher
        if arm in STARTS_FROM_TEACHER:
            settings["teacher"] = self.teacher
        return settings

    @cached_property
    def teacher(self) -> str:
        """The teacher's name among all teachers: a hash of all that determines it."""
        return digest(self.settings(TEACHER, None))


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
