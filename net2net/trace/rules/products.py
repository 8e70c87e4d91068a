"""Matrix products: layers, where one factor is a parameter, and contractions of two activations."""

import torch
from torch import Tensor

from ..facts import Call, Contraction, Labels
from ..graph import Trace
from .layers import Product, apply_layer
from .registry import CannotFollow, rule


@rule("matmul")
def matmul(trace: Trace, call: Call) -> None:
    """A layer, if one factor is a parameter; else a contraction of two activations."""
    a, b = call.args[0], call.arg(1, "other", call.kwargs.get("mat2"))
    if _is_weight(trace, b):
        return apply_layer(trace, call, Product(a, -1, b, reads=0, produces=1))
    if _is_weight(trace, a) and b.dim() > 1:
        return apply_layer(trace, call, Product(b, -2, a))
    if not (a.dim() > 1 and b.dim() > 1) or not (trace.follows(a) or trace.follows(b)):
        raise CannotFollow(f"{call} multiplies vectors")
    left, right = trace.labels(a), trace.labels(b)
    if left is None or right is None:
        return _multiply_by_constant(trace, call, left, right)
    _contract(trace, call, left, right)


def _is_weight(trace: Trace, factor: Tensor) -> bool:
    return factor.dim() == 2 and not trace.is_activation(factor) and trace.parameters.weight(factor) is not None


def _multiply_by_constant(trace: Trace, call: Call, left: Labels | None, right: Labels | None) -> None:
    """A constant matrix has one size in both networks."""
    labels, dim = (left, -1) if left is not None else (right, -2)
    assert labels is not None
    units = trace.units.tie_along(labels.units, [labels.units.dim() + dim], f"{call} multiplies it with a constant")
    shape = call.out.shape
    trace.label(call.out, Labels.of(units.broadcast_to((*shape[:-2], *units.shape[-2:])).expand(shape), labels))


def _contract(trace: Trace, call: Call, left: Labels, right: Labels) -> None:
    """Sum over the last axis of `left` and the last but one of `right`: positions, or units that meet in pairs."""
    shape, gain = call.out.shape, left.gain * right.gain
    one, two = trace.units.drop_repeats(left.units), trace.units.drop_repeats(right.units)
    key = trace.units.key("contraction", call.module)
    as_grouped = key in trace.seen_as.as_grouped
    sums_units = [one.shape[-1] > 1 or as_grouped, two.shape[-2] > 1 or as_grouped]
    why = f"{call} sums products over them"
    one = trace.units.tie_along(one, [one.dim() - 1], why)
    two = trace.units.tie_along(two, [two.dim() - 2], why)
    if not any(sums_units):
        units = trace.units.combine(one.expand(shape), two.expand(shape), call)
        return trace.label(call.out, Labels.of(units, left, right, gain=gain))
    one, two = torch.broadcast_tensors(one, two)
    trace.units.unite(one, two, contraction=True)
    if all(sums_units):
        trace.contractions.append(Contraction(key, torch.unique(trace.units.drop_repeats(left.units))))
    _, numbers = torch.unique(trace.units.find(one), return_inverse=True)
    units = trace.units.fresh(int(numbers.max()) + 1)[numbers]  # heads: labels of their own, of neither factor
    trace.units.unite(units, one, contraction=True)
    trace.label(call.out, Labels.of(units.expand(shape), left, right, gain=gain))
