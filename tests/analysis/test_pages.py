"""The pages: every number in them is that of the committed curves, every command composes, and cases are shown."""

import html
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import cases as compose_cases

from experiments.analysis import cases, pages
from experiments.analysis import figures as drawing
from experiments.analysis.curves import Results, describe_differences, load_all
from experiments.config import ExperimentError
from scripts import claims, figures

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/reproduction.md", "results/README.md")
KINDS = ["net2net", "random_pad", "random_init", "teacher_continued"]


@pytest.fixture(scope="module")
def results() -> Results:
    """The committed curves."""
    return load_all(ROOT / "results/curves")


def test_every_number_in_the_pages_is_that_of_the_curves(results, tmp_path):
    shutil.copytree(ROOT / "results/trials", tmp_path / "results/trials")
    shutil.copy(ROOT / "results/claims.yaml", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    for page in PAGES:  # a changed number is set right
        text = (ROOT / page).read_text()
        number = re.findall(r"\| (\d+\.\d\d) ", text)[-1]
        changed = text.replace(f"| {number} ", f"| {float(number) + 1:.2f} ")
        assert changed != text
        (tmp_path / page).write_text(changed)
    figures.write_pages(tmp_path / "results", results)
    wrong = [page for page in PAGES if (tmp_path / page).read_bytes() != (ROOT / page).read_bytes()]
    assert wrong == [], "run python scripts/figures.py and commit what it writes"


def test_the_table_of_the_readme_is_that_of_the_ladder(results):
    runs = results.select("ladder_wider", "10ep").runs
    lines = pages.summary_block(results, []).splitlines()[2:5]
    for line, arm in zip(lines, ("random_init", "net2net", "teacher_continued"), strict=True):
        own = runs.xs(arm, level="arm")
        assert f" | {100 * own['final'].mean():.2f} " in line and line.endswith(f" | {len(own)} |")
        assert f" | {own['total_flops'].mean() / 1e12:.0f} | " in line


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_pages_composes(page):
    text = html.unescape((ROOT / page).read_text())
    commands = {match.strip() for match in re.findall(r"python train\.py ([^`#\n]*experiment=[^`#\n]+)", text)}
    assert commands or page == "docs/reproduction.md"
    for command in sorted(commands):
        words = [word for word in shlex.split(command) if not word.startswith(("-", "hydra"))]
        swept = "-m" in shlex.split(command)
        for job in itertools.product(*(sweep(word) if swept else [word] for word in words)):
            assert compose_cases(*job), command


def sweep(word: str) -> list[str]:
    """The settings of the jobs that a setting of a sweep stands for."""
    key, _, values = word.partition("=")
    return [word] if "[" in values else [f"{key}={value}" for value in values.split(",")]


def test_one_command_repeats_an_experiment():
    base = (
        "python train.py experiment=one case={} scale=cpu 'arms=[net2net]' runs=r logger=none seed={} 'rates={{a: 1}}'"
    )
    records = [{"command": base.format(case, seed), "seed": seed} for case in ("x1", "x3") for seed in (1, 0)]
    assert pages.join_commands(records) == "python train.py -m experiment=one scale=cpu 'rates={a: 1}' seed=0,1"
    records.append({"command": "python train.py -m experiment=one seed=0,1 'rates={a: 1}'", "seed": 0})
    assert pages.join_commands(records[-1:]) == "python train.py experiment=one 'rates={a: 1}' seed=0"
    assert pages.join_commands(records) == "python train.py -m experiment=one 'rates={a: 1}' seed=0,1"


def test_no_line_of_the_results_is_long():
    lines = (ROOT / "results/README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 200] == []


def test_what_cases_change_is_a_list(results):
    selected = results.select("tune_ladder")
    section = pages._section_head("tune_ladder", selected, {"Cases": pages.describe_cases(selected)}, "caption")
    assert "\n- **Cases:** schedule.epochs 2.5ep where nothing else is said\n  - `x0.1`: rates.net2net 0.1, " in section
    assert max(map(len, section.splitlines())) <= 130


# -- searches of rates --------------------------------------------------------------------------------------------


def test_the_best_rate_of_each_arm_with_each_budget(results, capsys):
    selected = results.select("tune_ladder")
    table = cases.tabulate_rates(selected)
    tried = {(record["config"]["schedule"]["epochs"], record["arm"]) for record in selected.runs["manifest"]}
    assert list(table.index) == [
        (budget, arm) for budget in ("2.5ep", "10ep") for arm in KINDS if (budget, arm) in tried
    ]
    ends = selected.select(case="x0.3").runs["holdout"].xs("random_pad", level="arm")
    assert table.at[("2.5ep", "random_pad"), 0.3] == ends.iloc[0]
    claims.print_rates("tune_ladder", results)
    lines = capsys.readouterr().out.splitlines()
    values = {rate: float(value) for rate, value in re.findall(r"([\d.]+) (\d\d\.\d\d)", lines[0])}
    assert list(values) == ["0.1", "0.3", "1", "2"]
    chosen = max(values, key=lambda rate: values[rate])
    assert lines[0].startswith(f"2.5ep net2net: {chosen}")
    assert ("at the edge of the search" in lines[0]) == (chosen in ("0.1", "2"))
    rates = [line for line in lines if "rates:" in line]
    assert rates[0].startswith(f"2.5ep rates: {{net2net: {chosen}, ") and rates[1].startswith("10ep rates: {net2net: ")


@pytest.mark.parametrize(
    ("key", "value", "search"),
    [
        ("growth", {"noise": 0.5}, False),
        ("unknown", {"layers": 1}, False),  # a setting that one case alone has
        ("inception", {"slim": 1.0}, True),  # another machine's default scale, of a network that this is not
    ],
)
def test_a_search_has_rates_alone_for_cases(results, key, value, search):
    selected = results.select("tune_ladder")
    manifests = list(selected.runs["manifest"])
    place = next(n for n, key in enumerate(selected.runs.index) if key[1:3] == ("x1", "net2net"))
    before, config = manifests[place], manifests[place]["config"]
    manifests[place] = before | {"config": config | {key: config.get(key, {}) | value}}
    assert cases.is_search(Results(selected.curves, selected.runs.assign(manifest=manifests))) == search
    assert bool(describe_differences([before, manifests[place]])) != search


def with_other_noise(results: Results) -> Results:
    """The same runs, each grown with another noise."""
    manifests = list(results.runs["manifest"])
    for n, manifest in enumerate(manifests):
        manifests[n] = manifest | {"config": manifest["config"] | {"growth": {"noise": n}}}
    return Results(results.curves, results.runs.assign(manifest=manifests))


def test_rates_of_what_is_no_search_or_half_of_one(results, tmp_path, capsys):
    with pytest.raises(ExperimentError, match="differ in more than rates"):
        claims.print_rates("tune_ladder", with_other_noise(results.select("tune_ladder")))
    runs = results.select("tune_ladder").runs
    runs = pd.concat([runs, runs.rename({100: 0}, level="seed")])
    # The arm has seed 0 with one of the rates, and the other seed with all others.
    kept = [arm != "net2net" or (case == "x0.3") == (seed == 0) for _, case, arm, seed in runs.index]
    claims.print_rates("tune_ladder", Results(results.curves, runs[kept]))
    assert "2.5ep net2net: no seed has all of its rates" in capsys.readouterr().out
    teachers = Results(results.curves, runs.xs("teacher", level="arm", drop_level=False))
    for experiment in ("tune_ladder", "never_run"):
        with pytest.raises(ExperimentError, match=f"There are no curves of cases of {experiment}: "):
            claims.print_rates(experiment, teachers)
    assert claims.main(["--results", str(tmp_path), "--rates", "tune_ladder"]) == 1
    assert capsys.readouterr().err.startswith(f"There are no curves under {tmp_path / 'curves'}: ")


def test_the_claims_and_the_rates_of_a_folder(tmp_path, capsys):
    for name in ("tune_ladder", "wider_inception"):
        shutil.copytree(ROOT / f"results/curves/{name}", tmp_path / f"curves/{name}")
    shutil.copy(ROOT / "results/claims.yaml", tmp_path)
    assert claims.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n\d+ holds?, (\d+ \w+, )*\d+ not run\n$", out)
    assert "\nWider, as the paper reads it (wider_inception)\nholds        net2net is ahead of random_init" in out
    assert "(from 1.00), n = 5 (never within the run in 5 of 5 seeds)\n" in out
    assert claims.main(["--results", str(tmp_path), "--rates", "tune_ladder"]) == 0
    assert "\n10ep rates: {net2net: " in capsys.readouterr().out


# -- experiments with cases, and costs ----------------------------------------------------------------------------


def test_a_case_of_which_only_the_teacher_was_run_is_no_result(results):
    runs = results.select("ladder_wider").runs
    kept = [case != "5ep" or arm == "teacher" for _, case, arm, _ in runs.index]
    left = [case for case in results.experiments["ladder_wider"] if case != "5ep"]
    assert "10ep" in left and Results(results.curves, runs[kept]).experiments == {"ladder_wider": left}


@pytest.mark.parametrize("name", ["ladder_wider", "tune_ladder"])
def test_the_figure_of_cases_is_the_same_each_time(results, tmp_path, name):
    (drawn,) = drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
    first = drawn.read_bytes()
    assert len(first) > 10_000
    if name == "ladder_wider":
        drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
        assert drawn.read_bytes() == first
