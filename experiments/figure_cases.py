"""Draws an experiment with cases: a frontier over budgets, or the end of every case. Imports no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from . import family, report
from .figure import FORMATS, LOOKS, canvas, save
from .report import flops_unit, ordered
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_family(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes the figure of an experiment with cases to `path` + .png and .svg, and returns those paths."""
    return (_frontier if family.is_frontier(cases) else _ends)(name, cases, path, formats)


def _frontier(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...]) -> list[Path]:
    """Test accuracy that each arm ends with against what it cost, on a logarithmic axis: a point a budget."""
    lines = family.lines(cases)
    budgets = {case: _budget(manifests) for case, (_, manifests) in cases.items()}
    epochs = {case: number for case, (number, _) in budgets.items()}
    size, unit = flops_unit(max(line.flops_total or line.flops for line in lines))
    with canvas() as new:
        figure = new(3.3)
        own, total = figure.subplots(1, 2, sharey=True)
        for arm in ordered({line.arm for line in lines}):
            mine = [line for line in lines if line.arm == arm]
            _interval_line(own, arm, [epochs[line.case] for line in mine], [line.final for line in mine])
            costs = [math.nan if line.flops_total is None else line.flops_total / size for line in mine]
            _interval_line(total, arm, costs, [line.final for line in mine])
        own.set_xscale("log", base=2)
        own.set_xticks(list(epochs.values()), [f"{value:g}" for value in epochs.values()])
        own.set_xlabel(f"training budget of the arm ({next(iter(budgets.values()))[1]})")
        total.set_xscale("log", base=2)
        total.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        total.set_xlabel(f"training compute with teacher's ({unit})")
        own.set_ylabel("final test accuracy (%)")
        own.set_title("(a) by the arm's own budget", loc="left")
        total.set_title("(b) by all compute", loc="left")
        figure.suptitle(f"{name}: {seeds_phrase(lines)}", fontsize=10)
        handles, labels = own.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, path, formats)


def _ends(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...]) -> list[Path]:
    """What every arm of every case starts and ends with: a row a case, from above in their order."""
    lines = family.lines(cases)
    arms = ordered({line.arm for line in lines})
    rows = {case: len(cases) - place for place, case in enumerate(cases)}
    with canvas() as new:
        figure = new(1.5 + 0.3 * len(cases))
        start, final = figure.subplots(1, 2, sharey=True)
        for place, arm in enumerate(arms):
            colour, _, marker = LOOKS.get(report.split_arm(arm)[1], ("#000000", "-", "x"))
            mine = [line for line in lines if line.arm == arm]
            # Arms of a case stand one above the other, so that equal ones do not hide each other.
            heights = [rows[line.case] + 0.13 * ((len(arms) - 1) / 2 - place) for line in mine]
            look = {"color": colour, "marker": marker, "linestyle": "none", "label": arm}
            start.plot([100 * line.start.mean for line in mine], heights, **look)
            middles, errors = _bars([line.final for line in mine])
            final.errorbar(middles, heights, xerr=errors, capsize=2, elinewidth=0.8, **look)
        start.set_yticks(list(rows.values()), list(rows))
        start.set_ylim(0.4, len(cases) + 0.6)
        start.set_title("(a) at step 0", loc="left")
        final.set_title("(b) at the end", loc="left")
        for ax in (start, final):
            ax.set_xlabel("test accuracy (%)")
        figure.suptitle(f"{name}: {seeds_phrase(lines)}", fontsize=10)
        handles, labels = final.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, path, formats)


def _interval_line(ax: "Axes", arm: str, x: list[float], found: list[Estimate]) -> None:
    colour, line, marker = LOOKS.get(report.split_arm(arm)[1], ("#000000", "-", "x"))
    middles, errors = _bars(found)
    ax.errorbar(
        x, middles, yerr=errors, color=colour, linestyle=line, marker=marker, capsize=2, elinewidth=0.8, label=arm
    )


def _bars(found: list[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Means and the lengths of the bars to either end of their intervals, in per cent; no bar for a single seed."""
    ends = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    return [100 * one.mean for one in found], [[100 * x if math.isfinite(x) else 0.0 for x in side] for side in ends]


def _budget(manifests: report.Manifests) -> tuple[float, str]:
    """The budget of a case and its unit."""
    duration = report.own(manifests)[0]["config"]["schedule"]["epochs"]
    return float(duration[:-2]), {"ep": "epochs", "it": "steps"}[duration[-2:]]


def seeds_phrase(lines: list[family.Line]) -> str:
    """How many seeds the points are over, and what the bars are."""
    counts = sorted({line.final.n for line in lines})
    if counts == [1]:
        return "one seed"
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return f"mean over seeds ({n}), bars are 95 % intervals"
