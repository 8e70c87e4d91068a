"""Draws an experiment with cases: a frontier over budgets, or the end of every case. Imports no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import family, report
from .figure import FORMATS, LOOKS, MARKERS, band, canvas, save
from .frontier import is_frontier
from .report import flops_unit, ordered
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


CASES = [*LOOKS.values(), ("#009e73", (0, (3, 1, 1, 1)), "P")]  # colour, line and marker of a case


def draw_family(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes the figure of an experiment with cases to `path` + .png and .svg, and returns those paths."""
    return (_frontier if is_frontier(cases) else _ends)(name, cases, path, formats)


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
    """How net2net learns in each case, or where it starts if there are many; and how every arm of every case ends."""
    lines = family.lines(cases)
    arms = ordered({line.arm for line in lines})
    few = len(cases) <= len(CASES) and all("net2net" in curves for curves, _ in cases.values())
    with canvas() as new:
        figure = new(max(3.2, 1.5 + 0.3 * len(cases)))
        left, right = figure.subplots(1, 2)
        if few:
            _learning(left, cases)
        else:
            _rows(left, cases, lines, arms, start=True)
            right.tick_params(labelleft=False)
        _rows(right, cases, lines, arms)
        left.set_title("(a) net2net, by step" if few else "(a) at step 0", loc="left")
        right.set_title("(b) at the end", loc="left")
        figure.suptitle(f"{name}: {seeds_phrase(lines)}", fontsize=10)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, path, formats)


def _learning(ax: "Axes", cases: family.Cases) -> None:
    """Test accuracy of net2net over steps: a line a case."""
    for place, (case, (curves, _)) in enumerate(cases.items()):
        steps, _, mean, _, _ = band(curves, "net2net", "test_accuracy")
        colour, line, marker = CASES[place]
        every = math.ceil(len(steps) / MARKERS) or 1
        look: dict[str, Any] = {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markerfacecolor": "white" if place % 2 else colour,
        }
        ax.plot(steps, mean, **look, markevery=(place % every, every), label=case)
    ax.set_xlabel("training steps")
    ax.set_ylabel("test accuracy (%)")
    ax.legend(fontsize=7.5)


def _rows(ax: "Axes", cases: family.Cases, lines: list[family.Line], arms: list[str], start: bool = False) -> None:
    """Test accuracy at the end, or at the start, of every arm: a row a case, from above in their order."""
    heights = {case: len(cases) - place for place, case in enumerate(cases)}
    for arm in arms:
        colour, _, marker = LOOKS.get(report.split_arm(arm)[1], ("#000000", "-", "x"))
        mine = [line for line in lines if line.arm == arm]
        # Arms of a case stand one above the other, so that equal ones do not hide each other.
        beside = {
            line.case: [one for one in arms if any((x.case, x.arm) == (line.case, one) for x in lines)] for line in mine
        }
        rows = [heights[case] + 0.13 * ((len(there) - 1) / 2 - there.index(arm)) for case, there in beside.items()]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "label": arm}
        if start:
            ax.plot([100 * line.start.mean for line in mine], rows, **look)
        else:
            middles, errors = _bars([line.final for line in mine])
            ax.errorbar(middles, rows, xerr=errors, capsize=2, elinewidth=0.8, **look)
    ax.set_yticks(list(heights.values()), list(heights))
    ax.set_ylim(0.4, len(cases) + 0.6)
    ax.set_xlabel("test accuracy (%)")


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
