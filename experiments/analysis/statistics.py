"""What a few seeds allow to be said: differences paired by seed, their intervals, verdicts, and costs to a target.

An interval is the wider, at either end, of Student's t and the percentile bootstrap. With three seeds the bootstrap
alone covers the mean in three cases of four, not in nineteen of twenty: it has only the three numbers to draw from, and
never leaves their range. Student's t covers as often as it says if seeds differ by something like a normal
distribution, which the sum of many small accidents is; where they do not, the bootstrap's end may be the wider one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

CLAIM_SEEDS = 3  # below it there is no verdict
HEADLINE_SEEDS = 5  # below it there is none on what a reader will quote
LEVEL = 0.95
POWER = 0.8  # with which the seeds that a verdict would take find what was observed
RESAMPLES = 20_000


@dataclass(frozen=True)
class Estimate:
    """The mean of one number a seed, and its interval; an end is infinite where nothing bounds it."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    sides: tuple[int, ...] = ()  # for each value, if some are bounds: the truth is no more (-1) or no less (1) than it
    note: str = ""  # what a reader should know beside the numbers

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.values)


@dataclass(frozen=True)
class Reached:
    """The cost at which a target is reached: `cost` itself, or no more (side < 0), or no less (side > 0) than it."""

    cost: float
    side: int = 0


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> list[float]:
    """left - right for each seed that both have, in order of seeds."""
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of at least one number, one a seed; of a single seed the interval is unbounded."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, tuple(values))
    half = quantile(LEVEL, len(values)) * deviation(values) / math.sqrt(len(values))
    low, high = bootstrap(values)
    return Estimate(mean, min(mean - half, low), max(mean + half, high), tuple(values))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of the mean: over every resample of up to six values, over RESAMPLES of more."""
    n = len(values)
    if n <= 6:
        picks = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        picks = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    means = np.asarray(values, dtype=float)[picks].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of the population that at least two values are drawn from."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def quantile(level: float, n: int, sides: int = 2) -> float:
    """Student's t of n values that a share `level` stays below, on both sides or on one."""
    from scipy.special import stdtrit  # takes half a second to load

    return float(stdtrit(n - 1, 1 - (1 - level) / sides))


def verdict(found: Estimate, low: float, high: float, headline: bool = False) -> str:
    """Whether the mean lies from `low` to `high`: "holds" if all of its interval does, "fails" if none of it does.

    Where every seed gives a bound only, all on one side, it is the bounds that must lie there: what was not reached
    with all that was spent costs more. Else, and whenever there are fewer seeds than a claim or a headline takes,
    "undecided".
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
    """The seeds that decide whether the mean lies from `low` to `high`, were mean and deviation as observed.

    With probability POWER, for two-sided intervals of LEVEL. None if nothing can be said of them: one seed alone, a
    target that some seed never reached (which takes a larger budget, not more seeds), or more than a thousand.
    """
    least = HEADLINE_SEEDS if headline else CLAIM_SEEDS
    if found.n < 2 or found.sides:
        return None
    distance = min(abs(found.mean - end) for end in (low, high))
    spread = deviation(found.values)
    for n in range(least, 1001):
        if (quantile(LEVEL, n) + quantile(POWER, n, sides=1)) * spread / math.sqrt(n) <= distance:
            return n
    return None


def crossing(points: Sequence[tuple[float, float]], target: float) -> Reached:
    """The cost at which accuracy first reaches `target`, of (cost, accuracy) pairs in order of cost.

    Between two measured costs it is interpolated in the logarithm of the cost. What the smallest one reaches already
    may have cost less; what none reaches costs more than the largest.
    """
    before: tuple[float, float] | None = None
    for cost, accuracy in points:
        if accuracy >= target:
            if before is None:
                return Reached(cost, -1)
            share = (target - before[1]) / (accuracy - before[1])
            return Reached(before[0] * (cost / before[0]) ** share)
        before = cost, accuracy
    return Reached(points[-1][0], 1)


def log_ratio(costs: Sequence[tuple[Reached, Reached]]) -> Estimate:
    """The mean, over seeds, of the logarithm of the first cost over the second.

    A cost that is known from one side only enters as that bound, and opens the interval on the side where the truth
    may lie: the mean of what is no less than the truth is no less than the truth's. Where no seed gives more than a
    bound, the other end is the weakest of them.
    """
    found = estimate([math.log(one.cost / other.cost) for one, other in costs])
    sides = [{one.side, -other.side} - {0} for one, other in costs]
    either, every = set().union(*sides), set.intersection(*sides)
    low, high = min(found.values) if 1 in every else found.low, max(found.values) if -1 in every else found.high
    return replace(
        found,
        low=-math.inf if -1 in either else low,
        high=math.inf if 1 in either else high,
        # Of a quotient of bounds that is open on both sides nothing is known.
        sides=tuple(min(side) if len(side) == 1 else 0 for side in sides) if either else (),
    )
