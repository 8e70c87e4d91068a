"""g: which teacher unit each student unit copies, and what becomes of the layers that the teacher lacks.

The paper's Algorithm 1 keeps one mapping a layer consistent by hand. Here units that meet anywhere in the network
are one unit (`Trace.find`), so one array from student units to teacher units is consistent by construction. Units that
belong to others (to a group, a head) are chosen after those, inside what those copy; units of one layer that
different layers read (the halves of a shuffle) are chosen apart.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import TransferError, used_differently
from ..record import MEAN, NEW, ZERO
from ..trace.facts import Key, Layer, Norm
from ..trace.graph import Trace
from ..trace.groups import close
from ..trace.units import Units, in_order
from .mixing import Mixed, mixed, streams
from .sign_pairs import Bends, bends

Rename = Mapping[str, str] | Callable[[str], str | None] | None


class Unpaired(TransferError):
    """A layer of the teacher has no counterpart by name."""


@dataclass(frozen=True)
class Plan:
    """How a student is filled: decided before a single weight is written.

    `teacher_of` maps each student unit (its root label) to the teacher unit (root) that it copies, or to `NEW`, `ZERO`
    or `MEAN - k`. `names` maps each student tensor to its teacher's counterpart, or to None. `identity`, `silent` and
    `fresh` name the student's layers that the teacher lacks: those that pass their units through, those that end a
    branch which must add nothing, and those that are read with zero weights only. `rescaled` gives, for norms that see
    padding, the factor of their mean square; `eps` what modules with another eps than their teacher's must have.
    `bends` are the activations behind identities whose units pass them in pairs, `patterns` the signs of these units.
    `mixed` are axes whose units are mixtures of the teacher's, by the names of the tensors.
    """

    teacher: Trace
    student: Trace
    teacher_units: Units
    units: Units
    teacher_roots: Tensor
    student_roots: Tensor
    teacher_of: Tensor
    means: list[Tensor]
    names: dict[str, str | None]
    identity: frozenset[str]
    silent: frozenset[str]
    fresh: frozenset[str]
    rescaled: dict[Key, tuple[Norm, float]]
    eps: dict[str, float]
    bends: dict[str, Bends]
    patterns: Tensor
    mixed: dict[str, tuple[Mixed, ...]]


# -- names --------------------------------------------------------------------------------------------------------


def teacher_names(student: Trace, teacher: Trace, rename: Rename) -> dict[str, str | None]:
    """The teacher's name of every student tensor, None where the teacher has no such tensor.

    Normalisations without tensors go by their modules' names, and are among the keys.
    `rename` is a function of the student's name, or a dict from student prefixes (whole dotted parts) to
    teacher prefixes, the longest that fits; a prefix that maps to "" marks a layer that the teacher lacks.
    """
    convert = rename if callable(rename) else _by_prefix(rename or {})
    names = {name: convert(name) for name in student.parameters.tensors}
    found = {name: teacher.parameters.first_names.get(theirs) if theirs else None for name, theirs in names.items()}
    if lost := set(teacher.parameters.tensors) - set(found.values()):
        first = next(name for name in teacher.parameters.tensors if name in lost)
        raise Unpaired(
            f"The student has no counterpart of the teacher's {first} ({len(lost)} tensors in all): a student keeps "
            "every layer of its teacher. If it goes by another name, pass rename={'student.prefix': 'teacher.prefix'}."
        )
    for layer in student.layers.values():
        if layer.key is not None:
            theirs = str(replace(layer.key, where=convert(layer.key.where) or ""))
            found[layer.name] = theirs if theirs in teacher.layers else None
    return found


def _by_prefix(rename: Mapping[str, str]) -> Callable[[str], str | None]:
    prefixes = sorted(rename.items(), key=lambda item: -len(item[0]))

    def convert(name: str) -> str | None:
        for mine, theirs in prefixes:
            if name == mine or name.startswith(mine + "."):
                return theirs + name[len(mine) :] if theirs else None
        return name

    return convert


def key_names(names: dict[str, str | None]) -> Callable[[Key], Key | None]:
    """The teacher's key of what the student calls by a key: a tensor's or a module's name, then what it is."""
    modules = {}
    for mine, theirs in names.items():
        while mine and theirs is not None:
            mine, _, a = mine.rpartition(".")
            theirs, _, b = theirs.rpartition(".")
            if a != b and modules.get(mine, theirs) != theirs:
                break
            modules.setdefault(mine, theirs)

    def convert(key: Key) -> Key | None:
        if key.inside is not None:
            inner, outer = convert(replace(key, inside=None)), convert(key.inside)
            return None if inner is None or outer is None else replace(inner, inside=outer)
        if key.where in names:
            theirs = names[key.where]
            return None if theirs is None else replace(key, where=theirs)
        return replace(key, where=modules.get(key.where, key.where))

    return convert


# -- the plan -----------------------------------------------------------------------------------------------------


def plan(
    teacher: Trace,
    student: Trace,
    rename: Rename,
    generator: torch.Generator,
    passing_all: bool = False,
    paired: bool = False,
) -> Plan:
    """Decide which teacher unit every student unit copies (paper, section 3.3) and what each new layer becomes.

    With `passing_all` every new layer passes its units on that does not join a stream which is carried already: right
    for a block that works on a part of a stream, and shuffles it with the rest. With `paired` units pass activations
    behind new layers in pairs, where those have room for them.

    Raises TransferError where the student is smaller than its teacher, or where units would have to grow that an
    operation pins; the message names the layer, and by how much or why.
    """
    names = teacher_names(student, teacher, rename)
    units, teacher_units = (
        student.units.copy(),
        teacher.units.copy(),
    )  # another attempt begins with what the passes told
    roles = _roles(teacher, student, units, names, passing_all)
    idle = roles["silent"] | roles["fresh"]
    behind = bends(student.layers.values(), roles["identity"], idle) if paired else {}
    _unite_passed(student, units, roles["identity"], behind)
    choice = _Choice(teacher, student, teacher_units, units, names, generator, roles["identity"])
    shared = [layer for layer in student.layers.values() if layer.kind == "mix" and names[layer.name]]
    for layer in shared:
        choice.pair(layer.name)  # refuses the first that is too small, in the order of the forward pass
    passing = [layer for layer in student.layers.values() if layer.name in roles["identity"] and layer.kind == "mix"]
    families = choice.families(shared)
    for level in sorted({family.level for family in families}):
        now = sorted((f for f in families if f.level == level), key=lambda f: f.width)  # parts before their sum
        for family in now:
            choice.keep(family)
        for layer in passing:
            if layer.produces is not None:
                choice.leave(choice.roots[layer.produces], len(layer.produces))
        for family in now:
            choice.copy(family)
    for layer in passing:
        choice.pass_through(layer, len(behind.get(layer.name, ())))
    for family in families:
        choice.check(family)
    choice.check_pins()
    rescaled, eps = choice.check_norms()
    return Plan(
        teacher,
        student,
        teacher_units,
        units,
        choice.teacher_roots,
        choice.roots,
        choice.g,
        choice.means,
        names,
        **{role: frozenset(layers) for role, layers in roles.items()},
        rescaled=rescaled,
        eps=eps,
        bends=behind,
        patterns=choice.patterns,
        mixed=choice.mixed(),
    )


@dataclass(frozen=True)
class _Family:
    """Units that came into being together in both networks: the student's roots and the teacher's.

    `level` says how many units above them they belong to; `width` how many there are with those of other levels.
    """

    name: Key
    mine: Tensor
    theirs: Tensor
    level: int
    width: int


class _Choice:
    """The mapping while it is being made: `g` maps student roots to teacher roots."""

    def __init__(
        self,
        teacher: Trace,
        student: Trace,
        teacher_units: Units,
        units: Units,
        names: dict[str, str | None],
        generator: torch.Generator,
        passing: Collection[str],
    ) -> None:
        self.teacher, self.student, self.names, self.generator = teacher, student, names, generator
        self.units, self.teacher_units = units, teacher_units
        self.key = key_names(names)
        close(units)
        close(
            teacher_units,
            {other for key in units.relations if key.inside is not None and (other := self.key(key)) is not None},
        )
        self.teacher_roots, self.roots = teacher_units.roots(), units.roots()
        self.g = torch.full((len(self.roots),), NEW)
        self.patterns = torch.zeros_like(self.g)  # of units that pass activations in pairs: a bit for each sign
        self.narrowest = torch.full((len(self.roots),), len(self.roots))  # of the layers that a unit is in, the width
        self.means: list[Tensor] = []
        self.owners, self.teacher_owners = self._owners()
        self.readers, self.teacher_readers = self._readers()
        self.norm_kinds = self._norm_kinds()
        counterparts = {norm.key: other for norm in student.norms if (other := self._counterpart(norm)) is not None}
        self.streams = streams(student, units, self.roots, self.teacher_roots, counterparts, passing)
        self.mixing = torch.zeros(len(self.roots), dtype=torch.bool)
        for stream in self.streams:
            self.mixing[stream.units] = True

    # -- what a unit's copy must agree in ---------------------------------------------------------------------

    def _owners(self) -> tuple[dict[int, dict[Key, int]], dict[int, dict[Key, int]]]:
        """For every unit the units that it belongs to, by relations that both networks have, in the teacher's names."""
        mine: dict[int, dict[Key, int]] = defaultdict(dict)
        theirs: dict[int, dict[Key, int]] = defaultdict(dict)
        for key, (children, parents) in self.units.relations.items():
            other = self.key(key)
            if other is None or other not in self.teacher_units.relations:
                continue
            for child, parent in zip(self.roots[children].tolist(), self.roots[parents].tolist(), strict=True):
                if child != parent:
                    mine[child][other] = parent
            for child, parent in zip(
                *(self.teacher_roots[x].tolist() for x in self.teacher_units.relations[other]), strict=True
            ):
                if child != parent:
                    theirs[child][other] = parent
        return mine, theirs

    def _readers(self) -> tuple[Tensor, Tensor]:
        """For every unit a number that says which tensors of both networks it is an entry of."""
        generator = torch.Generator().manual_seed(0)
        mine, theirs = torch.zeros_like(self.roots), torch.zeros_like(self.teacher_roots)
        for name, other in self.names.items():
            if other is None or name not in self.student.parameters.axes or other not in self.teacher.parameters.axes:
                continue
            for a, b in zip(self.student.parameters.axes[name], self.teacher.parameters.axes[other], strict=False):
                if a is not None and b is not None:
                    number = int(torch.randint(2**62, (), generator=generator))
                    mine[torch.unique(self.roots[a])] += number
                    theirs[torch.unique(self.teacher_roots[b])] += number
        for numbers, owners in ((mine, self.owners), (theirs, self.teacher_owners)):
            members: dict[int, set[int]] = defaultdict(set)
            for child, parents in owners.items():
                for parent in parents.values():
                    members[parent].add(int(numbers[child]))
            for parent, inside in members.items():  # a group is known by what is in it
                if not int(numbers[parent]):
                    numbers[parent] = sum(inside) % 2**62
        return mine, theirs

    def _norm_kinds(self) -> dict[int, set[str]]:
        """For every unit of the student the kinds of the norms across units that see it, if the teacher has them."""
        kinds: dict[int, set[str]] = defaultdict(set)
        for norm in self.student.norms:
            if norm.kind != "extreme" and self._counterpart(norm) is not None:
                for root in torch.unique(self.roots[norm.units]).tolist():
                    kinds[root].add(norm.kind if norm.padded else "even")
        return kinds

    def _counterpart(self, norm: Norm) -> Norm | None:
        key = self.key(norm.key)
        if any(self.names[tensor] is None for tensor in norm.tensors.values()):
            return None
        return next((other for other in self.teacher.norms if other.key == key), None)

    # -- families ---------------------------------------------------------------------------------------------

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The units that a layer which both networks have produces: student's roots, teacher's roots."""
        theirs = self.names[name]
        assert theirs is not None
        mine = self.student.layers[name].produces
        other = self.teacher.layers[theirs].produces if theirs in self.teacher.layers else None
        if mine is None or other is None:
            raise used_differently(name)
        if len(mine) < len(other):
            raise TransferError(
                f"The student is smaller than its teacher: {name} has {len(mine)} units, the teacher's {len(other)}, "
                f"{len(other) - len(mine)} too few. A student is at least as wide everywhere."
            )
        return self.roots[mine], self.teacher_roots[other]

    def families(self, shared: Iterable[Layer]) -> list[_Family]:
        """Every family that both networks have."""
        pairs = {Key(layer.name): self.pair(layer.name) for layer in shared}
        for key, labels in self.units.families.items():
            other = self.key(key)
            if other is not None and other in self.teacher_units.families:
                pairs[key] = (self.roots[labels], self.teacher_roots[self.teacher_units.families[other]])
        found = []
        for name, (mine, theirs) in pairs.items():
            depths = [
                torch.tensor([self._depth(unit, owners) for unit in units.tolist()])
                for units, owners in ((mine, self.owners), (theirs, self.teacher_owners))
            ]
            for level in torch.unique(depths[0]).tolist():
                alike = theirs[depths[1] == level]  # or, behind a new layer, what there belongs to something
                found.append(_Family(name, mine[depths[0] == level], alike if len(alike) else theirs, level, len(mine)))
        return found

    def _depth(self, unit: int, owners: dict[int, dict[Key, int]], below: tuple[int, ...] = ()) -> int:
        if unit not in owners:
            return 0
        above = {owner for owner in owners[unit].values() if owner not in below and owner != unit}
        return max((1 + self._depth(owner, owners, (*below, unit)) for owner in above), default=0)

    def _buckets(self, family: _Family) -> list[tuple[Tensor, Tensor]]:
        """The family in parts: the student's units that belong to the same and are read by the same, and those of the
        teacher that they may copy."""
        mine, theirs = family.mine, family.theirs
        both = [
            torch.unique(side[units]).tolist() for side, units in ((self.readers, mine), (self.teacher_readers, theirs))
        ]
        apart = len(both[1]) > 1 and set(both[1]) <= set(both[0])
        owned = not self.teacher_owners.keys().isdisjoint(theirs.tolist())
        if not apart and not owned:
            return [(mine, theirs)]
        parts: dict[tuple[frozenset[tuple[Key, int]], int], list[int]] = defaultdict(list)
        for unit in dict.fromkeys(mine.tolist()):
            readers = int(self.readers[unit]) if apart else 0
            parts[frozenset(self.owners.get(unit, {}).items()), readers].append(unit)
        found, distinct = [], list(dict.fromkeys(theirs.tolist()))
        by_key: dict[Hashable, dict[Hashable, list[int]]] = {}
        for (owners, readers), units in parts.items():
            keys = frozenset(key for key, _ in owners)
            if keys not in by_key:  # the teacher's units by what they belong to in these relations
                by_key[keys] = defaultdict(list)
                for unit in distinct:
                    theirs_of = self.teacher_owners.get(unit, {})
                    same = frozenset((key, theirs_of.get(key)) for key in keys)
                    by_key[keys][same, int(self.teacher_readers[unit]) if apart else 0].append(unit)
            copied = frozenset((key, int(self.g[owner])) for key, owner in owners)
            found.append((torch.tensor(units), torch.tensor(by_key[keys].get((copied, readers), []), dtype=torch.long)))
        return found

    # -- choosing ---------------------------------------------------------------------------------------------

    def keep(self, family: _Family) -> None:
        """g(j) = j for the first n units of a layer; units that an earlier layer brought in are not kept twice."""
        self.leave(family.mine, family.width)
        for mine, theirs in self._buckets(family):
            free = in_order(mine[self.g[mine] == NEW])
            missing = in_order(theirs[~torch.isin(theirs, self.g[mine])])
            if len(free) < len(missing):
                raise TransferError(
                    f"The student joins units of {_said(family.name)} with units that the teacher keeps apart, "
                    "so no mapping of units serves both."
                )
            self.g[free[: len(missing)]] = missing

    def leave(self, mine: Tensor, width: int) -> None:
        """Leave the units of this layer to it, rather than to a wider layer that it is a part of."""
        self.narrowest[mine] = self.narrowest[mine].clamp(max=width)

    def copy(self, family: _Family) -> None:
        """g(j) drawn uniformly from the n units, with replacement, for the others.

        Units that a narrower layer shares (a part of a concatenation that meets this layer) are left to that one.
        """
        for mine, theirs in self._buckets(family):
            self._draw(mine[self.narrowest[mine] == family.width], mine, theirs)

    def _draw(self, mine: Tensor, among: Tensor, theirs: Tensor) -> None:
        """Give each free unit of `mine` a teacher's: drawn; in equal numbers, or padding, where a norm asks for it."""
        free, theirs = in_order(mine[(self.g[mine] == NEW) & ~self.mixing[mine]]), in_order(theirs)
        if not len(free) or not len(theirs):
            return
        kinds = set().union(*(self.norm_kinds.get(unit, set()) for unit in free.tolist()))
        among = in_order(among)
        if not kinds:
            self.g[free] = theirs[torch.randint(len(theirs), (len(free),), generator=self.generator)]
        elif len(among) % len(theirs) == 0:
            each = len(among) // len(theirs)
            left = each - (self.g[among][:, None] == theirs[None, :]).sum(0)
            pool = theirs.repeat_interleave(left.clamp(min=0))
            self.g[free] = pool[torch.randperm(len(pool), generator=self.generator)][: len(free)]
        elif kinds == {"rms"}:
            self.g[free] = ZERO
        elif kinds == {"layer"}:
            self.means.append(theirs)
            self.g[free] = MEAN - (len(self.means) - 1)
        else:
            self.g[free] = theirs[torch.randint(len(theirs), (len(free),), generator=self.generator)]

    def pass_through(self, layer: Layer, bends: int) -> None:
        """The units of a layer that the teacher lacks are those that it reads, in the same order, then copies; before
        activations that pairs pass, each with every pattern of signs."""
        if layer.reads is None:
            raise TransferError(f"The new layer {layer.name} would have to pass on what is not followed unit by unit.")
        mine = self.roots[layer.produces]
        read = self.g[self.roots[layer.reads]]
        read = read[read != NEW]
        distinct = in_order(read)
        if len(mine) < len(distinct):
            raise TransferError(
                f"The student is smaller than its teacher: the new layer {layer.name} has {len(mine)} units and "
                f"must pass {len(distinct)} through, {len(distinct) - len(mine)} too few."
            )
        if bends:
            if len(mine) < len(distinct) << bends:
                raise TransferError(
                    f"The new layer {layer.name} has {len(mine)} units and must pass {len(distinct)} on through an "
                    f"activation that is not idempotent: that takes {2**bends} for each."
                )
            place = torch.arange(len(mine))
            self.g[mine], self.patterns[mine] = distinct[place % len(distinct)], place // len(distinct) % 2**bends
        first = read if len(mine) >= len(read) else distinct
        free = self.g[mine[: len(first)]] == NEW
        self.g[mine[: len(first)][free]] = first[free]
        self._draw(mine, mine, distinct)
        self._consistent(mine, distinct, Key(layer.name))

    # -- checking ---------------------------------------------------------------------------------------------

    def check(self, family: _Family) -> None:
        """Every unit copies one of the same family of the teacher, and belongs to a copy of what that belongs to."""
        self._consistent(family.mine, family.theirs, family.name)
        for unit in set(family.mine.tolist()) & self.owners.keys():
            theirs = self.teacher_owners.get(int(self.g[unit]), {})
            for key, owner in self.owners[unit].items():
                if key in theirs and int(self.g[unit]) >= 0 and int(self.g[owner]) != theirs[key]:
                    raise TransferError(
                        f"Units of {_said(family.name)} would be copied into another group or head than the one that "
                        "they belong to: no mapping of units serves all groupings of the student."
                    )

    def check_pins(self) -> None:
        """No pinned unit may be copied."""
        for trace, roots in ((self.student, self.roots), (self.teacher, self.teacher_roots)):
            why = {}
            for labels, reason in trace.units.pinned:
                for root in roots[labels].tolist():
                    why.setdefault(root, reason)
            for name, theirs in self.names.items():
                layer = self.student.layers.get(name)
                if layer is None or layer.kind != "mix" or theirs is None:
                    continue
                mine, other = self.pair(name)
                pinned = [root for root in (mine if trace is self.student else other).tolist() if root in why]
                if len(mine) > len(other) and pinned:
                    raise TransferError(f"{name} cannot grow from {len(other)} to {len(mine)} units: {why[pinned[0]]}.")

    def check_norms(self) -> tuple[dict[Key, tuple[Norm, float]], dict[str, float]]:
        """Every norm across units sees all units of the teacher's equally often, or with padding that it can undo."""
        rescaled, eps = {}, {}
        for layer in self.student.layers.values():
            other = self.teacher.layers.get(_layer_name(layer, self.names)) if "eps" in layer.options else None
            if other is not None and other.options.get("eps") != layer.options["eps"]:
                eps[layer.options["module"]] = other.options["eps"]
        for norm in self.student.norms:
            other = self._counterpart(norm)
            if other is None:
                continue
            if bool(self.mixing[self.roots[norm.units]].all()):
                eps[norm.module] = other.eps * other.units.shape[1] / norm.units.shape[1]
                continue
            factors = {self._factor(norm, other, group) for group in self.g[self.roots[norm.units]]}
            if len(factors) > 1:
                raise TransferError(f"The groups of {norm.module} grow by different factors, and have one eps.")
            if (factor := factors.pop()) != 1.0:
                rescaled[norm.key] = (norm, factor)
            if norm.eps != other.eps * factor:
                eps[norm.module] = other.eps * factor
        return rescaled, eps

    def _factor(self, norm: Norm, other: Norm, group: Tensor) -> float:
        """By what the mean square of the norm's input is smaller than the teacher's."""
        for theirs in self.teacher_roots[other.units]:
            wanted, times = torch.unique(theirs, return_counts=True)
            if int(torch.isin(group, wanted).sum()) == 0:
                continue
            seen = (group[:, None] == wanted[None, :]).sum(0) / times
            padding = group[~torch.isin(group, wanted)]
            if norm.kind == "extreme" and bool((seen > 0).all()) and not len(padding):
                return 1.0  # however often each is seen
            fits = padding == ZERO if norm.kind == "rms" else torch.isin(padding, self._means_of(wanted))
            if len(torch.unique(seen)) == 1 and float(seen[0]) > 0 and bool(fits.all()):
                return 1.0 - len(padding) / len(group)
            or_means = ", or if means can be added to them, which the layers before it cannot do" * (
                norm.kind == "layer"
            )
            what = norm.kind if norm.kind in ("mean", "extreme") else "norm"
            needs = (
                "the largest or smallest of all units, and some are new here"
                if what == "extreme"
                else f"the mean over all units, which stays what it is only if each is copied equally often{or_means}"
            )
            raise TransferError(
                f"The {what} {norm.module or 'in the network'} has {len(group)} units and its teacher "
                f"{len(theirs)}: it takes {needs}."
            )
        raise TransferError(f"The norm {norm.module} sees none of the units that its teacher sees.")

    def mixed(self) -> dict[str, tuple[Mixed, ...]]:
        """What is mixed of every tensor: the axis that reads one stream, and the one that produces another."""
        found: dict[str, tuple[Mixed, ...]] = defaultdict(tuple)
        for stream in self.streams:
            made = mixed(stream, self.student, self.roots, self.teacher, self.teacher_roots, self.names)
            for name, one in made:
                found[name] += (one,)
        return dict(found)

    def _means_of(self, units: Tensor) -> Tensor:
        """The codes of the means over exactly these units."""
        found = [MEAN - k for k, mean in enumerate(self.means) if torch.equal(torch.sort(mean).values, units)]
        return torch.tensor(found, dtype=torch.long)

    def _consistent(self, mine: Tensor, theirs: Tensor, name: Key) -> None:
        if not bool((torch.isin(self.g[mine], theirs) | (self.g[mine] < 0)).all()):
            raise TransferError(
                f"Units of {_said(name)} meet units of another layer that copy another teacher unit; "
                "the teacher joins these layers differently."
            )


def _said(key: Key) -> str:
    """A key as a reader of an error knows it."""
    return key.where or "the network"


def _roles(
    teacher: Trace, student: Trace, units: Units, names: dict[str, str | None], passing_all: bool
) -> dict[str, set[str]]:
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

    def origin(name: str) -> set[str]:
        """The teacher's layers whose outputs a new layer could hand on, through other new layers too."""
        found, passed, waiting = set(), set(), [name]
        while waiting:
            passed.add(layer := waiting.pop())
            found |= {theirs(source) for source in new[layer].sources - mixers}
            waiting += (new[layer].sources & mixers) - passed
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
                demand(new[name], met - {theirs(source) for source in new[name].sources - mixers})

    readers = [layer for layer in student.layers.values() if layer.name not in new]
    for reader in readers:
        other = teacher.layers.get(_layer_name(reader, names))
        if other is not None:
            demand(reader, set(other.sources) - {theirs(s) for s in reader.sources if s not in mixers})

    if passing_all:
        roots = units.roots()
        kept = {root for layer in readers if layer.produces is not None for root in roots[layer.produces].tolist()}
        identity |= {name for name in mixers if not kept & set(roots[new[name].produces].tolist())}

    # A normalisation is an identity if it lies on the way of units that a reader needs; it ends a silent branch if
    # it sees that branch alone.
    carrying = lambda layer: layer.sources - (mixers - identity)  # noqa: E731 (a definition, not a step)
    for reader in [*readers, *(new[name] for name in identity)]:
        for name in reader.norms_since & set(new):
            if carrying(new[name]):
                identity.add(name)

    roots = units.roots()
    carried = {
        root
        for layer in student.layers.values()
        if layer.kind == "mix" and (layer.name not in new or layer.name in identity)
        for root in roots[layer.produces].tolist()
    }
    silent = set()
    for name in mixers - identity:
        if carried & set(roots[new[name].produces].tolist()):
            norms = [n for n, layer in new.items() if layer.kind == "norm" and layer.sources == {name}]
            silent.add(norms[-1] if norms and "weight" in new[norms[-1]].tensors else name)
    return {"identity": identity, "silent": silent, "fresh": set(new) - identity - silent}


def _unite_passed(student: Trace, units: Units, identity: set[str], bends: Collection[str]) -> None:
    """A new layer that is as wide as what it reads passes each entry on for itself: what reads it then, reads that."""
    for name in identity:
        layer = student.layers[name]
        if name in bends or not layer.sources.isdisjoint(bends):
            continue
        if layer.kind == "mix" and layer.reads is not None and layer.produces is not None:
            read = units.find(layer.reads)
            if len(read) == len(layer.produces):
                units.unite(layer.produces, layer.reads)


def _layer_name(layer: Layer, names: dict[str, str | None]) -> str:
    if layer.kind == "output":
        return layer.name
    for name in layer.tensors.values():
        if (theirs := names[name]) is not None:
            return theirs if layer.kind in ("mix", "scale") else theirs.rpartition(".")[0]
    return names.get(layer.name) or layer.name
