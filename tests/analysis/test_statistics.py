"""What a few seeds allow to be said: against tables, by simulation, and where nothing can be said."""

import math

import numpy as np
import pytest

from experiments.analysis.statistics import Reached, crossing, estimate, log_ratio, seeds_needed, verdict


def test_an_interval_by_hand():
    found = estimate([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(7 / 3))
    half = 4.30265 * math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(7 / 3 - half, abs=1e-4), pytest.approx(7 / 3 + half, abs=1e-4))
    assert estimate([3.0]).low == -math.inf and estimate([3.0]).high == math.inf
    for values in ([2.0, 2.0, 2.0], [0.1 + 0.2, 0.3, 0.3]):  # equal, and equal but for rounding
        assert (estimate(values).low, estimate(values).high) == pytest.approx((values[0], values[0]))


def test_the_seeds_that_it_would_take_are_the_seeds_that_it_takes():
    rng = np.random.default_rng(0)
    observed = estimate([1.0, 3.0, -1.0, 1.0])  # mean 1, deviation 1.63
    assert verdict(observed, 0, math.inf) == "undecided"
    n = seeds_needed(observed, 0, math.inf)
    assert n is not None and n > 4
    enough, half = (rng.normal(1, 1.633, (200, seeds)).tolist() for seeds in (n, n // 2))
    power = np.mean([verdict(estimate(values), 0, math.inf) == "holds" for values in enough])
    assert power == pytest.approx(0.8, abs=0.09)
    assert np.mean([verdict(estimate(values), 0, math.inf) == "holds" for values in half]) < 0.65
    assert seeds_needed(estimate([1.0, 1.1]), 0, math.inf, headline=True) == 5
    assert seeds_needed(estimate([1.0]), 0, math.inf) is None
    assert seeds_needed(estimate([1.0, -1.0, 0.001]), 0, math.inf) is None  # thousands


def test_costs_to_a_target():
    points = [(1.0, 0.5), (2.0, 0.6), (4.0, 0.8), (8.0, 0.7)]
    assert crossing(points, 0.6) == Reached(2.0)
    assert crossing(points, 0.7) == Reached(pytest.approx(2 * math.sqrt(2)))
    assert crossing(points, 0.5) == crossing(points, 0.3) == Reached(1.0, -1)
    assert crossing(points, 0.81) == Reached(8.0, 1)


def test_ratios_of_costs():
    found = log_ratio([(Reached(1.0), Reached(2.0)), (Reached(2.0), Reached(4.0)), (Reached(1.0), Reached(4.0))])
    assert math.exp(found.mean) == pytest.approx((1 / 16) ** (1 / 3))
    assert verdict(found, -math.inf, 0) == "undecided"
    same = [(Reached(1.0), Reached(4.0))] * 3
    assert verdict(log_ratio(same), -math.inf, 0) == "holds"


def test_what_is_known_from_one_side_decides_on_that_side_alone():
    below = log_ratio([(Reached(1.0, -1), Reached(4.0)), (Reached(1.1), Reached(4.0)), (Reached(1.0), Reached(4.0))])
    assert below.low == -math.inf and verdict(below, -math.inf, 0) == "holds"
    assert verdict(below, math.log(0.2), 0) == "undecided"
    above = log_ratio([(Reached(8.0, 1), Reached(4.0)), (Reached(8.1), Reached(4.0)), (Reached(8.0), Reached(4.0))])
    assert above.high == math.inf and verdict(above, -math.inf, 0) == "fails"
    assert verdict(above, 0, 10) == "undecided"
    # Three seeds far below one, and one that never got there: its cost may be anything.
    never = log_ratio([(Reached(1.0), Reached(8.0))] * 3 + [(Reached(8.0, 1), Reached(8.0))])
    assert verdict(never, -math.inf, 0) == "undecided" and seeds_needed(never, -math.inf, 0) is None
    # No seed got there with all that the other one spent: it costs more than that.
    spent = log_ratio([(Reached(8.0, 1), Reached(8.0))] * 3)
    assert spent.low == 0 and verdict(spent, -math.inf, 0) == "fails" and verdict(spent, 0, 1) == "undecided"
    assert verdict(log_ratio([(Reached(8.0), Reached(8.0))] * 3), -math.inf, 0) == "holds"  # reached: no more than that
    turned = log_ratio([(Reached(1.0), Reached(4.0, 1))] * 3)  # the other one never reached it
    assert turned.low == -math.inf and verdict(turned, -math.inf, 0) == "holds"
    # Never in five seeds, of which the others took less than everything in one: stronger evidence, no weaker verdict.
    uneven = log_ratio([(Reached(8.0, 1), Reached(8.0))] * 4 + [(Reached(8.0, 1), Reached(7.0))])
    assert uneven.low == 0 and verdict(uneven, -math.inf, 0) == "fails"
    mixed = log_ratio([(Reached(8.0, 1), Reached(8.0)), (Reached(7.0, 1), Reached(8.0))] * 2)
    assert verdict(mixed, -math.inf, 0) == "undecided"
    both = log_ratio([(Reached(8.0, 1), Reached(8.0, 1))] * 3)  # neither got there
    assert both.sides == (0, 0, 0) and verdict(both, -math.inf, 0) == "undecided"


@pytest.mark.parametrize("side", [-1, 1])
def test_of_bounds_alone_the_weakest_ends_the_interval(side):
    found = log_ratio([(Reached(share, side), Reached(1.0)) for share in (0.5, 0.5, 0.9)])
    low, high = (-math.inf, math.log(0.9)) if side == -1 else (math.log(0.5), math.inf)
    assert (found.low, found.high) == (low, high)
    # With one that is known, the interval is that of the mean.
    found = log_ratio([(Reached(share, side * (share < 0.9)), Reached(1.0)) for share in (0.5, 0.5, 0.9)])
    assert (found.high > math.log(0.9)) if side == -1 else (found.low < math.log(0.5))
