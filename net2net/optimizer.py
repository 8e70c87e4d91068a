"""Optimizer state along the record of a transfer.

Gradients are dual to weights. Along an axis that produces units a copy's gradient is the teacher's times the copy's
share of the outgoing weight; along an axis that reads them it is the teacher's own. Momentum is a sum of
gradients and is carried like one, a second moment like their square.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import TransferError
from .fill.gather import entrywise, gathered
from .network import unwrap
from .record import NEW, Axis, How, Origin, Record
from .tensors import merge_groups, named_tensors

FIRST = {"momentum_buffer", "exp_avg", "grad_avg"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def gradients(record: Record, theirs: Mapping[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """What the gradient of every student parameter is, given the teacher's by name, on the same loss and inputs.

    Exact where every copy takes an equal share (`split="equal"`) and each unit of a larger one is copied as often as
    the others; with uneven shares, right on average. NaN where it does not follow from the teacher's: new layers, new
    entries, padding, mixtures, the outer taps of larger kernels.
    """
    made = {}
    for name, target in named_tensors(unwrap(student)).items():
        origin = record.origins.get(name)
        if origin is not None and origin.teacher is not None and origin.teacher in theirs:
            made[name] = _carried(theirs[origin.teacher], target, origin, 1)
    return made


def _carried(source: Tensor, target: Tensor, origin: Origin, power: int) -> Tensor:
    """A teacher's gradient, or the `power`-th moment of one, in the student's shape; NaN where it is not known."""
    source = merge_groups(source, *origin.merged, between=float("nan"))
    unknown = torch.full_like(target, float("nan"), dtype=source.dtype)
    padded = any(axis.means and not axis.reads for axis in origin.axes.values())  # the mean's gradient falls to all
    padded |= any(axis.reads and axis.signed for axis in origin.axes.values())  # no unit of a pair is the teacher's
    if origin.tied or padded or origin.turn is not None or origin.mixed:
        return unknown
    axes = {
        dim: Axis(_known(axis.index), axis.first, False, axis.share, axis.groups) for dim, axis in origin.axes.items()
    }
    plain = Origin(How.SHARED, origin.teacher, axes, origin.flat)
    value = gathered(source, unknown, plain, torch.Generator(), "equal")
    shape = value.shape
    value = value.reshape(-1) if origin.flat else value
    for dim, axis in origin.axes.items():
        if not axis.reads:
            value = value * entrywise(axis, value, dim, axis.share).to(value) ** power
    value = value / origin.factor**power
    if origin.rows is not None:
        value = value / origin.rows.to(value).reshape(-1, *[1] * (value.dim() - 1)) ** power
    return value.reshape(shape)


def _known(index: Tensor) -> Tensor:
    return index.clamp(min=NEW)


def optimizer_state(record: Record, old: Optimizer, new: Optimizer, teacher: nn.Module, student: nn.Module) -> None:
    """Carry the state of `old`, which trained `teacher`, into `new`, which will train `student`, both in place.

    Afterwards `new` has the parameter groups of `old` (learning rates, decay and whatever else they hold), with the
    student's parameters in their places and new layers in the first group; every parameter that the teacher has, too,
    has its step count and its moments; entries that no teacher entry stands for start at zero. For SGD, Adam, AdamW,
    NAdam, RMSprop and Adagrad.

    Raises TransferError if the optimizers are of different kinds or do not hold these networks' parameters, or if
    the state has entries that are not known to follow the gradient.
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
            states[name] = _state(old.state[theirs[source]], parameter, theirs[source], record.origins[name], type(old))
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


def _state(state: Mapping, parameter: Tensor, source: Tensor, origin: Origin, kind: type) -> dict:
    made = {}
    for key, value in state.items():
        power = 1 if key in FIRST else 2 if key in SECOND else None
        if key == "momentum_buffer" and issubclass(kind, torch.optim.RMSprop):
            power = 0  # it sums gradients that are divided by their size
        if not isinstance(value, Tensor) or (value.dim() == 0 and power is None):
            made[key] = value.clone() if isinstance(value, Tensor) else value
        elif power is not None and value.shape == source.shape:
            made[key] = torch.nan_to_num(_carried(value, parameter, origin, power).to(value.dtype), nan=0.0)
        else:
            raise TransferError(f"It is not known how {key!r} in the state of {kind.__name__} follows the gradient.")
    return made
