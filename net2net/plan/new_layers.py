"""Check that new layers can be identities, and say what each tensor of a new layer is filled with."""

from dataclasses import replace

import torch

from ..errors import TransferError
from ..record import Fill, How, Origin
from ..trace.activations import largest_change
from ..trace.facts import Layer, LayerKind
from .axes import kernel_options, tap_places
from .plan import Plan

_NEUTRAL = {"factor": Fill.ONE, "slope": Fill.ONE, "taps": Fill.TAP}  # by role; bias, shift and amount are zero


def check_identities(plan: Plan) -> None:
    """Raise TransferError if a new layer has to pass its units through and cannot (paper, section 3.4)."""
    for name in plan.roles.identity:
        layer = plan.student.layers[name]
        if layer.options.get("across"):
            if name in plan.chains.parts:
                continue
            raise _lone_norm(plan, layer)
        if layer.kind == LayerKind.NORM and not layer.tensors.keys() >= {"weight", "mean"}:
            why = "it has no affine parameters or no running statistics"
            raise TransferError(f"The new batch norm {layer.name} cannot undo its own normalisation: {why}.")
        if layer.kind == LayerKind.MIX or "taps" in layer.tensors:
            _check_activations(plan, layer)
            _check_kernel(layer, tuple(plan.student.parameters.tensors[name].shape[2:]))


def _lone_norm(plan: Plan, layer: Layer) -> TransferError:
    """Return the error of a new norm across units that stands in no row with a norm of the teacher."""
    norms, idle = {norm.name: norm for norm in plan.student.norms}, plan.roles.silent | plan.roles.fresh
    before = norms[layer.name].first_norm
    readers = [other.name for other in plan.student.layers.values() if before in other.normed_by - idle]
    others = [name for name in readers if name not in idle | {layer.name}]
    if not before:
        why = "what it normalises is not the result of another norm, and no weight brings back what it takes away"
    elif others:
        why = f"{before}, whose result it normalises again, is read by {others[0]}, too, which needs it as it is"
    elif before in plan.chains.parts or any(plan.names[t] for t in plan.student.layers[before].tensors.values()):
        why = f"it is no norm like {before}, whose result it normalises again, or lacks a weight or bias of that one"
    else:
        why = f"{before}, whose result it normalises again, is new, too"
    return TransferError(f"The new norm {layer.name} cannot be an identity: {why}. Give it a branch of its own.")


def _check_activations(plan: Plan, layer: Layer) -> None:
    """Raise TransferError if an activation behind a new layer changes numbers that the teacher's units may have."""
    in_pairs = {carrier for activations in plan.sign_pairs.values() for carrier, _ in activations}
    chains = plan.student.chains.get(layer.name, ())
    if layer.name in in_pairs or not chains:
        return
    behind, around = {layer.name}, set(layer.sources)
    # Identities in front of the layer pass their units on to it.
    while new := {name for name in around & plan.roles.identity if name not in behind}:
        behind |= new
        around |= {source for name in new for source in plan.student.layers[name].sources}
    mine = [chain for name in around for chain in plan.student.chains.get(name, ())]
    theirs = [chain for name in around for chain in plan.teacher.chains.get(plan.names.get(name) or "", ())]
    for chain in chains:
        if (change := largest_change(chain, layer.range, mine, theirs)) is not None:
            raise TransferError(
                f"The new layer {layer.name} cannot be an identity: the activation behind it is not idempotent on what "
                f"the teacher may pass through (it makes {change[1]:.3g} of {change[0]:g}). Use one that is, such as "
                "ReLU behind ReLU, or net2net.Blend. Before SiLU, GELU and the like, twice the units serve, too."
            )


def _check_kernel(layer: Layer, kernel: tuple[int, ...]) -> None:
    """Raise TransferError if no weights make a convolution the identity, with the reason."""
    if kernel and "stride" not in layer.options:
        raise TransferError(f"The new layer {layer.name} cannot be an identity: its weight is a stack of matrices.")
    along = [kernel_options(layer, taps, dim) for dim, taps in enumerate(kernel)]
    why = None
    if layer.options.get("transposed"):
        why = "it is a transposed convolution"
    elif any(options["stride"] != 1 for options in along):
        why = f"its stride is {layer.options['stride']}, not 1"
    elif any(taps % 2 == 0 for taps in kernel):
        why = f"its kernel {kernel} is even and has no centre"
    elif any(places[len(places) // 2] or shorter for places, shorter in (tap_places(**options) for options in along)):
        why = f"its padding {layer.options['padding']} does not keep the size under a kernel of {kernel}"
    if why is not None:
        raise TransferError(f"The new layer {layer.name} cannot be an identity: {why}.")


def new_origins(plan: Plan) -> dict[str, Origin]:
    """Return the origins of the tensors of identities and silent layers. Weights that mix units are completed later."""
    made = {}
    for name in plan.roles.silent:
        for role, tensor in plan.student.layers[name].tensors.items():
            if role in ("weight", "bias", "shift"):
                made[tensor] = Origin(How.SILENT, fill=Fill.ZERO)
    for name in plan.roles.identity:
        layer = plan.student.layers[name]
        for role, tensor in layer.tensors.items():
            if layer.options.get("across"):
                made[tensor] = Origin(How.IDENTITY, fill=Fill.ONE if role == "weight" else Fill.ZERO)
            elif layer.kind == LayerKind.NORM and role in ("weight", "bias"):
                statistic, fill = {"weight": ("var", Fill.DEVIATION), "bias": ("mean", Fill.MEAN)}[role]
                of = (layer.tensors[statistic], float(layer.options["eps"]))
                made[tensor] = Origin(How.IDENTITY, fill=fill, of=of)
            elif layer.kind == LayerKind.NORM or role == "weight":
                made[tensor] = Origin(How.IDENTITY)
            else:
                made[tensor] = Origin(How.IDENTITY, fill=_NEUTRAL.get(role, Fill.ZERO))
    return made


def densify(plan: Plan, origins: dict[str, Origin]) -> dict[str, Origin]:
    """Return new origins of the identities that can be dense instead, and of the layers that read them."""
    # An identity becomes a random rotation of its units, which the layer behind it undoes (Wei et al., "Network
    # Morphism", 2016). That needs a plain path between the two: no activation, no norm, no sum.
    made, student = {}, plan.student
    for seed, name in enumerate(sorted(plan.roles.identity)):
        layer = student.layers[name]
        readers = [r for r in student.layers.values() if name in r.sources and r.kind != LayerKind.SCALE]
        if layer.kind != LayerKind.MIX or name in student.parameters.inner or len(readers) != 1:
            continue
        (reader,) = readers
        after = made.get(reader.name, origins.get(reader.name))
        plain = reader.kind == LayerKind.MIX and reader.linear and reader.sources == {name}
        if not plain or reader.name in student.parameters.inner:
            continue
        whole = torch.equal(plan.student_roots[reader.reads], plan.student_roots[layer.produces])
        if whole and after is not None and after.turn is None and after.how == How.SHARED:
            made[name] = replace(made.get(name, origins[name]), turn=seed)
            made[reader.name] = replace(after, turn=seed)
    return made


def new_batch_norms(plan: Plan) -> dict[str, bool]:
    """Return for each batch norm that the teacher lacks whether it passes its units through."""
    new = (*plan.roles.identity, *plan.roles.silent, *plan.roles.fresh)
    layers = [layer for name in new if (layer := plan.student.layers[name]).kind == LayerKind.NORM]
    return {layer.name: layer.name in plan.roles.identity for layer in layers if "mean" in layer.tensors}
