"""From runs to results: the tables' numbers, the figures' bytes, and what is refused. All curves here are made up."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pandas import DataFrame
from rich.console import Console
from simulated import make_curve

from experiments import files
from experiments.analysis import curves, figures, pages
from experiments.analysis.curves import Results, load, make_results
from experiments.config import ExperimentError, ordered
from experiments.run_log import COLUMNS, parse_curve
from scripts import collect
from scripts import figures as script

PNG = b"\x89PNG\r\n\x1a\n"
# Two seeds: (test accuracy, holdout accuracy, final FLOPs). random_init ends with a holdout accuracy of 0.85 and
# 0.88, which net2net reaches at steps 10 (exactly) and 20, random_pad in seed 1 alone and the low rate never.
CURVES: dict[str, list[tuple[list[float], list[float], float]]] = {
    "teacher": [([0.12, 0.52, 0.80], [0.10, 0.50, 0.78], 1e12), ([0.10, 0.50, 0.82], [0.10, 0.50, 0.79], 1.2e12)],
    "net2net": [([0.80, 0.86, 0.91], [0.78, 0.85, 0.90], 3e12), ([0.82, 0.88, 0.93], [0.79, 0.86, 0.89], 3e12)],
    "random_pad": [([0.31, 0.6, 0.85], [0.30, 0.60, 0.84], 3e12), ([0.31, 0.6, 0.87], [0.30, 0.60, 0.88], 3e12)],
    "random_init": [([0.12, 0.55, 0.86], [0.10, 0.50, 0.85], 3e12), ([0.12, 0.55, 0.88], [0.10, 0.60, 0.88], 3e12)],
    "teacher_continued": [([0.80, 0.82], [0.78, 0.80], 1e12), ([0.82, 0.84], [0.79, 0.81], 1e12)],
    "random_init_low_lr": [([0.1, 0.3, 0.4], [0.1, 0.3, 0.4], 3e12), ([0.1, 0.3, 0.4], [0.1, 0.3, 0.4], 3e12)],
}
COMMITTED = Path(__file__).parents[2] / "results/curves/wider_inception/seed0/net2net.json"
COMMAND = "/opt/env/bin/python /home/x/train.py experiment=wider 'data.root=/home/some body/cifar10'"


def make_manifest(arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Return the manifest of a finished arm of `wider`: a committed one, as it was on the machine that ran it."""
    record = json.loads(COMMITTED.read_text()) | {"arm": arm, "seed": seed, "student": None, "settings": {"seed": seed}}
    record["config"] |= {"experiment": "wider", "seed": seed, "runs": "/home/somebody/runs"}
    record["config"]["data"] |= {"root": "/home/some body/cifar10", "cache": "/home/somebody/.cache/net2net"}
    step0 = {"agree": 999 + seed, "of": 1000, "max_relative_error": 1e-14 * (seed + 1)}
    record |= {"experiment": "wider", "command": COMMAND, "step0": step0 if arm.endswith("net2net") else None}
    record["teacher"] = "teacher" if arm in ("net2net", "random_pad", "teacher_continued") else None
    return record | changes


def put(runs: Path, seed: int, arm: str, rows: list[dict[str, float]], **changes: Any) -> None:
    """Write one arm of a run of `wider`, finished unless `changes` say otherwise."""
    folder = runs / "wider" / f"seed{seed}" / arm
    folder.mkdir(parents=True)
    data = DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False).encode()
    record = make_manifest(arm, seed, **({"curve_sha256": hashlib.sha256(data).hexdigest()} | changes))
    (folder / "curve.csv").write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(record))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The finished runs of one experiment, `wider`: two seeds of every arm."""
    for arm, seeds in CURVES.items():
        for seed, (test, holdout, flops) in enumerate(seeds):
            first = "another" if arm == "teacher" else "wider"  # a teacher's manifest is of those that trained it first
            put(tmp_path / "runs", seed, arm, make_curve(test, holdout, flops), experiment=first)
    return tmp_path / "runs"


@pytest.fixture
def results(runs: Path) -> Path:
    """The same, collected."""
    folder = runs.parent / "results"
    assert run_collect(folder) == 0
    return folder


def run_collect(results: Path, *arguments: str) -> int:
    return collect.main(["--runs", str(results.parent / "runs"), "--results", str(results), *arguments])


def make(*arms: tuple[str, list[float]], seed: int = 0) -> Results:
    """Results of one seed, whose holdout and test accuracies are the same."""
    return make_results(("both", arm, seed, make_manifest(arm, seed), make_curve(values)) for arm, values in arms)


def test_a_mean_over_runs_of_different_settings_says_so(runs):
    table = pages.make_terminal_table(runs / "wider")
    assert "differ" not in str(table.caption)
    path = runs / "wider/seed1/net2net/manifest.json"
    record = json.loads(path.read_text())
    record["config"]["schedule"]["epochs"] = "99ep"
    path.write_text(json.dumps(record))
    said = "The means are over runs that differ in `schedule.epochs` (4ep, 99ep): give each its own tag=NAME."
    assert said in str(pages.make_terminal_table(runs / "wider").caption)


def test_statistics_by_hand(runs):
    table = curves.summarise_arms(load(runs / "wider"))
    expected = {
        "start": (0.81, 0.80, 0.82),
        "final": (0.92, 0.91, 0.93),
        "target": (0.865, 0.85, 0.88),
        "reached_step": (15, 10, 20),  # reaching a target exactly is reaching it
    }
    for column, values in expected.items():
        found = table.loc["net2net", [f"{column}_{one}" for one in ("mean", "min", "max")]]
        assert tuple(found) == pytest.approx(values)
    assert table.loc["net2net", ["n", "reached_step_count"]].tolist() == [2, 2]
    # What the teacher has cost is added for the arms that start from it.
    own = {"teacher": 1.1e12, "net2net": 3e12, "random_pad": 3e12, "random_init": 3e12, "teacher_continued": 1e12}
    before = dict.fromkeys(("net2net", "random_pad", "teacher_continued"), 1.1e12)
    for arm, flops in own.items():
        assert tuple(table.loc[arm, ["flops_mean", "total_flops_mean"]]) == (flops, flops + before.get(arm, 0))


def test_a_teacher_that_is_not_there_has_no_known_cost():
    heads, (cells,) = pages.tabulate_arms(make(("net2net", [0.1, 0.9])))
    found = dict(zip(heads, cells, strict=True))
    assert found["FLOP, with teacher's"] == "–"
    assert found["steps to target"] == found["target: holdout accuracy (%)"] == "–"


def test_each_student_runs_for_its_own_target():
    arms = {  # accuracies, and steps to the target
        "deeper_net2net": ([0.5, 0.7], "never"),
        "deeper_random_init": ([0.1, 0.8], "10"),
        "slim_net2net": ([0.4, 0.5], "10"),  # no random_init of its own: the teacher's
        "wider_net2net": ([0.5, 0.7], "10"),
        "wider_random_init": ([0.1, 0.6], "10"),
        "teacher_continued": ([0.5, 0.6], "0"),  # no student: the teacher's accuracy is its target
        "teacher": ([0.1, 0.5], "–"),
    }
    _, lines = pages.tabulate_arms(make(*((arm, accuracies) for arm, (accuracies, _) in arms.items())))
    assert [(line[0], line[5]) for line in lines] == [(arm, arms[arm][1]) for arm in ordered(arms)]


def test_the_band_is_the_range_over_seeds(runs):
    results = load(runs / "wider")
    band = figures.make_band(results, "net2net", "test_accuracy")
    assert list(band.index) == [0, 10, 20]
    expected = {"flops": [1.1e12, 2.6e12, 4.1e12], "mean": [81, 87, 92], "low": [80, 86, 91], "high": [82, 88, 93]}
    for column, values in expected.items():
        assert list(band[column]) == pytest.approx(values)
    # Nothing was trained before step 0, so there is no training accuracy.
    assert list(figures.make_band(results, "net2net", "train_accuracy").index) == [10, 20]


def test_the_band_keeps_to_steps_that_all_seeds_evaluated():
    one, other = make(("random_init", [0.1, 0.5, 0.6])), make(("random_init", [0.3, 0.7]), seed=1)
    both = Results(*(curves.pd.concat(tables) for tables in ((one.curves, other.curves), (one.runs, other.runs))))
    band = figures.make_band(both, "random_init", "test_accuracy")
    assert list(band.index) == [0, 10] and list(band["mean"]) == pytest.approx([20, 60])


def test_a_figure_and_a_table_straight_after_a_run(runs):
    path = figures.draw_runs(runs / "wider")
    assert path == runs / "wider" / "figure.png"
    assert path.read_bytes().startswith(PNG)
    out = io.StringIO()
    Console(file=out, width=80).print(pages.make_terminal_table(runs / "wider"))
    line = next(line for line in out.getvalue().splitlines() if line.strip().startswith("net2net "))
    assert line.split() == ["net2net", "2", "81.00", "92.00", "(91.00–93.00)", "15", "3", "4.1"]
    assert "net2net, step 0, float64: top-1 as teacher's 1999 of 2000 (error 2.0e-14)" in out.getvalue()


def test_a_figure_of_one_arm_that_was_evaluated_once(tmp_path):
    whole = make(("net2net", [0.5, 0.6]))
    point = Results(whole.curves[:1], whole.runs)
    assert figures.draw("one", point, tmp_path / "one", ("png",)) == [tmp_path / "one.png"]


def test_what_is_not_finished_counts_for_nothing(runs):
    put(runs, 2, "net2net", make_curve([0.1, 0.1]), complete=False)
    (runs / "wider" / "seed3" / "net2net").mkdir(parents=True)
    assert curves.summarise_arms(load(runs / "wider")).loc["net2net", "n"] == 2
    with pytest.raises(ExperimentError, match=r"no finished arm under .*nothing: run the experiment first\."):
        load(runs / "nothing")


def test_collecting_copies_what_is_finished_and_deletes_nothing(runs, results, capsys):
    put(runs, 2, "net2net", [], complete=False)
    for file in (runs / "wider/seed1/net2net").iterdir():
        file.unlink()
    assert run_collect(results, "wider") == 0
    out = capsys.readouterr().out
    assert "wider/seed0/net2net: 3 points, final test accuracy 91.00 % (unchanged)\n" in out
    assert "wider/seed2/net2net: skipped, unfinished\n" in out
    assert out.endswith("11 collected, 2 skipped, 0 refused\n")
    source, collected = runs / "wider/seed1/random_pad/curve.csv", results / "curves/wider/seed1/random_pad.csv"
    assert collected.read_bytes() == source.read_bytes()
    assert (results / "curves/wider/seed1/net2net.csv").exists() and not (results / "curves/wider/seed2").exists()


def test_collecting_replaces_no_curve_made_otherwise(runs, results, capsys):
    manifest, collected = runs / "wider/seed0/net2net/manifest.json", results / "curves/wider/seed0/net2net.json"
    record, kept = json.loads(manifest.read_text()), collected.read_text()
    record["config"]["schedule"]["epochs"] = "3it"
    manifest.write_text(json.dumps(record))
    capsys.readouterr()
    assert run_collect(results, "wider") == 1
    out, err = capsys.readouterr()
    assert "11 collected, 0 skipped, 1 refused" in out
    assert "wider/seed0/net2net: refused." in err and "made with other settings (schedule.epochs)" in err
    assert collected.read_text() == kept
    assert run_collect(results, "wider", "--replace") == 0
    assert json.loads(collected.read_text())["config"]["schedule"]["epochs"] == "3it"


def test_collecting_refuses_a_curve_that_was_changed_and_takes_the_others(runs, capsys):
    curve = runs / "wider" / "seed1" / "net2net" / "curve.csv"
    curve.write_bytes(curve.read_bytes().replace(b"0.93", b"0.99"))
    (runs / "wider" / "seed0" / "net2net" / "manifest.json").write_text("{")
    results = runs.parent / "results"
    assert run_collect(results) == 1
    out, err = capsys.readouterr()
    assert f"wider/seed1/net2net: refused. The curve {curve} does not match curve_sha256 in its manifest" in err
    assert "seed0/net2net/manifest.json is no manifest (" in err
    assert out.endswith("10 collected, 0 skipped, 2 refused\n")
    assert not list(results.rglob("net2net.*"))


def test_collecting_what_is_not_there(runs, capsys):
    assert collect.main(["--runs", "nowhere"]) == run_collect(runs.parent / "results", "deeper") == 1
    missing, unknown = capsys.readouterr().err.splitlines()
    assert missing.startswith("There is no folder nowhere: run an experiment first")
    assert unknown == f"There is no experiment deeper in {runs}: name one of those there (wider)."


def test_no_machine_path_is_collected(runs, results):
    expected = json.loads((runs / "wider" / "seed0" / "net2net" / "manifest.json").read_text())
    expected["config"]["data"] |= {"root": "cifar10", "cache": "net2net"}
    expected["config"]["runs"] = "runs"
    expected["command"] = "python train.py experiment=wider data.root=cifar10"
    assert json.loads((results / "curves" / "wider" / "seed0" / "net2net.json").read_text()) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("claim", "teacher/student, 1/2 of it", "teacher/student, 1/2 of it"),
        ("claim", "https://arxiv.org/abs/1511.05641", "https://arxiv.org/abs/1511.05641"),
        ("claim", "images of /data/digits, resized", "images of digits, resized"),
        ("runs", ["runs/wider", {"b": "/x/y/"}, 3, None], ["runs/wider", {"b": "y"}, 3, None]),
        ("command", "python train.py 'arms=[net2net,random_init]'", "python train.py 'arms=[net2net,random_init]'"),
        ("command", "python train.py data.root=/data/a=b/digits [/x/y]", "python train.py data.root=digits '[y]'"),
        ("command", "/usr/bin/python train.py runs=/tmp/a/runs", "python train.py runs=runs"),
        ("command", "python train.py claim=it's /data/x", "python train.py claim=it's x"),  # not a shell's quoting
    ],
)
def test_folders_are_removed_from_absolute_paths_alone(key, value, expected):
    assert collect.make_portable({key: value}) == {key: expected}


def test_figures_and_tables(results):
    readme = results.parent / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    assert script.main(["--results", str(results)]) == 0
    drawn = [results / f"figures/wider.{suffix}" for suffix in ("png", "svg")]
    first, page, block = [path.read_bytes() for path in drawn], (results / "README.md").read_text(), readme.read_text()
    assert first[0].startswith(PNG) and b"<svg" in first[1]
    assert not re.search(b"Software|dc:date|Matplotlib v", b"".join(first))
    figures.draw("wider", load(results / "curves/wider"), results / "figures/wider")
    assert [path.read_bytes() for path in drawn] == first
    assert "Not all curves share" not in page
    line = "| `net2net` | 2 | 81.00 (80.00–82.00) | 92.00 (91.00–93.00) | 86.50 (85.00–88.00) | 15 | 3 | 4.1 "
    assert f"\n{line}| 1999 of 2000 (error 2.0e-14) |\n" in page
    assert block.startswith("before\n<!-- results:begin -->\n") and block.endswith("\n<!-- results:end -->\nafter\n")
    assert "\nold\n" not in block


def test_curves_of_other_settings_are_named_and_teachers_that_different_cases_trained_alike_are_alike():
    for arm in ("net2net", "teacher"):
        records = [make_manifest(arm, seed, settings={"schedule": {"lr": 0.01}}) for seed in (0, 1)]
        records[1]["config"]["data"]["root"] = "elsewhere"  # where the images lie changes nothing
        if arm == "teacher":
            records[1]["config"]["growth"]["noise"] = 0.5
        records[1]["config"]["rates"] = {"distilled": 0.3}  # an arm that is younger than the first run
        assert curves.describe_differences(records) == []
        for place, rate in zip(records, (0.01, 0.02), strict=True):
            place["settings" if arm == "teacher" else "config"]["schedule"]["lr"] = rate
        records[1]["precision"] = "float32"
        found = {"`schedule.lr` (0.01, 0.02)", "`precision` (bfloat16, float32)"}
        assert set(curves.describe_differences(records)) == found


def test_a_result_that_was_edited_or_is_missing_is_refused(results, capsys):
    curve = results / "curves/wider/seed0/net2net.csv"
    curve.write_bytes(curve.read_bytes().replace(b"0.91", b"0.99"))
    said = {results: f"The curve {curve} does not match curve_sha256", results / "empty": "There are no curves under"}
    for folder, start in said.items():
        assert script.main(["--results", str(folder)]) == 1
        assert capsys.readouterr().err.startswith(start)
        assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "page", ["<!-- results:begin -->", "<!-- results:end --> <!-- results:begin -->", "<!-- results:end -->"]
)
def test_markers_that_are_no_pair_are_refused_and_a_page_without_any_is_left_alone(tmp_path, page):
    readme, other = tmp_path / "README.md", tmp_path / "OTHER.md"
    readme.write_text(page)
    with pytest.raises(ExperimentError, match=r"The results markers in .*README\.md are no pair"):
        files.fill_block(readme, "results", "text")
    assert readme.read_text() == page
    assert not files.fill_block(other, "results", "text") and not other.exists()
    assert not files.fill_block(readme, "trials", "text")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("step,epoch\n0,0\n", "has no column examples"),
        (",".join(COLUMNS) + "\nhigh\n", r"has a cell that is no number \(.*'high'\)"),
        (",".join(COLUMNS), "has no rows"),
    ],
)
def test_a_curve_that_cannot_be_read(data, message):
    with pytest.raises(ExperimentError, match=rf"The curve some\.csv {message}.*: run its arm again\."):
        parse_curve(data.encode(), "some.csv")
