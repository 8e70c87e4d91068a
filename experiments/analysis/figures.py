"""Draws an experiment's curves: accuracy over steps and over the compute spent. Imports no torch."""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TEACHER
from ..files import write
from .curves import Curves, before, flops_unit, load, name, ordered, split_arm, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")
FORMATS = ("png", "svg")
# Colours of Okabe and Ito: colour-blind readers tell them apart. In grey, line styles and markers do.
LOOKS: dict[str, tuple[str, Any, str]] = {
    "net2net": ("#0072b2", "-", "o"),
    "random_pad": ("#e69f00", (0, (5, 1.5)), "s"),
    "random_init": ("#d55e00", (0, (1, 1)), "^"),
    "teacher_continued": ("#555555", (0, (5, 1.2, 1, 1.2)), "D"),
    "random_init_low_lr": ("#cc79a7", (0, (5, 1.2, 1, 1.2, 1, 1.2)), "v"),
}
STUDENT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TEACHER_LINE: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": (0, (4, 3))}
PAPER = {  # experiment -> figure of the paper, and the arms in it
    "wider_inception": (4, ("net2net", "random_pad", "random_init")),
    "deeper_inception": (5, ("net2net", "random_init")),
    "design_space": (6, ("net2net",)),
}
MARKERS = 7  # a curve carries about this many


def looks(arms: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, line style and marker of each arm; with several students the colour tells the student."""
    students = sorted({student for arm in arms if (student := split_arm(arm)[0]) is not None})
    result: dict[str, dict[str, Any]] = {}
    for arm in arms:
        student, kind = split_arm(arm)
        colour, line, marker = LOOKS.get(kind, ("#000000", "-", "x"))
        if len(students) > 1 and student is not None:
            colour = STUDENT_COLOURS[students.index(student) % len(STUDENT_COLOURS)]
        # A second student's markers are hollow, for pages without colour.
        hollow = student is not None and students.index(student) % 2 == 1
        result[arm] = {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markerfacecolor": "white" if hollow else colour,
        }
    return result


def band(curves: Curves, arm: str, column: str) -> tuple[list[float], ...]:
    """Steps, training FLOPs from the teacher's start, mean, minimum and maximum of `column`, in per cent.

    Over the seeds of the arm, at the steps that all of them evaluated and have a value for. FLOPs are NaN
    where an arm starts from a teacher that `curves` lacks.
    """
    seeds = curves[arm]
    spent = [math.nan if (point := before(curves, arm, seed)) is None else point["flops"] for seed in seeds]
    by_step = [{point["step"]: point for point in curve} for curve in seeds.values()]
    lines: tuple[list[float], ...] = ([], [], [], [], [])
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        values = [100 * points[step][column] for points in by_step]
        if any(math.isnan(value) for value in values):
            continue
        total = [points[step]["flops"] + past for points, past in zip(by_step, spent, strict=True)]
        value = spread(values)
        for line, number in zip(
            lines, (step, math.fsum(total) / len(total), value.mean, value.low, value.high), strict=True
        ):
            line.append(number)
    return lines


def late_limits(curves: Curves, column: str) -> tuple[float, float]:
    """The ends of an axis that shows how the arms end, in per cent: the second halves of those that end well fit.

    An arm that ends far below the best (by more than 15 points) would press the others together.
    """
    late: list[float] = []
    ends = {arm: max(100 * curve[-1][column] for curve in seeds.values()) for arm, seeds in curves.items()}
    for arm, seeds in curves.items():
        for curve in seeds.values() if ends[arm] > max(ends.values()) - 15 else ():
            points = curve[-1:] if arm == TEACHER else curve[len(curve) // 2 :]
            late += [100 * point[column] for point in points if not math.isnan(point[column])]
    if not late:
        return 0.0, 100.0
    margin = 0.08 * (max(late) - min(late)) + 0.1
    return min(late) - margin, max(late) + margin


def draw(curves: Curves, title: str, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes the figure of {arm: {seed: points}} to `path` + .png and .svg, and returns those paths.

    Four panels: test and training accuracy over steps, the last of the test curves enlarged, and test
    accuracy over training FLOPs, the teacher's included. The same curves give the same bytes under the same
    matplotlib.
    """
    with canvas() as new:
        arms = [arm for arm in ordered(curves) if arm != TEACHER]
        figure = new(4.75 + 0.19 * math.ceil((len(arms) + 2) / 3))
        axes = figure.subplots(2, 2)
        over_steps, training, zoomed, over_flops = axes.flat
        panel(over_steps, curves, arms, "test_accuracy", "(a) test")
        panel(training, curves, arms, "train_accuracy", "(b) training")
        panel(zoomed, curves, arms, "test_accuracy", "(c) test, enlarged")
        zoomed.set_ylim(late_limits(curves, "test_accuracy"))
        panel(over_flops, curves, arms, "test_accuracy", "(d) test, by compute", flops=True)
        for ax in (over_steps, zoomed):
            ax.set_ylabel("accuracy (%)")
        figure.suptitle(f"{title}: {seeds_phrase(map(len, curves.values()))}", fontsize=10)
        handles, labels = over_flops.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return save(figure, path, formats)


def draw_paper(curves: Curves, name: str, path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes an experiment as the paper's figure of it (4 to 6): training and validation accuracy over training steps.

    With the arms of that figure alone; where a student was not trained from scratch, with the teacher's own curve,
    as in figure 6. The validation images are the test images here.
    """
    number, raced = PAPER[name]
    with canvas() as new:
        arms = [arm for arm in ordered(curves) if split_arm(arm)[1] in raced]
        scratch = "random_init" in raced
        title = f"Figure {number} of the paper, from {name}"
        figure = new(3.1)
        training, validation = figure.subplots(1, 2)
        for ax, column, heading in (
            (training, "train_accuracy", "(a) training"),
            (validation, "test_accuracy", "(b) validation"),
        ):
            panel(ax, curves, arms, column, heading, teacher="" if scratch else "the original, from scratch")
        training.set_ylabel("accuracy (%)")
        figure.suptitle(f"{title}\n{seeds_phrase(len(curves[arm]) for arm in arms)}", fontsize=10)
        handles, labels = validation.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return save(figure, path, formats)


def panel(
    ax: "Axes",
    curves: Curves,
    arms: list[str],
    column: str,
    heading: str,
    flops: bool = False,
    teacher: str | None = None,
) -> None:
    """One column of the arms' curves over steps, or over FLOPs with the teacher's.

    The teacher is a line at the height of its end, and over FLOPs a curve; or, if it is named, a curve over its own
    steps; with the name "" it is left out.
    """
    styles = looks(arms)
    totals = [total for arm in curves for total in band(curves, arm, "test_accuracy")[1]]
    size, unit = flops_unit(max((total for total in totals if math.isfinite(total)), default=0))
    shown = [*arms, TEACHER] if flops or teacher else arms
    for place, arm in enumerate(arm for arm in shown if arm in curves):
        step, total, mean, low, high = band(curves, arm, column)
        x = [value / size for value in total] if flops else step
        if arm == TEACHER:
            ax.plot(x, mean, **{**TEACHER_LINE, "linestyle": "-"}, label=teacher or TEACHER)
            continue
        every = math.ceil(len(x) / MARKERS) or 1
        # Each arm's markers begin elsewhere, so that curves that coincide are still told apart.
        ax.plot(x, mean, **styles[arm], markevery=(place % every, every), label=arm)
        if len(curves[arm]) > 1:
            ax.fill_between(x, low, high, color=styles[arm]["color"], alpha=0.15, linewidth=0)
    if TEACHER in curves and teacher is None:
        final = spread([100 * curve[-1][column] for curve in curves[TEACHER].values()]).mean
        ax.axhline(final, **TEACHER_LINE, label="teacher at its end")
    ax.set_title(heading, loc="left")
    ax.set_xlabel(f"training compute with teacher's ({unit})" if flops else "training steps")
    ax.set_xlim(left=0)


@contextmanager
def canvas() -> "Iterator[Callable[[float], Figure]]":
    """Gives what makes a figure as wide as the page and so many inches high, in the paper's style."""
    import matplotlib
    from matplotlib.figure import Figure

    # Given a file, rc_context also resets what a user's own matplotlibrc may have set.
    with matplotlib.rc_context(fname=STYLE):
        yield lambda height: Figure(figsize=(6.6, height))


def save(figure: "Figure", path: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Writes the figure to `path` + .png and so on, whole or not at all, and returns those paths."""
    written: list[Path] = []
    for suffix in formats:
        # Dates and versions in the file would make every drawing a change.
        metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
        image = io.BytesIO()
        figure.savefig(image, format=suffix, metadata=metadata)
        written.append(path.with_name(f"{path.name}.{suffix}"))
        write(written[-1], image.getvalue())
    return written


def seeds_phrase(counts: Iterable[int], spread: str = "band from lowest to highest") -> str:
    """How many seeds the lines are over, and what shows their spread."""
    found = sorted(set(counts))
    if found == [1]:
        return "one seed"
    n = f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}"
    return f"mean over seeds ({n}), {spread}"


def draw_runs(experiment_dir: Path) -> Path:
    """Draws the finished arms under `runs/<experiment>` into its `figure.png` and returns that path.

    Raises ExperimentError if there is no finished arm.
    """
    curves, manifests = load(experiment_dir)
    return draw(curves, name(manifests), experiment_dir / "figure", formats=("png",))[0]
