"""Streams whose channels are mixed, where copies and means do not serve the layer norms that read them.

A wider stream can hold the teacher's channels and, beside them, their mean, which a layer norm does not see. But a
norm with weights that begins the stream makes a constant of what holds the mean, and a norm over several positions at
once sees how the means differ. There the stream holds Q times the teacher's channels, an isometry that keeps means, and
every layer on it is multiplied by Q; a norm that begins it is given new weights, and before it stands another isometry
(`frames`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import used_differently
from ..record import Matrix, Mixed
from ..trace.facts import NO_NORM, Key, Layer, Norm
from ..trace.graph import Trace
from ..trace.units import Units, in_order


@dataclass(frozen=True)
class Stream:
    """A stream of the student's that is mixed: the norm that begins it, if one does, and the teacher's; the teacher's
    other norms on it by the names of the student's; the roots of its channels in both networks."""

    first: Norm | None
    begins: str | None
    norms: dict[str, Norm]
    units: Tensor
    theirs: Tensor


def streams(
    student: Trace,
    student_units: Units,
    roots: Tensor,
    teacher_roots: Tensor,
    counterparts: Mapping[Key, Norm],
    passing: Collection[str],
) -> list[Stream]:
    """The streams that have to be mixed and can be: those that layer norms read, that grow by no whole number, and that
    a norm begins or of which a norm sees several positions.

    `counterparts` are the teacher's norms by the keys of the student's, `passing` the new layers that hand on units.
    """
    found: list[Stream] = []
    for norm in student.norms:
        theirs, first = counterparts.get(norm.key), None
        if theirs is None or norm.kind != "layer" or len(norm.units) > 1:
            continue
        if norm.padded and "weight" in norm.tensors:
            first = norm
        elif norm.padded or norm.first_norm != NO_NORM:
            continue
        units, others = in_order(roots[norm.units[0]]), in_order(teacher_roots[theirs.units[0]])
        behind = [other for other in student.norms if other.first_norm == (norm.name if first else NO_NORM)]
        behind = [other for other in behind if bool(torch.isin(roots[other.units], units).all())]
        if not behind or len(units) % len(others) == 0 or any(torch.isin(units, one.units).any() for one in found):
            continue
        norms = {other.name: counterparts[other.key] for other in behind if other.key in counterparts}
        if _can(student, student_units, roots, first, units, {other.name: other for other in behind}, passing):
            found.append(Stream(first, theirs.tensors["weight"] if first else None, norms, units, others))
    return found


def _can(
    trace: Trace,
    related: Units,
    roots: Tensor,
    first: Norm | None,
    units: Tensor,
    norms: dict[str, Norm],
    passing: Collection[str],
) -> bool:
    """Whether everything on these units is linear in them, or a layer norm over all of them."""

    def on(labels: Tensor | None) -> bool:
        return labels is not None and bool(torch.isin(roots[labels], units).any())

    def serves(layer: Layer) -> bool:
        if layer.kind == "norm":
            return layer.name in every
        if layer.kind != "mix" or layer.name in trace.parameters.inner or layer.options.get("embedding"):
            return False
        if not layer.tensors.keys() <= {"weight", "bias"}:
            return False
        if not all(labels is None or even(labels) for labels in (layer.reads, layer.produces) if on(labels)):
            return False
        if layer.reads is None or not on(layer.reads):
            return True
        norm = norms.get(layer.first_norm or "")
        if norm is None:
            return layer.linear if first is None else layer.first_norm == first.name
        return layer.first_norm == layer.after_norm and norm.units.shape[1] in (len(units), len(layer.reads))

    def even(labels: Tensor) -> bool:
        """Whether there is every channel, equally often."""
        found, times = torch.unique(roots[labels], return_counts=True)
        return torch.equal(found, torch.unique(units)) and len(torch.unique(times)) == 1

    def whole(norm: Norm) -> bool:
        """Whether it sees one row of the channels, with an entry for each."""
        shapes = {tuple(trace.parameters.tensors[name].shape) for name in norm.tensors.values()}
        return len(norm.units) == 1 and even(norm.units) and shapes <= {(norm.units.shape[1],)}

    every = norms if first is None else norms | {first.name: first}
    layers = [layer for layer in trace.layers.values() if on(layer.reads) or on(layer.produces)]
    tensors = {tensor for layer in layers for tensor in layer.tensors.values()}
    elsewhere = [labels for name, axes in trace.parameters.axes.items() if name not in tensors for labels in axes]
    elsewhere += [labels for name, labels in trace.parameters.values.items() if name not in tensors]
    elsewhere += [labels for pair in related.relations.values() for labels in pair]
    elsewhere += [*(c.left for c in trace.contractions), *(labels for labels, _ in related.pinned)]
    elsewhere += [norm.units for norm in trace.norms if norm.kind != "layer" or norm.name not in every]
    return (
        not any(on(labels) for labels in elsewhere)
        and all(whole(norm) for norm in every.values())
        and all(serves(layer) for layer in layers)
        and not any(layer.name in passing for layer in layers)
    )


def mixed(
    stream: Stream,
    student: Trace,
    roots: Tensor,
    teacher: Trace,
    teacher_roots: Tensor,
    names: Mapping[str, str | None],
) -> list[tuple[str, Mixed]]:
    """What is mixed of all tensors on the stream that the teacher has, too, beside the name of the student's.

    Raises TransferError if the teacher uses one of them differently.
    """
    place = {root: k for k, root in enumerate(stream.units.tolist())}
    theirs = {root: k for k, root in enumerate(stream.theirs.tolist())}
    widths = len(theirs), len(place)
    first = "" if stream.first is None else stream.first.name
    before = student.layers[first].sources if first else frozenset()
    made: list[tuple[str, Mixed]] = []

    def add(name: str, dim: int, how: Matrix, norm: tuple[str | None, str | None] = (None, None)) -> None:
        other = names[name]
        if other is not None:
            rows = _places(roots[_labels(student, name, dim)], place, name)
            columns = _places(teacher_roots[_labels(teacher, other, dim)], theirs, name)
            made.append((name, Mixed(dim, how, stream.begins, widths, norm, rows, columns)))

    def inside(labels: Tensor | None) -> bool:
        return labels is not None and int(roots[labels[0]]) in place

    for layer in student.layers.values():
        if layer.kind == "norm" and layer.name in {first, *stream.norms}:
            for role, name in layer.tensors.items():
                begins = {"weight": Matrix.FIRST, "bias": Matrix.STREAM}
                add(
                    name,
                    0,
                    begins[role] if layer.name == first else {"weight": Matrix.OTHER, "bias": Matrix.BIAS}[role],
                )
        if layer.kind == "mix" and inside(layer.produces):
            for role, name in layer.tensors.items():
                dim = 0 if role == "bias" else 1 - student.parameters.read_axis[name]
                add(name, dim, Matrix.BEFORE if layer.name in before else Matrix.STREAM)
        if layer.kind == "mix" and inside(layer.reads):
            norm = stream.norms.get(layer.first_norm or "")
            tensors = (None, None) if norm is None else (norm.tensors.get("weight"), norm.tensors.get("bias"))
            how = Matrix.STREAM if norm is None else Matrix.BEHIND
            add(layer.name, student.parameters.read_axis[layer.name], how, tensors)
    return made


def _labels(trace: Trace, name: str, dim: int) -> Tensor:
    if name in trace.parameters.values:  # of a norm
        return trace.parameters.values[name]
    labels = trace.parameters.axes[name][dim] if name in trace.parameters.axes else None
    if labels is None:
        raise used_differently(name)
    return labels


def _places(units: Tensor, place: dict[int, int], name: str) -> Tensor:
    """For every entry its channel's place, and for the second entry of a channel that of the second position."""
    seen = torch.zeros(len(place), dtype=torch.long)
    found = []
    for unit in units.tolist():
        if unit not in place:
            raise used_differently(name)
        k = place[unit]
        found.append(k + len(place) * int(seen[k]))
        seen[k] += 1
    return torch.tensor(found)
