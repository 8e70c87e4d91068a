"""Layers that the teacher lacks: pass-through identities, silent branches, calibrated batch norm."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TransferError
from ..fill.gather import fill_new
from ..network import Example, Inputs, run
from ..record import Origin
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
                made[tensor] = Origin("silent", fill="zero")
    for name in plan.identity:
        layer = plan.student.layers[name]
        for role, tensor in layer.tensors.items():
            if layer.kind == "norm" and role in ("weight", "bias"):
                statistic = "var" if role == "weight" else "mean"
                of = (layer.tensors[statistic], float(layer.options["eps"]))
                made[tensor] = Origin("identity", fill={"weight": "deviation", "bias": "mean"}[role], of=of)
            elif layer.kind == "norm" or role == "weight":
                made[tensor] = Origin("identity")
            else:
                made[tensor] = Origin("identity", fill=_NEUTRAL[role])
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
        if whole and after is not None and after.turn is None and after.how == "shared":
            made[name] = replace(made.get(name, origins[name]), turn=seed)
            made[reader.name] = replace(after, turn=seed)
    return made


_NEUTRAL = {"bias": "zero", "shift": "zero", "factor": "one", "slope": "one", "taps": "tap", "amount": "zero"}


@torch.no_grad()
def restore_scale(student: nn.Module, plan: Plan) -> None:
    """Every new batch norm on the way of carried units undoes its own normalisation: scale sqrt(var + eps), shift mean.

    Exact in eval mode, whatever the statistics are; in train mode as close as they are to the batch's (section 3.4).
    """
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, origin in origins(plan).items():
        if origin.fill in ("deviation", "mean"):
            fill_new(tensors[name], origin, tensors)


def calibrate(student: nn.Module, plan: Plan, batches: Tensor | dict[str, Any] | Iterable[Example]) -> None:
    """Measure the statistics of every new batch norm on `batches`, then restore the scale of those that pass units on.

    `batches` is one batch of inputs or an iterable of them (each a tuple for several arguments); statistics are
    averaged over batches. The paper (section 3.4) needs these forward passes to undo the new layer's normalisation.
    """
    new = [n for n in (*plan.identity, *plan.silent, *plan.fresh) if plan.student.layers[n].kind == "norm"]
    passes_on = {
        student.get_submodule(name): name in plan.identity
        for name in new
        if "mean" in plan.student.layers[name].tensors
    }
    for norm in passes_on:
        if not isinstance(norm, _BatchNorm):
            raise TransferError(f"The new batch norm in {type(norm).__name__} is no module: it cannot be calibrated.")
    if passes_on:
        with _measuring(passes_on):
            for batch in [batches] if isinstance(batches, (Tensor, dict)) else batches:
                run(student, Inputs.of(cast(Example, batch)))
        restore_scale(student, plan)


@contextmanager
def _measuring(passes_on: dict[nn.Module, bool]) -> Iterator[None]:
    """While the block runs these norms, and no others, average the batches' own statistics, every batch alike.

    A norm that passes its units on hands its input through instead, so that the layers behind it see the
    teacher's values.
    """
    hooks, momentum = [], {}

    def begin(norm: nn.Module, _: tuple) -> None:
        norm.training = True

    def end(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        norm.training = False
        return inputs[0] if passes_on[norm] else output

    for norm in passes_on:
        momentum[norm], norm.momentum = norm.momentum, None  # type: ignore[assignment]
        norm.reset_running_stats()  # type: ignore[operator]
        hooks += [norm.register_forward_pre_hook(begin), norm.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, value in momentum.items():
            norm.momentum = value
            norm.num_batches_tracked.zero_()  # type: ignore[operator]
