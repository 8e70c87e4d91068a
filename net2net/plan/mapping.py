"""g: which teacher unit each student unit copies (paper, section 3.3, Algorithm 1).

Algorithm 1 draws one mapping for each layer and keeps neighbouring layers consistent by hand. Here units that meet
anywhere in the network are one unit, so one array from student units to teacher units is consistent by construction:
its first n units are the teacher's own, and each further unit is drawn from those. Units that belong to larger units
(to a group, a head) are chosen after those, inside what those copy. Units of one layer that different layers read (the
halves of a shuffle) are chosen apart.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import TransferError
from ..record import MEAN, NEW, ZERO
from ..trace.facts import Key, Layer, NormKind
from ..trace.units import distinct_pairs, in_order
from .traces import Networks

EVEN = "even"  # what a norm asks of a layer: every teacher unit is copied equally often
ZEROS = "zeros"  # or that all others are zero, as a sum of squares is best kept

Kinds = dict[int, set[str]]
Owners = dict[int, dict[Key, int]]


@dataclass(frozen=True)
class Ties:
    """What the units of one network are tied to: a unit and its copy must agree in it."""

    owners: Owners  # unit -> relation (by the teacher's key; both networks have it) -> the larger unit it belongs to
    readers: Tensor  # for every unit a number that says which tensors of both networks it is an entry of


@dataclass(frozen=True)
class Family:
    """Units that came into being together in both networks."""

    name: str  # where they are in the student
    mine: Tensor  # the student's roots
    theirs: Tensor  # the teacher's roots
    level: int  # how many units above them they belong to
    width: int  # how many there are, together with those of other levels


@dataclass
class UnitMap:
    """g while it is being made."""

    networks: Networks
    ties: tuple[Ties, Ties]  # of the units of the student and of the teacher
    kinds: Kinds  # what norms ask of each unit's layer (see `norms.norm_kinds`)
    rotated: Tensor  # for every unit whether it is on a rotated stream, where nothing is copied
    generator: torch.Generator  # draws the copies
    g: Tensor  # for every student root the teacher root that it copies, or `NEW`, `ZERO` or `MEAN - k`
    patterns: Tensor  # of units that pass activations in pairs, a bit for the sign before each activation
    narrowest: Tensor  # for every unit the width of the narrowest layer that it is in
    fresh: bool  # whether further units are new, and not copies
    means: list[Tensor] = field(default_factory=list)  # the teacher units that the code `MEAN - k` is the mean of


def map_units(
    networks: Networks,
    passing: list[tuple[Layer, int]],
    kinds: Kinds,
    rotated: Tensor,
    generator: torch.Generator,
    fresh: bool = False,
) -> UnitMap:
    """Decide which teacher unit every student unit copies."""
    # `passing`: the new layers that pass units through, and how many activations their units pass in pairs.
    size = len(networks.student_roots)
    g, patterns, narrowest = torch.full((size,), NEW), torch.zeros(size, dtype=torch.long), torch.full((size,), size)
    unit_map = UnitMap(networks, _find_ties(networks), kinds, rotated, generator, g, patterns, narrowest, fresh)
    _spread_owners(unit_map)
    pairs = _pair_families(networks)
    families = [family for key, pair in pairs.items() for family in _split_by_level(unit_map, key, pair)]
    for level in sorted({family.level for family in families}):
        now = sorted((f for f in families if f.level == level), key=lambda f: f.width)  # parts before their sum
        for family in now:
            _keep(unit_map, family)
        for layer, _ in passing:
            if layer.produces is not None:
                units = networks.student_roots[layer.produces]
                narrowest[units] = narrowest[units].clamp(max=len(units))
        for family in now:  # draw g(j) for the others uniformly, with replacement; a narrower layer keeps its units
            for mine, theirs in _split_by_ties(unit_map, family):
                _draw(unit_map, mine[unit_map.narrowest[mine] == family.width], mine, theirs)
    for layer, activations in passing:
        _pass_through(unit_map, layer, activations)
    for family in families:
        _check_family(unit_map, family)
    _check_pins(networks, pairs)
    return unit_map


def _find_ties(networks: Networks) -> tuple[Ties, Ties]:
    mine: Owners = defaultdict(dict)
    theirs: Owners = defaultdict(dict)
    roots, teacher_roots = networks.student_roots, networks.teacher_roots
    relations, teacher_relations = networks.student_units.relations, networks.teacher_units.relations
    known: set[tuple[tuple[int, ...], ...]] = set()
    for key in relations:
        other = networks.convert(key)
        if other is None or other not in teacher_relations:
            continue
        sides = (roots, relations[key]), (teacher_roots, teacher_relations[other])
        pairs = tuple(tuple(distinct_pairs(of[a], of[b]).T.reshape(-1).tolist()) for of, (a, b) in sides)
        if pairs in known:  # as of most norms on the stream of a deep network
            continue
        known.add(pairs)
        for owners, numbers in zip((mine, theirs), pairs, strict=True):
            for child, parent in zip(numbers[::2], numbers[1::2], strict=True):
                if child != parent:
                    owners[child][other] = parent
    readers, teacher_readers = _find_readers(networks, mine, theirs)
    return Ties(mine, readers), Ties(theirs, teacher_readers)


def _spread_owners(unit_map: UnitMap) -> None:
    """Ask for equally many copies of owners (key heads, say) that have room for fewer units than their teacher's."""
    most: tuple[dict[Key, int], dict[Key, int]] = (defaultdict(int), defaultdict(int))
    sizes = [Counter(owner for held in each.owners.values() for owner in held.items()) for each in unit_map.ties]
    for found, counted in zip(most, sizes, strict=True):
        for (key, _), size in counted.items():
            found[key] = max(found[key], size)
    for key, parent in sizes[0]:
        if most[0][key] < most[1][key]:
            unit_map.kinds[parent].add(EVEN)


def _find_readers(networks: Networks, owners: Owners, teacher_owners: Owners) -> tuple[Tensor, Tensor]:
    """Number the sets of tensors that units are entries of; equal numbers in both networks are equal sets."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = torch.zeros_like(networks.student_roots), torch.zeros_like(networks.teacher_roots)
    axes, teacher_axes = networks.student.parameters.axes, networks.teacher.parameters.axes
    for name, other in networks.names.items():
        if other is None or name not in axes or other not in teacher_axes:
            continue
        for a, b in zip(axes[name], teacher_axes[other], strict=False):
            if a is not None and b is not None:
                number = int(torch.randint(2**62, (), generator=generator))
                mine[torch.unique(networks.student_roots[a])] += number
                theirs[torch.unique(networks.teacher_roots[b])] += number
    for numbers, belonging in ((mine, owners), (theirs, teacher_owners)):
        members: dict[int, set[int]] = defaultdict(set)
        for child, parents in belonging.items():
            for parent in parents.values():
                members[parent].add(int(numbers[child]))
        for parent, inside in members.items():  # a group is known by what is in it
            if not int(numbers[parent]):
                numbers[parent] = sum(inside) % 2**62
    return mine, theirs


def _pair_families(networks: Networks) -> dict[Key, tuple[Tensor, Tensor]]:
    """Pair the families that both networks have; refuse the first layer that is too narrow."""
    names = [layer.name for layer in networks.student.mixers]
    pairs = {Key(name): networks.produced(name) for name in names if networks.names[name]}
    for key, labels in networks.student_units.families.items():
        other = networks.convert(key)
        if other is not None and other in networks.teacher_units.families:
            theirs = networks.teacher_units.families[other]
            pairs[key] = (networks.student_roots[labels], networks.teacher_roots[theirs])
    return pairs


def _split_by_level(unit_map: UnitMap, key: Key, pair: tuple[Tensor, Tensor]) -> list[Family]:
    """Split the units of both networks that came into being together by how many units above them they belong to."""
    (mine, theirs), name = pair, key.where or "the network"
    levels, teacher_levels = (
        torch.tensor([_level(unit, ties.owners) for unit in units.tolist()], dtype=torch.long)
        for units, ties in zip(pair, unit_map.ties, strict=True)
    )
    found = []
    for level in torch.unique(levels).tolist():
        # Behind a new layer the student's units may belong to nothing where the teacher's do.
        same = theirs[teacher_levels == level]
        found.append(Family(name, mine[levels == level], same if len(same) else theirs, level, len(mine)))
    return found


def _level(unit: int, owners: Owners, below: tuple[int, ...] = ()) -> int:
    """Return how many units above it a unit belongs to."""
    if unit not in owners:
        return 0
    above = {owner for owner in owners[unit].values() if owner not in below and owner != unit}
    return max((1 + _level(owner, owners, (*below, unit)) for owner in above), default=0)


def _split_by_ties(unit_map: UnitMap, family: Family) -> list[tuple[Tensor, Tensor]]:
    """Split a family: the student's units with the same owners and readers, and the teacher's that they may copy."""
    ties, teacher_ties = unit_map.ties
    read, teacher_read = set(ties.readers[family.mine].tolist()), set(teacher_ties.readers[family.theirs].tolist())
    apart = len(teacher_read) > 1 and teacher_read <= read
    owned = not teacher_ties.owners.keys().isdisjoint(family.theirs.tolist())
    if not apart and not owned:
        return [(family.mine, family.theirs)]
    parts: dict[tuple[frozenset[tuple[Key, int]], int], list[int]] = defaultdict(list)
    for unit in dict.fromkeys(family.mine.tolist()):
        readers = int(ties.readers[unit]) if apart else 0
        parts[frozenset(ties.owners.get(unit, {}).items()), readers].append(unit)
    found = []
    choices: dict[frozenset[Key], dict[Hashable, list[int]]] = {}
    for (owners, readers), units in parts.items():
        keys = frozenset(key for key, _ in owners)
        if keys not in choices:
            choices[keys] = _group(family.theirs, keys, teacher_ties, apart)
        copied = frozenset((key, int(unit_map.g[owner])) for key, owner in owners)
        found.append((torch.tensor(units), torch.tensor(choices[keys].get((copied, readers), []), dtype=torch.long)))
    return found


def _group(units: Tensor, keys: frozenset[Key], ties: Ties, apart: bool) -> dict[Hashable, list[int]]:
    """Group units by their owners in the relations `keys`, and by their readers if those tell units `apart`."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for unit in dict.fromkeys(units.tolist()):
        owners = ties.owners.get(unit, {})
        same = frozenset((key, owners.get(key)) for key in keys)
        groups[same, int(ties.readers[unit]) if apart else 0].append(unit)
    return groups


def _keep(unit_map: UnitMap, family: Family) -> None:
    """Set g(j) = j for the first n units of a layer; units that an earlier layer brought in are not kept twice."""
    # Copies of an owner keep all of its units each, or, where they have room for fewer, together.
    unit_map.narrowest[family.mine] = unit_map.narrowest[family.mine].clamp(max=family.width)
    together = family.theirs[:0]
    for mine, theirs in _split_by_ties(unit_map, family):
        free = in_order(mine[unit_map.g[mine] == NEW])
        missing = in_order(theirs[~torch.isin(theirs, unit_map.g[mine])])
        if len(free) < len(missing):
            together = torch.cat([together, missing])
            missing = missing[~torch.isin(missing, unit_map.g[family.mine])][: len(free)]
        unit_map.g[free[: len(missing)]] = missing
    if lost := len(torch.unique(together[~torch.isin(together, unit_map.g[family.mine])])):
        if family.level:
            few = "those of one head or group stay in copies of it, and the student's are too small or too few"
            raise TransferError(f"{family.name} has no room for {lost} of its teacher's units: {few}.")
        joined = f"The student joins units of {family.name} with units that the teacher keeps apart"
        raise TransferError(f"{joined}, so no mapping of units serves both.")


def _draw(unit_map: UnitMap, units: Tensor, among: Tensor, theirs: Tensor) -> None:
    """Give each free unit one of the teacher's: drawn, or equally often `among` all or padding if a norm asks."""
    g = unit_map.g
    free, theirs = in_order(units[(g[units] == NEW) & ~unit_map.rotated[units]]), in_order(theirs)
    if not len(free) or not len(theirs):
        return
    kinds = set().union(*(unit_map.kinds.get(unit, set()) for unit in free.tolist()))
    among = in_order(among)
    if kinds == {ZEROS} and bool(torch.isin(theirs, g[among]).all()):
        g[free] = ZERO
    elif kinds and len(among) % len(theirs) == 0:
        left = len(among) // len(theirs) - (g[among][:, None] == theirs[None, :]).sum(0)
        pool = theirs.repeat_interleave(left.clamp(min=0))
        g[free] = pool[torch.randperm(len(pool), generator=unit_map.generator)][: len(free)]
    elif kinds and kinds <= {NormKind.RMS, ZEROS}:
        g[free] = ZERO
    elif kinds == {NormKind.LAYER}:
        unit_map.means.append(theirs)
        g[free] = MEAN - (len(unit_map.means) - 1)
    elif EVEN in kinds:
        counts = (g[among][:, None] == theirs[None, :]).sum(0)
        for unit in free.tolist():
            fewest = (counts == counts.min()).nonzero().flatten()
            chosen = fewest[torch.randint(len(fewest), (), generator=unit_map.generator)]
            g[unit], counts[chosen] = theirs[chosen], counts[chosen] + 1
    elif not unit_map.fresh:
        g[free] = theirs[torch.randint(len(theirs), (len(free),), generator=unit_map.generator)]


def _pass_through(unit_map: UnitMap, layer: Layer, activations: int) -> None:
    """Let a new layer produce the units that it reads, in the same order, and then copies of them."""
    # Before `activations` that units pass in pairs, it produces every unit with every pattern of signs.
    if layer.reads is None or layer.produces is None:
        raise TransferError(f"The new layer {layer.name} would have to pass on what is not followed unit by unit.")
    g, roots = unit_map.g, unit_map.networks.student_roots
    mine, read = roots[layer.produces], g[roots[layer.reads]]
    read = read[read != NEW]
    distinct = in_order(read)
    if len(mine) < len(distinct):
        raise TransferError(
            f"The student is smaller than its teacher: the new layer {layer.name} has {len(mine)} units and "
            f"must pass {len(distinct)} through, {len(distinct) - len(mine)} too few."
        )
    if activations:
        if len(mine) < len(distinct) << activations:
            raise TransferError(
                f"The new layer {layer.name} has {len(mine)} units and must pass {len(distinct)} on through an "
                f"activation that is not idempotent: that takes {2**activations} for each."
            )
        place = torch.arange(len(mine))
        g[mine], unit_map.patterns[mine] = distinct[place % len(distinct)], place // len(distinct) % 2**activations
    first = read if len(mine) >= len(read) else distinct
    free = g[mine[: len(first)]] == NEW
    g[mine[: len(first)][free]] = first[free]
    _draw(unit_map, mine, mine, distinct)
    _check_copies(unit_map, mine, distinct, layer.name)


def _check_copies(unit_map: UnitMap, mine: Tensor, theirs: Tensor, name: str) -> None:
    if not bool((torch.isin(unit_map.g[mine], theirs) | (unit_map.g[mine] < 0)).all()):
        meet = f"Units of {name} meet units of another layer that copy another teacher unit"
        raise TransferError(f"{meet}; the teacher joins these layers differently.")


def _check_family(unit_map: UnitMap, family: Family) -> None:
    """Raise TransferError if a unit copies one of another family, or belongs to no copy of what that belongs to."""
    _check_copies(unit_map, family.mine, family.theirs, family.name)
    ties, teacher_ties = unit_map.ties
    for unit in set(family.mine.tolist()) & ties.owners.keys():
        copied = int(unit_map.g[unit])
        theirs = teacher_ties.owners.get(copied, {})
        for key, owner in ties.owners[unit].items():
            if key in theirs and copied >= 0 and int(unit_map.g[owner]) != theirs[key]:
                raise TransferError(
                    f"Units of {family.name} would be copied into another group or head than the one that "
                    "they belong to: no mapping of units serves all groupings of the student."
                )


def _check_pins(networks: Networks, pairs: dict[Key, tuple[Tensor, Tensor]]) -> None:
    sides = ((networks.student_units, networks.student_roots, 0), (networks.teacher_units, networks.teacher_roots, 1))
    for units, roots, side in sides:
        why: dict[int, str] = {}
        for labels, reason in units.pinned:
            for root in roots[labels].tolist():
                why.setdefault(root, reason)
        for key, pair in pairs.items():
            mine, theirs = map(len, pair)
            pinned = next((root for root in pair[side].tolist() if root in why), None)
            if mine > theirs and pinned is not None:
                where = key.where or "the network"
                raise TransferError(f"{where} cannot grow from {theirs} to {mine} units: {why[pinned]}.")
