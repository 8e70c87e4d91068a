"""What a few seeds allow us to say: intervals of means, verdicts on claims, and costs to reach a target.

Differences are paired by seed. An interval is that of Student's t, which covers the mean as often as it says if seeds
differ by something like a normal distribution. The sum of many small accidents is close to one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit  # Student's t; scipy.stats has it, too, but takes a second to import

CLAIM_SEEDS = 3  # with fewer seeds there is no verdict
HEADLINE_SEEDS = 5  # with fewer seeds there is none on a claim that a reader will quote
LEVEL = 0.95
POWER = 0.8  # the probability with which `seeds_needed` seeds find an effect of the observed size


@dataclass(frozen=True)
class Estimate:
    """The mean of one number a seed, and its interval; an end is infinite where nothing bounds it."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    sides: tuple[int, ...] = ()  # if some values are bounds: the truth is at most (-1) or at least (1) the value
    note: str = ""  # what a reader should know beside the numbers

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.values)


@dataclass(frozen=True)
class Reached:
    """The cost at which a target is reached: `cost`, or at most (side < 0), or at least (side > 0) `cost`."""

    cost: float
    side: int = 0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and the interval of at least one number, one a seed; one seed alone has an unbounded interval."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, tuple(values))
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / math.sqrt(len(values))
    return Estimate(mean, float(mean - half), float(mean + half), tuple(values))


def verdict(found: Estimate, low: float, high: float, headline: bool = False) -> str:
    """Say whether the mean lies from `low` to `high`: it "holds" if all of the interval does, "fails" if none does.

    Else, and with fewer seeds than a claim or a headline takes, it is "undecided". Where every seed gives only a bound,
    all on one side, the bounds must lie there: a run that never reached the target needs more than its whole budget.
    """
    if found.n < (HEADLINE_SEEDS if headline else CLAIM_SEEDS):
        return "undecided"
    bottom, top = found.low, found.high
    if set(found.sides) == {1}:
        bottom, top = math.nextafter(min(found.values), math.inf), math.inf
    elif set(found.sides) == {-1}:
        bottom, top = -math.inf, math.nextafter(max(found.values), -math.inf)
    if low <= bottom and top <= high:
        return "holds"
    return "fails" if top < low or bottom > high else "undecided"


def seeds_needed(found: Estimate, low: float, high: float, headline: bool = False) -> int | None:
    """Return how many seeds decide, with probability POWER, whether the mean lies from `low` to `high`.

    It is None with a single seed, with seeds that never reached the target (only a larger budget would help), and if it
    takes more than a thousand.
    """
    if found.n < 2 or found.sides:
        return None
    distance = min(abs(found.mean - end) for end in (low, high))
    deviation = float(np.std(found.values, ddof=1))
    for n in range(HEADLINE_SEEDS if headline else CLAIM_SEEDS, 1001):
        quantiles = stdtrit(n - 1, (1 + LEVEL) / 2) + stdtrit(n - 1, POWER)
        if quantiles * deviation / math.sqrt(n) <= distance:
            return n
    return None


def crossing(points: Sequence[tuple[float, float]], target: float) -> Reached:
    """Return the cost at which accuracy first reaches `target`, from pairs (cost, accuracy) in order of cost.

    It is interpolated in the logarithm of the cost. If the smallest cost reaches the target, less might have done; if
    none reaches it, more than the largest is needed.
    """
    above = next((place for place, (_, accuracy) in enumerate(points) if accuracy >= target), None)
    if not above:
        return Reached(points[-1][0], 1) if above is None else Reached(points[0][0], -1)
    (less, below), (more, reached) = points[above - 1 : above + 1]
    return Reached(less * (more / less) ** ((target - below) / (reached - below)))


def log_ratio(costs: Sequence[tuple[Reached, Reached]]) -> Estimate:
    """Return the mean over seeds of the logarithm of the first cost over the second.

    A one-sided bound opens the interval on that side. If every seed is a bound, the other end is the weakest of them.
    """
    found = estimate([math.log(one.cost / other.cost) for one, other in costs])
    sides = [{one.side, -other.side} - {0} for one, other in costs]
    some, every = set().union(*sides), set.intersection(*sides)
    low, high = min(found.values) if 1 in every else found.low, max(found.values) if -1 in every else found.high
    return replace(
        found,
        low=-math.inf if -1 in some else low,
        high=math.inf if 1 in some else high,
        # Two bounds in opposite directions say nothing about their ratio.
        sides=tuple(min(side) if len(side) == 1 else 0 for side in sides) if some else (),
    )
