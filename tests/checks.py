"""How the tests compare networks, refuse students, and spoil records for negative controls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images
from torch import Tensor, nn

from net2net import Axis, Origin, Transfer, TransferError, equivalence, replay, transfer
from net2net.testing import look_trained

BAR = 1e-12  # relative, in float64: rounding, and nothing else


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Return whether every tensor still has the values in `before`, to the last bit."""
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def modes(*models: nn.Module) -> list[bool]:
    """Whether each module is in train mode."""
    return [module.training for model in models for module in model.modules()]


def every_eps(*models: nn.Module) -> list[float | None]:
    """The eps of each module that has one."""
    return [module.eps for model in models for module in model.modules() if hasattr(module, "eps")]


def assert_same(a: nn.Module, b: nn.Module, inputs: Any, modes: Sequence[str] = ("eval",), bar: float = BAR) -> None:
    """The two compute the same on these inputs, in these modes."""
    for mode in modes:
        measured = equivalence(a, b, inputs, mode=mode)
        assert measured.max_relative <= bar, (mode, str(measured))


def trained(*models: nn.Module) -> tuple[nn.Module, ...]:
    """The models, made to look trained, each in another way."""
    return tuple(look_trained(model, seed=1 + k) for k, model in enumerate(models))


def grow(
    teacher: nn.Module, student: nn.Module, inputs: Tensor | None = None, modes: Sequence[str] = ("eval",), **options
) -> Transfer:
    """Make both look trained, transfer on the first two inputs, compare on all, and return the record."""
    inputs = images() if inputs is None else inputs
    record = transfer(*trained(teacher, student), inputs[:2], **{"split": "equal"} | options)
    assert_same(teacher, student, inputs, modes)
    return record


@contextmanager
def refused(message: str | None, *models: nn.Module) -> Iterator[None]:
    """Expect a TransferError (with this message) that leaves every tensor and every eps of the models as it was."""
    before, eps = [state(model) for model in models], every_eps(*models)
    with pytest.raises(TransferError, match=message):
        yield
    assert all(map(unchanged, models, before)) and every_eps(*models) == eps


# -- negative controls: what a spoilt record makes of the student ------------------------------------------------------


def error(record: Transfer, teacher: nn.Module, student: nn.Module, inputs: Tensor | None = None) -> float:
    """The relative difference after a replay of the record on the student."""
    replay(record, teacher, student)
    return equivalence(teacher, student, images() if inputs is None else inputs).max_relative


def change(record: Transfer, how: Callable[[Origin], Origin]) -> Transfer:
    """The record with every origin as `how` makes it. At least one must change."""
    origins = {name: how(origin) for name, origin in record.origins.items()}
    assert any(origins[name] is not origin for name, origin in record.origins.items())
    return replace(record, origins=origins)


def change_axes(record: Transfer, how: Callable[[Axis], Axis]) -> Transfer:
    """The same, axis by axis."""

    def each(origin: Origin) -> Origin:
        axes = {dim: how(axis) for dim, axis in origin.axes.items()}
        return replace(origin, axes=axes) if any(axes[dim] is not axis for dim, axis in origin.axes.items()) else origin

    return change(record, each)


def refill(record: Transfer, old: str, new: str) -> Transfer:
    """The record with new tensors filled in another way."""
    return change(record, lambda origin: replace(origin, fill=new) if origin.fill == old else origin)


def drop_shares(axis: Axis) -> Axis:
    """The axis, with every copy taking the whole of the teacher's weight."""
    return replace(axis, share=torch.ones_like(axis.share)) if axis.reads and axis.copies else axis


def shift_index(axis: Axis) -> Axis:
    """The axis that reads copies, with every entry taken from the teacher's entry of its neighbour."""
    return replace(axis, index=axis.index.roll(1)) if axis.reads and axis.copies else axis
