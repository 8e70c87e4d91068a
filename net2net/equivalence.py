"""How far a student is from its teacher: by the largest difference, never by a sum that could cancel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import TransferError
from .network import Example, Inputs, run, tensors_in, unwrap


@dataclass(frozen=True)
class Equivalence:
    """The difference of two networks on some inputs.

    `max_abs` is the largest |teacher - student| over all outputs, `max_relative` the same over the teacher's
    largest |output|. `agree` of `examples` rows have the same largest entry (top-1). `mode` says how the networks ran.
    """

    max_abs: float
    max_relative: float
    agree: int
    examples: int
    mode: str

    def __str__(self) -> str:
        return (
            f"max |difference| {self.max_abs:.2e}, relative {self.max_relative:.2e}, "
            f"same top-1 on {self.agree} of {self.examples} ({self.mode} mode)"
        )


def equivalence(teacher: nn.Module, student: nn.Module, inputs: Example, *, mode: str = "eval") -> Equivalence:
    """Measure |teacher - student| on `inputs` (a tensor, a tuple of arguments or a dict of keyword arguments).

    `mode` is "eval", or "train" to let batch norm use the batch's statistics (running statistics, modes and the random
    state are put back). Dropout makes the train mode meaningless. Raises TransferError if the outputs differ in shape,
    or if the mode is neither.
    """
    if mode not in ("eval", "train"):
        raise TransferError(f"The mode {mode!r} is unknown: it is 'eval' or 'train'.")
    teacher, student, arguments = unwrap(teacher), unwrap(student), Inputs.of(inputs)
    mine, theirs = (run(model, arguments, training=mode == "train") for model in (student, teacher))
    return compare(theirs, mine, mode)


def compare(theirs: object, mine: object, mode: str = "eval") -> Equivalence:
    """The difference of two results: tensors, or nested containers of tensors."""
    pairs = list(zip(tensors_in(theirs), tensors_in(mine), strict=False))
    if len(tensors_in(theirs)) != len(tensors_in(mine)) or any(a.shape != b.shape for a, b in pairs) or not pairs:
        shapes = [[tuple(t.shape) for t in tensors_in(out)] for out in (theirs, mine)]
        raise TransferError(f"The outputs differ in shape: the teacher's are {shapes[0]}, the student's {shapes[1]}.")
    if not all(a.numel() for a, _ in pairs):
        raise TransferError("An output of the networks is empty: there is nothing to compare.")
    pairs = [(_precise(a), _precise(b)) for a, b in pairs]
    differences = [(a - b).abs().max().item() for a, b in pairs]
    sizes = [a.abs().max().item() for a, _ in pairs]
    a, b = pairs[0]
    examples = len(a) if a.dim() > 1 and not a.is_complex() else 0
    if not all(map(_finite, differences)):  # max() of a NaN depends on the order: say it plainly
        return Equivalence(float("nan"), float("nan"), 0, examples, mode)
    worst = max(d / s if s else d for d, s in zip(differences, sizes, strict=True))
    agree = int((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum()) if examples else 0
    return Equivalence(max(differences), worst, agree, examples, mode)


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.double)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
