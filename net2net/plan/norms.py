"""Check that every norm across units sees equal copies of the teacher's units, or padding that it can undo."""

from collections import defaultdict

import torch
from torch import Tensor

from ..errors import TransferError
from ..record import MEAN, NEW, ZERO
from ..trace.facts import Key, Norm, NormKind
from .mapping import EVEN, ZEROS, UnitMap
from .names import teacher_layer
from .traces import Networks


def norm_kinds(networks: Networks) -> dict[int, set[str]]:
    """Return for every unit what the norms that both networks have ask of its layer (see `mapping.EVEN`)."""
    kinds: dict[int, set[str]] = defaultdict(set)
    relations = [pair for key, pair in networks.student_units.relations.items() if key.part in ("left", "right")]
    owners = [dict(zip(*(networks.student_roots[side].tolist() for side in pair), strict=True)) for pair in relations]
    for norm in networks.student.norms:
        if norm.kind != NormKind.EXTREME and networks.teacher_norm(norm) is not None:
            wanted = norm.kind if norm.padded else EVEN
            wanted = ZEROS if wanted == NormKind.RMS and norm.divisor == 1 else wanted
            for row in networks.student_roots[norm.units]:
                roots = set(row.tolist())
                if len(roots) > 1:  # one unit that fills a group, as a head may, is copied as it is
                    for root in roots:
                        kinds[root].add(wanted)
                    for owned in (owner for owner in owners if roots <= owner.keys()):
                        if len(varying := {owned[root] for root in roots}) > 1:  # such as what mixes positions makes
                            for root in varying:
                                kinds[root].add(EVEN)
    return kinds


def adjust_norms(unit_map: UnitMap) -> tuple[dict[Key, tuple[Norm, float]], dict[str, float]]:
    """Check what every norm sees. Return the factors of mean squares that change, and the new eps by their places."""
    networks = unit_map.networks
    padding_factors, eps = {}, {}
    wanted: list[tuple[Norm, Norm, float]] = []
    for layer in networks.student.layers.values():
        if "eps" not in layer.options:
            continue
        counterpart = networks.teacher.layers.get(teacher_layer(layer, networks.names))
        if counterpart is not None and counterpart.options.get("eps") != layer.options["eps"]:
            eps[layer.options["module"]] = counterpart.options["eps"]
    for norm in networks.student.norms:
        if (other := networks.teacher_norm(norm)) is None:
            continue
        roots = networks.student_roots[norm.units]
        if bool(unit_map.rotated[roots].all()):
            wanted.append((norm, other, other.eps * other.units.shape[1] / norm.units.shape[1]))
            continue
        groups = unit_map.g[roots]
        grown = [copied for copied in groups if not bool((copied == NEW).all())]  # groups of old units
        factors = {_factor(unit_map, norm, other, copied) for copied in grown or groups}
        if len(factors) > 1:
            raise TransferError(
                f"The groups of the norm {norm.module or 'in the network'} grow by different factors, and have one eps."
            )
        if (factor := factors.pop()) != 1.0:
            padding_factors[norm.key] = (norm, factor)
        wanted.append((norm, other, other.eps * (factor**0.5 if norm.outside else factor)))
    return padding_factors, eps | _set_eps(networks, wanted)


def _set_eps(networks: Networks, wanted: list[tuple[Norm, Norm, float]]) -> dict[str, float]:
    """Return the eps that the norms want, by their places; raise TransferError if a place would need two."""
    eps: dict[str, float] = {}
    uses = networks.student.eps_uses
    kept = {norm.eps_at for norm, _, value in wanted if norm.eps == value}
    for norm, other, value in wanted:
        if norm.eps == value:
            continue
        elsewhere = uses[norm.eps_at] > 0 and value != other.eps  # code that is no norm wants the teacher's
        if eps.setdefault(_eps_place(norm), value) != value or norm.eps_at in kept or elsewhere:
            place = f" ({norm.eps_at})" if norm.eps_at else ""
            needs = f"The norm {norm.module or 'in the network'} would need the eps {value:.3g}"
            raise TransferError(f"{needs}, but its eps{place} is also used elsewhere: give the norm an eps of its own.")
    return eps


def _eps_place(norm: Norm) -> str:
    """Return where the eps of a norm is set; raise TransferError if it is a number in the forward pass."""
    if norm.eps_at is None:
        why = f"its eps is the number {norm.eps:g} in the forward pass, and would have to be another"
        advice = "Make it an attribute of the module, called eps, which holds a float"
        raise TransferError(f"The norm in {norm.module or 'the network'} cannot grow in this way: {why}. {advice}.")
    return norm.eps_at


def _factor(unit_map: UnitMap, norm: Norm, other: Norm, copied: Tensor) -> float:
    """Return the mean square that a norm sees in the group `copied`, divided by the one that its teacher sees."""
    for theirs in unit_map.networks.teacher_roots[other.units]:
        wanted, times = torch.unique(theirs, return_counts=True)
        if int(torch.isin(copied, wanted).sum()) == 0:
            continue
        seen = (copied[:, None] == wanted[None, :]).sum(0) / times
        padding = copied[~torch.isin(copied, wanted)]
        if norm.kind == NormKind.EXTREME and bool((seen > 0).all()) and not len(padding):
            return 1.0  # copies do not change the largest or smallest unit
        codes = [MEAN - k for k, mean in enumerate(unit_map.means) if torch.equal(torch.sort(mean).values, wanted)]
        undone = torch.tensor([ZERO] if norm.kind == NormKind.RMS else codes, dtype=torch.long)
        if len(torch.unique(seen)) == 1 and float(seen[0]) > 0 and bool(torch.isin(padding, undone).all()):
            if norm.divisor and other.divisor:
                factor = float(seen[0]) * other.divisor / norm.divisor
                if norm.kind != NormKind.MEAN or factor == 1.0:
                    return factor
                raise _refusal(unit_map, norm, len(copied), len(theirs))
            return 1.0 - len(padding) / len(copied)
        raise _refusal(unit_map, norm, len(copied), len(theirs))
    where = norm.module or "in the network"
    raise TransferError(f"The norm {where} sees none of the units that its teacher sees.")


def _refusal(unit_map: UnitMap, norm: Norm, width: int, teacher_width: int) -> TransferError:
    """Return the error of a norm that cannot grow from `teacher_width` to `width` units, with the reason."""
    needs = "the mean over all units, which stays the same only if each is copied equally often"
    if norm.kind == NormKind.EXTREME:
        needs = "the largest or smallest of all units, and some are new here"
    elif norm.kind == NormKind.MEAN and norm.divisor != width:
        needs = "a sum over all units, which copies change"
    elif norm.kind == NormKind.LAYER:
        roots = unit_map.networks.student_roots
        on = [x for x in unit_map.networks.student.norms if bool(torch.isin(roots[x.units], roots[norm.units]).any())]
        held = next((other for other in (norm, *reversed(on)) if not other.padded), norm)
        where = held.module or "the norm"
        why = f"{held.bent_by} stands before {where}"
        if held.padded:
            why = "another norm sees units that belong to these"
        elif not held.bent_by:
            why = f"{where} takes several positions together, which have other means"
        needs += f", or if units that hold means are added: layers and sums can make those, but {why}"
    elif norm.kind == NormKind.RMS and norm.bent_by:
        needs += f", or if zeros are added: but {norm.bent_by} may make other numbers of them"
    if norm.kind not in (NormKind.EXTREME, NormKind.MEAN) or norm.divisor == width:
        needs += ". A multiple of the width serves, if all that the norm sees grows by it"
    what = norm.kind if norm.kind in (NormKind.MEAN, NormKind.EXTREME) else "norm"
    widths = f"has {width} units and its teacher {teacher_width}"
    return TransferError(f"The {what} {norm.module or 'in the network'} {widths}: it takes {needs}.")
