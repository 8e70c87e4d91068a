"""Gather the entries of a student tensor from its teacher's, and divide weights among the copies that are read."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..record import MEAN, NEW, ZERO, Axis, Origin

PIECE = 2**22  # numbers of a large tensor that are gathered at once


def pieces(source: Tensor, target: Tensor, origin: Origin, split: str) -> Iterator[tuple[Tensor, Tensor, Origin]]:
    """Divide a large tensor into parts that `gather` fills one after the other as it would fill all of it at once."""
    # Otherwise several copies of a large network's largest tensor would be in memory. The numbers that are drawn for
    # shares follow each other along the axis that produces units, so they are the same.
    dim = _dividing_axis(target, origin, split) if target.numel() > PIECE else None
    if dim is None:
        yield source, target, origin
        return
    axis, size = origin.axes.get(dim), target.shape[dim]
    produced = next((d for d, each in origin.axes.items() if not each.reads), 0)
    step = max(1, PIECE * size // target.numel())
    for start in range(0, size, step):
        part = slice(start, start + step)
        into = target.narrow(dim, start, min(step, size - start))
        if axis is None:
            yield source.narrow(dim, start, into.shape[dim]), into, origin
            continue
        index = axis.index[part]
        taken, places = index.clamp(min=0).unique(return_inverse=True)
        mine = replace(axis, index=index.where(index < 0, places), first=axis.first[part], share=axis.share[part])
        rows = origin.rows[part] if origin.rows is not None and dim == produced else origin.rows
        yield (
            source.index_select(dim, taken.to(source.device)),
            into,
            replace(origin, axes=origin.axes | {dim: mine}, rows=rows),
        )


def _dividing_axis(target: Tensor, origin: Origin, split: str) -> int | None:
    """Return the axis along which the entries of a tensor can be gathered part by part, if there is one."""
    axes = origin.axes
    drawing = [dim for dim, axis in axes.items() if axis.reads and axis.copies]
    if target.dim() < 2 or origin.flat or origin.turn is not None or any(axis.groups > 1 for axis in axes.values()):
        return None
    if len(drawing) > 1 or (drawing and split == "paired"):
        return None
    dim = next((_other_axis(origin, each) for each in drawing), 0)
    return None if dim in axes and (axes[dim].means or axes[dim].reads) else dim


def _other_axis(origin: Origin, reading: int) -> int:
    """Return the axis that produces units beside one that reads them."""
    near = (reading - 1, reading + 1, *origin.axes)
    return next((each for each in near if each in origin.axes and not origin.axes[each].reads), int(reading == 0))


def gather(source: Tensor, target: Tensor, origin: Origin, generator: torch.Generator, split: str) -> Tensor:
    """Gather a teacher's tensor along every axis of units, and divide it among copies along the axes that read."""
    # An entry that copies none of the teacher's is zero, or a mean, or keeps its value in `target`. Where possible the
    # result is computed in `target` itself.
    shape = target.shape
    if origin.flat:
        source, target = source.reshape(-1), target.reshape(-1)
    exact = target.dtype if not target.is_floating_point() else torch.promote_types(target.dtype, torch.float32)
    value = source = source.to(target.device, exact)
    own = zero = None  # masks of the entries that keep the student's value, and of those that are zero
    keeps = any(bool((axis.index == NEW).any()) for axis in origin.axes.values())
    in_place = not (keeps or origin.flat or exact != target.dtype)
    last = max(origin.axes, default=-1)
    for dim, axis in origin.axes.items():
        value = _take(value, axis, dim, target if in_place and dim == last else None)
        missing = bool((axis.index < 0).any())
        if axis.reads:
            value = share_out(axis, value, (dim, _other_axis(origin, dim)), generator, split, source)
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


def append_means(source: Tensor, origin: Origin, theirs: Mapping[str, Tensor]) -> tuple[Tensor, Origin]:
    """Return a teacher's tensor with the means that layer scales weigh behind it, and the origin that takes them."""
    if not origin.scaled:
        return source, origin
    value = source.reshape(-1) if origin.flat else source
    ((dim, axis),) = ((dim, axis) for dim, axis in origin.axes.items() if axis.means)
    scales = [theirs[each.scale].reshape(-1)[each.entries.to(value.device)] for each in origin.scaled]
    value = value.movedim(dim, 0)
    weighed = value * torch.stack(scales).prod(0).reshape([-1] + [1] * (value.dim() - 1))
    if origin.scaled[0].scale == origin.teacher:
        weighed = torch.ones_like(value)
    means = torch.stack([weighed[entries.to(value.device)].mean(0) for entries in axis.means])
    index = torch.where(axis.index <= MEAN, len(value) + MEAN - axis.index, axis.index)
    axes = origin.axes | {dim: replace(axis, index=index, means=())}
    return torch.cat([value, means]).movedim(0, dim), replace(origin, axes=axes, scaled=())


def _join(mask: Tensor | None, axis: Axis, value: Tensor, dim: int, entries: Tensor) -> Tensor | None:
    """Return the mask with further `entries` along one axis; None stands for an empty mask."""
    if not bool(entries.any()):
        return mask
    entries = entrywise(axis, value, dim, entries)
    return entries if mask is None else mask | entries


def _take(value: Tensor, axis: Axis, dim: int, into: Tensor | None = None) -> Tensor:
    """Gather one axis, into `into` if the shape fits. An entry that is neither a copy nor a mean holds anything."""
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


def entrywise(axis: Axis, value: Tensor, dim: int, entries: Tensor) -> Tensor:
    """Return one number for each entry of an axis, in a shape that broadcasts against `value`."""
    entries = entries.to(value.device)
    if axis.groups > 1 and dim == 1:
        entries = entries.reshape(axis.groups, -1).repeat_interleave(value.shape[0] // axis.groups, 0)
        return entries.reshape(*entries.shape, *[1] * (value.dim() - 2))
    return entries.reshape([-1 if d == dim else 1 for d in range(value.dim())])


def share_out(
    axis: Axis, value: Tensor, dims: tuple[int, int], generator: torch.Generator, split: str, source: Tensor
) -> Tensor:
    """Divide the weights of every unit among its copies. `dims` are the axis that reads and the one that produces."""
    if not axis.copies:
        return value
    value, dim = multiply(value, shares(axis, value, dims, generator, split), source), dims[0]
    if split != "paired" or axis.signed:
        return value
    spread = value.std()
    if axis.groups == 1:
        return _add_paired_noise(value, axis.index, axis.share, dim, generator, spread)
    # Each group gets its own noise, on its rows or on its part of the axis that a transposed convolution reads.
    index, share = axis.index.reshape(axis.groups, -1), axis.share.reshape(axis.groups, -1)
    groups = zip(value.chunk(axis.groups, 0), index, share, strict=True)
    return torch.cat([_add_paired_noise(part, i, s, dim, generator, spread) for part, i, s in groups], 0)


def shares(axis: Axis, value: Tensor, dims: tuple[int, int], generator: torch.Generator | None, split: str) -> Tensor:
    """Return the part of the teacher's outgoing weight that each copy takes; those of one entry add up to one."""
    # Uneven shares are drawn for every reading unit. If all readers of a copy had one share, it would only scale the
    # copy's gradient, which RMSProp and Adam undo.
    dim, other = dims if value.dim() > 1 else (dims[0], dims[0])
    if split != "uneven" or not axis.copies or axis.signed:
        return entrywise(axis, value, dim, axis.share).to(value)
    inside = axis.groups > 1 and dim == 1
    rows, size = value.shape[other] if other != dim else 1, value.shape[dim]
    part = 0.5 + torch.rand(rows, size, generator=generator, dtype=torch.double)  # none is three times another
    index, copied = _number(axis.index), axis.index >= 0
    if inside:
        times = rows // axis.groups
        index, copied = (x.reshape(axis.groups, -1).repeat_interleave(times, 0) for x in (index, copied))
    index = index.expand(rows, size)
    if axis.groups > 1 and not inside:  # copies share with those of their own group
        index = index + torch.arange(axis.groups).repeat_interleave(size // axis.groups) * (int(index.max()) + 1)
    part = part * copied
    whole = torch.zeros(rows, int(index.max()) + 1, dtype=torch.double).scatter_add_(1, index, part)
    share = part / whole.gather(1, index).clamp(min=torch.finfo(torch.double).tiny)
    shape = [1] * value.dim()
    shape[other], shape[dim] = rows, size
    return (share if other < dim else share.T).reshape(shape).to(value)


def _number(index: Tensor) -> Tensor:
    """Number what an index copies without gaps, since the codes of new layers are large; the rest gets any number."""
    return torch.unique(index.clamp(min=0), return_inverse=True)[1]


def _add_paired_noise(
    value: Tensor, index: Tensor, share: Tensor, dim: int, generator: torch.Generator, spread: Tensor
) -> Tensor:
    """Add noise of half the weights' deviation, which sums to zero over the copies of a unit."""
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    known = (index >= 0).reshape(shape).to(value)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.double).to(value) * spread / 2 * known
    index = _number(index).to(value.device)
    size = [int(index.max()) + 1 if d == dim else n for d, n in enumerate(value.shape)]
    total = torch.zeros(size, dtype=value.dtype, device=value.device).index_add_(dim, index, noise)
    mean = total.index_select(dim, index) * share.reshape(shape).to(value)
    return value + (noise - mean) * known


def scale_rows(value: Tensor, origin: Origin, source: Tensor) -> Tensor:
    """Multiply each entry of the axis that produces units by its number in `origin.rows`, if there are any."""
    return value if origin.rows is None else multiply(value, row_factors(value, origin), source)


def row_factors(value: Tensor, origin: Origin) -> Tensor:
    """Return `origin.rows` in a shape that broadcasts against a tensor of this origin."""
    assert origin.rows is not None
    produced = next((dim for dim, axis in origin.axes.items() if not axis.reads), 0)
    return origin.rows.to(value).reshape([-1 if dim == produced else 1 for dim in range(value.dim())])


def multiply(value: Tensor, factor: Tensor | float, source: Tensor) -> Tensor:
    """Return the product. It is made in place unless that would write to `source`."""
    return value * factor if value.data_ptr() == source.data_ptr() else value.mul_(factor)


def rotate(value: Tensor, dim: int, seed: int) -> Tensor:
    """Rotate the units of one axis at random. The same seed gives the same rotation, so that the reader undoes it."""
    drawn = torch.randn(2 * (value.shape[dim],), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    rotation = torch.linalg.qr(drawn).Q.to(value)
    return (value.movedim(dim, -1) @ rotation.T).movedim(-1, dim)
