"""Between which numbers activations lie: whether an activation behind a new layer leaves them as they are.

What an example shows is not enough: ReLU6 is the identity on small activations alone, ReLU on positive ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Range = tuple[float, float] | None  # None: not known
Functions = tuple[Callable[[Tensor], Tensor], ...]  # of single numbers, the first first
ALL: Range = (-math.inf, math.inf)
_HALF = (1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 5.9, 6.1, 8.0, 10.0, 20.0, 50.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Chain:
    """Activations one directly behind the other, the first of them behind a layer."""

    behind: str
    functions: Functions

    def longer(self, function: Callable[[Tensor], Tensor]) -> Chain:
        """The same with one more."""
        return Chain(self.behind, (*self.functions, function))


def _numbers(where: tuple[float, float]) -> Tensor:
    """Numbers in a range, far and near, its finite ends among them."""
    ends = [end for end in where if math.isfinite(end)]
    every = sorted({*(-x for x in _HALF), 0.0, *_HALF, *ends})
    return torch.tensor([x for x in every if where[0] <= x <= where[1]], dtype=torch.double)


def _applied(functions: Functions, x: Tensor) -> Tensor | None:
    """What the functions make of these numbers, in turn; None for what takes no such numbers."""
    made = x
    for function in functions:
        try:
            made = function(made.clone())  # it may work in place
        except (RuntimeError, TypeError, ValueError):
            return None
    return made if made.dtype == x.dtype and made.shape == x.shape and bool(made.isfinite().all()) else None


def image(function: Callable[[Tensor], Tensor], where: Range) -> Range:
    """The range behind a function, as far as single numbers tell."""
    if where is None or (made := _applied((function,), at := _numbers(where))) is None or len(at) < 2:
        return None
    low, high = float(made.min()), float(made.max())
    for open_, (end, next_) in zip(map(math.isinf, where), ((0, 1), (-1, -2)), strict=True):
        if open_ and float(made[end]) != float(made[next_]):  # it goes on
            low = -math.inf if float(made[end]) == low else low
            high = math.inf if float(made[end]) == high else high
    return low, high


def moved(chain: Chain, where: Range, before: Iterable[Chain], wanted: Iterable[Chain]) -> tuple[float, float] | None:
    """The number in the range that the activations of `chain` change most, and into what.

    None if they change none; if they make of all of them what one of the chains `wanted` makes, or do so behind one of
    the chains `before`; or if that is not known.
    """
    if where is None or (made := _applied(chain.functions, at := _numbers(where))) is None:
        return None
    place, every = _differ(at, made), _numbers((-math.inf, math.inf))
    starts = [(at, chain.functions), *((every, first.functions + chain.functions) for first in before)]
    goals = [one.functions for one in wanted]
    same = any(_same(x, whole, goal) for x, whole in starts for goal in goals)
    return None if same or place is None else (float(at[place]), float(made[place]))


def _same(x: Tensor, one: Functions, other: Functions) -> bool:
    made = _applied(one, x), _applied(other, x)
    return made[0] is not None and made[1] is not None and _differ(made[0], made[1]) is None


def _differ(a: Tensor, b: Tensor) -> int | None:
    """Where two rows of numbers differ most, if they do."""
    by = (a - b).abs() / a.abs().clamp(min=1.0)
    return int(by.argmax()) if by.numel() and float(by.max()) > 1e-12 else None


def hull(ranges: Iterable[Range]) -> Range:
    """What holds all of them."""
    known = list(ranges)
    if not known or None in known:
        return None
    return min(one[0] for one in known if one), max(one[1] for one in known if one)


def total(ranges: Iterable[Range]) -> Range:
    """What holds the sum of one of each."""
    known = list(ranges)
    if None in known:
        return None
    return sum(one[0] for one in known if one), sum(one[1] for one in known if one)


Bends = tuple[tuple[str, float], ...]  # of each activation the layer before it, and the slope


@dataclass(frozen=True)
class Passage:
    """What units have met since a layer produced them.

    `bends` are the activations with f(x) - f(-x) = slope * x, each with the layer before it that can turn a
    unit's sign. `gates` are the numbers that they are multiplied by if certain layers give zeros. `carrier` is the last
    layer with a weight for each unit since the last activation; `rest` is what the units are if the layer that produced
    them gives zeros, None if that is not known.
    """

    bends: Bends = ()
    gates: tuple[tuple[str, float], ...] = ()
    carrier: str | None = None
    rest: float | None = None

    def bent(self, function: Callable[[Tensor], Tensor]) -> Passage:
        """The passage behind an activation; one that no pair of units passes begins anew."""
        half = torch.linspace(0.25, 12.0, 8, dtype=torch.double)
        at = torch.cat([half, -half, torch.tensor([self.rest or 0.0], dtype=torch.double)])
        try:
            result = function(at)
            if result.dtype != torch.double:  # a comparison, or another precision
                return NOTHING
            positive, negative, rest = result.split([len(half), len(half), 1])
        except (RuntimeError, TypeError, ValueError):  # it takes no such numbers
            return NOTHING
        known = None if self.rest is None else float(rest)
        slope = float((positive - negative)[0] / half[0])
        if self.carrier is None or slope == 0 or not torch.allclose(positive - negative, slope * half, 1e-13, 0.0):
            return Passage(rest=known)
        return replace(self, bends=(*self.bends, (self.carrier, slope)), carrier=None, rest=known)

    def scaled(self, factor: float) -> Passage:
        """The passage behind a multiplication by a number."""
        return replace(self, rest=None if self.rest is None else self.rest * factor)


NOTHING = Passage()


def gated(operands: Sequence[tuple[Passage, frozenset[str]]]) -> Passage:
    """The passage of the product of two activations, each with the layers that it comes from: if one would be a number
    other than zero without its last layer, it is a gate of the other."""
    gates = [k for k, (past, sources) in enumerate(operands) if past.rest and len(sources) == 1]
    if len(operands) != 2 or len(gates) != 1:
        return NOTHING
    (gate,) = gates
    (past, sources), (passing, _) = operands[gate], operands[1 - gate]
    assert past.rest is not None
    return replace(passing, gates=(*passing.gates, (*sources, past.rest)), rest=None)
