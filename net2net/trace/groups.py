"""Units that belong to larger units: channels to groups, the entries of an attention head to the head."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from .facts import Key
from .units import Units


def close(units: Units, nested: Collection[Key] = ()) -> None:
    """Unite and relate units until each unit belongs to exactly one other unit in every relation."""
    # Where labels of one unit belong to several units, those become one unit, and so do units that belong to each other
    # in a circle. Two relations over the same units are compared: groups that coincide are one group, unless the other
    # network has one inside the other (`nested`), and a smaller group belongs to the larger one around it.
    while units.relations:
        related = list(units.relations.values())
        which = torch.arange(len(related)).repeat_interleave(torch.tensor([len(children) for children, _ in related]))
        children, parents = (units.find(torch.cat(side)) for side in zip(*related, strict=True))
        order = torch.argsort(children, stable=True)
        order = order[torch.argsort(which[order], stable=True)]
        which, a, b = which[order], children[order], parents[order]
        same = (which[1:] == which[:-1]) & (a[1:] == a[:-1]) & (b[1:] != b[:-1])
        if bool(same.any()):
            units.unite(b[1:][same], b[:-1][same])
        elif len(circular := _edges_on_circles(torch.stack([a, b])[:, a != b])):
            units.unite(circular[:, 0], circular[:, 1])
        elif not _nest(units, nested):
            return


def _edges_on_circles(edges: Tensor) -> Tensor:
    """Return the edges (unit, its owner), one a row, from whose end a path leads back to their start."""
    edges = torch.unique(edges, dim=1)
    while True:  # an edge on a circle has another edge at both of its ends
        inner = torch.isin(edges[0], edges[1]) & torch.isin(edges[1], edges[0])
        if bool(inner.all()):
            break
        edges = edges[:, inner]
    owners: dict[int, set[int]] = defaultdict(set)
    for child, parent in edges.T.tolist():
        owners[child].add(parent)

    def reachable(start: int) -> set[int]:
        found, waiting = set(), [start]
        while waiting:
            new = owners[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    return torch.tensor([edge for edge in map(tuple, edges.T.tolist()) if edge[0] in reachable(edge[1])])


def _nest(units: Units, nested: Collection[Key]) -> bool:
    """Relate the owners of one unit to each other where one decides the other; tell whether owners were united."""
    united: set[Key] = set()  # the pairs of these relations are no longer up to date
    for (a, b), owners in _owner_pairs(units).items():
        pairs = {(x, y) for x, y in owners if x != y}
        lefts, rights = {x for x, _ in pairs}, {y for _, y in pairs}
        if not pairs or (len(lefts) < len(pairs) and len(rights) < len(pairs)) or united & {a, b}:
            continue
        x, y = (torch.tensor(side) for side in zip(*sorted(pairs), strict=True))
        a_inside, b_inside = replace(a, inside=b) in nested, replace(b, inside=a) in nested
        if len(lefts) == len(rights) == len(pairs) and not (a_inside or b_inside):
            units.unite(x, y)
            united |= {a, b}
        elif len(lefts) == len(pairs) and not b_inside:
            units.relate(replace(a, inside=b), x, y)
        else:
            units.relate(replace(b, inside=a), y, x)
    return bool(united)


def _owner_pairs(units: Units) -> dict[tuple[Key, Key], set[tuple[int, int]]]:
    """For every two relations, return the pairs of owners that a unit has in them."""
    owners_of: dict[int, dict[Key, int]] = defaultdict(dict)
    for key, (children, parents) in units.relations.items():
        if key.inside is None:
            for child, parent in zip(units.find(children).tolist(), units.find(parents).tolist(), strict=True):
                owners_of[child][key] = parent
    pairs: dict[tuple[Key, Key], set[tuple[int, int]]] = defaultdict(set)
    for owners in owners_of.values():
        keys = sorted(owners, key=str)
        for i, a in enumerate(keys):
            for b in keys[i + 1 :]:
                pairs[a, b].add((owners[a], owners[b]))
    return pairs
