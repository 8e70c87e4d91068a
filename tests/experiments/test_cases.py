"""Cases: each is run as an experiment of its own, and the command line has the last word."""

import json
from dataclasses import asdict

import pytest
from conftest import cases

from experiments.analysis import curves
from experiments.config import ExperimentError
from scripts import collect

SHORT = "+cases.short={schedule.epochs: 4it, schedule.evaluate: 2it}"
NOISY = "+cases.noisy={growth: {noise: 0.5}, rates: {net2net: 0.3}, schedule.epochs: 4it, schedule.evaluate: 4it}"


def test_a_case_changes_what_it_names_in_dotted_or_nested_keys_and_nothing_else():
    (plain,) = cases("experiment=quickstart")
    assert (plain.case, plain.name) == (None, "quickstart")
    short, noisy = cases("experiment=quickstart", SHORT, NOISY)
    assert [config.name for config in (short, noisy)] == ["quickstart/short", "quickstart/noisy"]
    assert (short.schedule.epochs, short.schedule.evaluate) == ("4it", "2it")
    assert (noisy.growth.noise, noisy.rates["net2net"], noisy.rates["random_init"]) == (0.5, 0.3, 1.0)
    assert cases("experiment=quickstart", SHORT, NOISY, "case=noisy") == [noisy]
    changed = {"case": None, "schedule": asdict(plain.schedule)}
    assert asdict(short) | changed == asdict(plain)


def test_lists_and_new_arguments_of_a_network_can_be_changed():
    (config,) = cases("experiment=quickstart", "+cases.a={arms: [net2net], students.wider.layers: 2}")
    assert config.arms == ["net2net"]
    assert config.students == {"wider": {"width": 1.0, "layers": 2}}


def test_what_the_command_line_names_no_case_changes():
    short, _ = cases("experiment=quickstart", SHORT, NOISY, "schedule.epochs=9it", "+students.wider={width: 0.9}")
    assert (short.schedule.epochs, short.schedule.evaluate) == ("9it", "2it")
    # but a group of settings that is chosen by name is no setting
    (config,) = cases("experiment=quickstart", "data=cifar10", "+cases.large={data.size: 64}")
    assert (config.data.name, config.data.size) == ("cifar10", 64)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("+cases.a={schedule.epoch: 2ep}", r"no setting 'schedule.epoch' \(did you mean 'schedule.epochs'"),
        ("+cases.a=3", "The case a is 3: write the settings it changes"),
        ("+cases.a={seed: 3}", "The case a sets seed, which says which run it is"),
        ("+cases.seed3={growth.noise: 1}", "The case 'seed3' cannot name a folder"),
        ("+cases.a={growth.noise: -1}", "growth.noise is -1"),
        ("case=shor", r"quickstart has no case 'shor' \(did you mean 'short'\?\)\. There are: short"),
    ],
)
def test_a_wrong_case_is_answered_in_a_sentence(case, said):
    with pytest.raises(ExperimentError, match=said):
        cases("experiment=quickstart", SHORT, case)
    with pytest.raises(ExperimentError, match="quickstart has no cases: leave case= out"):
        cases("experiment=quickstart", "case=short")


@pytest.mark.slow
def test_cases_run_one_after_another_also_after_one_that_fails_and_are_collected(train_py, tmp_path, capsys):
    words = ["arms=[random_init]", "schedule.epochs=4it", "schedule.evaluate=4it"]
    rates = {"low": 0.1, "absurd": 1e30, "high": 2}
    words += [f"+cases.{name}={{rates.random_init: {rate}}}" for name, rate in rates.items()]
    assert train_py(*words) == 1
    err = capsys.readouterr().err
    assert "Error: case=absurd: " in err and "not finite at step" in err
    runs = tmp_path / "runs"
    folder = runs / "quickstart"
    assert {path.name for path in folder.iterdir()} == {"low", "absurd", "high"}
    manifest = json.loads((folder / "low/seed0/random_init/manifest.json").read_text())
    assert manifest["experiment"] == "quickstart/low"
    assert (manifest["config"]["case"], manifest["config"]["cases"], manifest["settings"]["rate"]) == ("low", {}, 0.1)
    assert (folder / "low/figure.png").is_file()

    assert train_py(*words, "case=high") == 0  # alone, and complete already
    assert "random_init            complete, skipped" in capsys.readouterr().out

    results = tmp_path / "results"
    assert collect.main(["--runs", str(runs), "--results", str(results), "quickstart"]) == 0
    assert "quickstart/high/seed0/random_init: 2 points" in capsys.readouterr().out
    assert list(curves.find_experiments(results / "curves")) == ["quickstart/high", "quickstart/low"]
    assert collect.main(["--runs", str(runs), "--results", str(results), "quickstart/low"]) == 0
    assert capsys.readouterr().out.endswith("1 collected, 0 skipped, 0 refused\n")
