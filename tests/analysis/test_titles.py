"""The titles of figures: what they say of curves made up for the purpose, and that they fit."""

import pytest
from matplotlib.figure import Figure
from simulated import Runs, make_frontier, make_runs

from experiments.analysis import figures, titles
from experiments.analysis.curves import Results, make_results


def tables(runs: Runs) -> Results:
    return make_results((*key, *run) for key, run in runs.items())


def ends(*accuracies: float) -> list[list[float]]:
    """Seeds that end with these accuracies."""
    return [[0.1, accuracy] for accuracy in accuracies]


def plain(title: str) -> str:
    return title.replace(titles.HARD_SPACE, " ")


LOW, HIGH, MIXED = ends(0.60, 0.70, 0.80), ends(0.61, 0.711, 0.812), ends(0.62, 0.69, 0.80)
RACES = [
    ({"net2net": HIGH, "random_init": LOW}, "net2net ends 1.1 points above random_init (n = 3)"),
    ({"net2net": LOW, "random_init": HIGH}, "net2net ends 1.1 points below random_init (n = 3)"),
    ({"net2net": LOW, "random_init": LOW}, "net2net ends level with random_init (n = 3)"),
    ({"net2net": MIXED, "random_init": LOW}, "net2net ends level with random_init (n = 3)"),  # within the interval
    ({"net2net": HIGH[:1], "random_init": LOW}, "net2net ends 1.0 points above random_init (one seed)"),
    (
        {"net2net": LOW, "teacher_continued": HIGH, "teacher": LOW},
        "net2net ends 1.1 points below teacher_continued (n = 3)",
    ),
    ({"net2net": HIGH, "teacher": LOW}, "net2net ends 1.1 points above teacher (n = 3)"),
    ({"random_init": HIGH, "teacher": LOW}, "random_init ends highest, teacher 1.1 points below (n = 3)"),
    ({"random_init": MIXED, "teacher": LOW}, "random_init and teacher end level (n = 3)"),
    ({"net2net": LOW}, "net2net ends at 70.0 % (n = 3)"),
    (
        {"a_net2net": HIGH, "a_random_init": LOW, "b_net2net": LOW[:2], "teacher": LOW},
        "a_net2net ends 1.1 points above a_random_init; b_net2net ends level with teacher (n = 2 to 3)",
    ),
    ({"net2net": ends(0.60004, 0.60005), "random_init": ends(0.6, 0.6)}, "net2net ends level with random_init (n = 2)"),
    (
        {"net2net": ends(0.6003, 0.6003), "random_init": ends(0.6, 0.6)},
        "net2net ends 0.03 points above random_init (n = 2)",
    ),
]


@pytest.mark.parametrize(("arms", "title"), RACES)
def test_who_ends_above_whom(arms, title):
    assert plain(titles.describe(tables(make_runs({"e": arms})))) == title


def test_a_verdict_says_where_the_grown_network_starts():
    arms = {"teacher": [[0.1, 0.5]] * 2, "net2net": [[0.5, 0.7]] * 2, "random_init": [[0.1, 0.7]] * 2}
    said = titles.describe_race(tables(make_runs({"e": arms})), starts=True)
    assert plain(said) == "net2net starts level with its teacher's end and ends level with random_init (n = 2)"
    del arms["random_init"]
    said = titles.describe_race(tables(make_runs({"e": arms})), starts=True)
    assert plain(said) == "net2net starts level with its teacher's end and ends 20.0 points above it (n = 2)"


def test_who_is_ahead_over_training_under_the_papers_names():
    names = figures.PAPER["wider_inception"][1]
    arms = {"net2net": [[0.5, 0.6, 0.6]] * 2, "random_init": [[0.1, 0.2, 0.62]] * 2}
    said = titles.describe_race(tables(make_runs({"e": arms})), names, leads=True)
    assert plain(said).startswith(
        "Net2WiderNet is on average 29.5 points above Random initialization and ends 2.0 points"
    )


def test_a_frontier_compares_at_the_compute_that_every_arm_had():
    # With the teacher's unit net2net has spent 2, 3 and 5, random_init 1, 2 and 4: they meet at 4.
    made = make_frontier([0.60, 0.70, 0.80], [0.40, 0.55, 0.75])
    at = "At 4 FLOP in all, net2net ends highest, random_init "  # 0.70 + 0.10 * log(4 / 3) / log(5 / 3) is 0.756
    assert plain(titles.describe_frontier(tables(made))) == at + "0.6 points below (n = 3)"
    made["f/1ep", "net2net", 3] = made["f/1ep", "net2net", 0]  # a seed without every budget
    assert plain(titles.describe_frontier(tables(made))) == at + "0.6 points below (n = 3)"
    equal = make_frontier([0.5, 0.6, 0.6], [0.5, 0.6, 0.6])
    assert (
        plain(titles.describe_frontier(tables(equal))) == "At 4 FLOP in all, net2net and random_init end level (n = 3)"
    )
    alone = {key: run for key, run in made.items() if key[2] == 0 or key[1] == "random_init"}
    del alone["f/2ep", "random_init", 0]
    assert titles.describe_frontier(tables(alone)) == "No seed has every budget of every arm"


def test_those_who_end_level_are_named_and_net2net_below_them():
    arms = {
        "random_init": HIGH,
        "distilled": ends(0.612, 0.71, 0.811),
        "random_pad": LOW,
        "net2net": ends(0.59, 0.69, 0.79),
    }
    said = titles._describe_highest(titles._tabulate_ends(tables(make_runs({"e": arms})).runs, "arm"))
    first = "random_init and distilled end highest, level with each other"
    assert plain(said) == f"{first}, net2net 2.1 points below random_init (n = 3)"
    del arms["net2net"]
    said = titles._describe_highest(titles._tabulate_ends(tables(make_runs({"e": arms})).runs, "arm"))
    assert plain(said) == f"{first} (n = 3)"


def test_in_which_case_each_arm_ends_highest():
    cases = {
        "e/a": {"net2net": HIGH, "random_pad": LOW},
        "e/b": {"net2net": MIXED},
        "e/c": {"net2net": ends(0.5, 0.6, 0.7)},
    }
    said = titles.describe_cases(tables(make_runs(cases)))
    assert plain(said) == "net2net ends highest in a (71.1 %, level with b), random_pad in a (70.0 %); n = 3"


@pytest.mark.parametrize("count", [2, 6])
def test_a_title_fits_into_the_figure(monkeypatch, tmp_path, count):
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path, formats: drawn.append(figure))
    arms = {f"student_{n}_net2net": HIGH for n in range(count)} | {"teacher": LOW}
    figures.draw("a_rather_long_name_of_an_experiment", tables(make_runs({"e": arms})), tmp_path / "e")
    (figure,) = drawn
    figure.draw_without_rendering()
    title, *_ = (text.get_window_extent() for text in figure.texts)
    (note,) = (text.get_window_extent() for text in figure.artists if isinstance(text, figures.Annotation))
    panels = max(box.y1 for ax in figure.axes if (box := ax.get_tightbbox()))
    for box in (title, note):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and panels <= box.y0 and box.y1 <= figure.bbox.y1
