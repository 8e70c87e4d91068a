"""Divide the outgoing weights of a unit among its copies: equally, unevenly, or with noise that cancels."""

import torch
from torch import Tensor

from ..record import Axis, Origin


def entrywise(axis: Axis, value: Tensor, dim: int, entries: Tensor) -> Tensor:
    """Return one number for each entry of an axis, in a shape that broadcasts against `value`."""
    entries = entries.to(value.device)
    if axis.groups > 1 and dim == 1:
        entries = entries.reshape(axis.groups, -1).repeat_interleave(value.shape[0] // axis.groups, 0)
        return entries.reshape(*entries.shape, *[1] * (value.dim() - 2))
    return entries.reshape([-1 if d == dim else 1 for d in range(value.dim())])


def share_out(axis: Axis, value: Tensor, dim: int, generator: torch.Generator, split: str, source: Tensor) -> Tensor:
    """Divide the weights of every unit among its copies, along an axis that reads them."""
    if not axis.copies:
        return value
    value = multiply(value, shares(axis, value, dim, generator, split), source)
    if split != "paired" or axis.signed:
        return value
    spread = value.std()
    if axis.groups == 1:
        return _add_paired_noise(value, axis.index, axis.share, dim, generator, spread)
    # Each group for itself: its rows, or its part of the axis that a transposed convolution reads.
    index, share = axis.index.reshape(axis.groups, -1), axis.share.reshape(axis.groups, -1)
    groups = zip(value.chunk(axis.groups, 0), index, share, strict=True)
    return torch.cat([_add_paired_noise(part, i, s, dim, generator, spread) for part, i, s in groups], 0)


def shares(axis: Axis, value: Tensor, dim: int, generator: torch.Generator | None, split: str) -> Tensor:
    """Return the part of the teacher's outgoing weight that each copy takes; those of one entry add up to one."""
    # Uneven ones differ from one reading unit to the next: a factor common to all readers of a copy would only scale
    # its gradient, which RMSProp and Adam undo.
    if split != "uneven" or not axis.copies or axis.signed:
        return entrywise(axis, value, dim, axis.share).to(value)
    other = 1 - dim if value.dim() > 1 else dim  # the axis that produces
    inside = axis.groups > 1 and dim == 1
    rows, size = value.shape[other], value.shape[dim]
    part = 0.5 + torch.rand(rows, size, generator=generator, dtype=torch.double)  # none is thrice as large as another
    index = axis.index.reshape(axis.groups, -1).repeat_interleave(rows // axis.groups, 0) if inside else axis.index
    index = index.expand(rows, size)
    if axis.groups > 1 and not inside:  # copies share with those of their own group
        index = index + torch.arange(axis.groups).repeat_interleave(size // axis.groups) * (int(index.max()) + 1)
    part, index = part * (index >= 0), index.clamp(min=0)
    whole = torch.zeros(rows, int(index.max()) + 1, dtype=torch.double).scatter_add_(1, index, part)
    share = part / whole.gather(1, index).clamp(min=torch.finfo(torch.double).tiny)
    shape = [1] * value.dim()
    shape[other], shape[dim] = rows, size
    return (share if other < dim else share.T).reshape(shape).to(value)


def _add_paired_noise(
    value: Tensor, index: Tensor, share: Tensor, dim: int, generator: torch.Generator, spread: Tensor
) -> Tensor:
    """Add noise that the copies of a unit cancel among themselves, half as large as the weights."""
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    known = (index >= 0).reshape(shape).to(value)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.double).to(value) * spread / 2 * known
    index = index.clamp(min=0).to(value.device)
    size = [int(index.max()) + 1 if d == dim else n for d, n in enumerate(value.shape)]
    total = torch.zeros(size, dtype=value.dtype, device=value.device).index_add_(dim, index, noise)
    mean = total.index_select(dim, index) * share.reshape(shape).to(value)
    return value + (noise - mean) * known


def scale_rows(value: Tensor, origin: Origin, source: Tensor) -> Tensor:
    """Multiply each entry of the first axis by its number in `origin.rows`, if there are any."""
    if origin.rows is None:
        return value
    return multiply(value, origin.rows.to(value).reshape(-1, *[1] * (value.dim() - 1)), source)


def multiply(value: Tensor, factor: Tensor | float, source: Tensor) -> Tensor:
    """Return the product. It is made in place unless that would write to `source`."""
    return value * factor if value.data_ptr() == source.data_ptr() else value.mul_(factor)


def rotate(value: Tensor, dim: int, seed: int) -> Tensor:
    """Rotate the units of one axis at random. The same seed gives the same rotation, so that the reader undoes it."""
    drawn = torch.randn(2 * (value.shape[dim],), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    rotation = torch.linalg.qr(drawn).Q.to(value)
    return (value.movedim(dim, -1) @ rotation.T).movedim(-1, dim)
