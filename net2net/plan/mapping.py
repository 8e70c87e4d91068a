"""g: which teacher unit each student unit copies (paper, section 3.3, Algorithm 1).

Algorithm 1 draws one mapping for each layer and keeps neighbouring layers consistent by hand. Here units that meet
anywhere in the network are one unit. One array g from student units to teacher units is therefore consistent by
construction. The first n units of a layer copy the teacher's n units, and each further unit copies one that is drawn
from those. A unit may belong to a larger unit, such as a group or a head: the larger unit is mapped first, and the
smaller one copies from inside what the larger one copies. Where different layers read different units of one layer, as
they read the halves of a shuffle, each part is mapped by itself.
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

# What a norm asks of the layer whose units it sees. `NormKind.LAYER` and `NormKind.RMS` ask for even copies where the
# width allows them, and otherwise for padding: units that hold a mean, or units that are zero.
EVEN = "even"  # every teacher unit is copied equally often, and nothing is padded
ZEROS = "zeros"  # the further units are zero: the norm takes a plain sum of squares, which copies would change

Kinds = dict[int, set[str]]  # unit -> what norms ask of its layer
Owners = dict[int, dict[Key, int]]  # unit -> relation -> the larger unit that it belongs to


@dataclass(frozen=True)
class Ties:
    """The ties of the units of one network. A unit may copy only a teacher unit with the same ties.

    Example: channel 5 of a grouped convolution belongs to group 1. It may copy only a channel of the teacher's group
    that group 1 copies.
    """

    owners: Owners  # of the relations that both networks have, by the teacher's keys
    readers: Tensor  # for every unit a number for the set of tensors that it is an entry of, the same in both networks


@dataclass(frozen=True)
class Family:
    """The units of one layer in both networks, or those of its units that are at one level.

    Example: the channels of a grouped convolution are a family of level 1, because each belongs to a group. The groups
    are a family of level 0.
    """

    name: str  # the student's layer, or the module that holds it
    mine: Tensor  # the student's roots
    theirs: Tensor  # the teacher's roots
    level: int  # the length of the longest chain of owners above them: a unit's group, what that belongs to, and so on
    width: int  # how many units the student's layer has at all levels


@dataclass
class UnitMap:
    """The map g while it is being made."""

    networks: Networks
    ties: tuple[Ties, Ties]  # of the units of the student and of the teacher
    kinds: Kinds  # see `norms.norm_kinds`
    rotated: Tensor  # for every unit whether it is a channel of a rotated stream (see `mixing`), which is not copied
    generator: torch.Generator  # draws the copies
    g: Tensor  # for every student root the teacher root that it copies, or `NEW`, `ZERO` or `MEAN - k`
    patterns: Tensor  # for units in sign pairs (see `roles`): bit k is 1 if the unit is negated before activation k
    narrowest: Tensor  # for every unit the width of the narrowest layer that it is in
    side_by_side: bool  # whether the copies of a unit stand beside it
    fresh: bool  # whether the further units are fresh instead of copies
    means: list[Tensor] = field(default_factory=list)  # the teacher units that the code `MEAN - k` is the mean of


def map_units(
    networks: Networks,
    passing: list[tuple[Layer, int]],
    kinds: Kinds,
    rotated: Tensor,
    generator: torch.Generator,
    how: tuple[bool, bool] = (False, False),
) -> UnitMap:
    """Decide which teacher unit every student unit copies."""
    # `passing` holds each new layer that passes its units through, with the number of activations that the units then
    # pass in sign pairs. `how` holds the fields `side_by_side` and `fresh`.
    size = len(networks.student_roots)
    g, patterns, narrowest = torch.full((size,), NEW), torch.zeros(size, dtype=torch.long), torch.full((size,), size)
    unit_map = UnitMap(networks, _find_ties(networks), kinds, rotated, generator, g, patterns, narrowest, *how)
    _spread_owners(unit_map)
    pairs = _pair_families(networks)
    families = [family for key, pair in pairs.items() for family in _split_by_level(unit_map, key, pair)]
    for level in sorted({family.level for family in families}):
        now = sorted((f for f in families if f.level == level), key=lambda f: f.width)  # narrow layers first
        for family in now:
            _keep(unit_map, family)
        for layer, _ in passing:
            if layer.produces is not None:
                units = networks.student_roots[layer.produces]
                narrowest[units] = narrowest[units].clamp(max=len(units))
        # g(j) of the others is drawn uniformly, with replacement. A unit of several layers is drawn for the narrowest.
        for family in now:
            for mine, theirs in _split_by_ties(unit_map, family):
                _draw(unit_map, mine[unit_map.narrowest[mine] == family.width], mine, theirs)
    for layer, activations in passing:
        _pass_through(unit_map, layer, activations)
    for family in families:
        _check_family(unit_map, family)
    _check_pins(networks, pairs)
    return unit_map


def _find_ties(networks: Networks) -> tuple[Ties, Ties]:
    """Return the ties of the student's units and those of the teacher's."""
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
        if pairs in known:  # most norms on the stream of a deep network relate the same units
            continue
        known.add(pairs)
        for owners, numbers in zip((mine, theirs), pairs, strict=True):
            for child, parent in zip(numbers[::2], numbers[1::2], strict=True):
                if child != parent:
                    owners[child][other] = parent
    readers, teacher_readers = _find_readers(networks, mine, theirs)
    return Ties(mine, readers), Ties(theirs, teacher_readers)


def _spread_owners(unit_map: UnitMap) -> None:
    """Ask for even copies of owners, such as key heads, if the student's hold fewer units than the teacher's."""
    most: tuple[dict[Key, int], dict[Key, int]] = (defaultdict(int), defaultdict(int))
    sizes = [Counter(owner for held in each.owners.values() for owner in held.items()) for each in unit_map.ties]
    for found, counted in zip(most, sizes, strict=True):
        for (key, _), size in counted.items():
            found[key] = max(found[key], size)
    for key, parent in sizes[0]:
        if most[0][key] < most[1][key]:
            unit_map.kinds[parent].add(EVEN)


def _find_readers(networks: Networks, owners: Owners, teacher_owners: Owners) -> tuple[Tensor, Tensor]:
    """Give every unit of both networks a number for the set of tensors that it is an entry of: equal for equal sets."""
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
        for parent, inside in members.items():  # an owner that is no entry is known by what belongs to it
            if not int(numbers[parent]):
                numbers[parent] = sum(inside) % 2**62
    return mine, theirs


def _pair_families(networks: Networks) -> dict[Key, tuple[Tensor, Tensor]]:
    """Pair the student's units with the teacher's, layer by layer; raise TransferError if a layer is too narrow."""
    names = [layer.name for layer in networks.student.mixers]
    pairs = {Key(name): networks.produced(name) for name in names if networks.names[name]}
    for key, labels in networks.student_units.families.items():
        other = networks.convert(key)
        if other is not None and other in networks.teacher_units.families:
            theirs = networks.teacher_units.families[other]
            pairs[key] = (networks.student_roots[labels], networks.teacher_roots[theirs])
    return pairs


def _split_by_level(unit_map: UnitMap, key: Key, pair: tuple[Tensor, Tensor]) -> list[Family]:
    """Split the units of one layer in both networks into families, one for each level."""
    (mine, theirs), name = pair, key.where or "the network"
    levels, teacher_levels = (
        torch.tensor([_level(unit, ties.owners) for unit in units.tolist()], dtype=torch.long)
        for units, ties in zip(pair, unit_map.ties, strict=True)
    )
    found = []
    for level in torch.unique(levels).tolist():
        # Behind a new layer the student's units may have no owner although the teacher's have one.
        same = theirs[teacher_levels == level]
        found.append(Family(name, mine[levels == level], same if len(same) else theirs, level, len(mine)))
    return found


def _level(unit: int, owners: Owners, below: tuple[int, ...] = ()) -> int:
    """Return the length of the longest chain of owners above a unit."""
    if unit not in owners:
        return 0
    above = {owner for owner in owners[unit].values() if owner not in below and owner != unit}
    return max((1 + _level(owner, owners, (*below, unit)) for owner in above), default=0)


def _split_by_ties(unit_map: UnitMap, family: Family) -> list[tuple[Tensor, Tensor]]:
    """Split a family by ties: return the student's units of each part, and the teacher's that those may copy."""
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
    """Group units by their owners in the relations `keys` and, if `apart` is set, by their readers."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for unit in dict.fromkeys(units.tolist()):
        owners = ties.owners.get(unit, {})
        same = frozenset((key, owners.get(key)) for key in keys)
        groups[same, int(ties.readers[unit]) if apart else 0].append(unit)
    return groups


def _keep(unit_map: UnitMap, family: Family) -> None:
    """Let free units of a layer copy, in order, the teacher's units that the layer lacks yet: g(j) = j."""
    # Each copy of an owner gets all units of that owner. If it has no room for them, the copies divide them up.
    unit_map.narrowest[family.mine] = unit_map.narrowest[family.mine].clamp(max=family.width)
    together = family.theirs[:0]
    for mine, theirs in _split_by_ties(unit_map, family):
        free = in_order(mine[unit_map.g[mine] == NEW])
        missing = in_order(theirs[~torch.isin(theirs, unit_map.g[mine])])
        if len(free) < len(missing):
            together = torch.cat([together, missing])
            missing = missing[~torch.isin(missing, unit_map.g[family.mine])][: len(free)]
        if unit_map.side_by_side and len(free) >= len(missing) == len(in_order(theirs)) > 0:
            missing = missing[torch.arange(len(free)) * len(missing) // len(free)]
        unit_map.g[free[: len(missing)]] = missing
    if lost := len(torch.unique(together[~torch.isin(together, unit_map.g[family.mine])])):
        if family.level:
            few = "those of one head or group stay in copies of it, and the student's are too small or too few"
            raise TransferError(f"{family.name} has no room for {lost} of its teacher's units: {few}.")
        joined = f"The student joins units of {family.name} with units that the teacher keeps apart"
        advice = "let what sums, concatenations, groups and heads join there grow by one factor"
        raise TransferError(f"{joined}, so no mapping of units serves both: {advice}.")


def _draw(unit_map: UnitMap, units: Tensor, among: Tensor, theirs: Tensor) -> None:
    """Choose what each free unit among `units` copies: a unit of `theirs` drawn at random, or what norms ask for."""
    # Where norms ask for even copies, these are counted `among` all units of the layer.
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
    # In front of `activations` that units pass in sign pairs, it produces every unit with every pattern of signs.
    if layer.reads is None or layer.produces is None:
        raise TransferError(
            f"The new layer {layer.name} would have to pass its units through, but the forward pass does not show "
            "which units it reads."
        )
    g, roots = unit_map.g, unit_map.networks.student_roots
    mine, read = roots[layer.produces], g[roots[layer.reads]]
    read = read[read != NEW]
    distinct = in_order(read)
    if not len(distinct):
        raise TransferError(f"The new layer {layer.name} reads no unit of the teacher that it could pass on.")
    if len(mine) < len(distinct):
        raise TransferError(
            f"The student is smaller than its teacher: the new layer {layer.name} has {len(mine)} units and "
            f"must pass {len(distinct)} through, {len(distinct) - len(mine)} too few."
        )
    if activations:
        if len(mine) < len(distinct) << activations:
            raise TransferError(
                f"The new layer {layer.name} has {len(mine)} units and must pass {len(distinct)} on through an "
                f"activation that is not idempotent: that takes {2**activations} units for each."
            )
        place = torch.arange(len(mine))
        g[mine], unit_map.patterns[mine] = distinct[place % len(distinct)], place // len(distinct) % 2**activations
    first = read if len(mine) >= len(read) else distinct
    free = g[mine[: len(first)]] == NEW
    g[mine[: len(first)][free]] = first[free]
    _draw(unit_map, mine, mine, distinct)
    _check_copies(unit_map, mine, distinct, layer.name)


def _check_copies(unit_map: UnitMap, mine: Tensor, theirs: Tensor, name: str) -> None:
    """Raise TransferError if a unit of the layer `name` copies a teacher unit that is not of the teacher's layer."""
    if not bool((torch.isin(unit_map.g[mine], theirs) | (unit_map.g[mine] < 0)).all()):
        meet = f"Units of {name} meet units of another layer that copy another teacher unit"
        raise TransferError(f"{meet}; the teacher joins these layers differently.")


def _check_family(unit_map: UnitMap, family: Family) -> None:
    """Raise TransferError if a unit copies one of another family, or if its owner does not copy that one's owner."""
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
    """Raise TransferError if a layer grows whose units are pinned in either network."""
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
