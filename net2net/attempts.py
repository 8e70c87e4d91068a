"""Try several ways to pair the layers of two networks, the likeliest first; every reason for a refusal is kept."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from .errors import Fault, TransferError, no_other_error
from .plan.names import Rename, Unpaired, candidates
from .record import Record
from .tensors import find_eps

Result = TypeVar("Result")

SECONDS = 30.0  # see `Patience`


@dataclass
class Patience:
    """How long a search goes on without success: some seconds, or three times as long as its first attempt takes."""

    started: float = field(default_factory=lambda: time.monotonic())
    limit: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the search has lasted."""
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Tell, after each attempt that fails, whether to stop."""
        self.limit = self.limit or max(SECONDS, 3 * self.seconds)
        return self.seconds > self.limit


@dataclass(frozen=True)
class Attempt:
    """One way to pair the layers of two networks, and to fill the student."""

    rename: Rename  # how layers are paired by name
    passing_all: bool = False  # see `plan.make_plan`
    in_pairs: bool = False  # see `plan.make_plan`
    side_by_side: bool = False  # whether the copies of a unit stand beside it
    absorb: bool = False  # whether numbers that multiply a layer's result count as part of its weights
    both_modes: bool = True  # whether the growth fits what the training mode adds, too


def list_attempts(
    teacher: nn.Module, student: nn.Module, rename: Rename, absorb: bool = False, grouped: bool = False
) -> list[Attempt]:
    """List the ways to pair and fill, the likeliest first. With `absorb` each of them comes again with `absorb` set."""
    # A shuffle that stands between groups sends copies to the group of their unit only if they stand `side_by_side`.
    pairings = candidates(teacher, student) if rename is None else [rename]
    deeper = len(list(student.parameters())) > len(list(teacher.parameters()))
    ways = [Attempt(None)]
    if deeper:
        ways += [Attempt(None, passing_all=True), Attempt(None, in_pairs=True)]
    if absorb:
        ways += [replace(way, absorb=True) for way in ways]
    ways += [Attempt(None, side_by_side=True)] * grouped
    return [replace(way, rename=names) for way in ways for names in pairings]


def first_that_serves(grow: Callable[[Attempt], Result], attempts: list[Attempt], generator: torch.Generator) -> Result:
    """Return `grow(attempt)` for the first attempt that is not refused; each begins from the same random state."""
    state, refusals, patience = generator.get_state(), [], Patience()
    for attempt in attempts:
        try:
            with no_other_error("An attempt"):
                return grow(attempt)
        except TransferError as error:
            refusals.append(error)
            generator.set_state(state)
        if patience.is_over():
            break
    if len(attempts) == 1:
        raise refusals[0]
    likeliest, *others = _order(refusals, attempts)
    reasons = [reason for error in others for reason in error.reasons]
    every = ExceptionGroup("Every way to pair the layers is refused.", refusals)
    untried = f" ({len(refusals)} of {len(attempts)} ways to pair the layers were tried, in {patience.seconds:.0f} s.)"
    kind = Fault if isinstance(likeliest, Fault) else TransferError
    raise kind(f"{likeliest}{untried * (len(refusals) < len(attempts))}", reasons) from every


def serve_most_modes(
    grow: Callable[[Attempt], Result], attempts: list[Attempt], generator: torch.Generator, asks: bool
) -> tuple[Result, TransferError | None]:
    """Return the first that serves both modes, else the first that serves the eval mode and why none serves both."""
    # `asks` says whether the training mode may add something.
    try:
        return first_that_serves(grow, attempts, generator), None
    except TransferError as refusal:
        if not asks:
            raise
        both = refusal
    return first_that_serves(grow, [replace(each, both_modes=False) for each in attempts], generator), both


def _order(refusals: list[TransferError], attempts: list[Attempt]) -> list[TransferError]:
    """Order refusals by how likely they tell what is wrong: faults of ours first, layers without a counterpart last."""
    # Where layers are renumbered, equal names tell little: of the first way to fill, the last pairing is the likeliest.
    pairings = sum(replace(attempt, rename=None) == replace(attempts[0], rename=None) for attempt in attempts)
    likely = [*reversed(refusals[:pairings]), *refusals[pairings:]]
    faults = [error for error in refusals if isinstance(error, Fault)]  # the attempt might have served
    paired = [error for error in likely if not isinstance(error, (Unpaired, Fault))]
    return faults + paired + [error for error in refusals if isinstance(error, Unpaired)]


@contextmanager
def restore_on_refusal(student: nn.Module, record: Record) -> Iterator[None]:
    """Put the student back as it was if the block, which fills it by `record`, raises an error."""
    # The copy is in main memory: an accelerator may have no room for it.
    tensors = [*student.parameters(), *student.buffers()]
    held = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    eps = [(place, getattr(*place)) for place in (find_eps(student, place) for place in record.eps)]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for tensor, value in zip(tensors, held, strict=True):
                tensor.copy_(value)
        for place, value in eps:
            setattr(*place, value)
        raise
