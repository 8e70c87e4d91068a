"""W&B may be absent, offline or broken: training goes on, and the curve on disk is whole."""

import itertools
import sys
from io import StringIO
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import yaml
from conftest import composed
from rich.console import Console

from experiments import wandb_log
from experiments.config import Config, check
from experiments.run_log import COLUMNS

ROOT = Path(__file__).parents[2]
MANIFEST = {
    **{"settings": {"seed": 0}, "parameters": 1, "forward_flops": 2, "commit": "abc", "hardware": "a CPU"},
    "processes": [{"started": "2026-01-01T00:00:00+00:00"}],
}
ROWS = [{"step": 0, "test_accuracy": 0.1}, {"step": 5, "test_accuracy": 0.2}]


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nobody is logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is restored after the test
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A W&B that notes how it is called."""
    service = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def calls(service: MagicMock) -> list[str]:
    """What was called, but for the settings."""
    names = [name.rpartition(".")[2] for name, _, _ in service.mock_calls]
    return [name for name in names if name not in ("Settings", "define_metric")]


def mirror_rows(tmp_path: Path, name: str = "net2net", last_step: int = -1) -> str:
    """Mirror both rows; return what the terminal says."""
    text = StringIO()
    config = Config(experiment="any", runs=str(tmp_path))
    with wandb_log.mirror(config, name, MANIFEST, Console(file=text), last_step) as log:
        for row in ROWS:
            log(row)
    return text.getvalue()


@pytest.mark.parametrize(
    ("failing", "made"),
    [
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("finish", ["init", "log", "log", "finish"]),
        ("", ["init", "log", "log", "finish"]),
    ],
)
def test_a_failure_is_said_once_and_ends_the_mirror_of_the_process(wandb, tmp_path, failing, made):
    if failing:
        owner = wandb if failing == "init" else wandb.init.return_value
        getattr(owner, failing).side_effect = RuntimeError("the network\nis [gone]")
    said = mirror_rows(tmp_path)
    assert calls(wandb) == made
    assert said.count("W&B fails (RuntimeError: the network is [gone]). Training continues") == bool(failing)
    mirror_rows(tmp_path)
    assert calls(wandb) == made * (1 if failing else 2)


def test_a_stage_keeps_its_identity_and_repeats_no_row(wandb, tmp_path):
    mirror_rows(tmp_path)
    first = wandb.init.call_args.kwargs
    assert (first["resume"], first["mode"], first["group"]) == ("allow", "offline", "any")
    log = wandb.init.return_value.log
    assert log.call_args_list == [call({"test_accuracy": 0.1}, step=0), call({"test_accuracy": 0.2}, step=5)]
    mirror_rows(tmp_path, last_step=0)
    assert log.call_args_list[2:] == [call({"test_accuracy": 0.2}, step=5)]
    assert wandb.init.call_args.kwargs["id"] == first["id"]
    assert first["tags"] == ["net2net", "seed0"]
    axes = {one.args[0]: one.kwargs["step_metric"] for one in wandb.init.return_value.define_metric.call_args_list}
    assert axes == {"train_*": "epoch", "holdout_*": "epoch", "test_*": "epoch"}


def test_without_wandb_installed_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert mirror_rows(tmp_path).startswith("W&B fails (ModuleNotFoundError: ")


@pytest.mark.slow
def test_offline_a_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mirror_rows(tmp_path) == ""
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("name", "variable"), [("first", "ANY"), ("teacher", "WANDB_SWEEP_ID")])
def test_what_belongs_to_no_arm_is_not_mirrored(wandb, monkeypatch, tmp_path, name, variable):
    monkeypatch.setenv(variable, "any")
    mirror_rows(tmp_path, name)
    assert wandb.mock_calls == []


def test_the_sweep_file_drives_the_command_line():
    sweep = yaml.safe_load((ROOT / "configs/wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["metric"]["name"] in COLUMNS
    swept = {key: choice.get("values") or [choice["value"]] for key, choice in sweep["parameters"].items()}
    assert sweep["command"] == ["${env}", "python", "${program}", "${args_no_hyphens}"]
    commands = list(itertools.product(*swept.values()))
    assert len(commands) == 15
    for values in (commands[0], commands[-1]):
        config = composed(*(f"{key}={value}" for key, value in zip(swept, values, strict=True)))
        check(config)
        assert len(config.arms) == 1  # a run of the sweep is one curve
