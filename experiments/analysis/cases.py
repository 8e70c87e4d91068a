"""An experiment with cases, as a whole: its table, and the best case of each arm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from ..config import ARMS, CONFIGS, TEACHER
from . import curves as report
from . import statistics
from .curves import Curves, Manifests, Results, Spread
from .statistics import Estimate

Cases = dict[str, tuple[Curves, Manifests]]  # name of the case -> what was run


@dataclass(frozen=True)
class Line:
    """One arm of one case over its seeds. Accuracies are in 0..1."""

    case: str
    arm: str
    start: Spread  # test accuracy before training
    final: Estimate  # test accuracy at the end
    holdout: float  # the same of the holdout images, which chooses
    flops: float  # of training
    flops_total: float | None  # with its teacher's


def families(results: Results) -> dict[str, Cases]:
    """The experiments that have cases, and these in the order of their configuration."""
    found: dict[str, Cases] = {}
    for name in results:
        experiment, _, case = name.partition("/")
        if case and any(arm != TEACHER for arm in results[name][0]):  # a teacher alone is no result
            found.setdefault(experiment, {})[case] = results[name]
    return {name: {case: cases[case] for case in _ordered(name, cases)} for name, cases in found.items()}


def _ordered(experiment: str, cases: Cases) -> list[str]:
    written = list(_written(experiment).get("cases") or {})
    return sorted(cases, key=lambda case: (written.index(case) if case in written else len(written), case))


def planned(experiment: str, arm: str) -> set[str]:
    """The cases of the configuration that have this arm."""
    written = _written(experiment)
    cases: dict[str, Any] = written.get("cases") or {}
    arms = {case: changes.get("arms", written.get("arms", ARMS)) for case, changes in cases.items()}
    return {case for case in cases if report.split_arm(arm)[1] in arms[case]}


def _written(experiment: str) -> dict[str, Any]:
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    found: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return found


def lines(cases: Cases) -> list[Line]:
    """A line for each arm of each case, teachers left out."""
    found: list[Line] = []
    for case, (curves, _) in cases.items():
        for row in report.summarise(curves, ""):
            if row.arm == TEACHER:
                continue
            seeds = curves[row.arm].values()
            final = statistics.estimate([curve[-1]["test_accuracy"] for curve in seeds])
            holdout = report.spread([curve[-1]["holdout_accuracy"] for curve in seeds]).mean
            total = None if row.flops_total is None else row.flops_total.mean
            found.append(Line(case, row.arm, row.start, final, holdout, row.flops.mean, total))
    return found


def best(cases: Cases) -> dict[str, tuple[str, float]]:
    """The case that each arm ends best in on the holdout images, and how, over the seeds that all its cases have."""
    arms = report.ordered({arm for curves, _ in cases.values() for arm in curves if arm != TEACHER})
    found: dict[str, tuple[str, float]] = {}
    for arm in arms:
        ends = holdout_ends(cases, arm)
        common = set.intersection(*(set(seeds) for seeds in ends.values()))
        if common:
            means = {case: report.spread([seeds[seed] for seed in common]).mean for case, seeds in ends.items()}
            found[arm] = max(means.items(), key=lambda entry: entry[1])
    return found


def holdout_ends(cases: Cases, arm: str) -> dict[str, dict[int, float]]:
    """The holdout accuracy that the arm ends with, by case and seed."""
    return {
        case: {seed: curve[-1]["holdout_accuracy"] for seed, curve in curves[arm].items()}
        for case, (curves, _) in cases.items()
        if arm in curves
    }


def choose(ends: Mapping[str, Mapping[int, float]]) -> dict[int, str]:
    """For each seed that all cases have, the case that is best in the mean of the others; with one seed alone, in that.

    What is chosen by the accuracy of a network and then measured on the same network is flattered by its luck.
    """
    common = set.intersection(*(set(seeds) for seeds in ends.values())) if ends else set[int]()
    chosen: dict[int, str] = {}
    for seed in sorted(common):
        others = common - {seed} or {seed}
        chosen[seed] = max(ends, key=lambda case: sum(ends[case][other] for other in others))
    return chosen
