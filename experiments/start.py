"""How networks start: freshly drawn, filled as their arm says, with or without the state of the teacher's optimizer."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import net2net

from .arms import ARMS
from .config import TEACHER, Config, ExperimentError, Growth
from .models import build
from .optimizers import make_optimizer
from .randomness import derive_seed


def make_network(config: Config, student: str | None, classes: int, channels: int) -> nn.Module:
    """Return a student (the teacher for None) with freshly drawn weights, the same for all arms of a seed."""
    spec = config.model | (config.teacher if student is None else config.students[student])
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "initialisation", student or TEACHER))
        return build(spec, classes, channels)


@dataclass
class StudentStart:
    """A student before its training, and what its arm can do to it (`experiments.arms.Start`)."""

    teacher: nn.Module
    student: nn.Module
    config: Config
    images: Callable[[int], Tensor]  # returns so many training images
    record: net2net.Transfer | None = None  # of the growth, if the arm grew the student
    fresh: nn.Module = field(init=False)  # the student as its constructor drew it

    def __post_init__(self) -> None:
        self.fresh = copy.deepcopy(self.student)
        self.generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "growth"))

    @property
    def growth(self) -> Growth:
        """The settings of `growth`."""
        return self.config.growth

    def transfer(self, split: str | None = None) -> None:
        """Fill the student so that it computes its teacher's function, as `split` and the settings of `growth` say."""
        self.record = net2net.transfer(
            self.teacher,
            self.student,
            self.images(2),
            generator=self.generator,
            noise=self.growth.noise,
            split=split or self.growth.split,
            calibrate=self.images(self.growth.calibrate) if self.growth.calibrate else None,
        )

    def random_pad(self) -> None:
        """Fill one corner of each tensor with the teacher's; the rest stays as the constructor drew it."""
        self.record = net2net.random_pad(self.teacher, self.student, self.images(2), generator=self.generator)

    @torch.no_grad()
    def shrink_towards_fresh(self, share: float) -> None:
        """Multiply all weights by `share`, and add (1 - share) times those that the constructor drew.

        Norms and biases stay, and so does what is frozen.
        """
        for mine, fresh in zip(self.student.parameters(), self.fresh.parameters(), strict=True):
            if mine.dim() > 1 and mine.requires_grad:
                mine.lerp_(fresh, 1 - share)


def fill(
    arm: str, teacher: nn.Module, student: nn.Module, config: Config, images: Callable[[int], Tensor]
) -> net2net.Transfer | None:
    """Fill a student in place as its arm does, and return the transfer; None if the arm starts from random weights.

    `images(n)` are n training images. Raises ExperimentError if the teacher cannot be carried into the student.
    """
    start = StudentStart(teacher, student, config, images)
    try:
        ARMS[arm].start(start)
    except net2net.TransferError as error:
        raise ExperimentError(str(error)) from error
    return start.record


def carry_optimizer_state(
    transfer: net2net.Transfer | None, teacher: nn.Module, network: nn.Module, state: dict[str, Any], config: Config
) -> dict[str, Any]:
    """Return the optimizer state with which a network starts if it inherits `state`, that of the teacher's optimizer.

    `transfer` says how the network was filled; None: it is the teacher itself, trained longer.
    """
    old, new = (make_optimizer(one, config.schedule) for one in (teacher, network))
    old.load_state_dict(state)
    if transfer is None:
        return old.state_dict()
    transfer.optimizer_state(old, new, fresh_new=config.growth.optimizer_state == "fresh_new")
    return new.state_dict()
