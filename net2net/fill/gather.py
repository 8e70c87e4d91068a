"""Carrying a record out: every student tensor from the teacher's, and nothing else is looked at."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import TransferError
from ..record import MEAN, NEW, ZERO, Axis, Mixed, Origin, Record
from ..tensors import computed, merge_groups, named_tensors, parametrised
from .isometry import frames, isometry

SPLITS = ("equal", "uneven", "paired")


@torch.no_grad()
def fill(teacher: nn.Module, student: nn.Module, record: Record) -> None:
    """Write every student tensor as `record` says; for `random_pad` only the teacher's own entries, unshared."""
    pad = record.split == "pad"
    generator = torch.Generator()
    generator.set_state(record.state)
    theirs, mine = named_tensors(teacher), named_tensors(student)
    mixing = {} if pad else {name: origin.mixed for name, origin in record.origins.items() if origin.mixed}
    # Before anything is written: there may be none.
    matrices = {name: [matrix(one, theirs) for one in mixed] for name, mixed in mixing.items()}
    for name, origin in record.origins.items():
        target = mine[name]
        if origin.how == "shared":
            assert origin.teacher is not None
            source = merge_groups(theirs[origin.teacher], *origin.merged)
            if name in matrices:
                source, origin = _mixed(source, origin, matrices[name])
            made = (
                _unshared(source, target, origin) if pad else gathered(source, target, origin, generator, record.split)
            )
            target.copy_(made)
        elif not pad:
            fill_new(target, origin, mine, generator, record.split)
    if not pad:
        for module, eps in record.eps.items():
            student.get_submodule(module).eps = eps  # type: ignore[assignment]
    for name, module, weight in parametrised(student):
        _assign(module, weight, mine[f"{name}.{weight}".lstrip(".")], f"{name}.{weight}".lstrip("."))


def _assign(module: nn.Module, weight: str, value: Tensor, name: str) -> None:
    """Set a parametrised weight, through the parametrisation's own inverse, and see whether it can hold the value."""
    try:
        setattr(module, weight, value)
        held = computed(module, weight)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise TransferError(f"The parametrisation of {name} cannot be given a weight: {error}") from error
    if not torch.allclose(held, value, rtol=torch.finfo(value.dtype).eps ** 0.75, atol=torch.finfo(value.dtype).eps):
        raise TransferError(
            f"The parametrisation of {name} cannot hold the weight that the student needs (a spectral norm, for one, "
            "fixes the size of the whole matrix, which shared weights change)."
        )


def fill_new(
    target: Tensor,
    origin: Origin,
    mine: dict[str, Tensor],
    generator: torch.Generator | None = None,
    split: str = "equal",
) -> None:
    """Fill a tensor that the teacher lacks; `mine` holds all of the student's."""
    if origin.fill == "zero":
        target.zero_()
    elif origin.fill == "one":
        target.fill_(1.0)
    elif origin.fill == "mean":
        target.copy_(mine[origin.of[0]])
    elif origin.fill == "deviation":
        target.copy_((mine[origin.of[0]].double() + origin.of[1]).sqrt())
    elif origin.fill == "tap":
        target.zero_()[(slice(None), slice(None), *(k // 2 for k in target.shape[2:]))] = 1.0
        target.copy_(_by_rows(target, origin, target))
    elif origin.fill == "pass":
        weight = passing(origin, target)
        weight = weight * _shares(origin.axes[1], weight, 1, generator, split) * origin.factor
        weight = _by_rows(weight, origin, weight)
        target.copy_(weight if origin.turn is None else turned(weight, 0, origin.turn))


def passing(origin: Origin, target: Tensor) -> Tensor:
    """The weight of a new layer that hands its units on, before shares: one at the centre tap where the unit read is
    the unit produced, zero elsewhere; units that the teacher lacks are read with zero. Shape and dtype of `target`."""
    produced, read = origin.axes[0].index, origin.axes[1]
    rows = read.index.reshape(read.groups, -1).repeat_interleave(len(produced) // read.groups, 0)
    same = (produced[:, None] == rows) & (rows >= 0)
    weight = torch.zeros_like(target)
    weight[(slice(None), slice(None), *(k // 2 for k in target.shape[2:]))] = same.to(weight)
    return weight


def matrix(mixed: Mixed, theirs: dict[str, Tensor]) -> Tensor:
    """What an axis of a teacher's tensor is multiplied by (entries of the student's x the teacher's); of the weights
    and biases of norms, what they hold."""
    channels, wider = mixed.widths
    positions = len(mixed.columns) // channels
    ratio = (channels / wider) ** 0.5  # norms see the same squares spread over more entries
    if mixed.how == "other":
        return torch.full((len(mixed.rows),), ratio, dtype=torch.double)
    if mixed.begins is None:
        made = isometry(channels, wider)
    else:
        made, before, first = frames(theirs[mixed.begins], wider)
        if mixed.how == "first":
            return ratio * first[mixed.rows]
        if mixed.how == "before":
            made = before - before.mean(1, keepdim=True)  # the mean is not to go through
    # What stands for 1 where norms add a bias: orthogonal to all that is on the stream.
    one = torch.linalg.qr(made, mode="complete").Q[:, -1].repeat(positions)[mixed.rows]
    if mixed.how == "bias":
        return one
    made = torch.block_diag(*[made] * positions)[mixed.rows][:, mixed.columns]
    if mixed.how == "behind":
        scale, shift = (None if name is None else theirs[name].to(made) for name in mixed.norm)
        if channels < len(mixed.columns):  # positions that the norm saw apart
            apart = mixed.columns % channels
            scale, shift = (x[apart] if x is not None and len(x) == channels else x for x in (scale, shift))
        made = made * (ratio if scale is None else scale)  # a norm with a weight has that, too, in its own
        made = made if shift is None else made + one[:, None] * shift / positions
    return made


def _mixed(source: Tensor, origin: Origin, matrices: list[Tensor]) -> tuple[Tensor, Origin]:
    """The teacher's tensor with some axes mixed, in double precision, and what is left to do to the others."""
    for mixed, by in zip(origin.mixed, matrices, strict=True):
        by = by.to(source.device)
        whole = by.dim() > 1
        source = (source.double().movedim(mixed.dim, -1) @ by.T).movedim(-1, mixed.dim) if whole else by
    dims = {mixed.dim for mixed in origin.mixed}
    return source, replace(origin, axes={dim: axis for dim, axis in origin.axes.items() if dim not in dims})


def turned(value: Tensor, dim: int, seed: int) -> Tensor:
    """One axis turned by the random rotation of a seed: what it does to the units that a layer produces, it undoes in
    the layer that reads them."""
    drawn = torch.randn(2 * (value.shape[dim],), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    rotation = torch.linalg.qr(drawn).Q.to(value)
    return (value.movedim(dim, -1) @ rotation.T).movedim(-1, dim)


def gathered(source: Tensor, target: Tensor, origin: Origin, generator: torch.Generator, split: str) -> Tensor:
    """The teacher's tensor, gathered along every axis of units and shared out along the ones that read.

    Entries that no teacher entry stands for are zero, a mean, or the student's own. Where it can be the result is made
    in `target`: there is no room for another copy of a large network's largest tensor.
    """
    shape = target.shape
    if origin.flat:
        source, target = source.reshape(-1), target.reshape(-1)
    exact = target.dtype if not target.is_floating_point() else torch.promote_types(target.dtype, torch.float32)
    value = source = source.to(target.device, exact)
    own = zero = None  # where the student's own value stays, where zero comes
    keeps = any(bool((axis.index == NEW).any()) for axis in origin.axes.values())
    straight = None if keeps or origin.flat or exact != target.dtype else target
    for dim, axis in origin.axes.items():
        value = _along(value, axis, dim, straight if dim == max(origin.axes) else None)
        if axis.reads:
            value = _shared(axis, value, dim, generator, split, source)
            if bool((axis.index < 0).any()):
                value = _times(value, entrywise(axis, value, dim, axis.index >= 0), source)
        elif bool((axis.index == ZERO).any()):
            zero = _either(zero, entrywise(axis, value, dim, axis.index == ZERO))
        if bool((axis.index == NEW).any()):
            own = _either(own, entrywise(axis, value, dim, axis.index == NEW))
    if origin.factor != 1.0:
        value = _times(value, origin.factor, source)
    value = _by_rows(value, origin, source)
    if origin.turn is not None:
        (reading,) = (dim for dim, axis in origin.axes.items() if axis.reads and dim < 2)
        value = turned(value, reading, origin.turn)
    if zero is not None:
        value, own = _times(value, ~zero, source), None if own is None else own & ~zero
    value = value.to(target.dtype)
    return (value if own is None else torch.where(own, target, value)).reshape(shape)


def _unshared(source: Tensor, target: Tensor, origin: Origin) -> Tensor:
    """The teacher's own entries, once and unshared; the student's own are everywhere else (random_pad)."""
    shape = target.shape
    if origin.flat:
        source, target = source.reshape(-1), target.reshape(-1)
    value, own = source.to(target), None
    for dim, axis in origin.axes.items():
        value = _along(value, axis, dim)
        if not bool(axis.first.all()):
            own = _either(own, entrywise(axis, value, dim, ~axis.first))
    return (value if own is None else torch.where(own, target, value)).reshape(shape)


def _by_rows(value: Tensor, origin: Origin, source: Tensor) -> Tensor:
    if origin.rows is None:
        return value
    return _times(value, origin.rows.to(value).reshape(-1, *[1] * (value.dim() - 1)), source)


def _times(value: Tensor, factor: Tensor | float, source: Tensor) -> Tensor:
    """The product, in place unless that would write to `source`."""
    return value * factor if value.data_ptr() == source.data_ptr() else value.mul_(factor)


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b


def _along(value: Tensor, axis: Axis, dim: int, into: Tensor | None = None) -> Tensor:
    """Gather one axis, into `into` if that serves; entries without a teacher's hold anything, but for means."""
    index = axis.index.to(value.device).clamp(min=0)
    if axis.groups > 1 and dim == 1:  # one row of entries a group
        rows = index.reshape(axis.groups, -1).repeat_interleave(value.shape[0] // axis.groups, 0)
        return torch.take_along_dim(value, rows.reshape(*rows.shape, *[1] * (value.dim() - 2)), 1)
    if torch.equal(axis.index, torch.arange(value.shape[dim])):
        return value
    shape = (*value.shape[:dim], len(index), *value.shape[dim + 1 :])
    fits = into is not None and into.shape == shape  # it would be resized
    taken = torch.index_select(value, dim, index, out=into) if fits else value.index_select(dim, index)
    for entry in (axis.index <= MEAN).nonzero().flatten().tolist():
        among = axis.means[MEAN - int(axis.index[entry])].to(value.device)
        taken.select(dim, entry).copy_(value.index_select(dim, among).mean(dim))
    return taken


def entrywise(axis: Axis, value: Tensor, dim: int, entries: Tensor) -> Tensor:
    """One value an entry, so that it broadcasts against the gathered tensor."""
    entries = entries.to(value.device)
    if axis.groups > 1 and dim == 1:
        entries = entries.reshape(axis.groups, -1).repeat_interleave(value.shape[0] // axis.groups, 0)
        return entries.reshape(*entries.shape, *[1] * (value.dim() - 2))
    return entries.reshape([-1 if d == dim else 1 for d in range(value.dim())])


def _shared(axis: Axis, value: Tensor, dim: int, generator: torch.Generator, split: str, source: Tensor) -> Tensor:
    if axis.copies:
        value = _times(value, _shares(axis, value, dim, generator, split), source)
    if split != "paired" or not axis.copies or axis.signed:
        return value
    if axis.groups > 1:
        return _paired_in_groups(axis, value, dim, generator)
    return _paired(value, axis.index, axis.share, dim, generator, value.std())


def _paired_in_groups(axis: Axis, value: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """The same group by group: the rows of one, or, of a transposed convolution, its part of the axis that reads."""
    index, share = axis.index.reshape(axis.groups, -1), axis.share.reshape(axis.groups, -1)
    parts = [
        _paired(part, i, s, dim, generator, value.std())
        for part, i, s in zip(value.chunk(axis.groups, 0), index, share, strict=True)
    ]
    return torch.cat(parts, 0)


def _paired(
    value: Tensor, index: Tensor, share: Tensor, dim: int, generator: torch.Generator, spread: Tensor
) -> Tensor:
    # Noise that the copies of a unit cancel among themselves, half as large as the shared weights: it parts them well,
    # and they stay what most of the result comes from.
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    known = (index >= 0).reshape(shape).to(value)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.double).to(value) * spread / 2 * known
    index = index.clamp(min=0).to(value.device)
    size = [int(index.max()) + 1 if d == dim else n for d, n in enumerate(value.shape)]
    total = torch.zeros(size, dtype=value.dtype, device=value.device).index_add_(dim, index, noise)
    mean = total.index_select(dim, index) * share.reshape(shape).to(value)
    return value + (noise - mean) * known


def _shares(axis: Axis, value: Tensor, dim: int, generator: torch.Generator | None, split: str) -> Tensor:
    """What part of the teacher's outgoing weight each copy takes: they sum to one over the copies of an entry.

    Broadcasts against `value`. Uneven shares differ from one reading unit to the next: a factor common to all
    readers of a copy would only scale its gradient, which RMSProp and Adam undo.
    """
    if split != "uneven" or not axis.copies or axis.signed:
        return entrywise(axis, value, dim, axis.share).to(value)
    other = 1 - dim if value.dim() > 1 else dim  # the axis that produces
    inside = axis.groups > 1 and dim == 1
    rows, size = value.shape[other], value.shape[dim]
    part = 0.5 + torch.rand(rows, size, generator=generator, dtype=torch.double)  # none more than three times another
    index = axis.index.reshape(axis.groups, -1).repeat_interleave(rows // axis.groups, 0) if inside else axis.index
    index = index.expand(rows, size)
    if axis.groups > 1 and not inside:  # shared among those of one group
        index = index + torch.arange(axis.groups).repeat_interleave(size // axis.groups) * (int(index.max()) + 1)
    known = index >= 0
    part, index = part * known, index.clamp(min=0)
    whole = torch.zeros(rows, int(index.max()) + 1, dtype=torch.double).scatter_add_(1, index, part)
    share = part / whole.gather(1, index).clamp(min=torch.finfo(torch.double).tiny)
    shape = [1] * value.dim()
    shape[other], shape[dim] = rows, size
    return (share if other < dim else share.T).reshape(shape).to(value)


@torch.no_grad()
def add_noise(student: nn.Module, record: Record, generator: torch.Generator) -> None:
    """Gaussian noise on the incoming weights of every copy but the first (section 3.3)."""
    tensors = named_tensors(student)
    for name, origin in record.origins.items():
        reading = any(axis.reads for axis in origin.axes.values())
        produced = [dim for dim, axis in origin.axes.items() if not axis.reads]
        if origin.how != "shared" or not reading or len(produced) != 1 or origin.flat:
            continue
        (dim,) = produced
        axis, target = origin.axes[dim], tensors[name]
        again = (~axis.first & (axis.index >= 0)).nonzero().flatten()
        if len(again) and len(axis.index) == target.shape[dim]:
            drawn = torch.randn(len(again), *target.movedim(dim, 0).shape[1:], generator=generator, dtype=torch.double)
            drawn = (record.noise * target.float().std() * drawn.to(target.device)).to(target.dtype)
            target.movedim(dim, 0)[again.to(target.device)] += drawn
    for name, module, weight in parametrised(student):
        _assign(module, weight, tensors[f"{name}.{weight}".lstrip(".")], f"{name}.{weight}".lstrip("."))
