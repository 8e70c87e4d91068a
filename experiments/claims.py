"""Claims as tests: each is a number that curves give, and the values of it for which the claim holds.

An operand reads `experiment:arm` or `experiment/case:arm`. The case `best` is the one that the arm ends best in on the
holdout images; what is said of it is measured on the test images, which chose nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import report, statistics
from .config import ExperimentError, nearest
from .report import Curves, Manifests, Point
from .statistics import Estimate, Reached

Results = Mapping[str, tuple[Curves, Manifests]]


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
        if sum(end is not None for end in (self.above, self.below, self.within)) != 1:
            raise ExperimentError("It says for which values it holds by one of above, below and within.")

    @property
    def region(self) -> tuple[float, float]:
        """The smallest and largest value for which the claim holds; of the logarithm, for a ratio."""
        scale = math.log if MEASURES[self.measure].ratio else float
        if self.within is not None:
            return -scale(self.within), scale(self.within)
        low = -math.inf if self.above is None else scale(self.above)
        return low, math.inf if self.below is None else scale(self.below)


@dataclass(frozen=True)
class Operand:
    """The runs of one arm of one experiment, or of one case of it."""

    name: str
    arm: str
    curves: Curves
    manifests: Manifests
    best: bool = False  # chosen among the cases

    @property
    def runs(self) -> dict[int, list[Point]]:
        """The arm's curve by seed."""
        return self.curves[self.arm]

    def last(self, column: str) -> dict[int, float]:
        """What the column ends with, by seed."""
        return {seed: curve[-1][column] for seed, curve in self.runs.items()}

    def cost(self, seed: int, teacher: bool) -> float:
        """Training FLOPs, with those of the teacher it starts from if they are wanted; NaN if they are not known."""
        before = report.teacher_flops(self.curves, self.arm, seed) if teacher else 0.0
        return self.runs[seed][-1]["flops"] + (math.nan if before is None else before)


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
    if said == "undecided":
        said += f" ({_takes(found, low, high, claim.headline)})"
    chosen = "".join(f"; best: {one.name}" for one in used if one.best)
    return Finding(claim, said, shown(found, claim.measure) + chosen, used)


def measured(measure: str, results: Results, of: str, against: str = "") -> tuple[Estimate | None, tuple[Operand, ...]]:
    """What the measure gives for these operands and the runs it was taken from; None if some of them were not run."""
    sides = [operands(results, text) for text in (of, against) if text]
    if not all(sides):
        return None, ()
    return MEASURES[measure].of(*sides), tuple(operand for side in sides for operand in side)


def operands(results: Results, text: str) -> list[Operand]:
    """What an operand names: one run of an arm; each case's, if it names an experiment with cases; none if not run."""
    name, _, arm = text.partition(":")
    family = name.removesuffix("/best")
    found = [
        Operand(experiment, arm, curves, manifests)
        for experiment, (curves, manifests) in results.items()
        if (experiment == family or experiment.startswith(f"{family}/")) and arm in curves
    ]
    if family == name:
        return found
    # Over the same seeds: one with an easier seed would win by it. A case that lacks seeds of others may have diverged.
    found = [one for one in found if len(one.runs) == max(len(other.runs) for other in found)]
    common = set.intersection(*(set(one.runs) for one in found)) if found else set()
    if not common:
        return []
    chosen = max(found, key=lambda one: sum(one.last("holdout_accuracy")[seed] for seed in common))
    return [replace(chosen, best=True)]


def _final(of: list[Operand], against: list[Operand]) -> Estimate | None:
    return _difference(*(_one(side).last("test_accuracy") for side in (of, against)))


def _accuracy(of: list[Operand]) -> Estimate | None:
    return statistics.estimate([100 * value for value in _one(of).last("test_accuracy").values()])


def _start(of: list[Operand], against: list[Operand]) -> Estimate | None:
    first = {seed: curve[0]["test_accuracy"] for seed, curve in _one(of).runs.items()}
    return _difference(first, _one(against).last("test_accuracy"))


def _average(of: list[Operand], against: list[Operand]) -> Estimate | None:
    return _difference(*({seed: mean(curve) for seed, curve in _one(side).runs.items()} for side in (of, against)))


def mean(curve: list[Point]) -> float:
    """The holdout accuracy on average over training: how fast it is learned, whatever the level of a target."""
    area = sum(
        (right["step"] - left["step"]) * (left["holdout_accuracy"] + right["holdout_accuracy"]) / 2
        for left, right in pairwise(curve)
    )
    return area / (curve[-1]["step"] - curve[0]["step"])


def _mismatch(of: list[Operand]) -> Estimate | None:
    records = _one(of).manifests[of[0].arm].values()
    shares = [100 * (1 - r["step0"]["agree"] / r["step0"]["of"]) for r in records if r.get("step0")]
    return statistics.estimate(shares) if shares else None


def _steps(of: list[Operand], against: list[Operand]) -> Estimate | None:
    """Of the first evaluated steps at which both reach the target of the run."""
    mine, theirs = _one(of), _one(against)
    target_arm = report.target_arm(mine.manifests)
    costs: list[tuple[Reached, Reached]] = []
    for seed in sorted(mine.runs.keys() & theirs.runs.keys()):
        target = report.target_accuracy(mine.curves, mine.arm, seed, target_arm)
        if target is not None:
            costs.append((_first(mine.runs[seed], target), _first(theirs.runs[seed], target)))
    return statistics.log_ratio(costs) if costs else None


def _first(curve: list[Point], target: float) -> Reached:
    step = report.steps_to(curve, target)
    if step is None:
        return Reached(curve[-1]["step"], 1)
    return Reached(step) if step else Reached(curve[1]["step"], -1)  # at once: no more than the shortest time seen


def _budget(of: list[Operand], against: list[Operand], teacher: bool = False) -> Estimate | None:
    """Of the training FLOPs that `of` needs, annealed over its own budget, for what `against` ends with, to its own."""
    goal = _one(against)
    costs: list[tuple[Reached, Reached]] = []
    for seed in sorted(goal.runs):
        points = sorted(
            (case.cost(seed, teacher), case.last("test_accuracy")[seed]) for case in of if seed in case.runs
        )
        if points and not any(math.isnan(cost) for cost in (goal.cost(seed, teacher), *dict(points))):
            reached = statistics.crossing(points, goal.last("test_accuracy")[seed])
            costs.append((reached, Reached(goal.cost(seed, teacher))))
    return statistics.log_ratio(costs) if costs else None


def _total_budget(of: list[Operand], against: list[Operand]) -> Estimate | None:
    return _budget(of, against, teacher=True)


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
    ratio: bool = False


MEASURES = {
    "accuracy": Measure(_accuracy, "% test accuracy"),
    "final": Measure(_final, "points of final test accuracy"),
    "start": Measure(_start, "points of test accuracy at step 0, over the final one of the other"),
    "average": Measure(_average, "points of holdout accuracy, on average over training"),
    "mismatch": Measure(_mismatch, "% of the test images are classified otherwise"),
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
    bound = {(): "", (-1,): "≤ ", (1,): "≥ ", (-1, 1): "bounded from neither side: "}[found.sides]
    words = f" {kind.unit}" if unit else ""
    return f"{bound}{mean}{words}{ends.get((low is not None, high is not None), '')}, n = {found.n}"


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
