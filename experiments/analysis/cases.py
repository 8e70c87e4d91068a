"""Experiments with cases: the table of their arms, the best case of each arm, and searches of initial rates.

Every function takes the results of one experiment, as `Results.select` gives them. Teachers are left out.
"""

from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from ..arms import ARMS
from ..config import TEACHER, ordered, split_arm
from . import statistics
from .curves import Results, find_differences, own_manifests, read_config, summarise

SEARCHED = ("schedule.epochs", "rates.", "case")  # the settings in which the cases of a search of rates may differ


def find_planned(experiment: str, arm: str) -> set[str]:
    """Return the cases in an experiment's configuration that have this arm."""
    config = read_config(experiment)
    cases: dict[str, Any] = config.get("cases") or {}
    default = config.get("arms", ARMS)
    return {case for case, changes in cases.items() if split_arm(arm)[1] in changes.get("arms", default)}


def student_runs(results: Results) -> DataFrame:
    """Return the table of runs without the teachers'."""
    return results.runs[results.runs.index.get_level_values("arm") != TEACHER]


def list_arms(results: Results) -> list[str]:
    """Return the arms of the students in reading order."""
    return [arm for arm in results.arms if arm != TEACHER]


def case_manifests(results: Results) -> dict[str, dict[str, Any]]:
    """Return one manifest of each case."""
    groups = results.runs["manifest"].groupby(level="case", sort=False)
    return {str(case): own_manifests(manifests)[0] for case, manifests in groups}


def summarise_cases(results: Results) -> DataFrame:
    """Return the table of `summarise` for the students, with `final` as an Estimate.

    `total_flops` is NaN where not all seeds know it.
    """
    runs = student_runs(results)
    groups = runs.groupby(level=["case", "arm"], sort=False)
    final = Series({key: statistics.estimate(list(ends)) for key, ends in groups["final"]}, dtype=object)
    table = summarise(Results(results.curves, runs))
    total = table["total_flops_mean"].where(table["total_flops_count"] == table["n"])
    return table.assign(final=final.reindex(table.index), flops=table["flops_mean"], total_flops=total)


def holdout_by_case(results: Results, arm: str) -> DataFrame:
    """Return the holdout accuracy that the arm ends with: a row a seed, a column a case."""
    groups = results.select(arm=arm).runs["holdout"].groupby(level="case", sort=False)
    return DataFrame({case: ends.droplevel(["experiment", "case", "arm"]) for case, ends in groups})


def best_cases(results: Results) -> dict[str, tuple[str, float]]:
    """Return for each arm its best case by holdout accuracy, and that accuracy, over the seeds that all cases have."""
    means = {arm: holdout_by_case(results, arm).dropna().mean() for arm in list_arms(results)}
    return {arm: (str(mean.idxmax()), float(mean.max())) for arm, mean in means.items() if mean.notna().all()}


def choose_cases(holdout: DataFrame) -> dict[int, str]:
    """Choose for each seed the case that is best on average over the other seeds; a single seed chooses for itself.

    A case that is chosen by a network's accuracy and then measured on the same network is flattered by its luck.
    `holdout` has a row a seed and a column a case. Seeds that lack a case are left out.
    """
    common = holdout.dropna().sort_index()
    others = {seed: common.drop(seed) if len(common) > 1 else common for seed in common.index}
    return {int(seed): str(holdouts.sum().idxmax()) for seed, holdouts in others.items()}


def is_frontier(results: Results) -> bool:
    """Say whether the cases are training budgets: random_init has them all, and net2net at least two."""
    budgets = [manifest["config"]["schedule"]["epochs"] for manifest in case_manifests(results).values()]
    raced = {arm: set(holdout_by_case(results, arm)) for arm in ("net2net", "random_init")}
    return len(raced["net2net"]) > 1 and len(raced["random_init"]) == len(budgets) == len(set(budgets))


def varies_only_rates(results: Results) -> bool:
    """Say whether the cases differ in nothing but initial rates and training budgets."""
    return all(key.startswith(SEARCHED) for key in find_differences(case_manifests(results).values()))


def is_search(results: Results) -> bool:
    """Say whether the cases try several rates for each arm with each of several budgets."""
    if not varies_only_rates(results):
        return False
    table = tabulate_rates(results)
    return table.index.get_level_values("budget").nunique() > 1 and bool((table.count(axis=1) > 1).all())


def tabulate_rates(results: Results) -> DataFrame:
    """Return the holdout accuracy at the end: a row for each budget and arm, a column for each multiple of schedule.lr.

    It is the mean over the seeds that all rates of the row have, NaN where there are none.
    """
    runs = student_runs(results).reset_index()
    configs = [manifest["config"] for manifest in runs["manifest"]]
    runs["budget"] = [config["schedule"]["epochs"] for config in configs]
    runs["rate"] = [config["rates"][split_arm(arm)[1]] for config, arm in zip(configs, runs["arm"], strict=True)]
    lines: dict[tuple[str, str], Series] = {}
    for budget, tried in runs.groupby("budget", sort=False):
        for arm in ordered(set(tried["arm"])):
            ends = tried[tried["arm"] == arm].pivot_table(index="seed", columns="rate", values="holdout")
            lines[str(budget), arm] = ends.dropna().mean()
    table = DataFrame(lines).T.sort_index(axis=1)
    return table.set_axis(pd.MultiIndex.from_tuples(table.index, names=["budget", "arm"]))
