"""Gradients and optimizer state along the record of a growth.

Gradients are dual to weights. Along an axis that produces units, a copy's gradient is the teacher's times the copy's
share of the outgoing weight; along an axis that reads them, it is the teacher's own. Momentum is a sum of gradients and
is carried like one, a second moment like their square.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import TransferError
from .fill.gather import entrywise, gather
from .network import unwrap
from .record import NEW, How, Origin, Record
from .tensors import merge_groups, named_tensors

FIRST_MOMENTS = {"momentum_buffer", "exp_avg", "grad_avg"}
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def gradients(record: Record, theirs: Mapping[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """Predict the gradients of the student's parameters from the teacher's, on the same loss and inputs.

    They are exact where every copy takes an equal share (`split="equal"`) and each unit of a larger one is copied as
    often as the others; with uneven shares they are right on average.

    Args:
        record: of the growth.
        theirs: the teacher's gradients by the names of its parameters, each in the shape of its parameter.
        student: the grown network.

    Returns:
        Gradients by name, each in the shape of its parameter, without new layers. They are NaN where they do not follow
        from the teacher's: in new entries, padding, rotated streams, and the outer taps of larger kernels.

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


def _carry(source: Tensor, target: Tensor, origin: Origin, power: int) -> Tensor:
    """Carry a gradient, or the `power`-th moment of one, to the shape of `target`; NaN where it does not follow."""
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
        if not axis.reads:
            value = value * entrywise(axis, value, dim, axis.share).to(value) ** power
    value = value / origin.factor**power
    if origin.rows is not None:
        value = value / origin.rows.to(value).reshape(-1, *[1] * (value.dim() - 1)) ** power
    return value.reshape(shape)


def optimizer_state(record: Record, old: Optimizer, new: Optimizer, teacher: nn.Module, student: nn.Module) -> None:
    """Carry the state of the teacher's optimizer into the student's, in place.

    Afterwards `new` has the parameter groups of `old`, with their learning rates, decay and whatever else they hold.
    The student's parameters stand in the teacher's places, and new layers in the first group. Every parameter that the
    teacher has, too, has its step count and its moments; entries without a teacher's start at zero.

    Args:
        record: of the growth.
        old: trained the parameters of `teacher`: SGD, Adam, AdamW, NAdam, RMSprop or Adagrad.
        new: will train those of `student`; of the same class.
        teacher: the network that was grown.
        student: the grown network.

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
    names = {id(parameter): name for name, parameter in theirs.items()}
    held = {id(parameter) for group in new.param_groups for parameter in group["params"]}
    if any(id(p) not in names for group in old.param_groups for p in group["params"]):
        raise TransferError("The old optimizer holds parameters that are not the teacher's.")
    if held - {id(parameter) for parameter in mine.values()}:
        raise TransferError("The new optimizer holds parameters that are not the student's.")
    counterpart = {name: record.origins[name].teacher for name in mine if name in record.origins}
    counterpart |= {name: name for name in mine if ".parametrizations." in name and name in theirs}
    states = {}
    for name, parameter in mine.items():
        source = counterpart.get(name)
        if name in record.origins and source in theirs and theirs[source] in old.state:
            state = old.state[theirs[source]]
            states[name] = _carry_state(state, parameter, theirs[source], record.origins[name], type(old))
    groups = []
    for group in old.param_groups:
        inside = {names[id(p)] for p in group["params"]}
        params = [p for name, p in mine.items() if counterpart.get(name) in inside and id(p) in held]
        own = copy.deepcopy({key: value for key, value in group.items() if key != "params"})  # a rate may be a tensor
        groups.append({**own, "params": params})
    placed = {id(p) for group in groups for p in group["params"]}
    groups[0]["params"] += [p for p in mine.values() if id(p) in held and id(p) not in placed]
    new.param_groups[:] = groups
    new.state.clear()
    new.state.update({mine[name]: state for name, state in states.items()})


def _carry_state(state: Mapping, parameter: Tensor, source: Tensor, origin: Origin, kind: type) -> dict:
    carried = {}
    for key, value in state.items():
        power = 1 if key in FIRST_MOMENTS else 2 if key in SECOND_MOMENTS else None
        if key == "momentum_buffer" and issubclass(kind, torch.optim.RMSprop):
            power = 0  # it sums gradients that are divided by their size
        if not isinstance(value, Tensor) or (value.dim() == 0 and power is None):
            carried[key] = value.clone() if isinstance(value, Tensor) else value
        elif power is not None and value.shape == source.shape:
            carried[key] = torch.nan_to_num(_carry(value, parameter, origin, power).to(value.dtype), nan=0.0)
        else:
            raise TransferError(f"It is not known how {key!r} in the state of {kind.__name__} follows the gradient.")
    return carried
