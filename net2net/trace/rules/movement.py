"""Rules for data movement: the labels move as the data do."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...network import tensors_in
from ..activations import NOTHING, join_ranges
from ..facts import Call, Labels
from ..graph import Trace
from ..units import compact, spread
from .elementwise import join
from .registry import CannotFollow, carries_no_units, first_labels, first_norm_of_sum, label_constant, names, rule

MOVEMENT = """
    view reshape flatten unflatten permute transpose swapaxes movedim moveaxis t squeeze unsqueeze cat concat
    concatenate stack chunk split split_with_sizes tensor_split unbind index attribute narrow select flip fliplr flipud
    roll expand expand_as broadcast_to view_as reshape_as channel_shuffle native_channel_shuffle pixel_shuffle
    pixel_unshuffle index_select repeat repeat_interleave tile gather take_along_dim swapdims adjoint rot90 diagonal
    hsplit vsplit hstack vstack dstack ravel contiguous_format meshgrid
"""

CONCATENATIONS = names("cat concat concatenate")


@rule(*names(MOVEMENT))
def movement(trace: Trace, call: Call) -> None:
    """Apply the function itself to the labels."""
    operands = tensors_in(call.args[0])
    # The second tensor of view_as and the like only gives a shape.
    places = [] if call.name.endswith("_as") else [*call.args[1:], *call.kwargs.values()]
    if any(map(trace.is_activation, tensors_in(places))):
        check_places(trace, call, _chosen_axes(trace, call), operands)
    if len(operands) == 1 and not trace.is_activation(operands[0]):
        return _move_view(trace, call, operands[0])
    labels = [trace.labels(x) for x in operands]
    known = [one for one in labels if one is not None]
    if not known:
        return
    pairs = zip(operands, labels, strict=True)
    moved = _move(call, [one.units if one else _label_beside(trace, call, x, known) for x, one in pairs])
    if moved is None:
        raise CannotFollow(f"{call} returns elements that are not those of its input")
    state = {
        "gain": known[0].gain if len({one.gain for one in known}) == 1 else 1.0,
        "linear": all(one is not None and one.linear for one in labels),
        "after_norm": known[0].after_norm if len({one and one.after_norm for one in labels}) == 1 else None,
        "first_norm": first_norm_of_sum(labels),
        "passage": known[0].passage if len({one and one.passage for one in labels}) == 1 else NOTHING,
        "range": join_ranges(one and one.range for one in labels),
        "statistic": known[0].statistic if call.plain == "unsqueeze" else None,
    }
    for out, new in zip(call.results, moved, strict=True):
        trace.label(out, Labels.of(new, *known, **state))


def _label_beside(trace: Trace, call: Call, constant: Tensor, others: Sequence[Labels]) -> Tensor:
    """Return labels for a constant that is joined to activations; if all of it is one number, it serves any width."""
    if constant.is_meta or not constant.numel() or not bool((constant == constant.reshape(-1)[0]).all()):
        return label_constant(trace, call, constant.shape)
    shapes = [trace.units.drop_repeats(other.units).shape for other in others if other.units.dim() == constant.dim()]
    if not constant.is_floating_point() and all(max(shape, default=1) <= 1 for shape in shapes):  # places, no units
        return compact(others[0].units).reshape(-1)[:1].expand(constant.shape)
    carrying = {dim for shape in shapes for dim, size in enumerate(shape) if size > 1}
    if call.plain in CONCATENATIONS and not carrying:
        carrying = {call.arg(1, "dim", 0) % constant.dim()}
    shape = [size if dim in carrying else 1 for dim, size in enumerate(constant.shape)]
    key = trace.units.key(f"constant {call.name}", call.module)
    return trace.units.fresh(math.prod(shape), key).reshape(shape).expand(constant.shape)


def check_places(trace: Trace, call: Call, axes: Collection[int] | None, moved: Sequence[Tensor]) -> None:
    """Raise CannotFollow if the values that choose places carry units, or if `moved` carry units along these `axes`."""
    # Otherwise the units at the chosen places are the same, whatever the values are.
    chosen_by = [x for x in call.tensors if not any(x is other for other in moved)]
    if axes is None or not all(carries_no_units(trace, x) for x in chosen_by):
        raise CannotFollow(f"{call} moves units to places that depend on values")
    why = f"{call} chooses among units by values"
    for x in moved:
        view = trace.parameters.view(x)
        if view is not None and call.plain == "index":  # one of a stack of weights is taken whole
            sizes = [compact(places).shape for places in view.places]
            chosen = [dim for dim, shape in enumerate(sizes) if any(shape[axis] > 1 for axis in axes)]
            trace.parameters.chosen.update({(view.name, dim): why for dim in chosen})
        elif (labels := trace.labels(x)) is not None:
            shape = trace.units.drop_repeats(labels.units).shape
            if any(shape[axis] > 1 for axis in axes):
                raise CannotFollow(why)


def _chosen_axes(trace: Trace, call: Call) -> list[int] | None:
    """Return the axes along which activations among the arguments choose places; None if that is not known."""
    if call.plain in ("gather", "index_select", "take_along_dim"):
        dim = call.arg(2 if call.plain == "take_along_dim" else 1, "dim")
        return [dim] if isinstance(dim, int) else None
    if call.plain != "index":
        return None
    rank, index = call.args[0].dim(), call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    lengths = [x.dim() if isinstance(x, Tensor) and x.dtype == torch.bool else int(x is not None) for x in index]
    axes, axis = [], 0
    for x, length in zip(index, lengths, strict=True):
        if x is ...:
            axis += rank - sum(lengths) + 1
            continue
        if trace.is_activation(x):
            axes += range(axis, axis + length)
        axis += length
    return axes


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce")
def scatter(trace: Trace, call: Call) -> None:
    """Rows are added to places along an axis, or written there: rows and places hold the same units."""
    x, dim, _, *rows = call.args[:4]
    moved = [each for each in (x, *rows) if isinstance(each, Tensor)]
    if not all(each.numel() for each in moved):
        raise CannotFollow(f"{call} works on an empty tensor, which shows no units: give an example that fills it")
    tables = trace.parameters.values.keys()
    for each in moved:  # the rows of a table, such as one for each node, hold the same units then
        labels = trace.labels(each) if trace.is_activation(each) else None
        if labels is not None and labels.sources and labels.sources <= tables:
            trace.units.tie_along(labels.units, [dim % labels.units.dim()], f"{call} adds them up")
    check_places(trace, call, [dim], moved)
    shape, operands = call.out.shape, []
    for each in moved:
        if any(a != b for d, (a, b) in enumerate(zip(each.shape, shape, strict=True)) if d != dim % len(shape)):
            raise CannotFollow(f"{call} fills only a part of its tensor")
        operands.append(each.narrow(dim, 0, 1).expand(shape))
        if (labels := trace.labels(each)) is not None:
            trace.label(operands[-1], replace(labels, units=labels.units.narrow(dim, 0, 1).expand(shape)))
    join(trace, call, operands)


def _move_view(trace: Trace, call: Call, parameter: Tensor) -> None:
    """Remember what a movement makes of a parameter as a view of the parameter."""
    view = trace.parameters.view(parameter)
    if view is None:
        return
    moved = [places for axis in view.places if (places := _move(call, [axis])) is not None]
    if len(moved) == len(view.places):
        for out, *places in zip(call.results, *moved, strict=True):
            trace.parameters.remember_view(out, replace(view, places=tuple(places)))


def _move(call: Call, units: list[Tensor]) -> list[Tensor] | None:
    """Apply the call to labels; None if it does not move integers, or makes something else of them."""
    units = [labels.detach() for labels in units]  # objects of their own, which an in-place form may reshape
    if call.plain in ("view", "reshape", "view_as", "reshape_as"):  # a view of expanded labels would need a copy
        same = len(call.results) == 1 and call.results[0].numel() == units[0].numel()  # not a view as another dtype
        return [units[0].reshape(call.results[0].shape)] if same else None
    args = [units if isinstance(call.args[0], (list, tuple)) else units[0], *call.args[1:]]
    try:
        moved = tensors_in(call.func(*args, **call.kwargs))
    except (RuntimeError, NotImplementedError, IndexError, TypeError):  # or an index on the meta device
        return None
    shapes = [x.shape for x in moved] == [out.shape for out in call.results]
    return moved if shapes and not any(new.is_floating_point() for new in moved) else None


@rule("setitem")
def assignment(trace: Trace, call: Call) -> None:
    """A part of an activation is overwritten: by units of another, or by constants."""
    x, index, value = call.args
    labels, new = trace.labels(x), trace.labels(value)
    if chosen := [each for each in tensors_in([index]) if trace.is_activation(each)]:
        if not all(carries_no_units(trace, each) for each in (x, *tensors_in([value]), *chosen)):
            return _write_rows(trace, call)
        by = first_labels(trace, replace(call, args=(chosen[0],)))
        return trace.label(x, Labels.of(compact(by.units).reshape(-1)[:1].expand(x.shape), by))
    if labels is None and new is not None and (units := _spread_over_zeros(trace, call, new)) is not None:
        return trace.label(x, Labels.of(units, new, gain=new.gain))
    units = label_constant(trace, call, x.shape) if labels is None else labels.units
    if new is None:
        part = units[index]
        if isinstance(value, Tensor) and value.numel() > 1:
            raise CannotFollow(f"{call.module or 'the network'} writes constants into a part of the units")
        if torch.equal(torch.unique(trace.units.find(part)), torch.unique(trace.units.find(units))):
            return  # a number at some positions of every unit
        written = label_constant(trace, call, part.shape)
    else:
        written = new.units
    units = units.clone()
    units[index] = written
    trace.label(x, Labels.of(units, *(known for known in (labels, new) if known is not None)))


def _spread_over_zeros(trace: Trace, call: Call, new: Labels) -> Tensor | None:
    """Return the units of zeros of which a part is overwritten at some positions of every unit; None if of others."""
    x, index, _ = call.args
    part = x[index].shape
    units = trace.units.drop_repeats(new.units.broadcast_to(part))
    if len(part) != x.dim() or any(a > 1 and b < c for a, b, c in zip(units.shape, part, x.shape, strict=True)):
        return None
    rest = x.clone()
    rest[index] = 0
    return None if x.is_meta or bool(rest.any()) else units.expand(x.shape)


def _write_rows(trace: Trace, call: Call) -> None:
    """Values choose the first axes of places that are written to: each place holds the same units, before and after."""
    x, index, value = call.args
    axes = _chosen_axes(trace, replace(call, name="getitem", args=(x, index)))
    operands = [each for each in (x, value) if isinstance(each, Tensor)]
    chosen = tensors_in([index])
    if (
        axes is None
        or axes != list(range(len(axes)))
        or not all(trace.is_activation(i) and carries_no_units(trace, i) for i in chosen)
    ):
        raise CannotFollow(f"{call} writes to places that depend on values")
    rest, known, rows = x.dim() - len(axes), [], []
    for each in operands:
        labels = trace.labels(each)
        if labels is None:
            around = each.clone()
            if each is x:
                around[index] = 0
            if each.is_meta or bool(around.any()):
                raise CannotFollow(f"{call} writes units into constants")
        if labels is not None:
            units = trace.units.drop_repeats(labels.units)
            if any(size > 1 for size in units.shape[: max(0, units.dim() - rest)]):
                raise CannotFollow(f"{call} writes to places that depend on values")
            known.append(labels)
            rows.append(units.reshape(units.shape[max(0, units.dim() - rest) :]).expand(x.shape))
    units = rows[0] if len(rows) == 1 else trace.units.combine(rows[0], rows[1], call)
    gain = known[0].gain if len({each.gain for each in known}) == 1 else 1.0
    result = Labels.of(units, *known, gain=gain)
    everywhere = torch.zeros(x.shape[: len(axes)], dtype=torch.bool, device=x.device)
    everywhere[index] = True  # what was there is not known
    if (trace.labels(x) is None and bool(everywhere.all())) or (not isinstance(value, Tensor) and value != 0):
        result = replace(result, lifted_by=result.lifted_by or str(call))
    trace.label(x, result)


@rule("pad")
def pad(trace: Trace, call: Call) -> None:
    """Positions added to a map belong to its units; channels added are new units, which hold a constant."""
    labels = first_labels(trace, call)
    units, amounts, mode = labels.units, call.arg(1, "pad"), call.arg(2, "mode", "constant")
    padded_by = tuple(zip(amounts[::2], amounts[1::2], strict=True))
    zeros = mode == "constant" and not call.arg(3, "value")  # every sum and every norm leaves them zero
    if mode != "constant" and max(trace.units.drop_repeats(units).shape[-len(padded_by) :]) > 1:
        units = F.pad(units.double(), amounts, mode).long()
    else:
        for k, amount in enumerate(padded_by):
            dim = units.dim() - 1 - k
            if trace.units.drop_repeats(units).shape[dim] == 1:
                size = units.shape[dim] + sum(amount)
                units = units.narrow(dim, 0, 1).expand(_resize(units, dim, size))
            elif min(amount) < 0:
                raise CannotFollow(f"{call} removes some of the units")
            else:
                units, zeros = _pad_units(trace, call, units, dim, amount), zeros and not any(amount)
    result = Labels.of(units, labels, gain=labels.gain, padded_by=padded_by)
    if zeros:
        result = replace(result, range=join_ranges([labels.range, (0.0, 0.0)]), linear=labels.linear)
        result = replace(result, after_norm=labels.after_norm, first_norm=labels.first_norm)
    trace.label(call.out, result)


def _pad_units(trace: Trace, call: Call, units: Tensor, dim: int, amount: tuple[int, int]) -> Tensor:
    """Put new units before and behind `units` along one axis."""
    padding = []
    for count in amount:
        key = trace.units.key("padding", call.module) if count else None
        padding.append(spread(trace.units.fresh(count, key), dim, _resize(units, dim, count)))
    return torch.cat([padding[0], units, padding[1]], dim)


def _resize(units: Tensor, dim: int, size: int) -> list[int]:
    return [size if d == dim else n for d, n in enumerate(units.shape)]


@rule("view_as_complex", "view_as_real")
def pair_up(trace: Trace, call: Call) -> None:
    """Pairs of units become complex units, or the other way round: the units of a pair move as a whole."""
    labels, shape = first_labels(trace, call), call.out.shape
    if call.plain == "view_as_real":
        units = labels.units[..., None].expand(shape)
    else:
        units = trace.units.tie_along(labels.units, [len(shape)], f"{call} pairs them")[..., 0].expand(shape)
    trace.label(call.out, Labels.of(units, labels, gain=labels.gain))


@rule("unfold")
def unfold(trace: Trace, call: Call) -> None:
    """Patches of a map hold every unit once for each place in the patch; windows along one axis are views."""
    labels = first_labels(trace, call)
    if call.out.dim() == labels.units.dim() + 1:  # `Tensor.unfold`, which is another function
        return movement(trace, call)
    if labels.units.dim() != 4:
        raise CannotFollow(f"{call} acts on a map without a batch")
    units = trace.units.units_along(labels.units, 1, f"{call} mixes positions")
    units = units.repeat_interleave(call.out.shape[1] // len(units))
    trace.label(call.out, Labels.of(spread(units, 1, call.out.shape), labels, gain=labels.gain))


@rule("fold")
def fold(trace: Trace, call: Call) -> None:
    """Patches are summed into a map: the entries of one channel are one unit."""
    labels = first_labels(trace, call)
    if labels.units.dim() != 3:
        raise CannotFollow(f"{call} acts on patches without a batch")
    units = trace.units.units_along(labels.units, 1, f"{call} mixes positions").reshape(call.out.shape[1], -1)
    units = trace.units.tie_along(units, [1], f"{call} sums over patches").reshape(-1)
    trace.label(call.out, Labels.of(spread(units, 1, call.out.shape), labels, gain=labels.gain))
