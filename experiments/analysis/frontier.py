"""An experiment whose cases are training budgets: which share of a budget each arm needs."""

from . import claims
from . import curves as report
from .cases import Cases


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
