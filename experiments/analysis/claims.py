"""Claims as tests: each is a number that curves give, and the values of it for which the claim holds.

An operand reads `experiment:arm` or `experiment/case:arm`. The case `best` is, for each seed, the one that the arm ends
best in on the holdout images of the other seeds; what is said of it is measured on the test images of this one.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config import TEACHER, ExperimentError, nearest
from . import cases as family
from . import curves as report
from . import statistics
from .curves import Curves, Manifests, Point, Results, mixed
from .statistics import Estimate, Reached


@dataclass(frozen=True)
class Claim:
    """One claim: whose, and for which values of which measure it holds (one of above, below, within)."""

    claim: str
    source: str  # section of the paper, or whose claim it is
    paper: str  # what is printed there
    measure: str  # one of MEASURES
    of: str
    against: str = ""
    above: float | None = None
    below: float | None = None
    within: float | None = None  # at most so far from 0, or by so large a factor from 1
    headline: bool = False  # to be quoted: takes more seeds

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ExperimentError(f"There is no measure {self.measure!r}{nearest(self.measure, MEASURES)}.")
        ends = [end for end in (self.above, self.below, self.within) if end is not None]
        if len(ends) != 1:
            raise ExperimentError("It says for which values it holds by one of above, below and within.")
        measure = MEASURES[self.measure]
        if measure.pair != bool(self.against):
            raise ExperimentError(
                f"The measure {self.measure} compares two runs: name the other one with against."
                if measure.pair
                else f"The measure {self.measure} is of one run: leave against out."
            )
        if (self.within is not None and self.within < measure.ratio) or (measure.ratio and ends[0] <= 0):
            raise ExperimentError(f"{ends[0]} is no end of {self.measure}: a ratio is above 0, and within 1 or more.")

    @property
    def region(self) -> tuple[float, float]:
        """The smallest and largest value for which the claim holds; of the logarithm, for a ratio.

        What is neither more nor less than an end is within it, and neither above nor below it.
        """
        scale = math.log if MEASURES[self.measure].ratio else float
        if self.within is not None:
            return -scale(self.within), scale(self.within)
        low = -math.inf if self.above is None else math.nextafter(scale(self.above), math.inf)
        return low, math.inf if self.below is None else math.nextafter(scale(self.below), -math.inf)


@dataclass(frozen=True)
class Operand:
    """The runs of one arm of one experiment, or of one case of it."""

    name: str
    arm: str
    curves: Curves
    manifests: Manifests
    apart: tuple[str, ...] = ()  # settings in which its seeds differ
    best: str = ""  # of the best case: of how many, and which of them won in how many seeds

    @property
    def runs(self) -> dict[int, list[Point]]:
        """The arm's curve by seed."""
        return self.curves[self.arm]

    def last(self, column: str) -> dict[int, float]:
        """What the column ends with, by seed."""
        return {seed: curve[-1][column] for seed, curve in self.runs.items()}

    def cost(self, seed: int, teacher: bool) -> float:
        """Training FLOPs, with those of the teacher it starts from if they are wanted; NaN if they are not known."""
        before = report.before(self.curves, self.arm, seed)
        spent = math.nan if before is None else before["flops"]
        return self.runs[seed][-1]["flops"] + (spent if teacher else 0.0)


@dataclass(frozen=True)
class Finding:
    """What became of a claim."""

    claim: Claim
    verdict: str
    shown: str  # the measured value, for a reader
    operands: tuple[Operand, ...]  # what it was measured on


def read_claims(path: Path) -> list[Claim]:
    """The claims of a file; raises ExperimentError, naming the claim, for one that is malformed."""
    known = [field.name for field in fields(Claim)]
    claims: list[Claim] = []
    entries: Any = OmegaConf.to_container(OmegaConf.load(path))
    for entry in entries:
        try:
            for key in entry:
                if key not in known:
                    raise ExperimentError(f"A claim has no {key!r}{nearest(key, known)}.")
            claims.append(Claim(**entry))
        except (ExperimentError, TypeError) as error:
            raise ExperimentError(f"{path}, the claim {entry.get('claim', entry)!r}: {error}") from error
    return claims


def judge(claim: Claim, results: Results) -> Finding:
    """The verdict on a claim: holds, fails, undecided (and what it would take), or not run."""
    found, used = measured(claim.measure, results, claim.of, claim.against)
    if found is None:
        return Finding(claim, "not run", "–", used)
    low, high = claim.region
    said = statistics.verdict(found, low, high, claim.headline)
    if apart := _apart(used):
        said = f"undecided (its runs differ in {', '.join(apart)})"
    elif said == "undecided":
        said += f" ({_takes(found, low, high, claim.headline)})"
    chosen = "".join(f"; {one.best}" for one in used if one.best)
    return Finding(claim, said, shown(found, claim.measure) + chosen, used)


def _apart(used: Iterable[Operand]) -> list[str]:
    """Settings in which runs differ that are taken as alike: the seeds of an arm, the arms of one case."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for one in used:
        if one.arm != TEACHER and not one.best:  # a teacher's are its own, a best case's are of several
            cases.setdefault(one.name, []).extend(one.manifests[one.arm].values())
    settings = [*(one.apart for one in used), *map(mixed, cases.values())]
    return list(dict.fromkeys(itertools.chain.from_iterable(settings)))


def measured(measure: str, results: Results, of: str, against: str = "") -> tuple[Estimate | None, tuple[Operand, ...]]:
    """What the measure gives for these operands and the runs it was taken from; None if some of them were not run."""
    sides = [operands(results, text) for text in (of, against) if text]
    if not all(sides):
        return None, ()
    return MEASURES[measure].of(*sides), tuple(operand for side in sides for operand in side)


def operands(results: Results, text: str) -> list[Operand]:
    """What an operand names: one run of an arm; each case's, if it names an experiment with cases; none if not run."""
    name, _, arm = text.partition(":")
    experiment = name.removesuffix("/best")
    found = [
        Operand(key, arm, curves, manifests, tuple(mixed(list(manifests[arm].values()))))
        for key, (curves, manifests) in results.items()
        if (key == experiment or key.startswith(f"{experiment}/")) and arm in curves
    ]
    return found if experiment == name else _best(experiment, arm, found)


def _best(experiment: str, arm: str, found: list[Operand]) -> list[Operand]:
    """The best case of each seed, as one operand; none until every case that is planned was run."""
    cases = {one.name.partition("/")[2]: one for one in found}
    ends = {case: one.last("holdout_accuracy") for case, one in cases.items()}
    chosen = family.choose(ends)
    if not chosen or not family.planned(experiment, arm) <= cases.keys():
        return []
    curves: Curves = {}
    manifests: Manifests = {}
    for seed, case in chosen.items():
        for kind in (TEACHER, arm):
            if seed in cases[case].curves.get(kind, {}):
                curves.setdefault(kind, {})[seed] = cases[case].curves[kind][seed]
                manifests.setdefault(kind, {})[seed] = cases[case].manifests[kind][seed]
    apart = tuple(dict.fromkeys(setting for one in found for setting in one.apart))
    said = ", ".join(f"{case} ({n} of {len(chosen)} seeds)" for case, n in Counter(chosen.values()).items())
    return [Operand(f"{experiment}/best", arm, curves, manifests, apart, f"best of {len(cases)} for {arm}: {said}")]


def _final(of: list[Operand], against: list[Operand]) -> Estimate | None:
    return _difference(*(_one(side).last("test_accuracy") for side in (of, against)))


def _accuracy(of: list[Operand]) -> Estimate | None:
    return statistics.estimate([100 * value for value in _one(of).last("test_accuracy").values()])


def _start(of: list[Operand], against: list[Operand]) -> Estimate | None:
    first = {seed: curve[0]["test_accuracy"] for seed, curve in _one(of).runs.items()}
    return _difference(first, _one(against).last("test_accuracy"))


def _lowest(of: list[Operand], against: list[Operand]) -> Estimate | None:
    lowest = {seed: min(point["test_accuracy"] for point in curve) for seed, curve in _one(of).runs.items()}
    return _difference(lowest, _one(against).last("test_accuracy"))


def _average(of: list[Operand], against: list[Operand]) -> Estimate | None:
    left, right = ({seed: time_average(curve) for seed, curve in _one(side).runs.items()} for side in (of, against))
    return _difference(left, right)


def time_average(curve: list[Point]) -> float:
    """The holdout accuracy on average over training: how fast it is learned, whatever the level of a target."""
    area = sum(
        (right["step"] - left["step"]) * (left["holdout_accuracy"] + right["holdout_accuracy"]) / 2
        for left, right in itertools.pairwise(curve)
    )
    return area / (curve[-1]["step"] - curve[0]["step"])


def _mismatch(of: list[Operand]) -> Estimate | None:
    records = _one(of).manifests[of[0].arm].values()
    shares = [100 * (1 - r["step0"]["agree"] / r["step0"]["of"]) for r in records if r.get("step0")]
    return statistics.estimate(shares) if shares else None


def _steps(of: list[Operand], against: list[Operand]) -> Estimate | None:
    """Of the first evaluated steps at which both reach the target of the run."""
    mine, theirs = _one(of), _one(against)
    if mine.best:
        raise ExperimentError("The target of steps is that of one run, the best case is of several: name a case.")
    target_arm = report.target_arm(mine.manifests)
    costs: list[tuple[Reached, Reached]] = []
    for seed in sorted(mine.runs.keys() & theirs.runs.keys()):
        target = report.target_accuracy(mine.curves, mine.arm, seed, target_arm)
        if target is not None:
            costs.append((_first(mine.runs[seed], target), _first(theirs.runs[seed], target)))
    return _ratio(costs, {"never within the run": [one.side == 1 for one, _ in costs]})


def _first(curve: list[Point], target: float) -> Reached:
    at = report.reach(curve, target)
    if at is None:
        return Reached(curve[-1]["step"], 1)
    # At once: no more than the shortest time seen.
    return Reached(at["step"]) if at["step"] else Reached(curve[1]["step"], -1)


def _budget(of: list[Operand], against: list[Operand], teacher: bool = False) -> Estimate | None:
    """Of the training FLOPs that `of` needs, annealed over its own budget, for what `against` ends with, to its own.

    Of the seeds that were run with every budget alone: between fewer, a crossing is interpolated elsewhere.
    """
    goal = _one(against)
    every = set.intersection(*(set(case.runs) for case in of))
    costs: list[tuple[Reached, Reached]] = []
    untrained: list[bool] = []
    for seed, target in sorted(goal.last("test_accuracy").items()):
        if seed not in every:
            continue
        points = sorted((case.cost(seed, teacher), case.last("test_accuracy")[seed]) for case in of)
        if not any(math.isnan(cost) for cost in (goal.cost(seed, teacher), *dict(points))):
            costs.append((statistics.crossing(points, target), Reached(goal.cost(seed, teacher))))
            untrained.append(any(case.runs[seed][0]["test_accuracy"] >= target for case in of))
    notes = {
        "not with the largest budget": [one.side == 1 for one, _ in costs],
        "with the smallest budget already": [
            one.side == -1 and not there for (one, _), there in zip(costs, untrained, strict=True)
        ],
        "untrained already": untrained,
    }
    return _ratio(costs, notes)


def _total_budget(of: list[Operand], against: list[Operand]) -> Estimate | None:
    return _budget(of, against, teacher=True)


def _ratio(costs: list[tuple[Reached, Reached]], notes: dict[str, list[bool]]) -> Estimate | None:
    """Of one cost to the other; with what is to be said of some of the seeds."""
    if not costs:
        return None
    said = [f"{note} in {sum(seeds)} of {len(seeds)}" for note, seeds in notes.items() if any(seeds)]
    return replace(statistics.log_ratio(costs), note=", ".join(said))


def _one(side: list[Operand]) -> Operand:
    if len(side) != 1:
        names = ", ".join(operand.name for operand in side)
        raise ExperimentError(
            f"This measure takes one run of {side[0].arm}, there are {len(side)} ({names}): name a case."
        )
    return side[0]


def _difference(left: dict[int, float], right: dict[int, float]) -> Estimate | None:
    """In percentage points, paired by seed; None without a seed that both have."""
    found = statistics.paired(left, right)
    return statistics.estimate([100 * value for value in found]) if found else None


@dataclass(frozen=True)
class Measure:
    """A number a seed. Of a ratio the logarithm is what is estimated."""

    of: Callable[..., Estimate | None]
    unit: str
    pair: bool = True  # whether it compares two runs
    ratio: bool = False


MEASURES = {
    "accuracy": Measure(_accuracy, "% test accuracy", pair=False),
    "final": Measure(_final, "points of final test accuracy"),
    "start": Measure(_start, "points of test accuracy at step 0, over the final one of the other"),
    "lowest": Measure(_lowest, "points of test accuracy at its lowest, over the final one of the other"),
    "average": Measure(_average, "points of holdout accuracy, on average over training"),
    "mismatch": Measure(_mismatch, "% of the test images are classified otherwise", pair=False),
    "steps": Measure(_steps, "× the steps to the target", ratio=True),
    "budget": Measure(_budget, "× the budget", ratio=True),
    "total_budget": Measure(_total_budget, "× the budget, teachers' included", ratio=True),
}


def shown(found: Estimate, measure: str, unit: bool = True) -> str:
    """`+1.20 points (0.80 to 1.60), n = 3`; an end that nothing bounds is left open."""
    kind = MEASURES[measure]

    signed = "" if kind.ratio or kind.unit.startswith("%") else "+"
    mean, low, high = (
        f"{math.exp(value) if kind.ratio else value:{signed}.2f}" if math.isfinite(value) else None
        for value in (found.mean, found.low, found.high)
    )
    ends = {(True, True): f" ({low} to {high})", (True, False): f" (from {low})", (False, True): f" (up to {high})"}
    open_ = {-1, 1} & set(found.sides)
    bound = "about " if len(open_) == 2 else "≤ " if -1 in open_ else "≥ " if 1 in open_ else ""
    words = f" {kind.unit}" if unit else ""
    note = f" ({found.note})" if found.note else ""
    return f"{bound}{mean}{words}{ends.get((low is not None, high is not None), '')}, n = {found.n}{note}"


def _takes(found: Estimate, low: float, high: float, headline: bool) -> str:
    """What it would take to decide."""
    least = statistics.HEADLINE_SEEDS if headline else statistics.CLAIM_SEEDS
    needed = statistics.seeds_needed(found, low, high, headline)
    if needed is not None:
        return f"about {max(needed, found.n + 1)} seeds would tell"
    if found.n < least:
        return f"{least} seeds at least"
    if found.sides:
        return "a larger or smaller budget, not more seeds"
    return "more than 1,000 seeds"
