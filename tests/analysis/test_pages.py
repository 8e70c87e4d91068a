"""The pages: every number in them is that of the committed curves, every command composes, and cases are shown."""

import html
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import cases as compose_cases

from experiments.analysis import cases, pages
from experiments.analysis import figures as drawing
from experiments.analysis.curves import Results, describe_differences, load_all
from experiments.config import ExperimentError
from scripts import claims, figures

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/reproduction.md", "results/README.md")
BUDGETS = ["1ep", "2ep", "4ep", "8ep", "16ep"]
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


def test_commands_that_differ_in_seed_and_case_alone_are_one_sweep():
    base = "python train.py experiment=one seed={} case={} 'arms=[net2net]'"
    commands = [base.format(seed, case) for case in ("x1", "x3") for seed in (0, 1)] * 2
    one = "python train.py -m experiment=one seed=0,1 case=x1,x3 'arms=[net2net]'"
    assert pages.format_commands(commands) == f"`{one}`"
    assert pages.format_commands([*commands, one + " seed=4", "python train.py experiment=two"]).count("<br>") == 2


# -- searches of rates --------------------------------------------------------------------------------------------


def test_the_best_rate_of_each_arm(results, capsys):
    claims.print_rates("ablation_rate", results)
    *arms, last = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in arms] == [f"4ep {arm}" for arm in KINDS]
    values = {rate: float(value) for rate, value in re.findall(r"([\d.]+) (\d\d\.\d\d)", arms[0])}
    assert list(values) == ["0.1", "0.3", "1", "3", "10"]
    chosen = max(values, key=lambda rate: values[rate])
    assert arms[0].startswith(f"4ep net2net: {chosen}")
    assert ("at the edge" in arms[0]) == (chosen in ("0.1", "10"))
    assert last.startswith(f"4ep rates: {{net2net: {chosen}, ")


def test_the_best_rate_with_each_budget(results, capsys):
    table = cases.tabulate_rates(results.select("tune_deeper"))
    assert list(table.index) == [(budget, arm) for budget in BUDGETS for arm in KINDS]
    assert list(table.loc[("16ep", "net2net")].dropna().index) == [0.1, 0.3, 1, 3, 10]
    assert list(table.loc[("4ep", "random_init")].dropna().index) == [0.03, 0.1, 0.3, 1, 3]  # a case of this arm alone
    ends = results.select("tune_deeper", "2ep_x0.3").runs["holdout"].xs("random_pad", level="arm")
    assert table.at[("2ep", "random_pad"), 0.3] == ends.iloc[0]
    claims.print_rates("tune_deeper", results)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" {")[0] for line in lines if "rates:" in line] == [f"{budget} rates:" for budget in BUDGETS]
    assert any("at the edge of the search" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "search"),
    [
        ("growth", {"noise": 0.5}, False),
        ("first", {"layers": 1}, False),  # a setting that one case alone has
        ("inception", {"slim": 1.0}, True),  # another machine's default scale, of a network that this is not
    ],
)
def test_a_search_has_rates_alone_for_cases(results, key, value, search):
    selected = results.select("tune_deeper")
    manifests = list(selected.runs["manifest"])
    place = next(n for n, key in enumerate(selected.runs.index) if key[1:3] == ("2ep_x1", "net2net"))
    before, config = manifests[place], manifests[place]["config"]
    manifests[place] = before | {"config": config | {key: config.get(key, {}) | value}}
    assert cases.is_search(Results(selected.curves, selected.runs.assign(manifest=manifests))) == search
    assert bool(describe_differences([before, manifests[place]])) != search


def test_rates_of_what_is_no_search_or_half_of_one(results, tmp_path, capsys):
    with pytest.raises(ExperimentError, match="differ in more than rates"):
        claims.print_rates("grow_schedule", results)
    runs = results.select("ablation_rate").runs
    # The arm has seed 0 with one of the rates, and other seeds with all others.
    kept = [arm != "net2net" or (case == "x3") == (seed == 0) for _, case, arm, seed in runs.index]
    claims.print_rates("ablation_rate", Results(results.curves, runs[kept]))
    assert "4ep net2net: no seed has all of its rates" in capsys.readouterr().out
    teachers = Results(results.curves, runs.xs("teacher", level="arm", drop_level=False))
    for experiment in ("ablation_rate", "tune_wider"):
        with pytest.raises(ExperimentError, match=f"There are no curves of cases of {experiment}: "):
            claims.print_rates(experiment, teachers)
    assert claims.main(["--results", str(tmp_path), "--rates", "ablation_rate"]) == 1
    assert capsys.readouterr().err.startswith(f"There are no curves under {tmp_path / 'curves'}: ")


def test_the_claims_and_the_rates_of_a_folder(tmp_path, capsys):
    shutil.copytree(ROOT / "results/curves/ablation_rate", tmp_path / "curves/ablation_rate")
    shutil.copy(ROOT / "results/claims.yaml", tmp_path)
    assert claims.main(["--results", str(tmp_path)]) == 0
    assert re.search(r"\n\d+ holds?, (\d+ \w+, )*\d+ not run\n$", capsys.readouterr().out)
    assert claims.main(["--results", str(tmp_path), "--rates", "ablation_rate"]) == 0
    assert "\n4ep rates: {net2net: " in capsys.readouterr().out


# -- experiments with cases, and costs ----------------------------------------------------------------------------


def test_a_case_of_which_only_the_teacher_was_run_is_no_result(results):
    runs = results.select("frontier_wider").runs
    kept = [case != "2ep" or arm == "teacher" for _, case, arm, _ in runs.index]
    assert Results(results.curves, runs[kept]).experiments == {"frontier_wider": ["1ep", "4ep", "8ep", "16ep"]}


@pytest.mark.parametrize("name", ["frontier_wider", "ablation_rate", "tune_deeper", "grow_schedule"])
def test_the_figure_of_cases_is_the_same_each_time(results, tmp_path, name):
    (drawn,) = drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
    first = drawn.read_bytes()
    assert len(first) > 10_000
    if name == "frontier_wider":
        drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
        assert drawn.read_bytes() == first
