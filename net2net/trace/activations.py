"""Between which numbers activations lie: whether an activation behind a new layer leaves them as they are.

What an example shows is not enough: ReLU6 is the identity on small activations alone, ReLU on positive ones.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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

    def longer(self, function: Callable[[Tensor], Tensor]) -> "Chain":
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
