"""Say in a sentence what a figure shows. What differs by less than its 95 % interval is called level."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from pandas import DataFrame, Series

from ..config import TEACHER, split_arm
from . import statistics
from .cases import is_frontier, is_search, list_arms, student_runs, tabulate_rates
from .curves import Results, flops_unit
from .statistics import Estimate

HARD_SPACE = "\N{NO-BREAK SPACE}"  # no line of a title ends at it


def describe(results: Results) -> str:
    """Return what the figure of one experiment shows."""
    if [""] in results.experiments.values():
        return describe_race(results)
    if is_frontier(results):
        return describe_frontier(results)
    return describe_search(results) if is_search(results) else describe_cases(results)


def describe_race(
    results: Results, names: Mapping[str, str] | None = None, leads: bool = False, starts: bool = False
) -> str:
    """Return where each grown network ends beside its rival: random_init, else the teacher trained on, or the teacher.

    `names` are those of the arms, if they have others. With `leads` it also says who is ahead on average over training,
    and with `starts` where the grown network starts beside its teacher's end.
    Without such a pair it says who ends highest.
    """
    parts: list[str] = []
    counts: set[int] = set()
    for arm in (one for one in list_arms(results) if split_arm(one)[1] == "net2net"):
        student = split_arm(arm)[0]
        rivals = f"{student}_random_init" if student else "random_init", "teacher_continued", TEACHER
        rival = next((one for one in rivals if one in results.arms), "")
        ends, average = (_compare(results, arm, rival, column) for column in ("final", "average"))
        start = _compare(results, arm, TEACHER, "start", "final") if starts else None
        if ends:
            name, other = ((names or {}).get(one, one) for one in (arm, rival))
            ahead = f"is on average {_place(average)} {other} and " if average and leads else ""
            ahead = ahead or (f"starts {_place(start)} its teacher's end and " if start else "")
            parts.append(
                f"{name} {ahead}ends {_place(ends)} {'it' if ahead and (leads or rival == TEACHER) else other}"
            )
            counts.add(ends.n)
    if parts:
        return f"{'; '.join(parts)} ({_count(counts)})"
    return _describe_highest(_tabulate_ends(results.runs, "arm"))


def describe_frontier(results: Results) -> str:
    """Return who ends highest at the largest compute in all that every arm had, and by how much.

    Where an arm was not run with just as much, its accuracy is interpolated in the logarithm of the compute.
    """
    runs = student_runs(results)
    goals = runs["total_flops"].groupby(level=["arm", "seed"]).max().groupby(level="seed").min()
    ends: dict[str, dict[int, float]] = {}
    for arm in list_arms(results):
        tried = runs.xs(arm, level="arm")
        counts = tried["total_flops"].groupby(level="seed").count()
        for seed in counts.index[counts == tried.index.get_level_values("case").nunique()]:
            points = tried.xs(seed, level="seed").sort_values("total_flops")
            costs, goal = np.log(points["total_flops"]), math.log(goals[seed])
            if costs.min() <= goal <= costs.max():
                ends.setdefault(arm, {})[seed] = 100 * float(np.interp(goal, costs, points["final"]))
    table = DataFrame(ends).dropna()
    if table.empty:
        return "No seed has every budget of every arm"
    most = goals[table.index].mean()
    size, unit = flops_unit(most)
    return f"At {most / size:.3g} {unit} in all, {_describe_highest(table)}"


def describe_search(results: Results) -> str:
    """Return the rate with which each arm has the highest mean holdout accuracy, for each budget."""
    table = tabulate_rates(results)
    best = table.dropna(how="all").idxmax(axis=1)
    budgets, arms = (list(dict.fromkeys(table.index.get_level_values(level))) for level in ("budget", "arm"))
    rates = {arm: [f"{best[key]:g}" if (key := (budget, arm)) in best else "–" for budget in budgets] for arm in arms}
    found = ", ".join(f"{arm} {'/'.join(shown)}" for arm, shown in rates.items())
    return f"The best rates for {'/'.join(budgets)} are: {found}"


def describe_cases(results: Results) -> str:
    """Return in which case each arm ends highest, what it has there, and which other cases are level."""
    runs = student_runs(results)
    parts: list[str] = []
    counts: set[int] = set()
    for arm in list_arms(results):
        ends = _tabulate_ends(runs.xs(arm, level="arm"), "case")
        if ends.empty:
            continue
        (first, *level), means = _rank(ends)
        counts.add(len(ends))
        tie = f", level with {_join(level) if len(level) < 4 else f'{len(level)} others'}" if level else ""
        parts.append(f"{arm} {'' if parts else 'ends highest '}in {first} ({means[first]:.1f}{HARD_SPACE}%{tie})")
    return f"{', '.join(parts)}; {_count(counts)}" if parts else "No seed has every case"


def _describe_highest(ends: DataFrame) -> str:
    """Return who ends highest of the columns, in per cent and a row a seed, and where net2net is or who comes next."""
    if ends.empty:
        return "no seed has every arm"
    top, means = _rank(ends)
    count = f" ({_count([len(ends)])})"
    if len(means) == 1:
        return f"{top[0]} ends at {means.iloc[0]:.1f}{HARD_SPACE}%{count}"
    level = "end level" if len(top) == len(means) else "end highest, level with each other"
    first = f"{top[0]} ends highest" if len(top) == 1 else f"{_join(top)} {level}"
    second = next((name for name in ("net2net", means.index[1]) if name in means and name not in top), None)
    if second is None or (second != "net2net" and len(top) > 1):
        return first + count
    of = f" {top[0]}" if len(top) > 1 else ""
    return f"{first}, {second} {means[top[0]] - means[second]:.1f}{HARD_SPACE}points below{of}{count}"


def _rank(ends: DataFrame) -> tuple[list[str], Series]:
    """Return the columns that are level with the highest, which is the first, and all their means in falling order."""
    means = ends.mean().sort_values(ascending=False, kind="stable")
    lead = {str(name): statistics.estimate(list(ends[means.index[0]] - ends[name])) for name in means.index}
    return [name for name, found in lead.items() if name == means.index[0] or _is_level(found)], means


def _tabulate_ends(runs: DataFrame, level: str) -> DataFrame:
    """Return the final test accuracies in per cent: a column for each of `level`, a row for each seed that has all."""
    return (100 * runs["final"]).groupby(level=["seed", level], sort=False).last().unstack(level).dropna()


def _compare(results: Results, arm: str, rival: str, column: str, theirs: str | None = None) -> Estimate | None:
    """Return how many points an arm has more than its rival, paired by seed; None without a common seed.

    `column` is compared with the rival's own, or with the column `theirs`.
    """
    arms = results.runs.index.get_level_values("arm")
    pairs = ((arm, column), (rival, theirs or column))
    mine, others = (results.runs[name][arms == one].droplevel("arm") for one, name in pairs)
    found = 100 * (mine - others).dropna()
    return statistics.estimate(list(found)) if len(found) else None


def _is_level(found: Estimate) -> bool:
    """Say whether a difference is none to two decimals, or has 0 in its interval. One seed alone has no interval."""
    return round(found.mean, 2) == 0 or (found.n > 1 and found.low <= 0 <= found.high)


def _place(found: Estimate) -> str:
    """Return `3.4 points below`, or `level with`."""
    if _is_level(found):
        return "level with"
    size = abs(found.mean)
    return f"{size:.{1 if size >= 0.05 else 2}f}{HARD_SPACE}points {'above' if found.mean > 0 else 'below'}"


def _count(counts: Iterable[int]) -> str:
    """Return `n = 5`, `n = 3 to 5`, or `one seed`."""
    found = sorted(set(counts))
    if found == [1]:
        return "one seed"
    n = f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"
    return n.replace(" ", HARD_SPACE)


def _join(names: list[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
