"""The pages: every number in them is that of the curves, every command composes, and cases are shown."""

import hashlib
import html
import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import simulated
from conftest import cases as compose_cases
from simulated import make_curve

from experiments.analysis import cases, pages
from experiments.analysis import figures as drawing
from experiments.analysis.claims import tabulate_budgets
from experiments.analysis.curves import Results, describe_differences, load_all, make_results
from experiments.config import ExperimentError
from scripts import claims, figures

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]
PAGES = ("README.md", "docs/reproduction.md", "results/README.md")
BUDGETS = ["1ep", "2ep", "4ep", "8ep", "16ep"]
KINDS = ["net2net", "random_pad", "random_init", "teacher_continued"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What the pages are made from, and the pages, in a folder of their own."""
    for name in ("curves", "trials"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    (tmp_path / "docs").mkdir()
    for page in (*PAGES, "results/claims.yaml"):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def find_changes(folder: Path) -> list[str]:
    """Make the pages anew from the curves in the folder, and return those that are not as committed."""
    figures.write_pages(folder / "results", load_all(folder / "results/curves"))
    return [page for page in PAGES if (folder / page).read_bytes() != (ROOT / page).read_bytes()]


def test_every_number_in_the_pages_is_that_of_the_curves(copied: Path) -> None:
    for page in PAGES:  # a changed number is set right
        text = (ROOT / page).read_text()
        number = re.findall(r"\| (\d+\.\d\d) ", text)[-1]
        (copied / page).write_text(text.replace(f"| {number} ", f"| {float(number) + 1:.2f} "))
        assert (copied / page).read_bytes() != (ROOT / page).read_bytes()
    assert find_changes(copied) == [], "run python scripts/figures.py and commit what it writes"


def test_a_changed_curve_changes_the_pages(copied: Path) -> None:
    places = {"results/curves/*/seed0/net2net.csv": -1, "results/trials/*/curves/*/seed0/*.csv": -3}
    changed = [(curve, column) for pattern, column in places.items() for curve in copied.glob(pattern)]
    for curve, column in changed:
        *lines, last = curve.read_text().splitlines()
        cells = last.split(",")
        cells[column] = "0.123"
        curve.write_text("\n".join([*lines, ",".join(cells)]) + "\n")
    with pytest.raises(ExperimentError, match="does not match curve_sha256"):
        find_changes(copied)
    for curve, _ in changed:
        manifest, checksum = curve.with_suffix(".json"), hashlib.sha256(curve.read_bytes()).hexdigest()
        text = re.sub('"curve_sha256": "[0-9a-f]+"', f'"curve_sha256": "{checksum}"', manifest.read_text())
        manifest.write_text(text)
    assert find_changes(copied) == list(PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_pages_composes(page: str) -> None:
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


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_figure_in_the_pages_is_there(page: str) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated results of a frontier, a search of rates and the growing schedule: nothing of it was ever run."""
    folder = tmp_path_factory.mktemp("simulated") / "results"
    for experiment in ("frontier_wider", "ablation_rate", "grow_schedule"):
        simulated.write(folder, compose_cases(f"experiment={experiment}", "scale=cpu"))
    simulated.write(folder, compose_cases("experiment=tune_deeper", "scale=cpu"), seeds=1)
    shutil.copy(ROOT / "results/claims.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """The same, read."""
    return load_all(folder / "curves")


def test_cases_are_in_the_order_of_their_configuration(results: Results) -> None:
    found = results.experiments
    assert found["frontier_wider"] == BUDGETS
    assert found["ablation_rate"] == ["x0.1", "x0.3", "x1", "x3", "x10"]
    assert found["grow_schedule"][:4] == ["start", "start_half", "start_double", "never"]
    assert {name for name in found if cases.is_frontier(results.select(name))} == {"frontier_wider"}
    assert {name for name in found if cases.is_search(results.select(name))} == {"tune_deeper"}


def test_a_line_of_a_case_is_that_of_its_curves(results: Results) -> None:
    table = cases.summarise_cases(results.select("frontier_wider"))
    line, runs = table.loc[("2ep", "net2net")], results.select("frontier_wider", "2ep").runs
    ends = list(runs.xs("net2net", level="arm")["final"])
    assert line["final"].values == tuple(ends) and line["final"].mean == pytest.approx(sum(ends) / 3)
    assert line["flops"] == runs.xs("net2net", level="arm")["flops"].iloc[0]
    assert line["total_flops"] == line["flops"] + runs.xs("teacher", level="arm")["flops"].iloc[0]
    assert "teacher" not in table.index.get_level_values("arm")


def test_commands_that_differ_in_seed_and_case_alone_are_one_sweep() -> None:
    base = "python train.py experiment=one seed={} case={} 'arms=[net2net]'"
    commands = [base.format(seed, case) for case in ("x1", "x3") for seed in (0, 1)] * 2
    one = "python train.py -m experiment=one seed=0,1 case=x1,x3 'arms=[net2net]'"
    assert pages.format_commands(commands) == f"`{one}`"
    assert pages.format_commands([*commands, one + " seed=4", "python train.py experiment=two"]).count("<br>") == 2


def test_a_page_names_its_own_commands_and_not_those_that_trained_its_teacher(results: Results) -> None:
    selected = results.select("frontier_wider")
    manifests = [
        record | {"command": "python train.py experiment=another"} if record["arm"] == "teacher" else record
        for record in selected.runs["manifest"]
    ]
    changed = Results(selected.curves, selected.runs.assign(manifest=manifests))
    assert "another" not in pages.collect_facts(changed)["Command"]
    assert pages.collect_facts(changed.select(arm="teacher"))["Command"] == "`python train.py experiment=another`"


def test_the_budgets_of_a_frontier(results: Results) -> None:
    heads, table = tabulate_budgets("frontier_wider", results.select("frontier_wider"))
    assert [line[0] for line in table] == BUDGETS
    cells = dict(zip(heads, table[0], strict=True))
    assert cells["`net2net`"] == "≤ 1.00 (up to 1.00), n = 3 (untrained already in 3 of 3)"
    middle = dict(zip(heads, table[2], strict=True))
    mean, low, high = (float(x) for x in re.findall(r"\d\.\d\d", middle["`net2net`"]))
    assert low < mean < high < 1  # by the formula, net2net is ahead by three hundredths, an epoch's worth
    assert float(middle["`net2net`, teacher's included"].split()[0]) > 1


def test_the_page_of_cases_and_the_claims_on_it(folder: Path, results: Results, capsys: Capture) -> None:
    figures.write_pages(folder, results)
    page = (folder / "README.md").read_text()
    assert "## frontier_wider" in page and re.search(r"; `1ep`: .*schedule\.epochs 1ep; `2ep`: ", page)
    assert page.count("schedule.teacher_epochs 8.68ep") == 1  # what most cases have is said once
    assert "students 1ep / 2ep / 4ep / 8ep / 16ep, teacher 8ep" in page
    table = [line for line in page.splitlines() if line.startswith("| Wider")]
    assert any("| **holds** |" in line and "epochs with less training" in line for line in table)
    assert any("undecided (about 5 seeds would tell)" in line for line in table)  # a headline takes five
    assert any("not run" in line for line in page.splitlines() if line.startswith("| Deeper"))
    assert claims.main(["--results", str(folder)]) == 0
    assert re.search(r"^\d+ hold, (\d+ fail, )?\d+ undecided, \d+ not run$", capsys.readouterr().out.splitlines()[-1])


def print_rates(folder: Path, experiment: str) -> int:
    return claims.main(["--results", str(folder), "--rates", experiment])


def test_the_best_rate_of_each_arm(folder: Path, capsys: Capture) -> None:
    assert print_rates(folder, "ablation_rate") == 0
    *arms, last = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in arms] == [f"4ep {arm}" for arm in KINDS]
    values = {rate: float(value) for rate, value in re.findall(r"([\d.]+) (\d\d\.\d\d)", arms[0])}
    assert list(values) == ["0.1", "0.3", "1", "3", "10"]
    chosen = max(values, key=lambda rate: values[rate])
    assert arms[0].startswith(f"4ep net2net: {chosen}")
    assert ("at the edge" in arms[0]) == (chosen in ("0.1", "10"))
    assert last.startswith(f"4ep rates: {{net2net: {chosen}, ")


def test_the_best_rate_with_each_budget(folder: Path, results: Results, capsys: Capture) -> None:
    table = cases.tabulate_rates(results.select("tune_deeper"))
    assert list(table.index) == [(budget, arm) for budget in BUDGETS for arm in KINDS]
    assert list(table.loc[("16ep", "net2net")].dropna().index) == [0.1, 0.3, 1, 3, 10]
    assert list(table.loc[("4ep", "random_init")].dropna().index) == [0.03, 0.1, 0.3, 1, 3]  # a case of this arm alone
    ends = results.select("tune_deeper", "2ep_x0.3").runs["holdout"].xs("random_pad", level="arm")
    assert table.at[("2ep", "random_pad"), 0.3] == ends.iloc[0]
    for line in pages.cases_section("tune_deeper", results.select("tune_deeper")).splitlines():
        if re.match(r"\| \d+ep ", line):  # the best of each line in bold
            (bold,) = re.findall(r"\*\*(.*)\*\*", line)
            assert bold == max(re.findall(r"\d\d\.\d\d", line))
    assert print_rates(folder, "tune_deeper") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" {")[0] for line in lines if "rates:" in line] == [f"{budget} rates:" for budget in BUDGETS]


@pytest.mark.parametrize(
    ("key", "value", "search"),
    [
        ("growth", {"noise": 0.5}, False),
        ("first", {"layers": 1}, False),  # a setting that one case alone has
        ("inception", {"slim": 1.0}, True),  # another machine's default scale, of a network that this is not
    ],
)
def test_a_search_has_rates_alone_for_cases(results: Results, key: str, value: dict[str, Any], search: bool) -> None:
    selected = results.select("tune_deeper")
    manifests = list(selected.runs["manifest"])
    place = list(selected.runs.index).index(("tune_deeper", "2ep_x1", "net2net", 0))
    before, config = manifests[place], manifests[place]["config"]
    manifests[place] = before | {"config": config | {key: config[key] | value}}
    assert cases.is_search(Results(selected.curves, selected.runs.assign(manifest=manifests))) == search
    assert bool(describe_differences([before, manifests[place]])) != search


def test_rates_of_what_is_no_search_or_half_of_one(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert print_rates(folder, "grow_schedule") == 1
    assert "differ in more than rates" in capsys.readouterr().err
    copied = shutil.copytree(folder / "curves/ablation_rate", tmp_path / "curves/ablation_rate")
    (copied / "x3/seed7").mkdir()
    for path in sorted(copied.glob("x3/seed*/net2net.*")):  # another seed than all the other rates of the arm have
        path.rename(copied / "x3/seed7" / path.name) if "seed0" in str(path) else path.unlink()
    assert print_rates(tmp_path, "ablation_rate") == 0
    assert "4ep net2net: no seed has all of its rates" in capsys.readouterr().out
    for path in [*copied.rglob("*.csv"), *copied.rglob("*.json")]:
        if path.stem != "teacher":
            path.unlink()
    for experiment in ("ablation_rate", "tune_wider"):
        assert print_rates(tmp_path, experiment) == 1
        assert capsys.readouterr().err.startswith(f"There are no curves of cases of {experiment}: ")


def test_a_case_of_which_only_the_teacher_was_run_is_no_result(results: Results) -> None:
    runs = results.select("frontier_wider").runs
    kept = [case != "2ep" or arm == "teacher" for _, case, arm, _ in runs.index]
    assert Results(results.curves, runs[kept]).experiments == {"frontier_wider": ["1ep", "4ep", "8ep", "16ep"]}


@pytest.mark.parametrize("name", ["frontier_wider", "ablation_rate", "tune_deeper", "grow_schedule"])
def test_the_figure_of_cases_is_the_same_each_time(results: Results, tmp_path: Path, name: str) -> None:
    (drawn,) = drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
    first = drawn.read_bytes()
    assert len(first) > 10_000
    if name == "frontier_wider":
        drawing.draw_cases(name, results.select(name), tmp_path / "figure", ("svg",))
        assert drawn.read_bytes() == first


def test_what_it_costs_to_reach_the_target() -> None:
    curves = {
        "teacher": [0.1, 0.3, 0.5],
        "net2net": [0.5, 0.7, 0.8, 0.9],
        "random_init": [0.1, 0.4, 0.5, 0.7],
        "random_pad": [0.1, 0.1, 0.2, 0.3],
    }
    runs = [
        ("e", arm, seed, {"config": {"target": "random_init"}}, make_curve(accuracies, flops=3e9))
        for arm, accuracies in curves.items()
        for seed in range(2)
    ]
    for known in (True, False):  # the cost of the teacher
        _, lines = pages.tabulate_costs(make_results(runs if known else runs[2:])) or ([], [])
        cells = {line[0]: line[1:] for line in lines}
        own, scratch = ["10", "1,280", "1", "1"], ["30", "3,840", "3", "3"]
        assert cells["net2net"] == ["2 of 2", *own, *(["30", "3,840", "4", "3"] if known else ["–"] * 4)]
        assert cells["random_init"] == ["2 of 2", *scratch, *scratch]
        assert cells["random_pad"] == ["0 of 2", *["–"] * 8]
