"""The arms: net2net, random_pad, random_init and controls. They fill one student; only its weights differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import net2net

from .config import TEACHER, Config, ExperimentError
from .models import build
from .optimizers import make_optimizer
from .randomness import derive_seed


def make_network(config: Config, student: str | None, classes: int, channels: int) -> nn.Module:
    """Return a student (the teacher for None) with freshly drawn weights, the same for all arms of a seed."""
    spec = config.model | (config.teacher if student is None else config.students[student])
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "initialisation", student or TEACHER))
        return build(spec, classes, channels)


def fill(
    arm: str, teacher: nn.Module, student: nn.Module, config: Config, images: Callable[[int], Tensor]
) -> net2net.Transfer | None:
    """Fill a student in place as its arm does, and return the transfer; None if the arm starts from random weights.

    `images(n)` are n training images. Raises ExperimentError if the teacher cannot be carried into the student.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "growth"))
    growth = config.growth
    try:
        if arm == "net2net":
            return net2net.transfer(
                teacher,
                student,
                images(2),
                generator=generator,
                noise=growth.noise,
                split=growth.split,
                calibrate=images(growth.calibrate) if growth.calibrate else None,
            )
        if arm == "random_pad":
            return net2net.random_pad(teacher, student, images(2), generator=generator)
    except net2net.TransferError as error:
        raise ExperimentError(str(error)) from error
    return None


def carry_optimizer_state(
    transfer: net2net.Transfer | None, teacher: nn.Module, network: nn.Module, state: dict[str, Any], config: Config
) -> dict[str, Any]:
    """Return the optimizer state with which a network starts if it inherits `state`, that of the teacher's optimizer.

    `transfer` says how the network was filled; None: it is the teacher itself, trained longer.
    """
    old, new, grown = (make_optimizer(one, config.schedule) for one in (teacher, network, network))
    old.load_state_dict(state)
    if transfer is None:
        return old.state_dict()
    transfer.optimizer_state(old, grown)
    # `grown` now has the teacher's parameter groups; ours also hold the parameters of new layers.
    new.state.update(grown.state)
    return new.state_dict()
