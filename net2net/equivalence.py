"""Measure how far a student is from its teacher: by the largest difference, never by a sum that could cancel."""

import math
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import TransferError, no_other_error
from .network import Example, Inputs, Outputs, refuse_empty, run, tensors_in, unwrap
from .randomness import SameForAll
from .rounding import disturbed_runs


@dataclass(frozen=True)
class Equivalence:
    """The difference of two networks on some inputs."""

    max_abs: float  #: the largest |teacher - student| over all outputs
    max_relative: float  #: the same over the teacher's largest |output|
    agree: int  #: how many rows have the same largest entry (top-1); of N x T x classes, each position is a row
    examples: int  #: how many rows there are
    mode: str  #: how the networks ran, "eval" or "train"

    def __str__(self) -> str:
        return (
            f"max_abs {self.max_abs:.2e}, max_relative {self.max_relative:.2e}, "
            f"agree {self.agree} of {self.examples} (top-1, {self.mode} mode)"
        )


@no_other_error("equivalence")
def equivalence(
    teacher: nn.Module, student: nn.Module, inputs: Example, *, mode: str = "eval", outputs: Outputs = None
) -> Equivalence:
    """Measure |teacher - student|, in the precision of their weights: `torch.autocast` around the call is off.

    Args:
        teacher: one network.
        student: the other.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        mode: "eval", or "train" to let batch norm use the batch's statistics. Running statistics, modes and the random
            state are put back. Dropout makes the train mode meaningless.
        outputs: what of the result counts, as of `transfer`.

    Raises:
        TransferError: the outputs differ in shape, a forward pass fails, or the mode is neither.

    Example:
        >>> equivalence(teacher, student, images).max_relative < 1e-5
        True
    """
    if mode not in ("eval", "train"):
        raise TransferError(f"The mode {mode!r} is unknown: it is 'eval' or 'train'.")
    teacher, student, arguments = unwrap(teacher), unwrap(student), Inputs.of(inputs, outputs)
    mine, theirs = (run(model, arguments, training=mode == "train") for model in (student, teacher))
    return compare(theirs, mine, mode)


def compare(theirs: object, mine: object, mode: str = "eval") -> Equivalence:
    """Measure the difference of two results (tensors, or nested containers of tensors), which must agree in shape."""
    refuse_empty(theirs)
    pairs = list(zip(tensors_in(theirs), tensors_in(mine), strict=False))
    if len(tensors_in(theirs)) != len(tensors_in(mine)) or any(a.shape != b.shape for a, b in pairs):
        shapes = [[tuple(t.shape) for t in tensors_in(out)] for out in (theirs, mine)]
        raise TransferError(
            f"The outputs differ in shape: the teacher's are {shapes[0]}, the student's {shapes[1]}. Let the last "
            "layers keep their widths, or name with `outputs` what counts."
        )
    pairs = [[x.to(torch.complex128 if x.is_complex() else torch.double) for x in pair] for pair in pairs]
    differences = [(a - b).abs().max().item() for a, b in pairs]
    sizes = [a.abs().max().item() for a, _ in pairs]
    a, b = (x.flatten(0, 1) if x.dim() == 3 else x for x in pairs[0])
    examples = len(a) if a.dim() > 1 and not a.is_complex() else 0
    if not all(map(math.isfinite, differences)):  # max() of a NaN would depend on the order
        return Equivalence(float("nan"), float("nan"), 0, examples, mode)
    worst = max(d / s if s else d for d, s in zip(differences, sizes, strict=True))
    agree = int((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum()) if examples else 0
    return Equivalence(max(differences), worst, agree, examples, mode)


def assert_equivalent(
    teacher: nn.Module, student: nn.Module, inputs: Inputs, output: object, identities: Collection[str]
) -> Equivalence:
    """Measure the difference of a filled student and its teacher; raise TransferError if rounding cannot explain it."""
    # `output` is the teacher's output on the example; `identities` are named in the message.
    judge = _Judge(teacher, student, identities)
    measured = judge.check(inputs, output, "the example")
    for others in (inputs.draw_like(), inputs.draw_like(numbers=None)):
        try:
            theirs = run(teacher, others)
        except TransferError:
            continue  # it takes no other number of rows
        if all(x.numel() and bool(x.isfinite().all()) for x in tensors_in(theirs)):
            # Units that are dead on the example may be alive here. Far from its data a deep network can amplify
            # rounding. A hundredth of the output is no rounding, however deep the network.
            judge.check(others, theirs, "other inputs like it", largest=1e-2)
            break
    return measured


def assert_equivalent_on(teacher: nn.Module, student: nn.Module, inputs: Inputs, where: str) -> Equivalence:
    """Measure the difference on these inputs alone; raise TransferError, which says `where`, if it is no rounding."""
    judge = _Judge(teacher, student, ())
    return judge.check(inputs, judge.run(teacher, inputs), where)


def assert_equivalent_in_training(
    teacher: nn.Module, student: nn.Module, inputs: Inputs, identities: Collection[str]
) -> None:
    """Raise TransferError if the two differ in training mode, with random numbers that are the same for all units."""
    judge = _Judge(teacher, student, identities, training=True)
    judge.check(inputs, judge.run(teacher, inputs), "the example in training mode")


@dataclass(frozen=True)
class _Judge:
    """Judges whether a filled student computes its teacher's function up to rounding."""

    teacher: nn.Module
    student: nn.Module
    identities: Collection[str]  # the layers that pass units through, which a refusal names
    training: bool = False  # the mode in which the networks run

    def run(self, model: nn.Module, inputs: Inputs, *modes: AbstractContextManager) -> Any:
        """Return the network's output; in training mode with random numbers that are the same for all units."""
        # `SameForAll` comes last: the modes before it, which disturb numbers, then draw real random numbers.
        return run(model, inputs, self.training, modes=[*modes, *([SameForAll()] if self.training else [])])

    def check(self, inputs: Inputs, theirs: object, where: str, largest: float = 0.0) -> Equivalence:
        """Measure the difference from the teacher's output `theirs`; raise TransferError if it is no rounding."""
        tensors = [t for model in (self.teacher, self.student) for t in (*model.parameters(), *model.buffers())]
        kinds = {t.dtype for t in tensors if t.is_floating_point()} | {torch.float32}
        allowed = min(torch.finfo(kind).eps for kind in kinds) ** 0.5  # so small a difference needs no measurement
        mine = self.run(self.student, inputs)
        measured = compare(theirs, mine)
        if not measured.max_relative <= allowed:  # the student may compute in another precision
            pair = ((self.teacher, theirs), (self.student, mine))
            allowed = max(allowed, *(self._rounding(model, inputs, output, largest) for model, output in pair))
        if not measured.max_relative <= allowed:
            raise _refusal(measured, allowed, where, self.identities)
        return measured

    def _rounding(self, model: nn.Module, inputs: Inputs, output: object, largest: float) -> float:
        """Return the difference that rounding can explain: twice what it is measured to be in one of the networks."""
        # In a thousand random networks the student's difference was 1.4 times the measured rounding at most, and 0.3
        # times in the median. Some networks amplify rounding so far that anything would pass. They are held to a bound:
        # `largest`, or the square root of the coarsest precision that was computed in.
        runs = disturbed_runs(partial(self.run, model), inputs)
        outputs, precisions = zip(*runs, strict=True)
        measured = [compare(output, each).max_relative for each in outputs]
        bound = max(largest, max(precisions) ** 0.5)
        return min(2 * max(measured), bound) if all(map(math.isfinite, measured)) else 0.0


def _refusal(measured: Equivalence, allowed: float, where: str, identities: Collection[str]) -> TransferError:
    causes = [
        "treat the same units differently (another layout, more calls of one layer)",
        "depend on random numbers",
        "amplify rounding that far",
    ]
    if new := sorted(identities):
        through = f"what new layers pass through ({', '.join(new[:8])})"
        bends = "as pools do, sums over neighbours, and activations that are not idempotent"
        causes.insert(1, f"change {through}, {bends}")
    return TransferError(
        f"The filled student does not compute its teacher's function: on {where} they differ by "
        f"{measured.max_relative:.1e} relative, more than {allowed:.1e}. The two forward passes "
        f"{', '.join(causes[:-1])}, or {causes[-1]}."
    )
