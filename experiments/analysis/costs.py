"""What an arm needs to reach the target: steps, images, FLOPs, seconds, without and with the teacher's training."""

from collections.abc import Callable
from dataclasses import dataclass

from . import curves as report
from .curves import Curves

COLUMNS = ("step", "examples", "flops", "seconds")


@dataclass(frozen=True)
class Cost:
    """Means over the seeds that reach the target."""

    arm: str
    reached: int
    n: int  # seeds that have a target
    own: dict[str, float]  # column of the curve -> its value where the target is first reached; empty if it never is
    total: dict[str, float]  # with all of the teacher's training; empty, too, where that is not known


def costs(curves: Curves, target_arm: str) -> list[Cost]:
    """A line for each arm that has a target; the steps are those of the main table."""
    found: list[Cost] = []
    for arm in report.ordered(curves):
        own: list[dict[str, float]] = []
        total: list[dict[str, float] | None] = []
        n = 0
        for seed, curve in curves[arm].items():
            target = report.target_accuracy(curves, arm, seed, target_arm)
            if target is None:
                continue
            n += 1
            point, past = report.reach(curve, target), report.before(curves, arm, seed)
            if point is not None:
                own.append({column: point[column] for column in COLUMNS})
                total.append(past and {column: point[column] + past[column] for column in COLUMNS})
        known = [one for one in total if one is not None]
        if n:
            # A mean over some of the seeds would not be comparable with the one beside it.
            found.append(Cost(arm, len(own), n, _mean(own), _mean(known) if len(known) == len(own) else {}))
    return found


def _mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {column: sum(one[column] for one in values) / len(values) for column in COLUMNS} if values else {}


def cells(found: list[Cost]) -> tuple[list[str], list[list[str]]]:
    """The table as text: heads, and a line of cells an arm."""
    size, unit = report.flops_unit(max((cost.total or cost.own).get("flops", 1.0) for cost in found))
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "steps": ("step", lambda value: f"{value:,.0f}"),
        "images": ("examples", lambda value: f"{value:,.0f}"),
        unit: ("flops", lambda value: f"{value / size:.3g}"),
        "seconds": ("seconds", lambda value: f"{value:,.0f}"),
    }
    heads = ["arm", "reached by", *columns, *(f"{head}, with teacher's" for head in columns)]
    table: list[list[str]] = []
    for cost in found:
        sides = [cost.own, cost.total]
        texts = [text(side[column]) if side else "–" for side in sides for column, text in columns.values()]
        table.append([cost.arm, f"{cost.reached} of {cost.n}", *texts])
    return heads, table
