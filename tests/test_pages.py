"""The pages: every number in them is that of the curves, every command composes, and cases are shown."""

import copy
import html
import itertools
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import simulated

from experiments.analysis import cases as family
from experiments.analysis import costs, figure_cases, frontier, pages, search
from experiments.analysis import curves as report
from experiments.analysis.curves import mixed
from experiments.config import Config
from scripts import claims, figures, rates

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/reproduction.md", "results/README.md")
Cases = Callable[..., list[Config]]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What the pages are made from, and the pages, in a folder of their own."""
    for name in ("curves", "trials"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    shutil.copy(ROOT / "results/claims.yaml", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def changed(folder: Path) -> list[str]:
    """The pages that are others than those committed, after they were made anew from the curves in the folder."""
    figures.write_pages(folder / "results", report.load_all(folder / "results/curves"))
    return [page for page in PAGES if (folder / page).read_bytes() != (ROOT / page).read_bytes()]


def test_every_number_in_the_pages_is_that_of_the_curves(copied: Path) -> None:
    assert changed(copied) == [], "run python scripts/figures.py and commit what it writes"


def test_a_changed_number_in_a_page_is_found(copied: Path) -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        number = re.findall(r"\| (\d+\.\d\d) ", text)[-1]
        (copied / page).write_text(text.replace(f"| {number} ", f"| {float(number) + 1:.2f} "))
        assert (copied / page).read_bytes() != (ROOT / page).read_bytes()
    assert changed(copied) == []  # all of them are set right


def test_a_changed_curve_changes_the_pages(copied: Path) -> None:
    for curve in copied.glob("results/curves/*/seed0/net2net.csv"):
        *lines, last = curve.read_text().splitlines()
        cells = last.split(",")
        cells[-1] = "0.123"
        curve.write_text("\n".join([*lines, ",".join(cells)]) + "\n")
    for curve in copied.glob("results/trials/*/curves/*/seed0/*.csv"):
        *lines, last = curve.read_text().splitlines()
        cells = last.split(",")
        cells[-3] = "0.123"
        curve.write_text("\n".join([*lines, ",".join(cells)]) + "\n")
    with pytest.raises(report.ExperimentError, match="does not match curve_sha256"):
        changed(copied)
    for path in copied.rglob("*.json"):
        text = path.read_text()
        if path.with_suffix(".csv").is_file():
            path.write_text(
                re.sub('"curve_sha256": "[0-9a-f]+"', f'"curve_sha256": "{sha(path.with_suffix(".csv"))}"', text)
            )
    assert changed(copied) == list(PAGES)


def sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_pages_composes(cases: Cases, page: str) -> None:
    text = html.unescape((ROOT / page).read_text())
    commands = {match.strip() for match in re.findall(r"python train\.py ([^`#\n]*experiment=[^`#\n]+)", text)}
    assert commands or page == "docs/reproduction.md"
    for command in sorted(commands):
        words = [word for word in shlex.split(command) if not word.startswith(("-", "hydra"))]
        swept = "-m" in shlex.split(command)
        for job in itertools.product(*(sweep(word) if swept else [word] for word in words)):
            assert cases(*job), command


def sweep(word: str) -> list[str]:
    """The settings of the jobs that a setting of a sweep stands for."""
    key, _, values = word.partition("=")
    return [word] if "[" in values else [f"{key}={value}" for value in values.split(",")]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_figure_in_the_pages_is_there(page: str) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Simulated results of a frontier, a search of rates and the growing schedule: nothing of it was ever run."""
    from conftest import cases

    folder = tmp_path_factory.mktemp("simulated") / "results"
    for experiment in ("frontier_wider", "ablation_rate", "grow_schedule"):
        simulated.write(folder, cases(f"experiment={experiment}", "scale=cpu"))
    simulated.write(folder, cases("experiment=tune_deeper", "scale=cpu"), seeds=1)
    shutil.copy(ROOT / "results/claims.yaml", folder)
    return folder


def read(results: Path) -> dict[str, family.Cases]:
    return family.families(report.load_all(results / "curves"))


def test_cases_are_in_the_order_of_their_configuration(results: Path) -> None:
    found = read(results)
    assert list(found["frontier_wider"]) == ["1ep", "2ep", "4ep", "8ep", "16ep"]
    assert list(found["ablation_rate"]) == ["x0.1", "x0.3", "x1", "x3", "x10"]
    assert list(found["grow_schedule"])[:4] == ["start", "start_half", "start_double", "never"]
    assert {name for name, cases in found.items() if frontier.is_frontier(cases)} == {"frontier_wider"}


def test_a_line_of_a_case_is_that_of_its_curves(results: Path) -> None:
    cases = read(results)["frontier_wider"]
    (line,) = [line for line in family.lines(cases) if (line.case, line.arm) == ("2ep", "net2net")]
    curves = cases["2ep"][0]
    ends = [curve[-1]["test_accuracy"] for curve in curves["net2net"].values()]
    assert line.final.values == tuple(ends) and line.final.mean == pytest.approx(sum(ends) / 3)
    assert line.flops == curves["net2net"][0][-1]["flops"]
    assert line.flops_total == line.flops + curves["teacher"][0][-1]["flops"]
    assert "teacher" not in {one.arm for one in family.lines(cases)}


def test_commands_that_differ_in_seed_and_case_alone_are_one_sweep() -> None:
    base = "python train.py experiment=one seed={} case={} 'arms=[net2net]'"
    commands = [base.format(seed, case) for case in ("x1", "x3") for seed in (0, 1)] * 2
    one = "python train.py -m experiment=one seed=0,1 case=x1,x3 'arms=[net2net]'"
    assert pages.command_phrase(commands) == f"`{one}`"
    assert pages.command_phrase([*commands, one + " seed=4", "python train.py experiment=two"]).count("<br>") == 2
    assert pages.command_phrase(["python train.py experiment=two seed=3"]) == "`python train.py experiment=two seed=3`"


def test_a_page_names_its_own_commands_and_not_those_that_trained_its_teacher(results: Path) -> None:
    manifests = copy.deepcopy([manifests for _, manifests in read(results)["frontier_wider"].values()])
    for one in manifests:
        for record in one["teacher"].values():
            record["command"] = "python train.py experiment=another"
    assert "another" not in pages.facts(manifests)["Command"]
    alone = [{"teacher": one["teacher"]} for one in manifests]
    assert pages.facts(alone)["Command"] == "`python train.py experiment=another`"


def test_the_budgets_of_a_frontier(results: Path) -> None:
    heads, table = frontier.budgets("frontier_wider", read(results)["frontier_wider"])
    assert [line[0] for line in table] == ["1ep", "2ep", "4ep", "8ep", "16ep"]
    cells = dict(zip(heads, table[0], strict=True))
    assert cells["`net2net`"] == "≤ 1.00 (up to 1.00), n = 3 (untrained already in 3 of 3)"
    middle = dict(zip(heads, table[2], strict=True))
    mean, low, high = (float(x) for x in re.findall(r"\d\.\d\d", middle["`net2net`"]))
    assert low < mean < high < 1  # by the formula, net2net is ahead by three hundredths, an epoch's worth
    assert float(middle["`net2net`, teacher's included"].split()[0]) > 1


def test_the_page_of_a_family_and_the_claims_on_it(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures.write_pages(results, report.load_all(results / "curves"))
    page = (results / "README.md").read_text()
    assert "## frontier_wider" in page and re.search(r"; `1ep`: .*schedule\.epochs 1ep; `2ep`: ", page)
    assert " where nothing else is said; `start`: schedule.epochs 8ep; `start_half`: schedule.epochs 4ep; " in page
    assert page.count("schedule.teacher_epochs 8.68ep") == 1  # what most cases have is said once
    assert "students 1ep / 2ep / 4ep / 8ep / 16ep, teacher 8ep" in page
    assert re.search(r"Best by holdout accuracy: `net2net` `x[\d.]+` \(\d\d\.\d\d %\)", page)
    table = [line for line in page.splitlines() if line.startswith("| Wider")]
    assert any("| **holds** |" in line and "epochs with less training" in line for line in table)
    assert any("undecided (about 5 seeds would tell)" in line for line in table)  # a headline takes five
    assert any("not run" in line for line in page.splitlines() if line.startswith("| Deeper"))
    assert claims.main(["--results", str(results)]) == 0
    assert re.search(r"^\d+ hold, (\d+ fail, )?\d+ undecided, \d+ not run$", capsys.readouterr().out.splitlines()[-1])


def test_the_best_rate_of_each_arm(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rates.main(["--results", str(results), "ablation_rate"]) == 0
    *arms, last = capsys.readouterr().out.splitlines()
    kinds = ["net2net", "random_pad", "random_init", "teacher_continued"]
    assert [line.partition(":")[0] for line in arms] == [f"4ep {arm}" for arm in kinds]
    values = {rate: float(value) for rate, value in re.findall(r"([\d.]+) (\d\d\.\d\d)", arms[0])}
    assert list(values) == ["0.1", "0.3", "1", "3", "10"]
    chosen = max(values, key=lambda rate: values[rate])
    assert arms[0].startswith(f"4ep net2net: {chosen}")
    assert ("at the edge" in arms[0]) == (chosen in ("0.1", "10"))
    assert last.startswith(f"4ep rates: {{net2net: {chosen}, ")
    assert rates.main(["--results", str(results), "tune_wider"]) == 1
    assert capsys.readouterr().err.startswith("There are no cases of tune_wider under ")


def test_the_best_rate_with_each_budget(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = read(results)["tune_deeper"]
    found = search.tried(cases)
    assert list(found) == ["1ep", "2ep", "4ep", "8ep", "16ep"]
    assert list(found["16ep"]["net2net"]) == [0.1, 0.3, 1, 3, 10]
    assert list(found["4ep"]["random_init"]) == [0.03, 0.1, 0.3, 1, 3]  # a case that this arm alone has
    curve = cases["2ep_x0.3"][0]["random_pad"][0]
    assert found["2ep"]["random_pad"][0.3] == curve[-1]["holdout_accuracy"]
    for arms in found.values():
        assert list(arms) == ["net2net", "random_pad", "random_init", "teacher_continued"]
    heads, table = search.cells(found)
    assert heads[2:] == ["0.03 ×", "0.1 ×", "0.3 ×", "1 ×", "3 ×", "10 ×"] and len(table) == 20
    for line in table:
        (bold,) = [cell.strip("*") for cell in line if cell.startswith("**")]
        assert float(bold) == max(float(cell.strip("*")) for cell in line[2:] if cell != "–")
    assert rates.main(["--results", str(results), "tune_deeper"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" {")[0] for line in said if "rates:" in line] == [f"{budget} rates:" for budget in found]


def test_a_search_has_rates_alone_for_cases(results: Path) -> None:
    found = read(results)
    assert {name for name, cases in found.items() if search.is_search(cases)} == {"tune_deeper"}
    cases = found["tune_deeper"]
    curves, manifests = cases["2ep_x1"]
    other = copy.deepcopy(manifests)
    for record in other["net2net"].values():
        record["config"]["growth"]["noise"] = 0.5
    assert not search.is_search(cases | {"2ep_x1": (curves, other)})
    # What another machine's default scale makes of a network that this is not, is no difference.
    other = copy.deepcopy(manifests)
    for record in other["net2net"].values():
        record["config"]["inception"]["slim"] = 1.0
    assert search.is_search(cases | {"2ep_x1": (curves, other)})
    assert not mixed([record for one in (manifests, other) for record in one["net2net"].values()])
    # A setting that one case alone has, whichever comes first.
    other = copy.deepcopy(manifests)
    for record in other["net2net"].values():
        record["config"]["first"] = {"layers": 1}
    assert not search.is_search(cases | {"2ep_x1": (curves, other)})
    rest = {name: case for name, case in cases.items() if name != "2ep_x1"}
    assert not search.is_search({"2ep_x1": (curves, other)} | rest)


def test_rates_of_what_is_no_search_or_half_of_one(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rates.main(["--results", str(results), "grow_schedule"]) == 1
    assert "differ in more than rates" in capsys.readouterr().err
    copied = shutil.copytree(results / "curves/ablation_rate", tmp_path / "curves/ablation_rate")
    for path in copied.glob("x3/seed*/net2net.*"):  # another seed than all the other rates of the arm have
        path.rename(path.with_name(f"{path.stem}_elsewhere{path.suffix}")) if "seed0" in str(path) else path.unlink()
    (copied / "x3/seed7").mkdir()
    for path in copied.glob("x3/seed0/net2net_elsewhere.*"):
        path.rename(copied / "x3/seed7" / f"net2net{path.suffix}")
    assert rates.main(["--results", str(tmp_path), "ablation_rate"]) == 0
    assert "4ep net2net: no seed has all of its rates" in capsys.readouterr().out
    for path in [*copied.rglob("*.csv"), *copied.rglob("*.json")]:
        if path.stem != "teacher":
            path.unlink()
    assert rates.main(["--results", str(tmp_path), "ablation_rate"]) == 1
    assert capsys.readouterr().err.startswith("There are no cases of ablation_rate under ")


def test_a_case_of_which_only_the_teacher_was_run_is_no_result(results: Path) -> None:
    loaded = report.load_all(results / "curves")
    curves, manifests = loaded["frontier_wider/2ep"]
    alone = {"frontier_wider/2ep": ({"teacher": curves["teacher"]}, {"teacher": manifests["teacher"]})}
    assert list(family.families({**loaded, **alone})["frontier_wider"]) == ["1ep", "4ep", "8ep", "16ep"]


@pytest.mark.parametrize("name", ["frontier_wider", "ablation_rate", "tune_deeper", "grow_schedule"])
def test_the_figure_of_a_family_is_the_same_each_time(results: Path, tmp_path: Path, name: str) -> None:
    cases = read(results)[name]
    (first,) = figure_cases.draw_family(name, cases, tmp_path / "first", ("svg",))
    (second,) = figure_cases.draw_family(name, cases, tmp_path / "second", ("svg",))
    assert first.read_bytes() == second.read_bytes() and len(first.read_bytes()) > 10_000


def test_what_it_costs_to_reach_the_target(results: Path) -> None:
    curves, _ = read(results)["frontier_wider"]["4ep"]
    found = {cost.arm: cost for cost in costs.costs(curves, "random_init")}
    seeds = curves["net2net"]
    reached = [
        next(
            point
            for point in seeds[seed]
            if point["holdout_accuracy"] >= curves["random_init"][seed][-1]["holdout_accuracy"]
        )
        for seed in seeds
    ]
    net2net = found["net2net"]
    assert (net2net.reached, net2net.n) == (3, 3)
    assert net2net.own["step"] == pytest.approx(sum(point["step"] for point in reached) / 3)
    teacher = curves["teacher"][0][-1]
    for column in ("step", "examples", "flops", "seconds"):
        assert net2net.total[column] == pytest.approx(net2net.own[column] + teacher[column])
    assert found["random_init"].own == found["random_init"].total
    del curves["teacher"]
    (alone,) = [cost for cost in costs.costs(curves, "random_init") if cost.arm == "net2net"]
    assert alone.own and not alone.total
    heads, (line, *_) = costs.cells([alone])
    assert heads[:4] == ["arm", "reached by", "steps", "images"] and line[:2] == ["net2net", "3 of 3"]
    assert line[-1] == "–"


def test_a_target_that_none_reaches_costs_nothing_that_is_known() -> None:
    curves = {
        "net2net": {0: [dict.fromkeys(report.COLUMNS, 0.1)]},
        "random_init": {0: [dict.fromkeys(report.COLUMNS, 0.9)]},
    }
    cost = costs.costs(curves, "random_init")[0]
    assert (cost.arm, cost.reached, cost.own, cost.total) == ("net2net", 0, {}, {})
    assert costs.cells([cost])[1][0][1:] == ["0 of 1", *["–"] * 8]


def test_schedules_that_differ_are_all_told() -> None:
    one = {
        "schedule": {
            "epochs": "1ep",
            "batch_size": 8,
            "optimizer": "sgd",
            "lr": 0.1,
            "decay": "linear",
            "warmup": "0it",
            "evaluate": "1ep",
        }
    }
    other = {"schedule": one["schedule"] | {"epochs": "2ep", "teacher_epochs": "4ep"}}
    assert pages.schedule_phrase([one, other]).startswith(
        "students 1ep / 2ep, teacher 1ep / 4ep, batches of 8, sgd, rate 0.1 "
    )
