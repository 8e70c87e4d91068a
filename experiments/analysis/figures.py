"""Draw experiments: curves over steps and over compute, the paper's figures 4 to 6, and experiments with cases."""

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from pandas import DataFrame

from ..arms import ARMS
from ..config import TEACHER, ordered, split_arm
from ..files import write
from .cases import is_frontier, is_search, list_arms, summarise_cases, tabulate_rates
from .curves import INDEX, Results, cost_unit, flops_unit, load
from .statistics import Estimate
from .titles import describe_cases, describe_frontier, describe_race, describe_search

STYLE = Path(__file__).with_name("paper.mplstyle")
FORMATS = ("png", "svg")
WIDTH = 6.6  # of a page, inches
OTHER_LOOK = ("#000000", "-", "x")
STUDENT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TEACHER_LINE: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": (0, (4, 3))}
# The look of each case. It resembles no arm's, for the panel beside shows arms; from dark to light, for grey pages.
CASE_LOOKS: list[tuple[str, Any, str]] = [
    ("#440154", "-", "<"),
    ("#3e4a89", (0, (5, 1.5)), "p"),
    ("#26828e", (0, (1, 1)), "X"),
    ("#1f9e6e", (0, (5, 1.2, 1, 1.2)), "h"),
    ("#6cb33f", (0, (5, 1.2, 1, 1.2, 1, 1.2)), ">"),
    ("#b5a400", (0, (3, 1, 1, 1)), "*"),
]
BASELINES = {"random_pad": "Random pad", "random_init": "Random initialization"}
PAPER: dict[str, tuple[int, dict[str, str]]] = {  # experiment -> the paper's figure of it, and its names of the arms
    "wider_inception": (4, {"net2net": "Net2WiderNet", **BASELINES}),
    "deeper_inception": (5, {"net2net": "Net2DeeperNet", "random_init": BASELINES["random_init"]}),
    "design_space": (6, {"deeper_net2net": "Net2DeeperNet", "wider_net2net": "Net2WiderNet", TEACHER: "Teacher"}),
}
MARKERS = 7  # a curve carries about this many
BARS = "bars are 95 % intervals"
TITLE_WIDTH = 84  # characters of a title that fit into WIDTH
LEGEND_COLUMNS = 4


def choose_looks(arms: list[str]) -> dict[str, dict[str, Any]]:
    """Return colour, line style and marker of each arm; with several students the colour tells the student."""
    students = sorted({student for arm in arms if (student := split_arm(arm)[0]) is not None})
    result: dict[str, dict[str, Any]] = {}
    for arm in arms:
        student, kind = split_arm(arm)
        colour, line, marker = _find_look(kind)
        place = 0 if student is None else students.index(student)
        if len(students) > 1 and student is not None:
            colour = STUDENT_COLOURS[place % len(STUDENT_COLOURS)]
        result[arm] = _style((colour, line, marker), place)
    return result


def _find_look(kind: str) -> tuple[str, Any, str]:
    """Return colour, line style and marker of an arm.

    The colours are those of Okabe and Ito, which colour-blind readers tell apart. In grey, lines and markers differ.
    """
    return ARMS[kind].look if kind in ARMS else OTHER_LOOK


def _style(look: tuple[str, Any, str], place: int = 0) -> dict[str, Any]:
    """Return the properties of a line; the markers of every second one are hollow, for pages without colour."""
    colour, line, marker = look
    face = "white" if place % 2 else colour
    return {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": face}


def make_band(results: Results, arm: str, column: str) -> DataFrame:
    """Return mean, low and high of an arm's curve in per cent, at the steps that all seeds have a value for.

    `flops` are those from the teacher's start, NaN where the arm starts from a teacher that was not run.
    """
    curve = results.select(arm=arm).curves
    spent = curve["flops"] + results.runs["teacher_flops"].reindex(curve.index)
    table = DataFrame({"step": curve["step"], "value": 100 * curve[column], "flops": spent})
    seeds = curve.index.get_level_values("seed").nunique()
    steps = table.dropna(subset=["value"]).groupby("step")
    band = steps["value"].agg(["mean", "min", "max"]).set_axis(["mean", "low", "high"], axis=1)
    band["flops"] = steps["flops"].sum(min_count=seeds) / seeds
    return band[steps.size() == seeds]


def late_limits(results: Results) -> tuple[float, float]:
    """Return the ends of an axis, in per cent, for the second halves of the test curves.

    An arm that ends more than 15 points below the best would press the others together and is left out.
    """
    ends = 100 * results.runs["final"].groupby(level="arm").max()
    good = ends.index[ends > ends.max() - 15]
    arms = results.curves.index.get_level_values("arm")
    runs = results.curves["test_accuracy"].groupby(level=INDEX, sort=False)
    place, size = runs.cumcount(), runs.transform("size")
    late = (place >= size // 2) & ((arms != TEACHER) | (place == size - 1)) & arms.isin(good)
    values = 100 * results.curves["test_accuracy"][late].dropna()
    if values.empty:
        return 0.0, 100.0
    margin = 0.08 * (values.max() - values.min()) + 0.1
    return float(values.min() - margin), float(values.max() + margin)


@matplotlib.rc_context(fname=STYLE)
def draw(name: str, results: Results, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Draw one experiment: test and training accuracy over steps, their end enlarged, and test accuracy over compute.

    The same curves give the same bytes. A file is written to `path` with each of the formats as suffix.
    """
    arms = list_arms(results)
    figure = Figure(figsize=(WIDTH, 4.75 + 0.19 * math.ceil((len(arms) + 2) / 3)))
    over_steps, training, enlarged, over_flops = figure.subplots(2, 2).flat
    draw_panel(over_steps, results, arms, "test_accuracy", "(a) test")
    draw_panel(training, results, arms, "train_accuracy", "(b) training")
    draw_panel(enlarged, results, arms, "test_accuracy", "(c) test, enlarged")
    enlarged.set_ylim(late_limits(results))
    draw_panel(over_flops, results, arms, "test_accuracy", "(d) test, by compute", flops=True)
    for ax in (over_steps, enlarged):
        ax.set_ylabel("accuracy (%)")
    seeds = results.runs.groupby(level="arm").size()
    return save(
        _finish(figure, describe_race(results), f"{name}: {describe_seeds(seeds)}", over_steps, over_flops),
        path,
        formats,
    )


@matplotlib.rc_context(fname=STYLE)
def draw_paper(name: str, results: Results, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Draw an experiment as the paper's figure of it, with its arms alone; the validation images are our test images.

    Where no student was trained from scratch that includes the teacher's own curve, as in figure 6.
    """
    number, names = PAPER[name]
    shown = Results(*(table[table.index.isin(names, level="arm")] for table in (results.curves, results.runs)))
    arms = list_arms(shown)
    figure = Figure(figsize=(WIDTH, 3.1))
    training, validation = figure.subplots(1, 2)
    draw_panel(training, shown, arms, "train_accuracy", "(a) training", names=names)
    draw_panel(validation, shown, arms, "test_accuracy", "(b) validation", names=names)
    training.set_ylabel("accuracy (%)")
    source = (
        f"figure {number} of the paper, from {name}: {describe_seeds(shown.runs.groupby(level='arm').size()[arms])}"
    )
    return save(_finish(figure, describe_race(shown, names, leads=True), source, validation), path, formats)


def draw_panel(
    ax: Axes,
    results: Results,
    arms: list[str],
    column: str,
    heading: str,
    flops: bool = False,
    names: Mapping[str, str] | None = None,
) -> None:
    """Draw one column of the arms' curves over steps, or over FLOPs with the teacher's.

    The teacher is a line at the height of its end, and a curve over FLOPs, or where `names` has a name for each arm.
    """
    looks = choose_looks(arms)
    run = results.arms
    largest = max(make_band(results, arm, "test_accuracy")["flops"].max() for arm in run) if flops else 0.0
    size, unit = flops_unit(largest)
    whole = flops or names is not None
    drawn = [*arms, TEACHER] if whole else arms
    for place, arm in enumerate(arm for arm in drawn if arm in run):
        band = make_band(results, arm, column)
        x = band["flops"] / size if flops else band.index
        if arm == TEACHER:
            ax.plot(x, band["mean"], **{**TEACHER_LINE, "linestyle": "-"}, label=(names or {}).get(arm, arm))
            continue
        _plot_curve(ax, x, band["mean"], (names or {}).get(arm, arm), place, looks[arm])
        if len(results.select(arm=arm).runs) > 1:
            ax.fill_between(x, band["low"], band["high"], color=looks[arm]["color"], alpha=0.15, linewidth=0)
    if TEACHER in run and not whole:
        end = results.select(arm=TEACHER).curves.groupby(level=INDEX)[column].last().mean()
        ax.axhline(100 * end, **TEACHER_LINE, label="teacher at its end")
    ax.set_title(heading, loc="left")
    ax.set_xlabel(f"training compute with teacher's ({unit})" if flops else "training steps")
    ax.set_xlim(left=0)


def _plot_curve(ax: Axes, x: Any, y: Any, label: str, place: int, look: dict[str, Any]) -> None:
    """Plot a curve. The markers of each begin elsewhere, so that curves that coincide are still told apart."""
    every = math.ceil(len(x) / MARKERS) or 1
    ax.plot(x, y, **look, markevery=(place % every, every), label=label)


def draw_runs(experiment_dir: Path) -> Path:
    """Draw the finished arms under `runs/<experiment>` into its `figure.png` and return that path."""
    results = load(experiment_dir)
    return draw(results.title, results, experiment_dir / "figure", formats=("png",))[0]


@matplotlib.rc_context(fname=STYLE)
def draw_cases(name: str, results: Results, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Draw an experiment with cases: a frontier over budgets, a search of rates, or the end of every case."""
    draw = _draw_frontier if is_frontier(results) else _draw_search if is_search(results) else _draw_ends
    return save(draw(name, results), path, formats)


def _draw_frontier(name: str, results: Results) -> Figure:
    """Draw the test accuracy that each arm ends with over its cost, on logarithmic axes: a point a budget."""
    lines = summarise_cases(results)
    size, unit = cost_unit(results.runs)
    figure = Figure(figsize=(WIDTH, 3.3))
    own, total = figure.subplots(1, 2, sharey=True)
    headings = "(a) by the arm's own compute", "(b) with the teacher's"
    for ax, column, heading in zip((own, total), ("flops", "total_flops"), headings, strict=True):
        for arm in list_arms(results):
            arm_lines = lines.xs(arm, level="arm").sort_values(column)
            _draw_bars(ax, arm, arm_lines["final"], arm_lines[column] / size, upright=True)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        ax.set_xlabel(f"training compute ({unit})")
        ax.set_title(heading, loc="left")
    own.set_ylabel("final test accuracy (%)")
    return _finish(figure, describe_frontier(results), f"{name}: {describe_seeds(lines['n'], BARS)}", own)


def _draw_search(name: str, results: Results) -> Figure:
    """Draw the holdout accuracy that each arm ends with over its initial rate: a panel an arm, a line a budget."""
    table = tabulate_rates(results)
    arms = ordered(set(table.index.get_level_values("arm")))
    rows = math.ceil(len(arms) / 2)
    figure = Figure(figsize=(WIDTH, 1.2 + 2.0 * rows))
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    budgets = table.index.get_level_values("budget").unique()
    for ax, arm in zip(axes.flat, arms, strict=False):
        for look, budget in zip(itertools.cycle(CASE_LOOKS), budgets, strict=False):
            found = table.loc[(budget, arm)].dropna() if (budget, arm) in table.index else table.iloc[0, :0]
            ax.plot(found.index, 100 * found, **_style(look), label=budget)
        ax.set_title(arm, loc="left")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for ax in axes[-1]:
        ax.set_xlabel("initial rate (multiples of schedule.lr)")
    for ax in axes[:, 0]:
        ax.set_ylabel("holdout accuracy (%)")
    seeds = describe_seeds(summarise_cases(results)["n"])
    return _finish(figure, describe_search(results), f"{name}: {seeds}", axes[0, 0])


def _draw_ends(name: str, results: Results) -> Figure:
    """Draw how net2net learns in each case, unless they are many, and how every arm of every case ends."""
    lines = summarise_cases(results)
    cases = results.experiments[name]
    few = len(cases) <= len(CASE_LOOKS) and all((case, "net2net") in lines.index for case in cases)
    figure = Figure(figsize=(WIDTH, max(3.2, 1.5 + 0.3 * len(cases))))
    if few:
        left, right = figure.subplots(1, 2)
        for place, (case, look) in enumerate(zip(cases, CASE_LOOKS, strict=False)):
            mean = make_band(results.select(name, case), "net2net", "test_accuracy")["mean"]
            _plot_curve(left, mean.index, mean, case, place, _style(look, place))
        left.set_xlabel("training steps")
        left.set_ylabel("test accuracy (%)")
        left.legend(fontsize=7.5)
        left.set_title("(a) net2net, by step", loc="left")
        right.set_title("(b) at the end", loc="left")
    else:
        right = figure.subplots()
    _draw_rows(right, results, lines, costs=not few)
    return _finish(figure, describe_cases(results), f"{name}: {describe_seeds(lines['n'], BARS)}", right)


def _draw_rows(ax: Axes, results: Results, lines: DataFrame, costs: bool) -> None:
    """Draw the final test accuracy of every arm: a row a case, from above in order, with its largest cost if wanted."""
    cases = list(dict.fromkeys(lines.index.get_level_values("case")))
    heights = {case: len(cases) - place for place, case in enumerate(cases)}
    rivals = {case: [arm for arm in list_arms(results) if (case, arm) in lines.index] for case in cases}
    for arm in list_arms(results):
        ends = lines["final"].xs(arm, level="arm")
        # Arms of a case stand one above the other, so that equal ones do not hide each other.
        rows = [heights[case] + 0.13 * ((len(rivals[case]) - 1) / 2 - rivals[case].index(arm)) for case in ends.index]
        _draw_bars(ax, arm, ends, rows, upright=False)
    size, unit = cost_unit(results.runs)
    spent = lines[["flops", "total_flops"]].max(axis=1).groupby(level="case").max() / size
    names = [f"{case}, {spent[case]:.3g} {unit} in all" if costs else case for case in cases]
    ax.set_yticks(list(heights.values()), names)
    ax.set_ylim(0.4, len(cases) + 0.6)
    ax.set_xlabel("test accuracy (%)")


def _draw_bars(ax: Axes, arm: str, found: Iterable[Estimate], at: Any, upright: bool) -> None:
    """Draw an arm's means with their intervals, in per cent, `at` these places; upright ones are joined by a line."""
    ends = [(one.mean - one.low, one.high - one.mean) for one in found]
    lengths = [[100 * end if math.isfinite(end) else 0.0 for end in side] for side in zip(*ends, strict=True)]
    means = [100 * one.mean for one in found]
    look: Any = _style(_find_look(split_arm(arm)[1])) | {
        "capsize": 2,
        "elinewidth": 0.8,
        "label": arm,
    }
    if upright:
        ax.errorbar(at, means, yerr=lengths, **look)
    else:
        ax.errorbar(means, at, xerr=lengths, **look | {"linestyle": "none"})


def _finish(figure: Figure, finding: str, source: str, *panels: Axes) -> Figure:
    """Return the figure with its finding above, in small letters what it shows, and below the panels' legend."""
    lines = textwrap.wrap(finding, TITLE_WIDTH)
    title = figure.suptitle("\n".join([*lines, ""]), fontsize=10)  # the empty line is that of the source
    note = Annotation(source, (0.5, 0), xycoords=title, ha="center", va="bottom", fontsize=8, color="#555555")
    figure.add_artist(note)
    shown = {label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS)
    return figure


def save(figure: Figure, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write the figure to `path` + .png and so on, whole or not at all, and return those paths."""
    written: list[Path] = []
    for suffix in formats:
        # A date or a version in the file would make every drawing a change.
        metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
        image = io.BytesIO()
        figure.savefig(image, format=suffix, metadata=metadata)
        written.append(path.with_name(f"{path.name}.{suffix}"))
        write(written[-1], image.getvalue())
    return written


def describe_seeds(counts: Iterable[int], spread: str = "band from lowest to highest") -> str:
    """Say over how many seeds the lines are means, and what shows their spread."""
    found = sorted(set(counts))
    if found == [1]:
        return "one seed"
    n = f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"
    return f"mean over seeds ({n}), {spread}"
