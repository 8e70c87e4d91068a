"""Gradients and optimizer state along the record of a growth.

Gradients are dual to weights. Along an axis that produces units, a copy's gradient is the teacher's times the copy's
share of the outgoing weight; along an axis that reads them, it is the teacher's own. Momentum is a sum of gradients and
is carried like one, a second moment like their square.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import TransferError
from .fill.gather import entrywise, gather, row_factors
from .network import unwrap
from .record import NEW, How, Origin, Record
from .tensors import merge_groups, named_tensors

FIRST_MOMENTS = {"momentum_buffer", "exp_avg", "grad_avg"}
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def gradients(record: Record, theirs: Mapping[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """Predict the gradients of the student's parameters from the teacher's, on the same loss and inputs.

    They are exact where every copy takes an equal share (`split="equal"`) and all units of one group or head are copied
    equally often. With uneven shares they are right on average.

    Args:
        record: of the growth.
        theirs: the teacher's gradients by the names of its parameters, each in the shape of its parameter.
        student: the grown network.

    Returns:
        Gradients by name, each in the shape of its parameter, without those of new layers. They are NaN where they do
        not follow from the teacher's: in new entries, padding, rotated streams, and the outer taps of larger kernels.

    Example:
        >>> teacher, student = nn.Linear(3, 4), nn.Linear(3, 4)
        >>> record = net2net.transfer(teacher, student, torch.randn(2, 3))
        >>> teacher(torch.ones(2, 3)).sum().backward()
        >>> predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    """
    predicted = {}
    for name, target in named_tensors(unwrap(student)).items():
        origin = record.origins.get(name)
        if origin is not None and origin.teacher is not None and origin.teacher in theirs:
            predicted[name] = _carry(theirs[origin.teacher], target, origin, 1)
    return predicted


def _carry(source: Tensor, target: Tensor, origin: Origin, power: int, first_only: bool = False) -> Tensor:
    """Carry a gradient, or the `power`-th moment of one, to the shape of `target`; NaN where it does not follow.

    With `first_only` it is zero in all but the first copy of each entry.
    """
    source = merge_groups(source, *origin.merged, between=float("nan"))
    unknown = torch.full_like(target, float("nan"), dtype=source.dtype)
    # A mean's gradient belongs to all that are averaged, and neither unit of a sign pair is the teacher's.
    averaged = any(axis.means and not axis.reads for axis in origin.axes.values())
    in_pairs = any(axis.reads and axis.signed for axis in origin.axes.values())
    if origin.tied or averaged or in_pairs or origin.turn is not None or origin.mixed:
        return unknown
    written = {dim: axis.index.clamp(min=NEW) for dim, axis in origin.axes.items()}
    axes = {dim: replace(origin.axes[dim], index=index, reads=False, means=()) for dim, index in written.items()}
    plain = Origin(How.SHARED, origin.teacher, axes, origin.flat)
    value = gather(source, unknown, plain, torch.Generator(), "equal")
    shape = value.shape
    value = value.reshape(-1) if origin.flat else value
    for dim, axis in origin.axes.items():
        if axis.reads and origin.flat and axis.groups > 1:  # sums of units, whose copies divide the gradient
            _, which, counts = torch.unique(axis.index, return_inverse=True, return_counts=True)
            value = value / (counts[which] * axis.share).clamp(min=1).to(value) ** power
        if not axis.reads:
            value = value * entrywise(axis, value, dim, axis.share).to(value) ** power
        if first_only:
            value = value * entrywise(axis, value, dim, axis.first).to(value)
    value = value / origin.factor**power
    if origin.rows is not None:
        value = value / row_factors(value, origin) ** power
    return value.reshape(shape)


def parameter_groups(record: Record, old: Optimizer, teacher: nn.Module, student: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of `old` for the student, each divided by where its parameters come from.

    A new optimizer is made from them, with other rates for what is grown or new if you like.

    Args:
        record: of the growth.
        old: the optimizer of `teacher`.
        teacher: the network that was grown.
        student: the grown network.

    Returns:
        Groups with the settings of the old ones and a further key, `origin`: "copied" for tensors of the teacher's
        shape, "grown" for larger ones, "new" for those of new layers. New ones are in the group that holds most tensors
        of their kind, weights or vectors (biases, norms). Parameters that `old` does not hold, or that need no
        gradient, are left out.

    Raises:
        TransferError: `old` holds parameters that are not the teacher's.

    Example:
        >>> teacher, student = nn.Linear(3, 4), nn.Linear(3, 4)
        >>> old = torch.optim.SGD(teacher.parameters(), lr=0.1)
        >>> groups = net2net.transfer(teacher, student, torch.randn(2, 3)).parameter_groups(old)
        >>> new = torch.optim.SGD([{**group, "lr": 0.05} for group in groups])
    """
    teacher, student = unwrap(teacher), unwrap(student)
    theirs = dict(teacher.named_parameters())
    names = _names_of(old, theirs, "The old optimizer holds parameters that are not the teacher's.")
    place = {name: index for index, group in enumerate(names) for name in group}
    counterpart = _find_counterparts(record, theirs, student)
    found: dict[tuple[int, str], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        source = counterpart.get(name)
        if source is None:
            alike = [sum((theirs[one].dim() > 1) == (parameter.dim() > 1) for one in group) for group in names]
            index, origin = alike.index(max(alike)), "new"
        else:
            index, origin = place.get(source), "copied" if theirs[source].shape == parameter.shape else "grown"
        if parameter.requires_grad and index is not None:
            found.setdefault((index, origin), []).append(parameter)
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in old.param_groups
    ]
    # A rate may be a tensor, which is not shared.
    return [
        {**copy.deepcopy(settings[index]), "origin": origin, "params": found[index, origin]}
        for index, origin in sorted(found)
    ]


def optimizer_state(
    record: Record,
    old: Optimizer,
    new: Optimizer,
    teacher: nn.Module,
    student: nn.Module,
    *,
    fresh_new: bool = False,
) -> None:
    """Carry the state of the teacher's optimizer into the student's, in place.

    `new` keeps its parameter groups, with the rates and the decay that you gave it. Every parameter in it that the
    teacher has, too, gets its step count and its moments; entries that copy none of the teacher's start at zero.

    Args:
        record: of the growth.
        old: trained the parameters of `teacher`: SGD, Adam, AdamW, NAdam, RMSprop, Adagrad or Muon.
        new: will train those of `student`; of the same class.
        teacher: the network that was grown.
        student: the grown network.
        fresh_new: whether the momentum of all but the first copy of a unit starts at zero, which lets copies part.
            Second moments are carried all the same: near zero they would make the first steps several times too long.

    Raises:
        TransferError: the optimizers are of different classes or hold the parameters of other networks, or the state
            has entries that are not known to follow the gradient.

    Example:
        >>> teacher, student = nn.Linear(3, 4), nn.Linear(3, 4)
        >>> old, new = torch.optim.Adam(teacher.parameters()), torch.optim.Adam(student.parameters())
        >>> net2net.transfer(teacher, student, torch.randn(2, 3)).optimizer_state(old, new)
    """
    if type(old) is not type(new):
        raise TransferError(f"The state of {type(old).__name__} means nothing to {type(new).__name__}: use one kind.")
    teacher, student = unwrap(teacher), unwrap(student)
    theirs, mine = dict(teacher.named_parameters()), dict(student.named_parameters())
    _names_of(old, theirs, "The old optimizer holds parameters that are not the teacher's.")
    held = _names_of(new, mine, "The new optimizer holds parameters that are not the student's.")
    counterpart = _find_counterparts(record, theirs, student)
    states = {}
    for name in (name for group in held for name in group if name in record.origins):
        source = theirs.get(counterpart.get(name, ""))
        if source is not None and source in old.state:
            carried = _carry_state(old.state[source], mine[name], source, record.origins[name], type(old), fresh_new)
            states[mine[name]] = carried
    new.state.clear()
    new.state.update(states)


def _names_of(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], refusal: str) -> list[list[str]]:
    """Return the names of the parameters in each group of the optimizer; TransferError if it holds others."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    if any("" in group for group in groups):
        raise TransferError(refusal)
    return groups


def _find_counterparts(record: Record, theirs: Mapping[str, nn.Parameter], student: nn.Module) -> dict[str, str]:
    """Return the name of the teacher's parameter that each of the student's comes from; those of new layers lack it."""
    found = {}
    for name, _ in student.named_parameters():
        source = record.origins[name].teacher if name in record.origins else None
        if ".parametrizations." in name and name in theirs:
            source = name
        if source in theirs:
            found[name] = source
    return found


def _carry_state(
    state: Mapping, parameter: Tensor, source: Tensor, origin: Origin, kind: type, fresh_new: bool
) -> dict:
    carried = {}
    for key, value in state.items():
        power = 1 if key in FIRST_MOMENTS else 2 if key in SECOND_MOMENTS else None
        if key == "momentum_buffer" and issubclass(kind, torch.optim.RMSprop):
            power = 0  # it sums gradients that are divided by their size
        if not isinstance(value, Tensor) or (value.dim() == 0 and power is None):
            carried[key] = value.clone() if isinstance(value, Tensor) else value
        elif power is not None and value.shape == source.shape:
            first_only = fresh_new and power < 2
            value = _carry(value, parameter, origin, power, first_only)
            carried[key] = torch.nan_to_num(value.to(state[key].dtype), nan=0.0)
        else:
            raise TransferError(f"It is not known how {key!r} in the state of {kind.__name__} follows the gradient.")
    return carried
