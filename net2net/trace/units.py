"""Which labels are the same unit: a union-find over integer tensors.

A label is an integer without meaning. Two labels that meet in an elementwise operation are one unit from then on. Units
may also belong to a larger unit (a channel to its group, a value to its head): a copy of the smaller one then stays
inside a copy of the larger one.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, combinations, product

import torch
from torch import Tensor

from ..errors import TransferError
from .facts import Call, Key


class Units:
    """The units of one network, as far as its forward pass has shown them."""

    def __init__(self, as_grouped: frozenset[Key] = frozenset()) -> None:
        self.as_grouped = as_grouped  # calls that relate the units that meet in them instead of uniting them
        self.families: dict[Key, Tensor] = {}  # key that both networks share -> labels that were made together
        self.relations: dict[Key, tuple[Tensor, Tensor]] = {}  # labels, and the label of what each belongs to
        self.meetings: set[Key] = set()  # all elementwise calls in which units met
        self.whole: list[tuple[Tensor, str]] = []  # labels that move as a whole only, and why
        self.pinned: list[tuple[Tensor, str]] = []  # labels that may not be copied at all, and why
        self.mode = ""  # the end of the keys of what only the training mode shows
        self._count = 0
        self._calls: Counter[tuple[str, str]] = Counter()
        self._root = torch.arange(1024)  # label -> a smaller label of its unit, or the label itself
        self._pending: list[Tensor] = []  # 2 x k: pairs of labels that are one unit, and not in `_root` yet
        self._without_contractions: list[Tensor] = []  # 2 x k: pairs that are one unit not only by a contraction
        self._ends: list[int] = []  # where the ranges of labels that were made together end
        self._distinct: list[bool] = []  # for each such range, whether its labels are different units

    def copy(self) -> "Units":
        """Return units that can be united and related further without any effect on these."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (dict, list, set, Tensor)):
                vars(other)[name] = value.clone() if isinstance(value, Tensor) else copy(value)
        return other

    def learn_new(self, other: "Units") -> Tensor:
        """Learn what `other`, which went on from these units, says of new labels; tell for each if its unit is old."""
        # New labels are united as they are in `other`, also with an old unit. Two old units stay apart, even if they
        # are one in `other`.
        mine, theirs, known = self.roots(), other.roots(), self._count
        pairs = distinct_pairs(theirs[:known], mine)
        met = torch.bincount(pairs[0], minlength=len(theirs))[theirs]  # how many old units each label is one with
        self._count, self._ends, self._distinct = other._count, list(other._ends), list(other._distinct)
        new = torch.arange(known, len(theirs))
        self.unite(new[met[new] <= 1], theirs[new[met[new] <= 1]])
        old = met > 0
        for held, found in ((self.whole, other.whole), (self.pinned, other.pinned)):
            held += [(labels[~old[labels]], why) for labels, why in found[len(held) :] if not bool(old[labels].all())]
        for key, (children, parents) in other.relations.items():
            if key not in self.relations and not bool(old[children].any() or old[parents].any()):
                self.relations[key] = (children, parents)
        self.families = other.families | self.families
        self.meetings = self.meetings | other.meetings
        return old

    def fresh(self, count: int, key: Key | None = None, distinct: bool = True) -> Tensor:
        """Return `count` new labels. By the `key`, if there is one, they are paired with those of the other network."""
        # With `distinct` they are different units of one layer, and `combine` must not unite two of them.
        start, self._count = self._count, self._count + count
        self._ends.append(self._count)
        self._distinct.append(distinct)
        labels = torch.arange(start, self._count)
        if key is not None:
            self.families[key] = labels
        return labels

    def key(self, what: str, where: str) -> Key:
        """Return the key of the next `what` in a module; in the other network the same thing gets the same key."""
        what += self.mode
        self._calls[where, what] += 1
        return Key(where, what, self._calls[where, what])

    def unite(self, a: Tensor, b: Tensor, contraction: bool = False) -> None:
        """Make the labels `a` and `b` one unit, entry by entry; say if a `contraction` is the only reason."""
        if a.shape != b.shape:
            raise TransferError(f"Units of widths {tuple(a.shape)} and {tuple(b.shape)} meet in one parameter.")
        if a.numel():
            edges = distinct_pairs(a, b)
            self._pending.append(edges)
            if not contraction:
                self._without_contractions.append(edges)

    def find(self, labels: Tensor) -> Tensor:
        """Return the root of every label: the smallest label of its unit, as far as the pass has come."""
        # Only what has changed since the last call is updated. A pass over all labels in every call would take time
        # that grows with the square of the network's size.
        if len(self._root) < self._count:
            self._root = torch.cat([self._root, torch.arange(len(self._root), 2 * self._count)])
        if self._pending:
            edges, self._pending = torch.cat(self._pending, dim=1), []
            ends, smallest = join(self._follow(edges))
            self._root[ends] = smallest
        return self._follow(labels)

    def _follow(self, labels: Tensor) -> Tensor:
        """Return the end of the path that begins at each label, and let the label point to it."""
        found = self._root[labels]
        while not torch.equal(further := self._root[found], found):
            self._root[labels] = found = further
        return found

    def roots(self) -> Tensor:
        """Return the root of every label there is."""
        return self.find(torch.arange(self._count))

    def roots_without_contractions(self) -> Tensor:
        """Return the roots as if contractions had united nothing: queries and keys stay apart."""
        found = self._without_contractions
        edges = torch.cat(found, dim=1) if found else torch.empty(2, 0, dtype=torch.long)
        return torch.arange(self._count).index_copy_(0, *join(edges))

    def combine(self, a: Tensor, b: Tensor, call: Call, contraction: bool = False) -> Tensor:
        """Return the labels of an elementwise result of `a` and `b`: labels that meet are one unit."""
        # This could unite units that a layer keeps apart: a gate meets all channels, the weights of a head meet all its
        # values, a key meets several queries. There each unit belongs to the unit that it meets instead.
        shape, key = a.shape, self.key(call.name, call.module)
        self.meetings.add(key)
        a, b = torch.broadcast_tensors(self.drop_repeats(a), self.drop_repeats(b))
        mine, theirs = self.find(a), self.find(b)
        if torch.equal(mine, theirs):
            return a.expand(shape)
        base = self._count
        pairs, inverse = torch.unique(mine * base + theirs, return_inverse=True)
        left, right = pairs // base, pairs % base
        single = [len(torch.unique(side)) == len(pairs) for side in (left, right)]
        belongs = {part for part in ("<", ">", "left") if replace(key, part=part) in self.as_grouped}
        among = (left, right) if contraction else (torch.cat([left, right]),)  # one layer may give queries and keys
        collapses = not all(single) and any(self._collapses(left, right, each) for each in among)
        if not belongs and (not collapses or (contraction and self._are_made_of(left, right))):
            self.unite(a, b, contraction)
            return a.expand(shape)
        if single[0] and not belongs & {">", "left"}:
            self.relate(replace(key, part="<"), left, right)
            return a.expand(shape)
        if single[1] and "left" not in belongs:
            self.relate(replace(key, part=">"), right, left)
            return b.expand(shape)
        joined = self.fresh(len(pairs), key)
        self.relate(replace(key, part="left"), joined, left)
        self.relate(replace(key, part="right"), joined, right)
        return joined[inverse].reshape(a.shape).expand(shape)

    def _collapses(self, left: Tensor, right: Tensor, among: Tensor) -> bool:
        """Tell whether uniting the roots `left` and `right` unites two of `among` that a layer keeps apart."""
        joined, smallest = join(torch.stack([left, right]))
        ours = torch.isin(joined, among)
        if self._meet(joined[ours], joined[ours], smallest[ours]):  # no need to look at all labels of their units
            return True
        before, after = self.roots(), torch.arange(self._count).index_copy_(0, joined, smallest)
        touched = torch.isin(before, among).nonzero().flatten()
        return self._meet(touched, before[touched], after[before[touched]])

    def _meet(self, labels: Tensor, before: Tensor, after: Tensor) -> bool:
        """Tell whether labels of one layer, apart in the roots `before`, are one unit in the roots `after`."""
        family = torch.bucketize(labels, torch.tensor(self._ends), right=True)
        distinct = torch.tensor(self._distinct)[family]
        count = [len(torch.unique((family * self._count + root)[distinct])) for root in (before, after)]
        return count[1] < count[0]

    def _are_made_of(self, left: Tensor, right: Tensor) -> bool:
        """Tell whether a root on one side belongs to one on the other side, as a unit that `combine` made of two."""
        for key, pair in self.relations.items():
            if key.part in ("left", "right"):
                a, b = map(self.find, pair)
                if any(bool((torch.isin(a, x) & torch.isin(b, y)).any()) for x, y in ((left, right), (right, left))):
                    return True
        return False

    def relate(self, key: Key, children: Tensor, parents: Tensor) -> None:
        """Let each unit of `children` belong to the unit of `parents` beside it."""
        pairs = distinct_pairs(children, parents)
        self.relations[key] = (pairs[0], pairs[1])

    def owners(self, key: Key, units: Tensor) -> Tensor | None:
        """Return what each unit belongs to in a relation; None if one of them belongs to nothing there."""
        children, parents = (self.find(labels) for labels in self.relations[key])
        wanted = self.find(compact(units))
        order = torch.argsort(children)
        at = torch.searchsorted(children[order], wanted.contiguous()).clamp(max=len(children) - 1)
        return parents[order][at] if torch.equal(children[order][at], wanted) else None

    def close(self, nested: Collection[Key] = ()) -> None:
        """Unite and relate units until each unit belongs to exactly one other unit in every relation."""
        # If labels of one unit belong to several units, those become one unit. So do units that belong to each other in
        # a circle. Then relations over the same units are compared: groups that coincide become one group, unless the
        # other network has one inside the other (`nested`), and a smaller group belongs to the larger one around it.
        while self.relations:
            related = list(self.relations.values())
            lengths = torch.tensor([len(children) for children, _ in related])
            which = torch.arange(len(related)).repeat_interleave(lengths)
            children, parents = (self.find(torch.cat(side)) for side in zip(*related, strict=True))
            order = torch.argsort(children, stable=True)
            order = order[torch.argsort(which[order], stable=True)]
            which, a, b = which[order], children[order], parents[order]
            same = (which[1:] == which[:-1]) & (a[1:] == a[:-1]) & (b[1:] != b[:-1])
            if bool(same.any()):
                self.unite(b[1:][same], b[:-1][same])
            elif len(circular := _edges_on_circles(torch.stack([a, b])[:, a != b])):
                self.unite(circular[:, 0], circular[:, 1])
            elif not _nest(self, nested):
                return

    def pin(self, units: Tensor, why: str) -> None:
        """Let the units keep their number: growing them raises an error that says `why`."""
        self.pinned.append((torch.unique(compact(units)), why))

    def tie_along(self, units: Tensor, dims: Sequence[int], why: str) -> Tensor:
        """Make one unit of all labels along `dims`: they move as a whole. Return the labels with length 1 there."""
        first = units = self.drop_repeats(units)
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if first.shape != units.shape:
            self.unite(units, first.expand_as(units))
            self.whole.append((torch.unique(first), why))
        return first

    def units_along(self, units: Tensor, dim: int, why: str) -> Tensor:
        """Return the labels along one axis. All labels at the same place on this axis become one unit."""
        dim %= units.dim()
        others = [d for d in range(units.dim()) if d != dim]
        return self.tie_along(units, others, why).reshape(-1).expand(units.shape[dim])

    def drop_repeats(self, units: Tensor) -> Tensor:
        """Return the same labels with length 1 on every axis that only repeats them."""
        units = compact(units)
        for dim, size in enumerate(units.shape):
            if size > 1 and torch.equal(self.find(units), self.find(units.narrow(dim, 0, 1)).expand_as(units)):
                units = units.narrow(dim, 0, 1)
        return units


def _edges_on_circles(edges: Tensor) -> Tensor:
    """Return the edges (unit, its owner), one a row, from whose end a path leads back to their start."""
    edges = distinct_pairs(edges[0], edges[1])
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
    pairs, alike = _group_alike(units, nested)
    # They are all united at once, because the stream of a deep network has many.
    apart = [(keys[0], key) for keys in alike for key in keys if not torch.equal(pairs[keys[0]], pairs[key])]
    for first, key in apart:
        units.unite(pairs[first][1], pairs[key][1], contraction=True)
    if apart:
        return True
    owners_of: dict[int, dict[int, int]] = defaultdict(dict)
    for number, (key, *_) in enumerate(alike):
        for child, parent in pairs[key].T.tolist():
            owners_of[child][number] = parent
    owner_pairs: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)  # of a unit in two relations
    for direct in owners_of.values():
        above = [owners_of[owner] for owner in direct.values() if owner in owners_of]  # what owns its owners
        owners = dict(chain(*(each.items() for each in above), direct.items()))
        for i, j in combinations(sorted(owners), 2):
            x, y = owners[i], owners[j]
            if x != y and x not in owners_of.get(y, {}).values() and y not in owners_of.get(x, {}).values():
                owner_pairs[i, j].add((x, y))
    united: set[Key] = set()  # the pairs of these relations are no longer up to date
    for (i, j), both in owner_pairs.items():
        for a, b in product(alike[i], alike[j]):
            if not united & {a, b} and _nest_pair(units, nested, (a, b), both):
                united |= {a, b}
    return bool(united)


def _group_alike(units: Units, nested: Collection[Key]) -> tuple[dict[Key, Tensor], list[list[Key]]]:
    """Return the pairs (unit, owner) of every relation, and lists of relations that group the same units alike."""
    # A relation stands alone if the other network has it inside another, or another inside it (`nested`), and also if
    # its owners belong to something in turn.
    alone = {key for pair in nested for key in (replace(pair, inside=None), pair.inside)}
    order = sorted((key for key in units.relations if key.inside is None), key=str)
    pairs = {key: distinct_pairs(*map(units.find, units.relations[key])) for key in order}
    owned = torch.zeros(len(units.roots()), dtype=torch.bool)
    for units_of, _ in pairs.values():
        owned[units_of] = True
    alike: dict[tuple[object, ...], list[Key]] = defaultdict(list)
    for key, (units_of, owners) in pairs.items():
        alone |= {key} if bool(owned[owners].any()) else set()
        _, group = torch.unique(owners, return_inverse=True)
        first = units_of.new_full(group.shape, int(units_of.max())).scatter_reduce(0, group, units_of, "amin")
        alike[key if key in alone else None, *units_of.tolist(), *first[group].tolist()].append(key)
    return pairs, list(alike.values())


def _nest_pair(units: Units, nested: Collection[Key], keys: tuple[Key, Key], pairs: set[tuple[int, int]]) -> bool:
    """Relate the owners that units have in two relations to each other, or unite them; tell whether it unites."""
    a, b = keys
    lefts, rights = {x for x, _ in pairs}, {y for _, y in pairs}
    if len(lefts) < len(pairs) and len(rights) < len(pairs):
        return False
    x, y = (torch.tensor(side) for side in zip(*sorted(pairs), strict=True))
    a_inside, b_inside = replace(a, inside=b) in nested, replace(b, inside=a) in nested
    if len(lefts) == len(rights) == len(pairs) and not (a_inside or b_inside):
        units.unite(x, y, contraction=True)  # a query and a gate that belongs to it stay apart
        return True
    if len(lefts) == len(pairs) and not b_inside:
        units.relate(replace(a, inside=b), x, y)
    else:
        units.relate(replace(b, inside=a), y, x)
    return False


def join(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels of the edges (2 x k), and for each the smallest label that edges lead to from it."""
    labels, ends = torch.unique(edges, return_inverse=True)
    parent = torch.arange(len(labels))
    while True:
        high, low = torch.maximum(parent[ends[0]], parent[ends[1]]), torch.minimum(parent[ends[0]], parent[ends[1]])
        hooked = parent.scatter_reduce(0, high, low, "amin")
        while not torch.equal(hooked, hooked[hooked]):
            hooked = hooked[hooked]
        if torch.equal(hooked, parent):
            return labels, labels[parent]
        parent = hooked


def distinct_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Return the distinct pairs of labels that stand beside each other, 2 x k, in order."""
    base = int(b.max()) + 1 if b.numel() else 1
    pairs = torch.unique(a.reshape(-1) * base + b.reshape(-1))
    return torch.stack([pairs // base, pairs % base])


def in_order(values: Tensor) -> Tensor:
    """Return the distinct values in the order in which they first occur."""
    return torch.tensor(list(dict.fromkeys(values.tolist())), dtype=torch.long)


def rank(values: Tensor) -> Tensor:
    """Count how often each entry's value has occurred before it."""
    order = torch.argsort(values, stable=True)
    ordered = values[order]
    counts = torch.empty_like(values)
    counts[order] = torch.arange(len(values)) - torch.searchsorted(ordered, ordered)
    return counts


def compact(units: Tensor) -> Tensor:
    """Return the same labels with length 1 on the axes along which they are repeated in memory."""
    return units[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in units.stride())]


def spread(units: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return labels for an activation of `shape` that carries `units` along axis `dim`: an expanded view."""
    return units.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(tuple(shape))
