"""Draws an experiment with cases: a frontier over budgets, a search of rates, or the end of every case. No torch."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cases as family
from . import curves as report
from . import search
from .curves import flops_unit, ordered
from .figures import FORMATS, LOOKS, MARKERS, band, canvas, save, seeds_phrase
from .frontier import is_frontier
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colour, line and marker of each case: none of an arm's, which the panel beside shows; from dark to light, for greys.
CASES: list[tuple[str, Any, str]] = [
    ("#440154", "-", "<"),
    ("#3e4a89", (0, (5, 1.5)), "p"),
    ("#26828e", (0, (1, 1)), "X"),
    ("#1f9e6e", (0, (5, 1.2, 1, 1.2)), "h"),
    ("#6cb33f", (0, (5, 1.2, 1, 1.2, 1, 1.2)), ">"),
    ("#b5a400", (0, (3, 1, 1, 1)), "*"),
]


def draw_family(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes the figure of an experiment with cases to `path` + .png and .svg, and returns those paths."""
    draw = _frontier if is_frontier(cases) else _search if search.is_search(cases) else _ends
    return draw(name, cases, path, formats)


def _frontier(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...]) -> list[Path]:
    """Test accuracy that each arm ends with against what it cost, on logarithmic axes: a point a budget."""
    lines = family.lines(cases)
    size, unit = flops_unit(max(line.flops_total or line.flops for line in lines))
    with canvas() as new:
        figure = new(3.3)
        own, total = figure.subplots(1, 2, sharey=True)
        for arm in ordered({line.arm for line in lines}):
            mine = [line for line in lines if line.arm == arm]
            ends = [line.final for line in mine]
            _interval_line(own, arm, [line.flops / size for line in mine], ends)
            costs = [math.nan if line.flops_total is None else line.flops_total / size for line in mine]
            _interval_line(total, arm, costs, ends)
        for ax, heading in ((own, "(a) by the arm's own compute"), (total, "(b) with the teacher's")):
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            ax.set_xlabel(f"training compute ({unit})")
            ax.set_title(heading, loc="left")
        own.set_ylabel("final test accuracy (%)")
        _head(figure, f"{name}: budgets of {', '.join(cases)}", lines)
        handles, labels = own.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, path, formats)


def _search(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...]) -> list[Path]:
    """Holdout accuracy that each arm ends with against its initial rate: a panel an arm, a line a budget."""
    found = search.tried(cases)
    arms = ordered({arm for budget in found.values() for arm in budget})
    with canvas() as new:
        figure = new(1.2 + 2.0 * math.ceil(len(arms) / 2))
        axes = figure.subplots(math.ceil(len(arms) / 2), 2, sharex=True, sharey=True, squeeze=False)
        for ax, arm in zip(axes.flat, arms, strict=False):
            for (colour, line, marker), (budget, of) in zip(itertools.cycle(CASES), found.items(), strict=False):
                rates = of.get(arm, {})
                middles = [100 * accuracy for accuracy in rates.values()]
                ax.plot(list(rates), middles, color=colour, linestyle=line, marker=marker, label=budget)
            ax.set_title(arm, loc="left")
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for ax in axes[-1]:
            ax.set_xlabel("initial rate (multiples of schedule.lr)")
        for ax in axes[:, 0]:
            ax.set_ylabel("holdout accuracy (%)")
        said = seeds_phrase(line.final.n for line in family.lines(cases))
        figure.suptitle(f"{name}: {said}", fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        return save(figure, path, formats)


def _ends(name: str, cases: family.Cases, path: Path, formats: tuple[str, ...]) -> list[Path]:
    """How net2net learns in each case, unless they are many; and how every arm of every case ends."""
    lines = family.lines(cases)
    arms = ordered({line.arm for line in lines})
    few = len(cases) <= len(CASES) and all("net2net" in curves for curves, _ in cases.values())
    with canvas() as new:
        figure = new(max(3.2, 1.5 + 0.3 * len(cases)))
        if few:
            left, right = figure.subplots(1, 2)
            _learning(left, cases)
            left.set_title("(a) net2net, by step", loc="left")
            right.set_title("(b) at the end", loc="left")
        else:
            right = figure.subplots()
        _rows(right, cases, lines, arms, costs=not few)
        _head(figure, name, lines)
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


def _rows(ax: "Axes", cases: family.Cases, lines: list[family.Line], arms: list[str], costs: bool) -> None:
    """Test accuracy at the end of every arm: a row a case, from above in order; with its largest cost, if wanted."""
    heights = {case: len(cases) - place for place, case in enumerate(cases)}
    for arm in arms:
        colour, _, marker = LOOKS.get(report.split_arm(arm)[1], ("#000000", "-", "x"))
        mine = [line for line in lines if line.arm == arm]
        # Arms of a case stand one above the other, so that equal ones do not hide each other.
        beside = {
            line.case: [one for one in arms if any((x.case, x.arm) == (line.case, one) for x in lines)] for line in mine
        }
        rows = [heights[case] + 0.13 * ((len(there) - 1) / 2 - there.index(arm)) for case, there in beside.items()]
        middles, errors = _bars([line.final for line in mine])
        ax.errorbar(
            middles,
            rows,
            xerr=errors,
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=2,
            elinewidth=0.8,
            label=arm,
        )
    size, unit = flops_unit(max(line.flops_total or line.flops for line in lines))
    spent = {case: max(line.flops_total or line.flops for line in lines if line.case == case) / size for case in cases}
    said = [f"{case}, {spent[case]:.3g} {unit} in all" if costs else case for case in cases]
    ax.set_yticks(list(heights.values()), said)
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


def _head(figure: "Figure", title: str, lines: list[family.Line]) -> None:
    said = seeds_phrase((line.final.n for line in lines), "bars are 95 % intervals")
    figure.suptitle(f"{title}\n{said}", fontsize=10)
