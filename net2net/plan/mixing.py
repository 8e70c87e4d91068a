"""Find the streams whose channels must be rotated, because copies and means would change what layer norms compute.

A stream is the sum that residual connections carry. A wider stream usually holds the teacher's channels and, in the
further channels, their mean: a layer norm centres that to zero. This fails in two cases. A norm with weights that
begins the stream turns the mean into a constant, and a norm over several positions at once sees that their means
differ. The student's stream then holds Q times the teacher's channels, where Q is an isometry that keeps means, and
every layer on the stream is multiplied by Q. A norm that begins the stream gets new weights and another isometry in
front of it (`fill.isometry`).
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

TensorNames = tuple[str | None, str | None]  # the names of a norm's weight and bias

_FIRST_NORM = {"weight": Matrix.FIRST, "bias": Matrix.STREAM}  # the norm that begins a stream
_OTHER_NORM = {"weight": Matrix.OTHER, "bias": Matrix.BIAS}


@dataclass(frozen=True)
class Stream:
    """A stream that is rotated. An example is a stage of Swin, whose patch norm begins the first stream."""

    first: Norm | None  # the student's norm that begins it; None if sums of layers begin it
    begins: str | None  # the name of the teacher's weight of that norm
    norms: dict[str, Norm]  # the student's names of the other norms on it -> the teacher's norms
    units: Tensor  # the student's roots of its channels
    theirs: Tensor  # the teacher's roots of its channels

    def holds(self, roots: Tensor) -> bool:
        """Tell whether any of these roots is a channel of the stream."""
        return bool(torch.isin(roots, self.units).any())


def find_streams(networks: Networks, passing: Collection[str]) -> list[Stream]:
    """Find the streams that have to be rotated and can be. New layers that pass units through cannot be on them."""
    # Such a stream is read by layer norms and does not grow to a multiple of its width. Also, a norm with weights
    # begins it, or a norm on it sees several positions at once.
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
    # `behind` holds the student's norms on the stream, without the one that begins it.
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
    """Tell whether the roots are exactly the channels of the stream, each equally often."""
    found, times = torch.unique(roots, return_counts=True)
    return torch.equal(found, torch.unique(stream.units)) and len(torch.unique(times)) == 1


def _is_linear(networks: Networks, stream: Stream, layer: Layer, behind: dict[str, Norm]) -> bool:
    """Tell whether a layer is linear in the stream, or in the result of a norm of `behind`."""
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
    """Return, for each tensor on a stream, how the axes that read or produce the stream are rotated."""
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
    """List the axes of a layer that a stream rotates: tensor, axis, matrix, and the norm that the matrix includes."""
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
    """Return the channel of every entry of an axis; at the k-th of several positions k times the channels are added."""
    name, dim = axis
    labels = trace.parameters.values.get(name, trace.parameters.axis_labels(name, dim))
    place = {root: k for k, root in enumerate(channels.tolist())}
    if labels is None or not place.keys() >= set(roots[labels].tolist()):
        raise used_differently(name)
    return torch.tensor([place[root] for root in roots[labels].tolist()]) + len(place) * rank(roots[labels])
