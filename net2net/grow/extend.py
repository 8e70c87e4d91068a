"""Add entries that no unit of a network can be copied to: outputs, rows of a table, channels of the input."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..equivalence import Equivalence, compare
from ..errors import TransferError
from ..fill.fill import fill
from ..network import Inputs, run, tensors_in
from ..record import NEW, ZERO, Axis, How, Origin, Record
from ..tensors import named_tensors
from ..trace.facts import Layer
from ..trace.graph import Trace
from ..trace.tracer import IS_OUTPUT
from ..transfer import Transfer
from .describe import describe_trace
from .shapes import attach_record, copy_network, follow_widths, set_sizes

New = str | Tensor  # what new entries hold: "zero", "mean" of the old ones, or these numbers
Places = dict[tuple[str, int], int]  # a tensor and its axis -> the entries that it gets
INPUT = frozenset({"input"})


def extend(model: nn.Module, traced: Trace, inputs: Inputs, widths: Mapping[str, float | int], new: New) -> nn.Module:
    """Return a copy with more outputs, rows or input channels; on those that were there it is exact."""
    # `widen` calls this if it is given `new`, and has checked `widths`.
    if not isinstance(new, Tensor) and new not in ("zero", "mean"):
        raise TransferError(f"new={new!r} is no way to begin: it is 'zero', 'mean' or a tensor of new entries.")
    places, channels = _find_places(traced, widths)
    if channels and new != "zero":
        raise TransferError("New channels of the input are exact if nothing reads them at first: say new='zero'.")
    if missing := next((name for name, _ in places if name in traced.parameters.stand_ins), None):
        raise TransferError(f"{missing} is computed by a parametrisation: remove that first.")
    copied = copy_network(model)
    held = dict(copied.named_parameters()) | dict(copied.named_buffers())
    for (name, dim), size in places.items():
        old = held[name].detach()
        held[name].data = torch.cat([old, _new_entries(name, old, dim, size - old.shape[dim], new)], dim)
    set_sizes(copied, model)
    wider = _pad_channels(inputs, channels)
    try:
        run(copied, wider)
    except TransferError:
        follow_widths(copied, traced, torch.ones(len(traced.units.roots()), dtype=torch.double))
    record = _make_record(traced, copied, places)
    fill(model, copied, record)
    measured = _compare_old(run(model, inputs), run(copied, wider))
    if not measured.max_relative <= max(torch.finfo(t.dtype).eps for t in _floating(model)) ** 0.5:
        raise TransferError(
            f"The new entries of {', '.join(widths)} change the results that were there, by "
            f"{measured.max_relative:.1e} relative: something behind them mixes all entries, as a softmax does. Let "
            "the network return what stands before it."
        )
    record = replace(record, measured=measured, modes={"eval": "exact on what was there", "train": "not compared"})
    attach_record(copied, Transfer(**vars(record)).of(model, copied), model, f"new entries of {', '.join(widths)}")
    return copied


def _floating(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def _find_places(traced: Trace, widths: Mapping[str, float | int]) -> tuple[Places, dict[int, tuple[int, int]]]:
    """Return the new sizes of axes of tensors, and of the input: axis -> its size before and after."""
    modules: dict[str, list[str]] = {}
    for name, first in traced.parameters.first_names.items():
        modules.setdefault(name.rpartition(".")[0] or name, []).append(first)
    places: Places = {}
    channels: dict[int, tuple[int, int]] = {}
    for pattern, width in widths.items():
        named = [name for name in modules if fnmatchcase(name, pattern)]
        if not named:
            raise TransferError(f"No layer is called {pattern!r} (net2net.describe lists them).")
        for name in named:
            layer = next((traced.layers[first] for first in modules[name] if first in traced.layers), None)
            axes, reads_input = _axes_of(traced, name, layer)
            for tensor, dim in axes:
                before = traced.parameters.tensors[tensor].shape[dim]
                after = width if isinstance(width, int) else round(before * width + 1e-9)
                if after < before:
                    raise TransferError(f"{name} has {before} entries: it cannot shrink to {after}.")
                places[tensor, dim] = max(after, places.get((tensor, dim), 0))
                if reads_input:
                    channels[1 if traced.parameters.tensors[tensor].dim() > 2 else -1] = (before, after)
    return places, channels


def _axes_of(traced: Trace, name: str, layer: Layer | None) -> tuple[list[tuple[str, int]], bool]:
    """Return the axes (tensor, dimension) that new entries of a layer lie on, and whether they are the input's."""
    roots = traced.units.roots()
    if layer is not None and layer.produces is not None:
        for group in describe_trace(traced).groups:
            if group.pinned in IS_OUTPUT and bool(torch.isin(roots[layer.produces], group.units).all()):
                labels = {
                    (tensor, dim): roots[units]
                    for tensor, axes in traced.parameters.axes.items()
                    for dim, units in enumerate(axes)
                    if units is not None
                }
                for tensor, units in traced.parameters.values.items():  # a vector that is added to the outputs
                    sizes = traced.parameters.tensors[tensor].shape
                    if max(sizes, default=1) == len(units) > 1:
                        labels[tensor, sizes.index(len(units))] = roots[units]
                return [place for place, units in labels.items() if bool(torch.isin(units, group.units).all())], False
    if layer is not None and layer.options.get("embedding"):
        return [(layer.name, 0)], False
    if layer is not None and layer.sources == INPUT:
        return [(layer.name, traced.parameters.read_axis[layer.name])], True
    raise TransferError(
        f"{name} makes no output of the network, is no table and does not read the network's input: it grows by "
        "copies, so widen it without `new`."
    )


def _new_entries(name: str, old: Tensor, dim: int, count: int, new: New) -> Tensor:
    """Return `count` entries of one axis of a tensor."""
    shape = [count if d == dim else size for d, size in enumerate(old.shape)]
    if isinstance(new, Tensor) and old.numel() > old.shape[dim]:
        if list(new.shape) != shape:
            raise TransferError(f"`new` has the shape {list(new.shape)}: the new entries of {name} have {shape}.")
        return new.to(old)
    if new == "mean" and old.is_floating_point():
        return old.mean(dim, keepdim=True).expand(shape)
    return old.new_zeros(shape)


def _pad_channels(inputs: Inputs, channels: dict[int, tuple[int, int]]) -> Inputs:
    """Return the inputs with random numbers in the new channels."""

    def pad(x: Tensor) -> Tensor:
        for axis, (before, after) in channels.items():
            if x.is_floating_point() and x.dim() > max(axis, 0) and x.shape[axis] == before:
                shape = list(x.shape)
                shape[axis] = after - before
                x = torch.cat([x, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x)], axis)
        return x

    return inputs.map(pad)


def _make_record(traced: Trace, copied: nn.Module, places: Places) -> Record:
    """Return the record: new entries are the student's own, or zero where they are read."""
    mine = named_tensors(copied)
    shapes = {name: tuple(tensor.shape) for name, tensor in traced.parameters.originals.items()}
    origins = {}
    for name in mine:
        axes = {}
        for (tensor, dim), size in places.items():
            if tensor == name:
                reads = traced.parameters.read_axis.get(name) == dim
                index = torch.arange(size)
                index[shapes[name][dim] :] = ZERO if reads else NEW
                axes[dim] = Axis(index, torch.ones(size, dtype=torch.bool), reads, torch.ones(size, dtype=torch.double))
        origins[name] = Origin(How.SHARED, name, axes)
    grown = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    return Record(origins, "fresh", 0.0, state=torch.Generator().get_state(), shapes=(shapes, grown))


def _compare_old(theirs: object, mine: object) -> Equivalence:
    """Measure the difference on the entries that the teacher has, too: the first ones of each axis."""
    old = []
    for a, b in zip(tensors_in(theirs), tensors_in(mine), strict=False):
        grown = [dim for dim in range(min(a.dim(), b.dim())) if b.shape[dim] > a.shape[dim]]
        old.append(b.narrow(grown[0], 0, a.shape[grown[0]]) if len(grown) == 1 else b)
    return compare(tensors_in(theirs), old)
