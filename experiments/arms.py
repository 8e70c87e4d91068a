"""The arms: ways to fill one student. They share network, loop, schedule and data order; only the weights differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import net2net

from .config import CONTINUED as CONTINUED
from .config import TEACHER, Config, ExperimentError
from .models import build
from .optimizers import make_optimizer
from .randomness import derive_seed


def fresh(config: Config, student: str | None, classes: int, channels: int) -> nn.Module:
    """A network as its constructor draws it: the teacher's (None) or a student's, the same for all arms of a seed."""
    spec = config.model | (config.teacher if student is None else config.students[student])
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "initialisation", student or TEACHER))
        return build(spec, classes, channels)


def fill(
    arm: str, teacher: nn.Module, student: nn.Module, config: Config, images: Callable[[int], Tensor]
) -> net2net.Transfer | None:
    """Fill `student` in place as `arm` says; return the record of the transfer, None if nothing was transferred.

    `images(n)` gives n training images, for the example and the calibration.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "growth"))
    try:
        if arm == "net2net":
            return net2net.transfer(
                teacher,
                student,
                images(2),
                generator=generator,
                noise=config.growth.noise,
                split=config.growth.split,
                calibrate=images(config.growth.calibrate) if config.growth.calibrate else None,
            )
        if arm == "random_pad":
            return net2net.random_pad(teacher, student, images(2), generator=generator)
    except net2net.TransferError as error:
        raise ExperimentError(str(error)) from error
    return None


def carried(
    record: net2net.Transfer | None, teacher: nn.Module, network: nn.Module, state: dict[str, Any], config: Config
) -> dict[str, Any]:
    """The state that the optimizer of `network` starts with: the teacher's, where each weight has come from it.

    `record` says what came from where; without it, `network` is the teacher itself, trained on.
    """
    old, new = (make_optimizer(one, config.schedule) for one in (teacher, network))
    old.load_state_dict(state)
    if record is None:
        return old.state_dict()
    grown = make_optimizer(network, config.schedule)
    record.optimizer_state(old, grown)
    # It gives `grown` the teacher's groups; ours are by the kind of parameter, new layers' included.
    new.state.update(grown.state)
    return new.state_dict()
