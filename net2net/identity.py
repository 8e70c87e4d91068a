"""Layers that the teacher lacks: pass-through identities, silent branches, calibrated batch norm."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import TransferError
from .mapping import NEW, Plan
from .units import Layer, run


def check_identity(plan: Plan) -> None:
    """Raise TransferError if a layer that must pass its units through cannot (paper, section 3.4)."""
    for name in plan.identity:
        layer = plan.student.layers[name]
        if layer.kind == "norm":
            if "weight" not in layer.tensors or "mean" not in layer.tensors:
                raise TransferError(
                    f"The new batch norm {name} cannot undo its own normalisation: "
                    "it has no affine parameters or no running statistics."
                )
            continue
        kernel = plan.student.tensors[name].shape[2:]
        for what, expected in (("stride", 1), ("groups", 1)):
            value = layer.options.get(what, expected)
            if any(v != expected for v in (value if isinstance(value, (tuple, list)) else [value])):
                raise TransferError(
                    f"The new layer {name} cannot be an identity: its {what} is {value}, not {expected}."
                )
        if any(k % 2 == 0 for k in kernel):
            raise TransferError(
                f"The new layer {name} cannot be an identity: its kernel {tuple(kernel)} is even and has no centre."
            )
        if kernel and not _keeps_size(layer, tuple(kernel)):
            raise TransferError(
                f"The new layer {name} cannot be an identity: its padding {layer.options['padding']} "
                f"does not keep the size under a kernel of {tuple(kernel)}."
            )


def _keeps_size(layer: Layer, kernel: tuple[int, ...]) -> bool:
    padding, dilation = layer.options["padding"], layer.options["dilation"]
    if isinstance(padding, str):
        return padding == "same"
    paddings = padding if isinstance(padding, (tuple, list)) else (padding,) * len(kernel)
    dilations = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(kernel)
    return all(2 * p == d * (k - 1) for p, d, k in zip(paddings, dilations, kernel, strict=True))


def identity_weight(plan: Plan, name: str) -> Tensor:
    """The weight of a new layer that hands its units on, before shares: one at the centre tap where the unit read
    is the unit produced, zero elsewhere; units that the teacher lacks are read with zero.

    Shape and dtype of the student's own weight.
    """
    weight = torch.zeros_like(plan.student.tensors[name])
    produced, read = plan.student_units(name, 0), plan.student_units(name, 1)
    assert produced is not None and read is not None
    produced, read = plan.teacher_of[produced], plan.teacher_of[read]
    same = (produced[:, None] == read[None, :]) & (read[None, :] != NEW)
    centre = tuple(k // 2 for k in weight.shape[2:])
    weight[(slice(None), slice(None), *centre)] = same.to(weight)
    return weight


@torch.no_grad()
def silence(student: nn.Module, plan: Plan) -> None:
    """The last scale of every silent branch is zero: whatever the branch computes, it adds nothing."""
    tensors = dict(student.named_parameters())
    for name in plan.silent:
        for role in ("weight", "bias"):
            if role in plan.student.layers[name].tensors:
                tensors[plan.student.layers[name].tensors[role]].zero_()


@torch.no_grad()
def restore_scale(student: nn.Module, plan: Plan) -> None:
    """Every new batch norm on the way of carried units undoes its own normalisation: scale sqrt(var + eps), shift mean.

    Exact in eval mode, whatever the statistics are; in train mode as close as they are to the batch's (section 3.4).
    """
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    for name in plan.identity:
        layer = plan.student.layers[name]
        if layer.kind == "norm":
            role = {role: tensors[tensor] for role, tensor in layer.tensors.items()}
            role["weight"].copy_((role["var"].double() + layer.options["eps"]).sqrt())
            if "bias" in role:
                role["bias"].copy_(role["mean"])


def calibrate(student: nn.Module, plan: Plan, batches: Tensor | Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Measure the statistics of every new batch norm on `batches`, then restore the scale of those that pass units on.

    `batches` is one batch of inputs or an iterable of them (each a tuple for several arguments); statistics
    are averaged over batches. The paper
    (section 3.4) needs these forward passes to undo the new layer's normalisation.
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
            for batch in [batches] if isinstance(batches, Tensor) else batches:
                run(student, batch if isinstance(batch, tuple) else (batch,))
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
