"""An experiment whose cases are initial rates: which is best for which arm, with one training budget or several."""

from ..config import TEACHER
from . import curves as report
from .cases import Cases
from .curves import varied

SEARCHED = ("schedule.epochs", "rates.", "case")  # what the cases of a search differ in

# Budget -> arm -> rate -> holdout accuracy at the end, mean over seeds.
Tried = dict[str, dict[str, dict[float, float]]]


def are_rates(cases: Cases) -> bool:
    """Whether the cases differ in nothing but rates and budget."""
    return all(key.startswith(SEARCHED) for key in varied(report.own(manifests)[0] for _, manifests in cases.values()))


def is_search(cases: Cases) -> bool:
    """Whether the cases are several rates for each arm with each of several budgets."""
    found = tried(cases)
    several = len(found) > 1 and all(len(rates) > 1 for arms in found.values() for rates in arms.values())
    return several and are_rates(cases)


def tried(cases: Cases) -> Tried:
    """What each arm ends with at each rate that it was tried at, by budget, over the seeds that all of these have.

    Accuracies, in 0..1, are of the holdout images; rates are multiples of schedule.lr, in ascending order.
    """
    ends: dict[str, dict[str, dict[float, dict[int, float]]]] = {}
    for curves, manifests in cases.values():
        config = report.own(manifests)[0]["config"]
        budget = ends.setdefault(config["schedule"]["epochs"], {})
        for arm in set(curves) - {TEACHER}:
            found = {seed: curve[-1]["holdout_accuracy"] for seed, curve in curves[arm].items()}
            budget.setdefault(arm, {})[config["rates"][report.split_arm(arm)[1]]] = found
    return {budget: {arm: _means(arms[arm]) for arm in report.ordered(arms)} for budget, arms in ends.items()}


def _means(rates: dict[float, dict[int, float]]) -> dict[float, float]:
    common = set.intersection(*(set(seeds) for seeds in rates.values()))
    return {rate: report.spread([rates[rate][seed] for seed in common]).mean for rate in sorted(rates) if common}


def best(rates: dict[float, float]) -> float:
    """The rate of the highest accuracy; the lower one of two that are equal."""
    return max(rates, key=lambda rate: rates[rate])


def cells(found: Tried) -> tuple[list[str], list[list[str]]]:
    """A line for each arm with each budget: the holdout accuracy (%) at each rate, the highest in bold."""
    every = sorted({rate for arms in found.values() for rates in arms.values() for rate in rates})
    table: list[list[str]] = []
    for budget, arms in found.items():
        for arm, rates in arms.items():
            shown = {rate: f"{100 * accuracy:.2f}" for rate, accuracy in rates.items()}
            if rates:
                shown[best(rates)] = f"**{shown[best(rates)]}**"
            table.append([budget, f"`{arm}`", *(shown.get(rate, "–") for rate in every)])
    return ["budget", "arm", *(f"{rate:g} ×" for rate in every)], table
