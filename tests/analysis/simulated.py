"""Curves of runs that never were."""

import math
from collections.abc import Sequence

from experiments.run_log import COLUMNS

Rows = list[dict[str, float]]


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
