"""Decide what each layer that the teacher lacks becomes: an identity, a branch that adds zero, or fresh weights.

A unit does not pass through an identity unchanged if the activation behind the identity is not idempotent. A *sign
pair* does, where f(x) - f(-x) = slope * x for every x (SiLU, GELU, hard swish, softplus, ReLU, leaky ReLU): a new layer
of twice the width produces each unit and its negative, and the layer that reads them takes the difference. With two
activations in a row, four units are needed for each. A gate, as in squeeze-excite, is one number for all inputs if its
last layer gives zeros. The next layer undoes that number.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..errors import TransferError
from ..trace.activations import Bends
from ..trace.facts import Layer, LayerKind
from ..trace.graph import Trace
from ..trace.units import Units
from .names import Names, teacher_layer


@dataclass(frozen=True)
class Roles:
    """The names of the student's layers that the teacher lacks, by what they become."""

    identity: frozenset[str]  # pass their units through (paper, section 3.4)
    silent: frozenset[str]  # hold zeros: they end a branch that must add nothing to its stream, or shift such an end
    fresh: frozenset[str]  # keep their own weights, because all that reads them has zero weights


class _New:
    """The layers that only the student has, in the order of its forward pass."""

    def __init__(self, student: Trace, names: Names) -> None:
        self.names = names
        self.layers: dict[str, Layer] = {}
        self.readers: list[Layer] = []  # the student's other layers, which the teacher has, too
        for name, layer in student.layers.items():
            if layer.kind == LayerKind.OUTPUT or any(names[t] for t in layer.tensors.values() or [name]):
                self.readers.append(layer)
            else:
                self.layers[name] = layer
        # The new layers that read units and produce others, and those that add a number to each unit.
        self.mixers = {name for name, layer in self.layers.items() if layer.kind == LayerKind.MIX}
        self.shifts = {name for name, layer in self.layers.items() if "shift" in layer.tensors}

    def old_sources(self, layer: Layer) -> set[str]:
        """Return the teacher's names of what `layer` reads, without new layers."""
        # "input" has the same name in both networks.
        return {self.names.get(source) or source for source in layer.sources - self.mixers}

    @cached_property
    def origins(self) -> dict[str, set[str]]:
        """For each new layer the teacher's layers whose outputs it could hand on, also through other new layers."""
        found = {name: self.old_sources(layer) for name, layer in self.layers.items()}
        grows = True
        while grows:  # for two rounds, or more where a layer that is called again reads a later one
            before = sum(map(len, found.values()))
            for name, layer in self.layers.items():
                found[name].update(*(found[source] for source in layer.sources & self.mixers))
            grows = sum(map(len, found.values())) > before
        return found


def assign_roles(teacher: Trace, student: Trace, units: Units, names: Names, passing_all: bool) -> Roles:
    """Decide what each layer that only the student has becomes."""
    # A new layer is an identity if a layer of both networks needs an output that it no longer reads in the student, and
    # that the new layer can hand on. Otherwise the new layer is silent if its result joins a stream that other layers
    # carry. Else it is fresh: it is a new branch of a concatenation, or lies inside a silent branch.
    new = _New(student, names)
    identity = _needed_identities(teacher, new)
    if passing_all:
        kept = _units_of(new.readers, units)
        identity |= {name for name in new.mixers if not kept & _units_of([new.layers[name]], units)}
    # A norm is an identity if it is on the way of units that a reader needs, and not if it is on a silent branch alone.
    for reader in [*new.readers, *(new.layers[name] for name in identity)]:
        for name in reader.norms_since & new.layers.keys():
            if new.layers[name].sources - (new.mixers - identity) - new.shifts:
                identity.add(name)
    carried = _units_of((x for x in student.mixers if x.name not in new.layers or x.name in identity), units)
    idle = new.mixers - identity
    ends = {name for name in idle if carried & _units_of([new.layers[name]], units)}
    silent = {_branch_end(new, name) for name in ends}
    silent |= {name for name in new.shifts - identity if new.layers[name].sources & ends}  # else they would add
    return Roles(frozenset(identity), frozenset(silent), frozenset(new.layers.keys() - identity - silent))


def _units_of(layers: Iterable[Layer], units: Units) -> set[int]:
    """Return the roots of the units that layers produce."""
    return {root for layer in layers if layer.produces is not None for root in units.find(layer.produces).tolist()}


def _branch_end(new: _New, name: str) -> str:
    """Return the layer to set to zero where `name` ends a branch: a norm with a weight behind it, or `name` itself."""
    norms = [n for n, layer in new.layers.items() if layer.kind == LayerKind.NORM and layer.sources == {name}]
    return norms[-1] if norms and "weight" in new.layers[norms[-1]].tensors else name


def _needed_identities(teacher: Trace, new: _New) -> set[str]:
    """Find the new layers that must hand on what a layer of both networks needs to read."""
    identity: set[str] = set()
    order = {name: place for place, name in enumerate(new.layers)}

    def demand(reader: Layer, needed: set[str]) -> Iterator[tuple[Layer, set[str]]]:
        """Make identities of the earliest layers that hand on what `reader` needs; yield each with its own needs."""
        # The caller meets the needs of one identity before it asks for the next.
        for name in sorted(reader.sources & new.mixers, key=lambda name: (name not in identity, order[name])):
            met = new.origins[name] & needed
            needed = needed - met
            if met and name not in identity:
                identity.add(name)
                yield new.layers[name], met - new.old_sources(new.layers[name])

    for reader in new.readers:
        other = teacher.layers.get(teacher_layer(reader, new.names))
        if other is not None:
            waiting = [demand(reader, set(other.sources) - new.old_sources(reader))]
            while waiting:  # a recursion would go as deep as the network
                inner = next(waiting[-1], None)
                waiting.append(demand(*inner)) if inner else waiting.pop()
    return identity


def unite_passed(student: Trace, units: Units, identity: Collection[str], in_pairs: Collection[str]) -> None:
    """Unite each unit that an identity reads with the unit that it produces, unless they are in sign pairs."""
    for name in identity:
        layer = student.layers[name]
        if name in in_pairs or not layer.sources.isdisjoint(in_pairs):
            continue
        reads, produces = layer.reads, layer.produces
        if layer.kind == LayerKind.MIX and reads is not None and produces is not None and len(reads) == len(produces):
            units.unite(produces, reads)


def find_sign_pairs(layers: Iterable[Layer], passing: Collection[str], idle: Collection[str]) -> dict[str, Bends]:
    """Find the activations that units of the new layers `passing` meet in sign pairs; `idle` readers do not count."""
    found: dict[str, Bends] = {}
    for layer in layers:
        if layer.kind not in (LayerKind.MIX, LayerKind.OUTPUT) or layer.name in idle:
            continue
        whole = all(carrier in passing for carrier, _ in layer.passage.bends) and layer.norms_since <= set(passing)
        met = layer.passage.bends if layer.passage.bends and whole else ()
        for source in layer.sources & set(passing):
            mine = met if met and met[0][0] == source else ()
            if found.setdefault(source, mine) != mine:
                raise TransferError(f"The units of the new {source} are read both before an activation and behind it.")
    found = {source: met for source, met in found.items() if met}
    if not found:
        raise TransferError("No new layer passes its units on through an activation that lets pairs pass.")
    return found
