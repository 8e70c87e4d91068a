"""What activations do to numbers: the range of a result, chains of activations, and the pairs that pass them.

The range of its inputs decides whether an activation behind a new layer leaves them as they are: ReLU is the identity
on positive numbers only, and ReLU6 on small positive ones. An example input alone cannot show that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

Range = tuple[float, float] | None  # None: not known
Functions = tuple[Callable[[Tensor], Tensor], ...]  # elementwise, in the order in which they are applied
Bends = tuple[tuple[str, float], ...]  # activations that sign pairs pass: the layer before each, and the slope
ALL: Range = (-math.inf, math.inf)
_SAMPLES = (1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 5.9, 6.1, 8.0, 10.0, 20.0, 50.0, 100.0, 1000.0)


def range_after(function: Callable[[Tensor], Tensor], before: Range) -> Range:
    """Return the range of an elementwise function's results, as far as sample numbers show it."""
    if before is None or (values := _apply((function,), numbers := _sample(before))) is None or len(numbers) < 2:
        return None
    low, high = float(values.min()), float(values.max())
    for is_open, (end, next_) in zip(map(math.isinf, before), ((0, 1), (-1, -2)), strict=True):
        if is_open and float(values[end]) != float(values[next_]):  # it still rises or falls there
            low = -math.inf if float(values[end]) == low else low
            high = math.inf if float(values[end]) == high else high
    return low, high


def join_ranges(ranges: Iterable[Range]) -> Range:
    """Return the smallest range that contains all of them."""
    known = list(ranges)
    if not known or None in known:
        return None
    return min(one[0] for one in known if one), max(one[1] for one in known if one)


def add_ranges(ranges: Iterable[Range]) -> Range:
    """Return the range of a sum that takes one number from each range."""
    known = list(ranges)
    if None in known:
        return None
    return sum(one[0] for one in known if one), sum(one[1] for one in known if one)


@dataclass(frozen=True)
class Chain:
    """Activations in a row, the first directly behind the layer `behind`, such as ReLU and then ReLU6."""

    behind: str
    functions: Functions


def largest_change(
    chain: Chain, where: Range, before: Iterable[Chain], wanted: Sequence[Chain]
) -> tuple[float, float] | None:
    """Return the number in the range `where` that the activations of `chain` change most, and what it becomes."""
    # The result is None if it is not known, if they change no number, or if they do the same as one of the teacher's
    # chains `wanted`, by themselves or behind one of the chains `before`.
    if where is None or (values := _apply(chain.functions, numbers := _sample(where))) is None:
        return None
    if (place := _largest_difference(numbers, values)) is None:
        return None
    everywhere = _sample((-math.inf, math.inf))
    starts = [(numbers, chain.functions), *((everywhere, first.functions + chain.functions) for first in before)]
    results = ((_apply(functions, x), _apply(one.functions, x)) for x, functions in starts for one in wanted)
    same = any(a is not None and b is not None and _largest_difference(a, b) is None for a, b in results)
    return None if same else (float(numbers[place]), float(values[place]))


@lru_cache(256)
def _sample(where: tuple[float, float]) -> Tensor:
    """Return small and large numbers in a range, with its finite ends."""
    ends = [end for end in where if math.isfinite(end)]
    numbers = sorted({*(-x for x in _SAMPLES), 0.0, *_SAMPLES, *ends})
    return torch.tensor([x for x in numbers if where[0] <= x <= where[1]], dtype=torch.double)


def _apply(functions: Functions, numbers: Tensor) -> Tensor | None:
    """Apply the functions in turn; None if one of them does not take such numbers, or the result is not finite."""
    values = numbers
    for function in functions:
        try:
            values = function(values.clone())  # it may work in place
        except (RuntimeError, TypeError, ValueError):
            return None
    fits = values.dtype == numbers.dtype and values.shape == numbers.shape and bool(values.isfinite().all())
    return values if fits else None


def _largest_difference(a: Tensor, b: Tensor) -> int | None:
    """Return the place where two rows of numbers differ most; None if they agree."""
    difference = (a - b).abs() / a.abs().clamp(min=1.0)
    return int(difference.argmax()) if difference.numel() and float(difference.max()) > 1e-12 else None


@dataclass(frozen=True)
class Passage:
    """What happened to units since a layer produced them.

    Example: behind a convolution, SiLU and a squeeze-excite gate, `bends` is (("conv.weight", 1.0),) and `gates` is
    (("fc2.weight", 0.5),), as the sigmoid of zero is 0.5.
    """

    bends: Bends = ()  # activations with f(x) - f(-x) = slope * x: the layer before each can turn the sign of x
    gates: tuple[tuple[str, float], ...] = ()  # gates that multiplied them: last layer, value if that gives 0
    carrier: str | None = None  # the last layer since the last activation that has a weight for each unit
    rest: float | None = None  # the units' value if the layer that produced them gives zeros; None: not known

    def apply(self, function: Callable[[Tensor], Tensor]) -> Passage:
        """Return the passage behind an activation. It starts anew if no pair (x, -x) passes the activation."""
        half = torch.linspace(0.25, 12.0, 8, dtype=torch.double)
        numbers = torch.cat([half, -half, torch.tensor([self.rest or 0.0], dtype=torch.double)])
        try:
            values = function(numbers)
            if values.dtype != torch.double:  # a comparison, or another precision
                return NOTHING
            positive, negative, rest = values.split([len(half), len(half), 1])
        except (RuntimeError, TypeError, ValueError):  # it does not take such numbers
            return NOTHING
        new_rest = None if self.rest is None else float(rest)
        slope = float((positive - negative)[0] / half[0])
        if self.carrier is None or slope == 0 or not torch.allclose(positive - negative, slope * half, 1e-13, 0.0):
            return Passage(rest=new_rest)
        return replace(self, bends=(*self.bends, (self.carrier, slope)), carrier=None, rest=new_rest)


NOTHING = Passage()


def apply_gate(operands: Sequence[tuple[Passage, frozenset[str]]]) -> Passage:
    """Return the passage of a product of two activations, each given by its passage and its source layers."""
    # An operand is the gate of the other if it is a number other than zero when its one source layer gives zeros.
    gates = [k for k, (passage, sources) in enumerate(operands) if passage.rest and len(sources) == 1]
    if len(operands) != 2 or len(gates) != 1:
        return NOTHING
    (gate,) = gates
    (passage, sources), (passing, _) = operands[gate], operands[1 - gate]
    assert passage.rest is not None
    return replace(passing, gates=(*passing.gates, (*sources, passage.rest)), rest=None)
