"""An experiment with cases, as a whole: its table, the best case of each arm, and the budgets of a frontier."""

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import OmegaConf

from . import claims, report, statistics
from .config import CONFIGS
from .report import Curves, Manifests, Spread
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


def families(results: Mapping[str, tuple[Curves, Manifests]]) -> dict[str, Cases]:
    """The experiments that have cases, and these in the order of their configuration."""
    found: dict[str, Cases] = {}
    for name in results:
        experiment, _, case = name.partition("/")
        if case:
            found.setdefault(experiment, {})[case] = results[name]
    return {name: {case: cases[case] for case in _ordered(name, cases)} for name, cases in found.items()}


def _ordered(experiment: str, cases: Cases) -> list[str]:
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    written = list(OmegaConf.load(path).get("cases") or {}) if path.is_file() else []  # pyright: ignore
    return sorted(cases, key=lambda case: (written.index(case) if case in written else len(written), case))


def lines(cases: Cases) -> list[Line]:
    """A line for each arm of each case, teachers left out."""
    found: list[Line] = []
    for case, (curves, _) in cases.items():
        for row in report.summarise(curves, ""):
            if row.arm == "teacher":
                continue
            seeds = curves[row.arm].values()
            final = statistics.estimate([curve[-1]["test_accuracy"] for curve in seeds])
            holdout = report.spread([curve[-1]["holdout_accuracy"] for curve in seeds]).mean
            total = None if row.flops_total is None else row.flops_total.mean
            found.append(Line(case, row.arm, row.start, final, holdout, row.flops.mean, total))
    return found


def best(cases: Cases) -> dict[str, tuple[str, float]]:
    """The case that each arm ends best in on the holdout images, and how, over the seeds that all its cases have."""
    results = {f"family/{case}": loaded for case, loaded in cases.items()}
    arms = report.ordered({arm for curves, _ in cases.values() for arm in curves if arm != "teacher"})
    found: dict[str, tuple[str, float]] = {}
    for arm in arms:
        for chosen in claims.operands(results, f"family/best:{arm}"):
            accuracy = report.spread(list(chosen.last("holdout_accuracy").values())).mean
            found[arm] = chosen.name.partition("/")[2], accuracy
    return found


def is_frontier(cases: Cases) -> bool:
    """Whether the cases are the budgets of the same arms."""
    lengths = [report.own(manifests)[0]["config"]["schedule"]["epochs"] for _, manifests in cases.values()]
    raced = all({"net2net", "random_init"} <= set(curves) for curves, _ in cases.values())
    return raced and len(cases) > 1 and len(set(lengths)) == len(lengths)


def budgets(name: str, cases: Cases) -> tuple[list[str], list[list[str]]]:
    """For each budget of random_init: which share of it each arm needs to end as well, annealed over its own budget.

    Beside it what a single shared schedule says: steps until net2net's holdout accuracy is what random_init ends with.
    """
    results = {f"{name}/{case}": loaded for case, loaded in cases.items()}
    arms = [arm for arm in ("net2net", "random_pad", "teacher_continued") if any(arm in c for c, _ in cases.values())]
    heads = [
        "budget of `random_init`",
        *(f"`{arm}`" for arm in arms),
        "`net2net`, teacher's included",
        "`net2net`, read as a curve",
    ]
    table: list[list[str]] = []
    for case in cases:
        goal = f"{name}/{case}:random_init"
        asked = [("budget", f"{name}:{arm}") for arm in arms]
        asked += [("total_budget", f"{name}:net2net"), ("steps", f"{name}/{case}:net2net")]
        texts: list[str] = []
        for measure, of in asked:
            found = claims.measured(measure, results, of, goal)[0]
            texts.append("–" if found is None else claims.shown(found, measure, unit=False))
        table.append([case, *texts])
    return heads, table
