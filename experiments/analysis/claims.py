"""Claims as tests: each is a number that the curves give, and the values of it for which the claim holds.

An operand reads `experiment:arm` or `experiment/case:arm`. The case `best` is, for each seed, the one in which the arm
ends best on the holdout images of the other seeds; it is then measured on the test images of this seed.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from pandas import DataFrame, Series

from ..arms import ARMS
from ..config import TEACHER, ExperimentError, nearest
from . import statistics
from .cases import choose_cases, find_planned
from .curves import Results, describe_differences, find_first_reach
from .statistics import Estimate, Reached

Noted = str | tuple[str, str]  # a cell of a table, alone or with its note


@dataclass(frozen=True)
class Claim:
    """One claim: what is measured, and for which values it holds (one of above, below and within)."""

    claim: str
    source: str  # the section of the paper, or who makes the claim
    paper: str  # what is printed there
    measure: str  # one of MEASURES
    of: str  # the operand that is measured
    against: str = ""  # the operand that it is compared with, for measures that compare two
    above: float | None = None
    below: float | None = None
    within: float | None = None  # a difference up to this value either way, or a ratio up to this factor either way
    headline: bool = False  # readers will quote it, which takes more seeds
    # It was committed before the first curve of its experiment, or of the `arm` that it measures (scripts/verify.py).
    registered: bool | str = False
    group: str = ""  # the heading that it stands under

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ExperimentError(f"There is no measure {self.measure!r}{nearest(self.measure, MEASURES)}.")
        ends = [end for end in (self.above, self.below, self.within) if end is not None]
        if len(ends) != 1:
            raise ExperimentError("A claim says for which values it holds by one of above, below and within.")
        if self.registered not in (True, False, "arm"):
            raise ExperimentError(f"registered is {self.registered!r}: it is true, false or arm.")
        measure = MEASURES[self.measure]
        if measure.pair != bool(self.against):
            raise ExperimentError(
                f"The measure {self.measure} compares two runs: name the other one with against."
                if measure.pair
                else f"The measure {self.measure} is of one run: leave against out."
            )
        if (self.within is not None and self.within < measure.ratio) or (measure.ratio and ends[0] <= 0):
            raise ExperimentError(
                f"{ends[0]} is no end of {self.measure}: ratios are above 0, and within is at least 1."
            )

    @property
    def question(self) -> tuple[Any, ...]:
        """What decides the verdict, without the words."""
        return self.measure, self.of, self.against, self.above, self.below, self.within, self.headline

    @property
    def experiments(self) -> set[str]:
        """The experiments whose curves decide it."""
        return {text.partition(":")[0].partition("/")[0] for text in (self.of, self.against) if text}

    @property
    def region(self) -> tuple[float, float]:
        """The smallest and largest value for which the claim holds; for a ratio, those of its logarithm.

        A value equal to an end is within it, and neither above nor below it.
        """
        scale = math.log if MEASURES[self.measure].ratio else float
        if self.within is not None:
            return -scale(self.within), scale(self.within)
        low = -math.inf if self.above is None else math.nextafter(scale(self.above), math.inf)
        return low, math.inf if self.below is None else math.nextafter(scale(self.below), -math.inf)


@dataclass(frozen=True)
class Operand:
    """The runs of one arm of one experiment, or of one of its cases. Both tables are indexed by seed."""

    name: str  # experiment or experiment/case
    arm: str
    runs: DataFrame
    curves: DataFrame
    differences: tuple[str, ...] = ()  # settings in which its seeds differ
    best: str = ""  # for the case `best`: of how many cases, and which of them won in how many seeds


@dataclass(frozen=True)
class Finding:
    """The verdict on a claim."""

    claim: Claim
    verdict: str
    value: str  # the measured value as text
    note: str = ""  # what a reader should know beside the two


def read_claims(path: Path) -> list[Claim]:
    """Return the claims in a file; ExperimentError, which names the claim, if one is malformed."""
    return parse_claims(path.read_text(encoding="utf-8"), path)


def parse_claims(text: str, path: str | Path) -> list[Claim]:
    """Return the claims in the text of a file, alone or in groups; `path` is its name in messages."""
    known = [field.name for field in fields(Claim)]
    claims: list[Claim] = []
    found: Any = OmegaConf.to_container(OmegaConf.create(text))
    groups = [
        [claim | {"group": one["group"]} for claim in one["claims"]] if one.keys() == {"group", "claims"} else [one]
        for one in found
    ]
    for entry in itertools.chain(*groups):
        try:
            if unknown := [key for key in entry if key not in known]:
                raise ExperimentError(f"A claim has no {unknown[0]!r}{nearest(unknown[0], known)}.")
            claims.append(Claim(**entry))
        except (ExperimentError, TypeError) as error:
            raise ExperimentError(f"{path}, the claim {entry.get('claim', entry)!r}: {error}") from error
    return claims


def judge(claim: Claim, results: Results) -> Finding:
    """Return the verdict on a claim: holds, fails, undecided (and what would decide it), or not run."""
    found, used = measure(claim.measure, results, claim.of, claim.against)
    if found is None:
        return Finding(claim, "not run", "–")
    low, high = claim.region
    outcome = statistics.verdict(found, low, high, claim.headline)
    notes = [found.note, *(one.best for one in used)]
    if differences := _list_differences(used):
        outcome = "undecided (settings differ)"
        notes.append(f"its runs differ in {', '.join(differences)}")
    elif outcome == "undecided":
        outcome += f" ({_what_would_decide(found, low, high, claim.headline)})"
    return Finding(claim, outcome, format_estimate(found, claim.measure), "; ".join(filter(None, notes)))


def _list_differences(used: tuple[Operand, ...]) -> list[str]:
    """Return the settings in which runs differ that should be alike: the seeds of an arm, the arms of one case."""
    found = [text for one in used for text in one.differences]
    # A teacher has settings of its own, and `best` mixes several cases.
    arms = [one for one in used if one.arm != TEACHER and not one.best]
    for name in dict.fromkeys(one.name for one in arms):
        found += describe_differences(record for one in arms if one.name == name for record in one.runs["manifest"])
    return list(dict.fromkeys(found))


def measure(name: str, results: Results, of: str, against: str = "") -> tuple[Estimate | None, tuple[Operand, ...]]:
    """Return what a measure gives for these operands, and the runs it was taken from; None if some were not run."""
    sides = [find_operands(results, text) for text in (of, against) if text]
    if not all(sides):
        return None, ()
    return MEASURES[name].take(*sides), tuple(operand for side in sides for operand in side)


def find_operands(results: Results, text: str) -> list[Operand]:
    """Return what an operand names: one run of an arm, or the run of each case if it names none; [] if not run."""
    name, _, arm = text.partition(":")
    experiment, _, case = name.partition("/")
    selected = results.select(experiment, case if case not in ("", "best") else None, arm)
    evaluations = dict(iter(selected.curves.groupby(level="case")))
    found: list[Operand] = []
    for key, group in selected.runs.groupby(level="case"):
        own, curve = (one.droplevel(["experiment", "case", "arm"]) for one in (group, evaluations[key]))
        differences = tuple(describe_differences(own["manifest"]))
        found.append(Operand(f"{experiment}/{key}".rstrip("/"), arm, own, curve, differences))
    return _choose_best(experiment, arm, found) if case == "best" else found


def _choose_best(experiment: str, arm: str, found: list[Operand]) -> list[Operand]:
    """Return the best case of each seed as one operand, or nothing until every case in the configuration was run."""
    cases = {one.name.partition("/")[2]: one for one in found}
    chosen = choose_cases(DataFrame({case: one.runs["holdout"] for case, one in cases.items()}))
    if not chosen or not find_planned(experiment, arm) <= cases.keys():
        return []
    runs, curves = (
        pd.concat([getattr(cases[case], table).loc[[seed]] for seed, case in chosen.items()])
        for table in ("runs", "curves")
    )
    differences = tuple(dict.fromkeys(text for one in found for text in one.differences))
    wins = ", ".join(f"{case} ({n} of {len(chosen)} seeds)" for case, n in Counter(chosen.values()).items())
    return [Operand(f"{experiment}/best", arm, runs, curves, differences, f"best of {len(cases)} for {arm}: {wins}")]


def _single(side: list[Operand]) -> Operand:
    if len(side) != 1:
        names = ", ".join(operand.name for operand in side)
        raise ExperimentError(
            f"This measure takes one run of {side[0].arm}, there are {len(side)} ({names}): name a case."
        )
    return side[0]


def _compare(column: str, other: str) -> Callable[[list[Operand], list[Operand]], Estimate | None]:
    """Return a measure: `column` of one operand less `other` of the other one, in points, paired by seed."""

    def take(of: list[Operand], against: list[Operand]) -> Estimate | None:
        found = (_single(of).runs[column] - _single(against).runs[other]).dropna().sort_index()
        return statistics.estimate(list(100 * found)) if len(found) else None

    return take


def _measure_mismatch(of: list[Operand]) -> Estimate | None:
    counts = [record["step0"] for record in _single(of).runs["manifest"] if record.get("step0")]
    return statistics.estimate([100 * (1 - one["agree"] / one["of"]) for one in counts]) if counts else None


def _measure_steps(of: list[Operand], against: list[Operand]) -> Estimate | None:
    """Compare the first evaluated steps at which the two reach the target of the first."""
    mine, theirs = _single(of), _single(against)
    if mine.best:
        raise ExperimentError("The target of steps is that of one run, the best case is of several: name a case.")
    targets = mine.runs["target"].dropna()
    own, other = (_find_steps(one, targets) for one in (mine, theirs))
    costs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other)]
    return _ratio(costs, {"never within the run": [one.side == 1 for one, _ in costs]})


def _find_steps(operand: Operand, targets: Series) -> dict[int, Reached]:
    """Return for each seed the step at which the operand reaches the target."""
    reached = find_first_reach(operand.curves, targets)["step"]
    found: dict[int, Reached] = {}
    for seed in targets.index.intersection(operand.runs.index):
        if seed not in reached.index:
            found[seed] = Reached(operand.runs.at[seed, "step"], 1)
        elif reached[seed] == 0:  # it took no more than the shortest time that was measured
            found[seed] = Reached(operand.curves.loc[[seed], "step"].iloc[1], -1)
        else:
            found[seed] = Reached(reached[seed])
    return found


def _measure_budget(of: list[Operand], against: list[Operand], cost: str = "flops") -> Estimate | None:
    """Compare the budget with which `of` ends as well as `against`, with the budget that `against` had.

    Only seeds that were run with all budgets count, because between fewer a crossing is interpolated elsewhere.
    """
    goal = _single(against).runs.sort_index()
    tried = pd.concat([one.runs for one in of])
    costs: list[tuple[Reached, Reached]] = []
    untrained: list[bool] = []
    for seed, target, spent in zip(goal.index, goal["final"], goal[cost], strict=True):
        runs = tried.loc[tried.index == seed]
        if len(runs) == len(of) and runs[cost].notna().all() and not math.isnan(spent):
            points = sorted(zip(runs[cost], runs["final"], strict=True))
            costs.append((statistics.crossing(points, target), Reached(spent)))
            untrained.append(bool((runs["start"] >= target).any()))
    smallest = [one.side == -1 and not there for (one, _), there in zip(costs, untrained, strict=True)]
    notes = {
        "not with the largest budget": [one.side == 1 for one, _ in costs],
        "with the smallest budget already": smallest,
        "untrained already": untrained,
    }
    return _ratio(costs, notes)


def _ratio(costs: list[tuple[Reached, Reached]], notes: dict[str, list[bool]]) -> Estimate | None:
    """Return the ratio of the costs, with a note on the seeds that each of `notes` marks."""
    if not costs:
        return None
    texts = [f"{note} in {sum(seeds)} of {len(seeds)} seeds" for note, seeds in notes.items() if any(seeds)]
    return replace(statistics.log_ratio(costs), note=", ".join(texts))


@dataclass(frozen=True)
class Measure:
    """How a number is taken from each seed. A ratio is estimated by its logarithm."""

    take: Callable[..., Estimate | None]
    unit: str
    pair: bool = True  # whether it compares two runs
    ratio: bool = False


# `measures` in texts.yaml explains the units.
MEASURES = {
    "accuracy": Measure(lambda of: statistics.estimate(list(100 * _single(of).runs["final"])), "%", pair=False),
    "final": Measure(_compare("final", "final"), "points"),
    "start": Measure(_compare("start", "final"), "points at step 0"),
    "lowest": Measure(_compare("lowest", "final"), "points at the lowest"),
    "average": Measure(_compare("average", "average"), "points on average"),
    "mismatch": Measure(_measure_mismatch, "% differ", pair=False),
    "steps": Measure(_measure_steps, "× steps", ratio=True),
    "budget": Measure(_measure_budget, "× compute", ratio=True),
    "total_budget": Measure(partial(_measure_budget, cost="total_flops"), "× compute in all", ratio=True),
}


def format_estimate(found: Estimate, measure: str, unit: bool = True) -> str:
    """Return `+1.20 points (0.80 to 1.60), n = 3`; an end that nothing bounds is left open."""
    kind = MEASURES[measure]
    sign = "" if kind.ratio or kind.unit.startswith("%") else "+"
    mean, low, high = (
        f"{math.exp(value) if kind.ratio else value:{sign}.2f}" if math.isfinite(value) else None
        for value in (found.mean, found.low, found.high)
    )
    ends = {(True, True): f" ({low} to {high})", (True, False): f" (from {low})", (False, True): f" (up to {high})"}
    open_ = {-1, 1} & set(found.sides)
    bound = "about " if len(open_) == 2 else "≤ " if -1 in open_ else "≥ " if 1 in open_ else ""
    interval = ends.get((low is not None, high is not None), "")
    return f"{bound}{mean}{f' {kind.unit}' if unit else ''}{interval}, n = {found.n}"


def _what_would_decide(found: Estimate, low: float, high: float, headline: bool) -> str:
    needed = statistics.seeds_needed(found, low, high, headline)
    if needed is not None:
        return f"about {max(needed, found.n + 1)} seeds"
    least = statistics.HEADLINE_SEEDS if headline else statistics.CLAIM_SEEDS
    if found.n < least:
        return f"{least} seeds at least"
    return "other budgets" if found.sides else "over 1,000 seeds"


def tabulate_budgets(name: str, results: Results) -> tuple[list[str], list[list[Noted]]]:
    """Return the table of a frontier, an experiment whose cases are budgets: its heads, and its lines of cells.

    It says which share of each budget of random_init every arm needs; `frontier` in texts.yaml explains the columns.
    """
    arms = [arm for arm in ARMS if arm in results.arms and arm != "random_init"]
    lines: list[list[Noted]] = []
    for case, arm in itertools.product(results.experiments[name], arms):
        columns = {"budget": f"{name}:{arm}", "total_budget": f"{name}:{arm}", "steps": f"{name}/{case}:{arm}"}
        found = {kind: measure(kind, results, of, f"{name}/{case}:random_init")[0] for kind, of in columns.items()}
        cells = [(format_estimate(one, kind, unit=False), one.note) if one else "–" for kind, one in found.items()]
        lines.append([case, f"`{arm}`", *cells])
    return ["budget of `random_init`", "arm", "compute", "compute in all", "steps, read as a curve"], lines
