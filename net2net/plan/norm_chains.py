"""Find new norms behind a norm of the teacher's. In a row, they can compute what that norm computes alone.

A norm without weights and with eps e1 maps a row v to z = (v - mean) / sqrt(var + e1). The mean of z is zero, and its
variance is var / (var + e1). A second norm, with eps e2, maps z to (v - mean) / sqrt((1 + e2) var + e1 e2). That is the
result of one norm with eps e1 e2 / (1 + e2), divided by sqrt(1 + e2). So k norms in a row with eps k e, 1, ..., 1 are
one norm with eps e, divided by sqrt(k). The weight of the last norm undoes this division. The same holds for RMS norms,
which take no mean.
"""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from ..trace.facts import Norm, NormKind
from ..trace.graph import Trace
from ..trace.units import Units
from .names import Names, teacher_layer


@dataclass(frozen=True)
class NormChains:
    """The student's norms that stand in a row for one norm of the teacher."""

    parts: dict[str, Norm] = field(default_factory=dict)  # norm of a row -> the teacher's norm with the eps to take
    factors: dict[str, float] = field(default_factory=dict)  # last norm of a row -> the factor of its weight
    names: Names = field(default_factory=dict)  # tensor of a row -> the teacher's; only the last norm has any


def find_norm_chains(teacher: Trace, student: Trace, units: Units, names: Names, idle: Collection[str]) -> NormChains:
    """Find the new norms that stand in a row with a norm of both networks; `idle` layers may read between them."""
    chains = NormChains()
    for row in _find_rows(student, units, idle):
        layers = [student.layers[norm.name] for norm in row]
        old = [k for k, layer in enumerate(layers) if any(names[t] for t in layer.tensors.values() or [layer.name])]
        for start, k, end in zip([0, *old[1:]], old, [*old[1:], len(row)], strict=False):
            name = teacher_layer(layers[k], names)
            theirs = [norm for norm in teacher.norms if norm.name == name]
            last = layers[end - 1].tensors
            if end - start == 1 or len(theirs) != 1 or not last.keys() >= {"weight", *layers[k].tensors}:
                continue
            count = end - start
            for position, norm in enumerate(row[start:end]):
                chains.parts[norm.name] = replace(theirs[0], eps=1.0 if position else theirs[0].eps * count)
            chains.factors[row[end - 1].name] = count**0.5
            moved = {last[role]: names[name] for role, name in layers[k].tensors.items()}
            chains.names.update(dict.fromkeys(layers[k].tensors.values()) | moved)
    return chains


def _find_rows(student: Trace, units: Units, idle: Collection[str]) -> list[list[Norm]]:
    """List the rows of norms that directly follow each other: at most idle layers are added between two of them."""
    calls = Counter(norm.name for norm in student.norms)
    single = {norm.name: norm for norm in student.norms if norm.name and calls[norm.name] == 1}
    readers = defaultdict(list)
    for layer in student.layers.values():
        for name in layer.normed_by if layer.name not in idle else ():
            readers[name].append(layer.name)
    behind: dict[str, Norm] = {}
    for name, norm in single.items():
        other = single.get(readers[name][0]) if len(readers[name]) == 1 else None
        if other is not None and other.first_norm == name and _is_alike(units, norm, other):
            behind[name] = other
    rows, inside = [], {norm.name for norm in behind.values()}
    for name in (name for name in single if name not in inside):
        row = [single[name]]
        while (norm := behind.get(row[-1].name)) is not None:
            row.append(norm)
        rows.append(row)
    return rows


def _is_alike(units: Units, norm: Norm, other: Norm) -> bool:
    """Tell whether two norms take the same statistic over the same units."""
    if norm.kind != other.kind or norm.units.shape != other.units.shape:
        return False
    mine, theirs = (units.find(one.units).sort(1).values for one in (norm, other))
    return norm.kind in (NormKind.LAYER, NormKind.RMS) and torch.equal(mine, theirs)
