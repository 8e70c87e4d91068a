"""Curves of runs that never were."""

import math
from collections.abc import Sequence
from typing import Any

from experiments.run_log import COLUMNS

Rows = list[dict[str, float]]
Seeds = list[list[float]]  # the accuracies of each seed, a point every ten steps
Runs = dict[tuple[str, str, int], tuple[dict[str, Any], Rows]]  # name, arm, seed -> manifest, curve


def make_curve(
    test: Sequence[float], holdout: Sequence[float] = (), flops: float = 1.0, at: Sequence[int] = ()
) -> Rows:
    """Return rows of these accuracies, at these steps or a row every ten steps; the last one has cost `flops`."""
    at = at or range(0, 10 * len(test), 10)
    rows: Rows = []
    for step, t, h in zip(at, test, holdout or test, strict=True):
        trained = t if step else math.nan  # nothing was trained before step 0
        spent = [step, step / 20, 128 * step, step / 10, flops * step / max(1, at[-1])]
        rows.append(dict(zip(COLUMNS, [*spent, 1 - trained, trained, 1 - h, h, 1 - t, t], strict=True)))
    return rows


def make_runs(experiments: dict[str, dict[str, Seeds]], costs: dict[str, float] | None = None) -> Runs:
    """Runs with manifests; an experiment's students cost what `costs` says, teachers 1."""
    found: Runs = {}
    for name, arms in experiments.items():
        for arm, seeds in arms.items():
            cost = 1.0 if arm == "teacher" else (costs or {}).get(name, 1.0)
            for seed, accuracies in enumerate(seeds):
                manifest = {
                    "command": f"python train.py experiment={name}",
                    "config": {"target": "random_init"},
                    "step0": {"agree": 100, "of": 100} if arm == "net2net" else None,
                    "teacher": "teacher" if arm in ("net2net", "random_pad", "teacher_continued") else None,
                }
                found[name, arm, seed] = manifest, make_curve(accuracies, flops=cost)
    return found


def make_frontier(net2net: list[float], random_init: list[float], seeds: int = 3) -> Runs:
    """One case a budget of 1, 2, 4, ...: what either arm ends with, less 0.001 a seed."""
    budgets = {f"f/{2**i}ep": 2.0**i for i in range(len(net2net))}
    ends = zip(budgets, net2net, random_init, strict=True)
    arms = {
        name: {
            "net2net": [[0.1, one - s / 1000] for s in range(seeds)],
            "random_init": [[0.1, other - s / 1000] for s in range(seeds)],
            "teacher": [[0.1, 0.5]] * seeds,
        }
        for name, one, other in ends
    }
    return make_runs(arms, budgets)
