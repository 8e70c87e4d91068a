"""Fill layers that the teacher lacks: as identities, with zeros, or as norms that undo themselves (section 3.4)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..record import Fill, Origin
from .shares import rotate, scale_rows, shares


def fill_new(
    target: Tensor,
    origin: Origin,
    tensors: Mapping[str, Tensor],
    generator: torch.Generator | None = None,
    split: str = "equal",
) -> None:
    """Fill a tensor that the teacher lacks, in place; `tensors` are all of the student's (statistics of its norms)."""
    if origin.fill == Fill.ZERO:
        target.zero_()
    elif origin.fill == Fill.ONE:
        target.fill_(1.0)
    elif origin.fill == Fill.MEAN:
        target.copy_(tensors[origin.of[0]])
    elif origin.fill == Fill.DEVIATION:
        target.copy_((tensors[origin.of[0]].double() + origin.of[1]).sqrt())
    elif origin.fill == Fill.TAP:
        target.zero_()[_centre(target)] = 1.0
        target.copy_(scale_rows(target, origin, target))
    elif origin.fill == Fill.PASS:
        weight = pass_through(origin, target)
        weight = weight * shares(origin.axes[1], weight, 1, generator, split) * origin.factor
        weight = scale_rows(weight, origin, weight)
        target.copy_(weight if origin.turn is None else rotate(weight, 0, origin.turn))


def pass_through(origin: Origin, target: Tensor) -> Tensor:
    """Return the weight of a layer that hands on its units, before shares, in the shape and type of `target`."""
    # It is 1 at the centre tap where the unit read is the unit produced. Units that the teacher lacks are read with 0.
    produced, read = origin.axes[0].index, origin.axes[1]
    rows = read.index.reshape(read.groups, -1).repeat_interleave(len(produced) // read.groups, 0)
    same = (produced[:, None] == rows) & (rows >= 0)
    weight = torch.zeros_like(target)
    weight[_centre(target)] = same.to(weight)
    return weight


def _centre(weight: Tensor) -> tuple[int | slice, ...]:
    """Return the index of the centre tap of every kernel."""
    return (slice(None), slice(None), *(taps // 2 for taps in weight.shape[2:]))
