"""Compute one axis of a student tensor: which teacher entry each of its entries copies, and with which share."""

from typing import Any

import torch
from torch import Tensor

from ..errors import TransferError
from ..record import MEAN, NEW, ZERO, Axis
from ..trace.facts import Layer
from ..trace.units import rank
from .plan import Labels, Plan


def merged_groups(plan: Plan, theirs: str) -> tuple[int, int]:
    """Return how many groups a layer of the teacher has, and how many of them are one in the student."""
    times = plan.teacher.seen_as.merged_groups.get(theirs, 1)
    return (plan.teacher.layers[theirs].options["groups"], times) if times > 1 else (1, 1)


def unit_axis(plan: Plan, name: str, labels: Labels, dim: int, reads: bool) -> tuple[Axis, Tensor | None]:
    """Return the axis `dim` of a tensor that both networks have, and a factor for each entry if it produces queries."""
    # `labels` are those of the axis in the student and in the teacher.
    units, source = labels
    inner = plan.student.parameters.inner.get(name)
    groups = inner[1] if inner is not None and (dim == 1 or reads) else plan.student.parameters.summed.get(name, 1)
    known = plan.producing_axes.get((id(units), id(source)))
    if known is not None and not reads and inner is None:
        return known[1:]
    roots, theirs = plan.student_roots[units], plan.teacher_roots[source]
    if inner is not None and dim == 1:
        index = _match_inside(plan, name, units, source, groups)
    else:
        parts = _number_parts(roots, plan.apart[units]), _number_parts(theirs, plan.teacher_apart[source])
        index = match_entries(roots, plan.g[roots], theirs, parts)
        _check_complete(name, index, len(source), dim)
        if reads and _reads_silent(plan, name):  # it may read a unit once more, out of a branch that adds zero
            index = torch.where((index == NEW) & (plan.g[roots] >= 0), ZERO, index)
        _check_closed(plan, name, roots, index)
    if reads:
        layer = plan.student.layers.get(name)
        # A norm in front may turn padding into zero. The weights that read zeros keep their values.
        kept = layer is not None and layer.after_norm in plan.padded_norms
        index = torch.where(index >= 0, index, torch.where((index <= ZERO) & kept, NEW, ZERO))
        index, means = _number_means(plan, index, roots, theirs)
        return reading_axis(plan, index, roots, groups, means), None
    apart, rows = plan.apart[units], None
    queries = torch.isin(apart, plan.apart[plan.queries])
    index = torch.where(queries & (index == NEW), ZERO, index)
    if plan.query_gains and bool(queries.any()):
        rows = torch.tensor([plan.query_gains.get(label, 1.0) for label in apart.tolist()], dtype=torch.double)
    share = 1.0 / plan.copies[plan.g[roots].clamp(min=0)].clamp(min=1).double()
    index, means = _number_means(plan, index, roots, theirs)
    axis = make_axis(index, False, groups, share, means)
    if inner is None:
        plan.producing_axes[id(units), id(source)] = labels, axis, rows
    return axis, rows


def _reads_silent(plan: Plan, name: str) -> bool:
    """Tell whether a layer reads the result of a silent branch."""
    layer = plan.student.layers.get(name)
    return layer is not None and not plan.roles.silent.isdisjoint(layer.sources | layer.norms_since)


def reading_axis(plan: Plan, index: Tensor, roots: Tensor, groups: int, means: tuple[Tensor, ...] = ()) -> Axis:
    """Return an axis that reads units. Of the two units of a sign pair it reads the difference, in equal shares."""
    patterns = plan.patterns[roots]
    if not bool(patterns.any()):
        return make_axis(index, True, groups, means=means)
    keyed = torch.where(index >= 0, index * (int(patterns.max()) + 1) + patterns, index)
    share = make_axis(keyed, True, groups).share * signs(patterns)
    return Axis(index, make_axis(index, True, groups).first, True, share, groups, means)


def make_axis(
    index: Tensor, reads: bool, groups: int = 1, share: Tensor | None = None, means: tuple[Tensor, ...] = ()
) -> Axis:
    """Return the axis of an index. First copies follow from the index, and so do equal shares if the axis reads."""
    keyed = index
    if groups > 1:
        keyed = index + torch.arange(groups).repeat_interleave(len(index) // groups) * (int(index.max()) + 2)
        keyed = torch.where(index >= 0, keyed, index)
    if reads:
        _, inverse, counts = torch.unique(keyed, return_inverse=True, return_counts=True)
        share = torch.where(index >= 0, 1.0 / counts[inverse].double(), 0.0)
    share = torch.ones(len(index), dtype=torch.double) if share is None else share
    return Axis(index, (rank(keyed) == 0) & (index >= 0), reads, share, groups, means)


def passed_entries(plan: Plan, units: Tensor) -> Tensor:
    """Give each label of a new layer the number of the teacher's entry that it copies; NEW if it copies none."""
    roots = plan.student_roots[units]
    copied = plan.g[roots]
    return torch.where(copied >= 0, copied * len(plan.student_roots) + rank(roots), NEW)


def match_entries(roots: Tensor, copied: Tensor, theirs: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
    """Pair the k-th entry of a student unit with the k-th entry of the teacher unit that it copies."""
    # A unit has several entries on one axis where maps are flattened or a tensor is concatenated with itself. Both
    # networks lay them out in the same order. `parts` says which part of its unit each entry is (see `_number_parts`);
    # the entries are counted within each part.
    many = int(max(part.max() for part in parts)) + 1
    ranks_of = [rank(side * many + part) for side, part in zip((roots, theirs), parts, strict=True)]
    ranks = int(torch.cat(ranks_of).max()) + 1
    key, source_key = (
        (side * many + part) * ranks + k for side, part, k in zip((copied, theirs), parts, ranks_of, strict=True)
    )
    order = torch.argsort(source_key)
    place = torch.searchsorted(source_key[order], key).clamp(max=len(theirs) - 1)
    found = (source_key[order][place] == key) & (copied >= 0)
    return torch.where(found, order[place], torch.where(copied >= 0, NEW, copied))


def _number_parts(roots: Tensor, apart: Tensor) -> Tensor:
    """Number the parts of a unit, entry by entry: a query and a key that only a contraction unites are two parts."""
    if torch.equal(torch.unique(roots), torch.unique(apart)):
        return torch.zeros_like(roots)
    places, inverse = torch.arange(len(apart)), torch.unique(apart, return_inverse=True)[1]
    first = torch.full_like(places, len(apart)).scatter_reduce(0, inverse, places, "amin")[inverse]
    pairs, inverse = torch.unique(roots * len(apart) + first, return_inverse=True)  # sorted by root
    return rank(pairs // len(apart))[inverse]


def _number_means(plan: Plan, index: Tensor, roots: Tensor, theirs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the index with one code for each mean, and for each code the teacher's entries to average."""
    # A padding unit holds the mean of several teacher units. Its k-th entry is the mean of their k-th entries.
    if not bool((index <= MEAN).any()):
        return index, ()
    ranks, source_ranks = rank(roots), rank(theirs)
    index, codes, means = index.clone(), {}, []
    for entry in (index <= MEAN).nonzero().flatten().tolist():
        mean, k = MEAN - int(index[entry]), int(ranks[entry])
        if (mean, k) not in codes:
            codes[mean, k] = MEAN - len(means)
            among = torch.isin(theirs, plan.means[mean]) & (source_ranks == k)
            means.append(among.nonzero().flatten())
        index[entry] = codes[mean, k]
    return index, tuple(means)


def _match_inside(plan: Plan, name: str, units: Tensor, source: Tensor, groups: int) -> Tensor:
    """Return, for every group of the student, the places inside the teacher's group that it copies."""
    other = plan.teacher.parameters.inner.get(plan.names[name] or "")
    if other is None:
        raise TransferError(f"{name} is divided into groups that its counterpart in the teacher does not fit into.")
    theirs = plan.teacher_roots[source].reshape(other[1], -1)
    among, times = merged_groups(plan, plan.names[name] or "")
    empty = (-among % times) * theirs.shape[1] // times  # places in the last group that nothing fills
    rows = []
    for mine in plan.student_roots[units].reshape(groups, -1):
        copied = plan.g[mine]
        if bool((copied == NEW).all()):
            rows.append(copied)
            continue
        owners = torch.isin(theirs, copied).any(1).nonzero().flatten()
        if not len(owners):
            raise TransferError(f"A group of {name} reads no units that a group of its teacher reads.")
        group = theirs[owners[0]]
        index = match_entries(mine, copied, group, (torch.zeros_like(mine), torch.zeros_like(group)))
        last = int(owners[0]) == len(theirs) - 1
        _check_complete(name, index, theirs.shape[1] - (empty if last else 0), 1)
        _check_closed(plan, name, mine, index)
        rows.append(index)
    return torch.cat(rows)


def _check_complete(name: str, index: Tensor, entries: int, dim: int) -> None:
    """Raise TransferError if the student's axis lacks any of the teacher's `entries`."""
    if lost := entries - len(torch.unique(index[index >= 0])):
        raise TransferError(
            f"{name} gets no units for {lost} of the {entries} entries on axis {dim} of the teacher's tensor: the "
            "student lacks these units there, or its forward pass joins or divides units in another way."
        )


def _check_closed(plan: Plan, name: str, roots: Tensor, index: Tensor) -> None:
    """Raise TransferError if a unit with several entries is not copied with all of them."""
    # Queries and keys alone may have more entries than in the teacher. The further ones are zero.
    lost = roots[(index == NEW) & (plan.g[roots] >= 0)]
    heads = plan.student_roots[torch.cat([plan.queries, plan.keys])]
    for root in lost[~torch.isin(lost, heads)].tolist():
        count = int((roots == root).sum())
        cannot = f"{name} cannot grow in this way: it has {count} entries"
        relations = plan.student_units.relations.values()
        shared = (plan.student_roots[parents[torch.isin(plan.student_roots[of], heads)]] for of, parents in relations)
        if root in torch.cat([heads[:0], *shared]):
            raise TransferError(
                f"{cannot} that each head meets, more than its teacher, and is not zero in the further ones (as rotary "
                "frequencies are not, or weights in a head): keep the width of a head (`head_dim` in many configs), "
                "and take more heads."
            )
        moving = [*plan.student_units.whole, *plan.student_units.pinned]
        why = next((f", as {why}" for labels, why in moving if root in plan.student_roots[labels]), "")
        raise TransferError(
            f"{cannot} of one unit, more than its teacher. They move as a whole{why}: keep their number, or add "
            "whole copies of them (heads, groups)."
        )


def signs(patterns: Tensor, activation: int | None = None) -> Tensor:
    """Return every unit's sign before one activation, or the product of its signs before all of them."""
    # Bit k of a unit's pattern is 1 if the sign before activation k is negative.
    if activation is not None:
        return 1.0 - 2.0 * (patterns >> activation & 1).double()
    product = torch.ones(len(patterns), dtype=torch.double)
    for k in range(int(patterns.max()).bit_length()):
        product = product * signs(patterns, k)
    return product


def kernel_axis(layer: Layer, other: Layer, sizes: tuple[int, int], dim: int) -> Axis | None:
    """Return an axis along a kernel, whose taps copy the teacher's taps at the same places; None if nothing changes."""
    here, there = (kernel_options(each, size, dim) for each, size in zip((layer, other), sizes, strict=True))
    if here == there:
        return None
    (mine, shorter), (theirs, shorter_there) = tap_places(**here), tap_places(**there)
    resized = shorter != shorter_there and here["stride"] == 1 and not layer.options["transposed"]
    if set(theirs) - set(mine) or resized or here["stride"] != there["stride"]:
        text = "{taps} taps, padding {padding}, stride {stride}, dilation {dilation}"
        raise TransferError(
            f"The kernel of {layer.name} ({text.format(**here)}) does not look at every place that the teacher's "
            f"looks at ({text.format(**there)}): a larger kernel has the teacher's in its middle, and more padding."
        )
    where = {place: tap for tap, place in enumerate(theirs)}
    return make_axis(torch.tensor([where.get(place, ZERO) for place in mine]), True)


def kernel_options(layer: Layer, taps: int, dim: int) -> dict[str, Any]:
    """Return the options of a kernel along one axis."""
    options = {what: layer.options.get(what, 1) for what in ("stride", "dilation", "padding", "outer")}
    return {"taps": taps} | {what: o[dim] if isinstance(o, (tuple, list)) else o for what, o in options.items()}


def tap_places(taps: int, dilation: int, padding: int | str, outer: tuple[int, int], **_: Any) -> tuple[list[int], int]:
    """Return where each tap of a kernel looks, and by how much its result is shorter than its input."""
    reach = dilation * (taps - 1)
    if isinstance(padding, str):
        before, around = (reach // 2, reach) if padding == "same" else (0, 0)
    else:
        before, around = padding, 2 * padding
    return [tap * dilation - before - outer[0] for tap in range(taps)], reach - around - sum(outer)
