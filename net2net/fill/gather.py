"""Gather the entries of a student tensor from its teacher's."""

import torch
from torch import Tensor

from ..record import MEAN, NEW, ZERO, Axis, Origin
from .shares import entrywise, multiply, rotate, scale_rows, share_out


def gather(source: Tensor, target: Tensor, origin: Origin, generator: torch.Generator, split: str) -> Tensor:
    """Gather a teacher's tensor along every axis of units, and divide it along those that read."""
    # Entries without a teacher's are zero, a mean, or those of `target`. Where it can be, the result is made in
    # `target`: memory may not hold another copy of a large network's largest tensor.
    shape = target.shape
    if origin.flat:
        source, target = source.reshape(-1), target.reshape(-1)
    exact = target.dtype if not target.is_floating_point() else torch.promote_types(target.dtype, torch.float32)
    value = source = source.to(target.device, exact)
    own = zero = None  # masks: where the student's own value stays, and where zero comes
    keeps = any(bool((axis.index == NEW).any()) for axis in origin.axes.values())
    in_place = not (keeps or origin.flat or exact != target.dtype)
    last = max(origin.axes, default=-1)
    for dim, axis in origin.axes.items():
        value = _take(value, axis, dim, target if in_place and dim == last else None)
        missing = bool((axis.index < 0).any())
        if axis.reads:
            value = share_out(axis, value, dim, generator, split, source)
            if missing:
                value = multiply(value, entrywise(axis, value, dim, axis.index >= 0), source)
        elif missing:
            zero = _join(zero, axis, value, dim, axis.index == ZERO)
        if missing:
            own = _join(own, axis, value, dim, axis.index == NEW)
    if origin.factor != 1.0:
        value = multiply(value, origin.factor, source)
    value = scale_rows(value, origin, source)
    if origin.turn is not None:
        (reading,) = (dim for dim, axis in origin.axes.items() if axis.reads and dim < 2)
        value = rotate(value, reading, origin.turn)
    if zero is not None:
        value, own = multiply(value, ~zero, source), None if own is None else own & ~zero
    value = value.to(target.dtype)
    return (value if own is None else torch.where(own, target, value)).reshape(shape)


def _join(mask: Tensor | None, axis: Axis, value: Tensor, dim: int, entries: Tensor) -> Tensor | None:
    """Return the mask and the entries of one axis together; None stands for an empty mask."""
    if not bool(entries.any()):
        return mask
    entries = entrywise(axis, value, dim, entries)
    return entries if mask is None else mask | entries


def _take(value: Tensor, axis: Axis, dim: int, into: Tensor | None = None) -> Tensor:
    """Gather one axis, into `into` if that has the shape. Entries without a teacher's hold anything, or a mean."""
    index = axis.index.to(value.device).clamp(min=0)
    if axis.groups > 1 and dim == 1:  # one row of entries for each group
        rows = index.reshape(axis.groups, -1).repeat_interleave(value.shape[0] // axis.groups, 0)
        return torch.take_along_dim(value, rows.reshape(*rows.shape, *[1] * (value.dim() - 2)), 1)
    if torch.equal(axis.index, torch.arange(value.shape[dim])):
        return value
    shape = (*value.shape[:dim], len(index), *value.shape[dim + 1 :])
    fits = into is not None and into.shape == shape  # torch would resize it
    taken = torch.index_select(value, dim, index, out=into) if fits else value.index_select(dim, index)
    for entry in (axis.index <= MEAN).nonzero().flatten().tolist():
        among = axis.means[MEAN - int(axis.index[entry])].to(value.device)
        taken.select(dim, entry).copy_(value.index_select(dim, among).mean(dim))
    return taken
