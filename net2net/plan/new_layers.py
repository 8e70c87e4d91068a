"""Layers that the teacher lacks: pass-through identities, silent branches."""

from dataclasses import replace

import torch

from ..errors import TransferError
from ..record import Fill, How, Origin
from ..trace.activations import moved
from ..trace.facts import Layer
from .mapping import Plan


def check_identity(plan: Plan) -> None:
    """Raise TransferError if a layer that must pass its units through cannot (paper, section 3.4)."""
    for name in plan.identity:
        layer = plan.student.layers[name]
        if layer.kind == "norm":
            if layer.options.get("across"):
                raise TransferError(
                    f"The new norm {name} stands in the way of units that the teacher passes on, and takes their mean "
                    "away: no weight brings it back. Put it into a branch of its own."
                )
            if "weight" not in layer.tensors or "mean" not in layer.tensors:
                raise TransferError(
                    f"The new batch norm {name} cannot undo its own normalisation: it has no affine parameters or no "
                    "running statistics."
                )
            continue
        if layer.kind == "scale" and "taps" not in layer.tensors:
            continue
        _check_activations(plan, layer)
        kernel = plan.student.parameters.tensors[name].shape[2:]
        if layer.options.get("transposed"):
            raise TransferError(f"The new layer {name} cannot be an identity: it is a transposed convolution.")
        stride = layer.options.get("stride", 1)
        if any(s != 1 for s in (stride if isinstance(stride, (tuple, list)) else [stride])):
            raise TransferError(f"The new layer {name} cannot be an identity: its stride is {stride}, not 1.")
        if any(k % 2 == 0 for k in kernel):
            raise TransferError(
                f"The new layer {name} cannot be an identity: its kernel {tuple(kernel)} is even and has no centre."
            )
        if kernel and not _keeps_size(layer, tuple(kernel)):
            raise TransferError(
                f"The new layer {name} cannot be an identity: its padding {layer.options['padding']} "
                f"does not keep the size under a kernel of {tuple(kernel)}."
            )


def _check_activations(plan: Plan, layer: Layer) -> None:
    """Raise TransferError if an activation behind a new layer changes some of what the teacher may pass through it."""
    in_pairs = {carrier for bends in plan.bends.values() for carrier, _ in bends}
    chains = plan.student.chains.get(layer.name, ())
    if layer.name in in_pairs or not chains:
        return
    behind, around = {layer.name}, set(layer.sources)
    while new := {name for name in around & plan.identity if name not in behind}:  # whose units it passes on
        behind |= new
        around |= {source for name in new for source in plan.student.layers[name].sources}
    mine = [chain for name in around for chain in plan.student.chains.get(name, ())]
    theirs = [chain for name in around for chain in plan.teacher.chains.get(plan.names.get(name) or "", ())]
    for chain in chains:
        if (change := moved(chain, layer.range, mine, theirs)) is not None:
            raise TransferError(
                f"The new layer {layer.name} cannot be an identity: the activation behind it is not idempotent on what "
                f"the teacher may pass through (it makes {change[1]:.3g} of {change[0]:g}). Give it one that is, as "
                "ReLU behind ReLU, or net2net.Blend, or, for one that units pass in pairs, twice the units."
            )


def _keeps_size(layer: Layer, kernel: tuple[int, ...]) -> bool:
    padding, dilation = layer.options["padding"], layer.options["dilation"]
    if isinstance(padding, str):
        return padding == "same"
    paddings = padding if isinstance(padding, (tuple, list)) else (padding,) * len(kernel)
    dilations = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(kernel)
    around = zip(paddings, dilations, kernel, layer.options["outer"], strict=True)
    return all(2 * (p + outer) == d * (k - 1) for p, d, k, both in around for outer in both)


def origins(plan: Plan) -> dict[str, Origin]:
    """What the tensors hold of every layer that the teacher lacks (section 3.4), but for the weights of identities."""
    made = {}
    for name in plan.silent:
        for role, tensor in plan.student.layers[name].tensors.items():
            if role in ("weight", "bias"):
                made[tensor] = Origin(How.SILENT, fill=Fill.ZERO)
    for name in plan.identity:
        layer = plan.student.layers[name]
        for role, tensor in layer.tensors.items():
            if layer.kind == "norm" and role in ("weight", "bias"):
                statistic = "var" if role == "weight" else "mean"
                of = (layer.tensors[statistic], float(layer.options["eps"]))
                made[tensor] = Origin(How.IDENTITY, fill={"weight": Fill.DEVIATION, "bias": Fill.MEAN}[role], of=of)
            elif layer.kind == "norm" or role == "weight":
                made[tensor] = Origin(How.IDENTITY)
            else:
                made[tensor] = Origin(How.IDENTITY, fill=_NEUTRAL[role])
    return made


def dense(plan: Plan, origins: dict[str, Origin]) -> dict[str, Origin]:
    """The origins of identities that may be dense instead, and of what reads them: a layer of the teacher as the
    product of two (Wei et al., "Network Morphism", 2016), by a rotation of the units between them.

    That needs a plain path between the two: no activation, no norm, no sum.
    """
    made, student = {}, plan.student
    for seed, name in enumerate(sorted(plan.identity)):
        layer = student.layers[name]
        readers = [other for other in student.layers.values() if name in other.sources and other.kind != "scale"]
        if layer.kind != "mix" or name in student.parameters.inner or len(readers) != 1:
            continue
        (reader,) = readers
        after = made.get(reader.name, origins.get(reader.name))
        plain = (
            reader.kind == "mix"
            and reader.linear
            and reader.sources == {name}
            and reader.name not in student.parameters.inner
        )
        whole = plain and torch.equal(plan.student_roots[reader.reads], plan.student_roots[layer.produces])
        if whole and after is not None and after.turn is None and after.how == How.SHARED:
            made[name] = replace(made.get(name, origins[name]), turn=seed)
            made[reader.name] = replace(after, turn=seed)
    return made


_NEUTRAL = {
    "bias": Fill.ZERO,
    "shift": Fill.ZERO,
    "factor": Fill.ONE,
    "slope": Fill.ONE,
    "taps": Fill.TAP,
    "amount": Fill.ZERO,
}


def new_batch_norms(plan: Plan) -> dict[str, bool]:
    """Every batch norm that the teacher lacks, by name, and whether it passes its units through."""
    names = [*plan.identity, *plan.silent, *plan.fresh]
    layers = {name: plan.student.layers[name] for name in names}
    return {
        name: name in plan.identity
        for name, layer in layers.items()
        if layer.kind == "norm" and "mean" in layer.tensors
    }
