"""Functions that mix positions or units: pooling, sums and means, softmax and sorting."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..activations import NOTHING, join_ranges
from ..facts import Call, Labels, Norm, NormKind, Step
from ..graph import Trace
from ..units import spread
from .by_hand import reduced
from .elementwise import pointwise
from .registry import CannotFollow, first_labels, names, rule, unknown

POOLS = names("max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool")


@rule(
    *(f"{pool}{d}d" for pool in POOLS for d in (1, 2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (1, 2, 3)),
    *names("interpolate upsample upsample_nearest upsample_bilinear"),
)
def channelwise(trace: Trace, call: Call) -> None:
    """Pooling, interpolation: positions are mixed, channels are not."""
    labels = first_labels(trace, call)
    name, rank = call.plain, call.results[0].dim()
    spatial = int(name.partition("pool")[2][0]) if "pool" in name else rank - 2
    dim = rank - spatial - 1
    units = trace.units.units_along(labels.units, dim, f"{call} mixes positions")
    is_average = "avg" in name
    state = {
        "gain": labels.gain,
        "linear": labels.linear and is_average,
        "after_norm": labels.after_norm,
        "passage": labels.passage if is_average else NOTHING,
        # A pool may pad its input with zeros.
        "range": join_ranges([labels.range, (0.0, 0.0)]) if "pool" in name and "lp" not in name else None,
    }
    for out in call.results:
        trace.label(out, Labels.of(spread(units, dim, out.shape), labels, **state))


REDUCTIONS = """
    mean sum amax amin max min prod var std var_mean std_mean norm linalg_norm linalg_vector_norm logsumexp all any
    argmax argmin nansum nanmean count_nonzero median nanmedian
"""
EVENLY = names("mean amax amin max min all any")  # stay the same if all units are copied equally often


@rule(*names(REDUCTIONS))
def reduction(trace: Trace, call: Call) -> None:
    """A mean or sum over positions keeps the units."""
    # A mean or an extreme over units is a new unit. It stays the same if all these units are copied equally often. Any
    # other reduction over units makes one unit of them, which moves as a whole.
    if any(isinstance(x, Tensor) for x in call.args[1:]):
        return pointwise(trace, call)  # such as the maximum of two tensors
    labels, name = first_labels(trace, call), call.plain
    rank, dims = labels.units.dim(), call.arg(2 if "norm" in name else 1, "dim")
    if dims is None or isinstance(dims, bool):  # `x.std(False)`
        dims = range(rank)
    dims = sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})
    count, statistic = len(trace.norms), None
    size = math.prod(call.args[0].shape[d] for d in dims)
    divisor = size if name in EVENLY else _divisor(trace, call, size)
    if name == "sum" and (read := _weighted_sum(trace, call, labels, dims)) is not None:
        units = read
    elif divisor is not None:
        units = _reduce_units(trace, call, labels.units, dims)
        if len(trace.norms) > count:  # it is taken over units
            norm = trace.norms[-1] = replace(trace.norms[-1], divisor=divisor)
            statistic = reduced(trace, call, norm.key, call.args[0], norm.divisor)
    else:
        units = trace.units.tie_along(labels.units, dims, f"{call} mixes them")
    shape = [1 if d in dims else size for d, size in enumerate(labels.units.shape)]
    result = Labels.of(
        units, labels, statistic=statistic, range=labels.range if name in ("mean", "amax", "amin") else None
    )
    if name in ("mean", "sum"):
        result = replace(result, gain=labels.gain, linear=labels.linear, passage=labels.passage)
        result = replace(result, after_norm=labels.after_norm, first_norm=labels.first_norm)
    for out in call.results:
        trace.label(out, replace(result, units=units.expand(shape).reshape(out.shape)))


def _divisor(trace: Trace, call: Call, size: int) -> int | None:
    """Return the number that divides the sum of squares in a reduction over units; None for other reductions."""
    name, labels = call.plain, trace.labels(call.args[0])
    if name in ("var", "std"):
        first = call.arg(1, "dim")
        unbiased = first if isinstance(first, bool) else call.arg(2, "unbiased", True)
        return size - call.kwargs.get("correction", int(unbiased))
    if "norm" in name:
        return 1 if call.arg(1, "ord" if "linalg" in name else "p", 2) in (2, "fro", None) else None
    statistic = None if labels is None else labels.statistic
    return 1 if name == "sum" and statistic is not None and statistic.step == Step.SQUARE else None


def _reduce_units(trace: Trace, call: Call, units: Tensor, dims: Sequence[int]) -> Tensor:
    """Return a new unit for each set of units along `dims`; where all are one unit, that unit stays."""
    units = trace.units.drop_repeats(units)
    varying = [d for d in dims if units.shape[d] > 1]
    if not varying:
        return units
    shape = [1 if d in varying else size for d, size in enumerate(units.shape)]
    rows = units.movedim(varying, list(range(-len(varying), 0))).flatten(-len(varying)).reshape(math.prod(shape), -1)
    rows, which = torch.unique(trace.units.find(rows), dim=0, return_inverse=True)  # several positions have the same
    key = trace.units.key("across", call.module)
    kind = NormKind.EXTREME if call.plain in EVENLY - {"mean"} else NormKind.MEAN
    trace.norms.append(Norm(key, kind, rows, {}, 0.0, call.module))
    results = trace.units.fresh(len(rows), key)
    if len(rows) > 1:
        trace.units.relate(key, rows, results[:, None].expand_as(rows))
    return results[which].reshape(shape)


def _weighted_sum(trace: Trace, call: Call, labels: Labels, dims: Sequence[int]) -> Tensor | None:
    """Return a new unit for each sum of units times a parameter's entries, which reads them; None for another sum."""
    before, rank = labels.statistic, labels.units.dim()
    weight = before.weight if before is not None and before.step == Step.SCALED else None
    if weight is None or list(dims) != list(range(rank - len(dims), rank)):
        return None
    name, view = trace.parameters.owner_of(weight) or "", trace.parameters.view(weight)
    units = trace.units.drop_repeats(labels.units)
    own = trace.parameters.values.get(name, units[:0])
    whole = weight.numel() == own.numel() and view is not None and trace.parameters.weight(weight) is not None
    if not whole or not torch.equal(trace.units.find(units).flatten(), trace.units.find(own).flatten()):
        return None
    rows = units.reshape(-1, math.prod(units.shape[d] for d in dims))
    if any(len(torch.unique(trace.units.find(row))) < len(row) for row in rows):
        return None
    trace.parameters.summed[name] = len(rows)
    key = trace.units.key("weighted sum", call.module)
    results = trace.units.fresh(len(rows), key)
    if len(rows) > 1:
        trace.units.relate(key, rows, results[:, None].expand_as(rows))
    return results.reshape([1 if d in dims else size for d, size in enumerate(units.shape)])


@rule(*(f"fft_{way}{kind}fft{rank}" for way in ("", "i") for kind in ("", "r", "h") for rank in ("", "2", "n")))
def transform(trace: Trace, call: Call) -> None:
    """A Fourier transform along positions keeps the units."""
    labels, rank = first_labels(trace, call), call.args[0].dim()
    dims = call.arg(2, "dim", {"2": (-2, -1), "n": tuple(range(rank))}.get(call.name[-1], -1))
    dims = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    units = trace.units.drop_repeats(labels.units)
    if any(units.shape[d] > 1 for d in dims) and max(units.narrow(dims[0], 0, 1).shape) == 1:
        unknown(trace, call)
    units = trace.units.tie_along(units, dims, f"{call} mixes them")
    trace.label(call.out, Labels.of(units.expand(call.out.shape), labels, gain=labels.gain))


@rule(*names("softmax log_softmax softmin cumsum cumprod logcumsumexp cummax cummin sort argsort topk"))
def lengthwise(trace: Trace, call: Call) -> None:
    """A function along an axis, such as softmax: along positions it keeps the units, units along it move as a whole."""
    labels = first_labels(trace, call)
    name = call.plain
    default = -1 if name in ("sort", "argsort", "topk") else None
    dim = call.arg(2 if name == "topk" else 1, "dim", default)
    if not isinstance(dim, int):
        raise CannotFollow(f"{call} mixes elements along an axis that it does not name")
    units = trace.units.tie_along(labels.units, [dim], f"{call} mixes them")
    if "softm" in call.name:
        key = trace.units.key("softmax", call.module)
        trace.softmax_gains[key] = (labels.gain, labels.sources, torch.unique(units))
    for out in call.results:
        trace.label(out, Labels.of(units.expand(out.shape), labels))
