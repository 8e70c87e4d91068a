"""Norms that are written by hand: recognised by what they compute, from the mean to the weight and the bias.

A statistic is followed step by step: the mean of an activation, the activation without it, its squares, their mean, an
eps, the root. Where the same activation is divided by that root, the result is that of a norm across units.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..facts import NO_NORM, Call, Key, Labels, Layer, LayerKind, Norm, NormKind, Statistic, Step
from ..graph import Trace

SAME = frozenset(
    ["float", "double", "half", "bfloat16", "to", "type", "type_as", "detach", "clone", "contiguous", "identity"]
)
_ROLES = {"mul": "weight", "add": "bias"}


def reduced(trace: Trace, call: Call, key: Key, x: Tensor, divisor: float) -> Statistic | None:
    """Return the statistic that a reduction over units gives, whose sum is divided by `divisor`."""
    before = _statistic(trace, x)
    known: dict[str, Any] = {"key": key, "divisor": divisor}
    if call.plain in ("mean", "sum") and before is not None and before.step == Step.SQUARE:
        return replace(before, step=Step.VARIANCE, **known)
    if call.plain in ("var", "std"):
        return Statistic(x, Step.VARIANCE if call.plain == "var" else Step.DEVIATION, centred=True, **known)
    if "norm" in call.plain:
        centred = before is not None and before.step == Step.CENTRED
        return Statistic(x, Step.DEVIATION, centred=centred, mean=before.key if before and centred else None, **known)
    return Statistic(x, Step.MEAN, key) if call.plain == "mean" else None


def followed(trace: Trace, call: Call, operands: Sequence[Tensor]) -> Statistic | None:
    """Return the statistic that an elementwise call makes of its operands; a finished norm is at the step `NORMED`."""
    name, first = call.plain, _statistic(trace, operands[0])
    number = number_in(call)
    if name in SAME or (name in ("mul", "div") and number and first is not None and first.step == Step.NORMED):
        return first
    if call.name == "__rpow__":
        return None
    if (name == "pow" and number == 2) or name == "square" or (name == "mul" and _is_twice(call)):
        centred = first is not None and first.step == Step.CENTRED
        return Statistic(operands[0], Step.SQUARE, centred=centred, mean=first.key if first and centred else None)
    if len(operands) == 1 and first is not None:
        return _rooted(trace, call, first, number)
    if len(operands) != 2 or not all(map(trace.is_activation, operands)):
        return None
    a, b = operands
    other = _statistic(trace, b)
    if name == "sub" and other is not None and other.step == Step.MEAN and _is_same(a, other.of):
        return Statistic(a, Step.CENTRED, other.key)
    if name == "mul" and first is not None and first.step == Step.INVERSE:
        a, other = b, first
    is_norm = other is not None and other.step == {"mul": Step.INVERSE, "div": Step.DEVIATION}.get(name)
    return _norm(trace, call, a, other) if other is not None and is_norm else None


def _statistic(trace: Trace, x: Tensor) -> Statistic | None:
    labels = trace.labels(x) if trace.is_activation(x) else None
    return None if labels is None else labels.statistic


def number_in(call: Call) -> float | None:
    """Return the one number among a call's arguments."""
    numbers = [x for x in (*call.args, *call.kwargs.values()) if type(x) in (int, float)]
    return numbers[0] if len(numbers) == 1 else None


def _is_twice(call: Call) -> bool:
    return len(call.args) == 2 and call.args[0] is call.args[1]


def _rooted(trace: Trace, call: Call, before: Statistic, number: float | None) -> Statistic | None:
    """Return the statistic after one more step: an eps is added, a root is taken, or a number divides it."""
    name, step = call.plain, before.step
    inverts = name == "reciprocal" or (name == "pow" and number == -1) or (call.name == "__rtruediv__" and number == 1)
    if step == Step.DEVIATION and inverts:
        return replace(before, step=Step.INVERSE)
    if name == "add" and number is not None and not before.eps and step in (Step.VARIANCE, Step.DEVIATION):
        return replace(before, eps=number, eps_at=take_eps(trace, call, number), outside=step == Step.DEVIATION)
    if step in (Step.VARIANCE, Step.DEVIATION) and name in ("mul", "div") and number and not before.eps:
        by = (number if name == "div" else 1 / number) ** (1 if step == Step.VARIANCE else 2)
        divisor = before.divisor * by
        is_whole = abs(divisor - round(divisor)) < 1e-9 * divisor  # a root that is squared again is rounded
        return replace(before, divisor=round(divisor) if is_whole else divisor) if call.name != "__rtruediv__" else None
    if name in ("clamp_min", "clamp") and step == Step.DEVIATION and number is not None and not before.eps:
        return replace(before, eps=number, eps_at=take_eps(trace, call, number), outside=True)
    if step == Step.VARIANCE and (name == "sqrt" or (name == "pow" and number == 0.5)):
        return replace(before, step=Step.DEVIATION)
    if step == Step.VARIANCE and (name == "rsqrt" or (name == "pow" and number == -0.5)):
        return replace(before, step=Step.INVERSE)
    return None


def take_eps(trace: Trace, call: Call, eps: float | None) -> str | None:
    """Return the place where the eps that a norm takes in this call can be set, which is then no other use of it."""
    module = trace.model.get_submodule(call.module)
    place = call.module if isinstance(module, nn.RMSNorm) and module.eps is None else trace.eps_place(eps)
    trace.eps_uses[place] -= 1
    return place


def _is_same(x: Tensor, of: Tensor) -> bool:
    """Tell whether two activations hold the same numbers, perhaps in other types."""
    return x is of or (x.shape == of.shape and (x.is_meta or torch.equal(x.to(of.dtype), of)))


def _norm(trace: Trace, call: Call, x: Tensor, by: Statistic) -> Statistic | None:
    """Record the norm across units that divides `x` by a statistic of itself."""
    own, weight = _statistic(trace, x), None
    if own is not None and own.step == Step.SCALED:
        x, weight = own.of, own.weight
        own = _statistic(trace, x)
    is_centred = own is not None and own.step == Step.CENTRED
    mean = own.key if own is not None and is_centred else None
    same = _is_same(x, by.of) or (own is not None and is_centred and by.mean is None and _is_same(own.of, by.of))
    at = [k for k, norm in enumerate(trace.norms) if norm.key == by.key]
    if not same or is_centred != by.centred or by.key is None or len(at) != 1:
        return None
    labels = trace.labels(own.of if own is not None and is_centred else x)
    rows, key = trace.norms[at[0]].units, by.key
    if labels is None:
        return None
    once = all(len(torch.unique(row)) == len(row) for row in rows)
    kind = NormKind.LAYER if is_centred else NormKind.RMS
    padded = labels.linear and once if is_centred else not labels.lifted_by
    first = NO_NORM if labels.linear else labels.first_norm
    known = (by.eps, call.module, padded, str(key), first, by.eps_at, by.outside, by.divisor)
    trace.norms[at[0]] = Norm(key, kind, rows, {}, *known, bent_by=labels.bent_by if is_centred else labels.lifted_by)
    trace.norms = [norm for norm in trace.norms if norm.key not in {mean, by.mean}]
    state = {"normed_by": labels.normed_by, "key": key}
    known = (labels.sources, labels.norms_since, {"across": True})
    trace.norm_calls.append((str(key), labels.ways))
    trace.add(Layer(LayerKind.NORM, str(key), {}, rows.reshape(-1), *known, **state))
    normed = Statistic(x, Step.NORMED, key)
    return normed if weight is None else _attach(trace, normed, "weight", weight)


def add_affine(trace: Trace, call: Call, parameter: Tensor, labels: Labels) -> Statistic | None:
    """Let a parameter that meets a norm's bare result be its weight or bias; return the statistic of the result."""
    before, role = labels.statistic, _ROLES.get(call.plain)
    if before is not None and before.step == Step.NORMED and role is not None:
        return _attach(trace, before, role, parameter)
    x = next(x for x in call.tensors if x is not parameter)
    return Statistic(x, Step.SCALED, weight=parameter) if call.plain == "mul" else None


def _attach(trace: Trace, before: Statistic, role: str, parameter: Tensor) -> Statistic | None:
    """Let a parameter be the weight or bias of a norm that was recorded without one."""
    name, view = trace.parameters.owner_of(parameter), trace.parameters.view(parameter)
    if name is None or view is None:
        return None
    at = [k for k, norm in enumerate(trace.norms) if norm.key == before.key]
    whole = parameter.numel() == trace.parameters.tensors[name].numel() and view.gain == 1.0
    if len(at) != 1 or not whole or role in trace.norms[at[0]].tensors or "bias" in trace.norms[at[0]].tensors:
        return None
    norm = trace.norms[at[0]]
    if view.offset and role == "bias":
        return None
    layer = trace.layers.pop(norm.name)
    if role == "bias":
        trace.layers.pop(name, None)
    tensors = norm.tensors | {role: name}
    new = next(iter(tensors.values()))
    trace.norms[at[0]] = replace(norm, tensors=tensors, name=new, offset=norm.offset + view.offset)
    trace.add(replace(layer, name=new, tensors=tensors, key=None))
    return before


def result_of_norm(trace: Trace, statistic: Statistic | None) -> dict[str, Any]:
    """Return the fields of `Labels` that name the norm, if the statistic is a norm's result; else no fields."""
    if statistic is None or statistic.step != Step.NORMED:
        return {}
    name = next(norm.name for norm in trace.norms if norm.key == statistic.key)
    return {"after_norm": name, "first_norm": name, "normed_by": frozenset({name})}
