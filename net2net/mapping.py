"""g: which teacher unit each student unit copies, and what becomes of the layers that the teacher lacks.

The paper's Algorithm 1 keeps one mapping a layer consistent by hand. Here units that meet anywhere in the network
are one unit (`Trace.roots`), so one array from student units to teacher units is consistent by construction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import TransferError
from .units import Layer, Trace

Rename = Mapping[str, str] | Callable[[str], str | None] | None

NEW = -1  # a student unit that no teacher unit corresponds to


@dataclass(frozen=True)
class Plan:
    """How a student is filled: decided before a single weight is written.

    `teacher_of` maps each student unit (its root label) to the teacher unit (root) that it copies, or to `NEW`.
    `names` maps each student tensor to its teacher's counterpart, or to None. `identity`, `silent` and `fresh` name
    the student's layers that the teacher lacks: those that pass their units through, those that end a branch
    which must add nothing, and those that are read with zero weights only.
    """

    teacher: Trace
    student: Trace
    teacher_roots: Tensor
    student_roots: Tensor
    teacher_of: Tensor
    names: dict[str, str | None]
    identity: frozenset[str]
    silent: frozenset[str]
    fresh: frozenset[str]

    def student_units(self, name: str, dim: int) -> Tensor | None:
        """For each entry of a student tensor's axis its unit; None if not followed."""
        units = _axis(self.student, name, dim)
        return None if units is None else self.student_roots[units]

    def teacher_units(self, name: str, dim: int) -> Tensor | None:
        """For each entry of a teacher tensor's axis its unit; None if not followed."""
        units = _axis(self.teacher, name, dim)
        return None if units is None else self.teacher_roots[units]


def _axis(trace: Trace, name: str, dim: int) -> Tensor | None:
    return trace.axes[name][dim] if name in trace.axes else None


def teacher_names(student: Trace, teacher: Trace, rename: Rename) -> dict[str, str | None]:
    """The teacher's name of every student tensor, None where the teacher has no such tensor.

    Normalisations without tensors go by their modules' names, and are among the keys.
    `rename` is a function of the student's name, or a dict from student prefixes (whole dotted parts) to
    teacher prefixes, the longest that fits; a prefix that maps to "" marks a layer that the teacher lacks.
    """
    convert = rename if callable(rename) else _by_prefix(rename or {})
    names = {name: convert(name) for name in student.tensors}
    found = {name: teacher.first_names.get(theirs) if theirs else None for name, theirs in names.items()}
    if lost := set(teacher.tensors) - set(found.values()):
        first = next(name for name in teacher.tensors if name in lost)
        raise TransferError(
            f"The student has no counterpart of the teacher's {first} ({len(lost)} tensors in all): a student keeps "
            "every layer of its teacher. If it goes by another name, pass rename={'student.prefix': 'teacher.prefix'}."
        )
    for name in [layer.name for layer in student.layers.values() if layer.kind == "norm" and not layer.tensors]:
        theirs = convert(name)
        found[name] = theirs if theirs in teacher.layers else None
    return found


def _by_prefix(rename: Mapping[str, str]) -> Callable[[str], str | None]:
    prefixes = sorted(rename.items(), key=lambda item: -len(item[0]))

    def convert(name: str) -> str | None:
        for mine, theirs in prefixes:
            if name == mine or name.startswith(mine + "."):
                return theirs + name[len(mine) :] if theirs else None
        return name

    return convert


def plan(teacher: Trace, student: Trace, rename: Rename, generator: torch.Generator) -> Plan:
    """Decide which teacher unit every student unit copies (paper, section 3.3) and what each new layer becomes.

    Raises TransferError where the student is smaller than its teacher, or where units would have to grow that an
    operation pins; the message names the layer, and by how much or why.
    """
    names = teacher_names(student, teacher, rename)
    choice = _Choice(teacher, student, names, generator)
    shared = [layer for layer in student.layers.values() if layer.kind == "mix" and names[layer.name]]
    for layer in shared:
        choice.pair(layer.name)  # refuses the first that is too small, in the order of the forward pass
    for layer in sorted(shared, key=lambda layer: student.tensors[layer.name].shape[0]):  # parts before their sum
        choice.keep(layer.name)
    roles = _roles(teacher, student, names)
    passing = [layer for layer in student.layers.values() if layer.name in roles["identity"] and layer.kind == "mix"]
    for layer in passing:
        choice.leave(layer.name)
    for layer in shared:
        choice.copy(layer.name)
    for layer in passing:
        choice.pass_through(layer)
    for layer in shared:
        choice.check(layer.name)
    choice.check_pins()
    return Plan(
        teacher,
        student,
        choice.teacher_roots,
        choice.roots,
        choice.g,
        names,
        **{role: frozenset(layers) for role, layers in roles.items()},
    )


class _Choice:
    """The mapping while it is being made: `g` maps student roots to teacher roots."""

    def __init__(
        self, teacher: Trace, student: Trace, names: dict[str, str | None], generator: torch.Generator
    ) -> None:
        self.teacher, self.student, self.names, self.generator = teacher, student, names, generator
        self.teacher_roots, self.roots = teacher.roots(), student.roots()
        self.g = torch.full((len(self.roots),), NEW)
        self.narrowest = torch.full((len(self.roots),), len(self.roots))  # of the layers that a unit is in, the width

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The units that a layer which both networks have produces: student's roots, teacher's roots."""
        theirs = self.names[name]
        assert theirs is not None
        mine = _axis(self.student, name, 0)
        other = _axis(self.teacher, theirs, 0)
        if mine is None or other is None:
            raise TransferError(f"The forward pass uses {name} differently in the teacher and in the student.")
        if len(mine) < len(other):
            raise TransferError(
                f"The student is smaller than its teacher: {name} has {len(mine)} units, the teacher's {len(other)}, "
                f"{len(other) - len(mine)} too few. A student is at least as wide everywhere."
            )
        return self.roots[mine], self.teacher_roots[other]

    def keep(self, name: str) -> None:
        """g(j) = j for the first n units of a layer; units that an earlier layer brought in are not kept twice."""
        mine, theirs = self.pair(name)
        self.leave(name)
        free = _in_order(mine[self.g[mine] == NEW])
        missing = _in_order(theirs[~torch.isin(theirs, self.g[mine])])
        if len(free) < len(missing):
            raise TransferError(
                f"The student joins units of {name} with units that the teacher keeps apart, "
                "so no mapping of units serves both."
            )
        self.g[free[: len(missing)]] = missing

    def leave(self, name: str) -> None:
        """Leave the units of this layer to it, rather than to a wider layer that it is a part of."""
        mine = self.roots[self.student.axes[name][0]]
        self.narrowest[mine] = self.narrowest[mine].clamp(max=len(mine))

    def copy(self, name: str) -> None:
        """g(j) drawn uniformly from the n units, with replacement, for the others.

        Units that a narrower layer shares (a part of a concatenation that meets this layer) are left to that one.
        """
        mine, theirs = self.pair(name)
        self._draw(mine[self.narrowest[mine] == len(mine)], theirs)

    def check(self, name: str) -> None:
        """Every unit of a layer copies one of the same layer of the teacher."""
        self._consistent(*self.pair(name), name)

    def pass_through(self, layer: Layer) -> None:
        """The units of a layer that the teacher lacks are those that it reads, in the same order, then copies."""
        if layer.reads is None:
            raise TransferError(
                f"The new layer {layer.name} would have to pass on the network's input, or the result of an operation "
                "without a rule, which is not followed unit by unit."
            )
        mine = self.roots[self.student.axes[layer.name][0]]
        read = self.g[self.roots[layer.reads]]
        read = read[read != NEW]
        distinct = _in_order(read)
        if len(mine) < len(distinct):
            raise TransferError(
                f"The student is smaller than its teacher: the new layer {layer.name} has {len(mine)} units and "
                f"must pass {len(distinct)} through, {len(distinct) - len(mine)} too few."
            )
        first = read if len(mine) >= len(read) else distinct
        free = self.g[mine[: len(first)]] == NEW
        self.g[mine[: len(first)][free]] = first[free]
        self._draw(mine, distinct)
        self._consistent(mine, distinct, layer.name)

    def check_pins(self) -> None:
        """No pinned unit may be copied."""
        for trace, roots in ((self.student, self.roots), (self.teacher, self.teacher_roots)):
            why = {}
            for units, reason in trace.pins:
                for root in roots[units].tolist():
                    why.setdefault(root, reason)
            for name, theirs in self.names.items():
                layer = self.student.layers.get(name)
                if layer is None or layer.kind != "mix" or theirs is None:
                    continue
                mine, other = self.pair(name)
                pinned = [root for root in (mine if trace is self.student else other).tolist() if root in why]
                if len(mine) > len(other) and pinned:
                    raise TransferError(f"{name} cannot grow from {len(other)} to {len(mine)} units: {why[pinned[0]]}.")

    def _draw(self, mine: Tensor, theirs: Tensor) -> None:
        free = _in_order(mine[self.g[mine] == NEW])
        self.g[free] = theirs[torch.randint(len(theirs), (len(free),), generator=self.generator)]

    def _consistent(self, mine: Tensor, theirs: Tensor, name: str) -> None:
        if not bool(torch.isin(self.g[mine], theirs).all()):
            raise TransferError(
                f"Units of {name} meet units of another layer that copy another teacher unit; "
                "the teacher joins these layers differently."
            )


def _in_order(values: Tensor) -> Tensor:
    """The distinct values in the order in which they first occur."""
    return torch.tensor(list(dict.fromkeys(values.tolist())), dtype=torch.long)


def _roles(teacher: Trace, student: Trace, names: dict[str, str | None]) -> dict[str, set[str]]:
    """What each layer that only the student has becomes: identity, silent or fresh.

    A layer is an **identity** if a reader that the teacher has too lacks, in the student, the output of a layer which
    the new layer can hand on. Otherwise it is **silent** if it joins a stream that is carried already, and **fresh** if
    it does not (a new branch of a concatenation, the inside of a silent branch).
    """
    new = {
        layer.name: layer
        for layer in student.layers.values()
        if layer.kind != "output" and not any(names[t] for t in layer.tensors.values() or [layer.name])
    }
    mixers = {name for name, layer in new.items() if layer.kind == "mix"}

    def theirs(source: str) -> str:
        return names.get(source) or source  # "input" and outputs go by one name in both networks

    def origin(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The teacher's layers whose outputs a new layer could hand on, through other new layers too."""
        found = set()
        for source in new[name].sources - seen:
            found |= origin(source, seen | {name}) if source in mixers else {theirs(source)}
        return found

    identity: set[str] = set()
    order = {name: position for position, name in enumerate(student.layers)}

    def demand(reader: Layer, needed: set[str]) -> None:
        """Make identities of the layers that hand on what `reader` needs: each need is met once, by the earliest."""
        for name in sorted(reader.sources & mixers, key=lambda name: (name not in identity, order[name])):
            met = origin(name) & needed
            needed = needed - met
            if met and name not in identity:
                identity.add(name)
                demand(new[name], met)

    readers = [layer for layer in student.layers.values() if layer.name not in new]
    for reader in readers:
        other = teacher.layers.get(_layer_name(reader, names))
        if other is not None:
            demand(reader, set(other.sources) - {theirs(s) for s in reader.sources if s not in mixers})

    # A normalisation is an identity if it lies on the way of units that a reader needs; it ends a silent branch if
    # it sees that branch alone.
    carrying = lambda layer: layer.sources - (mixers - identity)  # noqa: E731 (a definition, not a step)
    for reader in [*readers, *(new[name] for name in identity)]:
        for name in reader.via & set(new):
            if carrying(new[name]):
                identity.add(name)

    roots = student.roots()
    carried = {
        root
        for layer in student.layers.values()
        if layer.kind == "mix" and (layer.name not in new or layer.name in identity)
        for root in roots[student.axes[layer.name][0]].tolist()
    }
    silent = set()
    for name in mixers - identity:
        if carried & set(roots[student.axes[name][0]].tolist()):
            norms = [n for n, layer in new.items() if layer.kind == "norm" and layer.sources == {name}]
            silent.add(norms[-1] if norms and "weight" in new[norms[-1]].tensors else name)
    return {"identity": identity, "silent": silent, "fresh": set(new) - identity - silent}


def _layer_name(layer: Layer, names: dict[str, str | None]) -> str:
    if layer.kind == "output":
        return layer.name
    for name in layer.tensors.values():
        if (theirs := names[name]) is not None:
            return theirs if layer.kind == "mix" else theirs.rpartition(".")[0]
    return names.get(layer.name) or layer.name
