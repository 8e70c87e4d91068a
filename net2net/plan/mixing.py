"""Residual channels that must be rotated, because neither copies nor means keep what their layer norms compute.

A wider stream can hold the teacher's channels and, beside them, their mean, which a layer norm does not see. But a norm
with weights that begins the stream turns the mean into a constant, and a norm over several positions at once sees how
the means differ. There the stream holds Q times the teacher's channels, where Q is an isometry that keeps means, and
every layer on the stream is multiplied by Q. A norm that begins the stream gets new weights, and before it stands
another isometry (`fill.isometry`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import used_differently
from ..record import Matrix, Mixed
from ..trace.facts import NO_NORM, Layer, LayerKind, Norm, NormKind
from ..trace.graph import Trace
from ..trace.units import in_order, rank
from .traces import Networks

TensorNames = tuple[str | None, str | None]  # of the weight and the bias of a norm

_FIRST_NORM = {"weight": Matrix.FIRST, "bias": Matrix.STREAM}  # the norm that begins a stream
_OTHER_NORM = {"weight": Matrix.OTHER, "bias": Matrix.BIAS}


@dataclass(frozen=True)
class Stream:
    """A stream of the student's that is rotated."""

    first: Norm | None  # the norm that begins it, if one does
    begins: str | None  # the teacher's weight of that norm
    norms: dict[str, Norm]  # the teacher's other norms on it, by the names of the student's
    units: Tensor  # the student's roots of its channels
    theirs: Tensor  # the teacher's roots of its channels

    def holds(self, roots: Tensor) -> bool:
        """Tell whether any of these roots is a channel of the stream."""
        return bool(torch.isin(roots, self.units).any())


def find_streams(networks: Networks, passing: Collection[str]) -> list[Stream]:
    """Find the streams that have to be rotated, and can be: none of the layers `passing` units through is on them."""
    # Layer norms read them, they grow by no whole number, and a norm begins them or sees several of their positions.
    found: list[Stream] = []
    roots, student = networks.student_roots, networks.student
    for norm in student.norms:
        theirs, first = networks.teacher_norm(norm), None
        if theirs is None or norm.kind != NormKind.LAYER or len(norm.units) > 1:
            continue
        if norm.padded and "weight" in norm.tensors:
            first = norm
        elif norm.padded or norm.first_norm != NO_NORM:
            continue
        units, others = in_order(roots[norm.units[0]]), in_order(networks.teacher_roots[theirs.units[0]])
        behind = [other for other in student.norms if other.first_norm == (norm.name if first else NO_NORM)]
        behind = [other for other in behind if bool(torch.isin(roots[other.units], units).all())]
        if not behind or len(units) % len(others) == 0 or any(one.holds(units) for one in found):
            continue
        counterparts = {other.name: networks.teacher_norm(other) for other in behind}
        norms = {name: other for name, other in counterparts.items() if other is not None}
        stream = Stream(first, theirs.tensors["weight"] if first else None, norms, units, others)
        if _can_rotate(networks, stream, {other.name: other for other in behind}, passing):
            found.append(stream)
    return found


def _can_rotate(networks: Networks, stream: Stream, behind: dict[str, Norm], passing: Collection[str]) -> bool:
    """Tell whether everything on the stream is linear in it, or a layer norm over all of it."""
    # `behind` are the student's norms on the stream but for the one that begins it.
    trace, roots = networks.student, networks.student_roots
    every = behind if stream.first is None else behind | {stream.first.name: stream.first}

    def on(labels: Tensor | None) -> bool:
        return labels is not None and stream.holds(roots[labels])

    layers = [layer for layer in trace.layers.values() if on(layer.reads) or on(layer.produces)]
    tensors = {tensor for layer in layers for tensor in layer.tensors.values()}
    elsewhere = [labels for name, axes in trace.parameters.axes.items() if name not in tensors for labels in axes]
    elsewhere += [labels for name, labels in trace.parameters.values.items() if name not in tensors]
    elsewhere += [labels for pair in networks.student_units.relations.values() for labels in pair]
    elsewhere += [side for c in trace.contractions for side in (c.left, c.right)]
    elsewhere += [labels for labels, _ in networks.student_units.pinned]
    elsewhere += [norm.units for norm in trace.norms if norm.kind != NormKind.LAYER or norm.name not in every]
    affine = [(name, norm) for norm in every.values() for name in norm.tensors.values()]
    return (
        not any(on(labels) for labels in elsewhere)
        and all(len(n.units) == 1 and _even(stream, roots[n.units]) and not n.offset for n in every.values())
        and all(trace.parameters.tensors[name].shape == norm.units.shape[1:] for name, norm in affine)
        and all(
            layer.name in every if layer.kind == LayerKind.NORM else _is_linear(networks, stream, layer, behind)
            for layer in layers
        )
        and not any(layer.name in passing for layer in layers)
    )


def _even(stream: Stream, roots: Tensor) -> bool:
    """Tell whether the roots are the channels of the stream, each equally often."""
    found, times = torch.unique(roots, return_counts=True)
    return torch.equal(found, torch.unique(stream.units)) and len(torch.unique(times)) == 1


def _is_linear(networks: Networks, stream: Stream, layer: Layer, behind: dict[str, Norm]) -> bool:
    """Tell whether a layer is linear in the stream, or in what a norm of `behind` makes of it."""
    trace, roots = networks.student, networks.student_roots
    if layer.kind != LayerKind.MIX or layer.name in trace.parameters.inner or layer.options.get("embedding"):
        return False
    if not layer.tensors.keys() <= {"weight", "bias"}:
        return False
    sides = [roots[labels] for labels in (layer.reads, layer.produces) if labels is not None]
    if not all(_even(stream, side) for side in sides if stream.holds(side)):
        return False
    if layer.reads is None or not stream.holds(roots[layer.reads]):
        return True
    norm = behind.get(layer.first_norm or "")
    if norm is None:
        return layer.linear if stream.first is None else layer.first_norm == stream.first.name
    return layer.first_norm == layer.after_norm and norm.units.shape[1] in (len(stream.units), len(layer.reads))


def find_rotations(networks: Networks, streams: list[Stream]) -> dict[str, tuple[Mixed, ...]]:
    """Find the axes that streams rotate: for each tensor the one that reads a stream, and the one that produces one."""
    found: dict[str, tuple[Mixed, ...]] = defaultdict(tuple)
    for stream in streams:
        for layer in networks.student.layers.values():
            for name, dim, how, norm in _list_rotations(networks, stream, layer):
                if (other := networks.names[name]) is not None:
                    rows = _channels(networks.student, networks.student_roots, (name, dim), stream.units)
                    columns = _channels(networks.teacher, networks.teacher_roots, (other, dim), stream.theirs)
                    widths = len(stream.theirs), len(stream.units)
                    found[name] += (Mixed(dim, how, stream.begins, widths, norm, rows, columns),)
    return dict(found)


def _list_rotations(networks: Networks, stream: Stream, layer: Layer) -> Iterator[tuple[str, int, Matrix, TensorNames]]:
    """List the axes of a layer that a stream rotates, by which matrix, and the norm that the matrix takes in."""
    roots, read_axis = networks.student_roots, networks.student.parameters.read_axis
    first = "" if stream.first is None else stream.first.name
    if layer.kind == LayerKind.NORM and layer.name in {first, *stream.norms}:
        matrices = _FIRST_NORM if layer.name == first else _OTHER_NORM
        for role, name in layer.tensors.items():
            yield name, 0, matrices[role], (None, None)
    if layer.kind != LayerKind.MIX:
        return
    if layer.produces is not None and stream.holds(roots[layer.produces[:1]]):
        before = bool(first) and layer.name in networks.student.layers[first].sources
        for role, name in layer.tensors.items():
            dim = 0 if role == "bias" else 1 - read_axis[name]
            yield name, dim, Matrix.BEFORE if before else Matrix.STREAM, (None, None)
    if layer.reads is not None and stream.holds(roots[layer.reads[:1]]):
        norm = stream.norms.get(layer.first_norm or "")
        if norm is None:
            yield layer.name, read_axis[layer.name], Matrix.STREAM, (None, None)
        else:
            affine = norm.tensors.get("weight"), norm.tensors.get("bias")
            yield layer.name, read_axis[layer.name], Matrix.BEHIND, affine


def _channels(trace: Trace, roots: Tensor, axis: tuple[str, int], channels: Tensor) -> Tensor:
    """Return the channel of every entry of an axis; a channel's second entry is that of the second position."""
    name, dim = axis
    labels = trace.parameters.values.get(name, trace.parameters.axis_labels(name, dim))
    place = {root: k for k, root in enumerate(channels.tolist())}
    if labels is None or not place.keys() >= set(roots[labels].tolist()):
        raise used_differently(name)
    return torch.tensor([place[root] for root in roots[labels].tolist()]) + len(place) * rank(roots[labels])
