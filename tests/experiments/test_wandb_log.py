"""W&B may be absent, offline or broken: training goes on, and the curve on disk is whole."""

import itertools
import json
import math
import operator
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import yaml
from conftest import composed
from rich.console import Console

from experiments import wandb_log
from experiments.analysis.curves import load
from experiments.config import Config, check
from experiments.run_log import COLUMNS, parse_curve

ROOT = Path(__file__).parents[2]
MANIFEST = {
    **{"settings": {"seed": 0}, "parameters": 1, "forward_flops": 2, "commit": "abc", "hardware": "a CPU"},
    "processes": [{"started": "2026-01-01T00:00:00+00:00"}],
}
ALL_CALLS = ["init", "log", "log", "update", "Artifact", "add_file", "log_artifact", "finish"]
ROWS = [{"step": 0, "test_accuracy": 0.1}, {"step": 5, "test_accuracy": 0.2}]


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nobody is logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
    monkeypatch.delenv("WANDB_DATA_DIR")
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
    """Mirror both rows, a summary and a file; return what the terminal says."""
    text = StringIO()
    config = Config(experiment="any", runs=str(tmp_path))
    (tmp_path / "growth.json").write_text("a record")
    with wandb_log.mirror(config, name, MANIFEST, Console(file=text), last_step) as mirrored:
        for row in ROWS:
            mirrored.log(row)
        mirrored.summarise({"final_test_accuracy": 0.2})
        mirrored.keep("growth", tmp_path / "growth.json")
    return text.getvalue()


def inspect(folder: Path, *options: str) -> list[dict[str, Any]]:
    """What W&B has written into an offline run's folder, a dict a record."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(text)] if options else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("failing", "made"),
    [
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("summary.update", ["init", "log", "log", "update"]),
        ("log_artifact", ["init", "log", "log", "update", "Artifact", "add_file", "log_artifact"]),
        ("finish", [*ALL_CALLS]),
        ("", [*ALL_CALLS]),
    ],
)
def test_a_failure_is_said_once_and_ends_the_mirror_of_the_process(wandb, tmp_path, failing, made):
    if failing:
        owner = wandb if failing == "init" else wandb.init.return_value
        operator.attrgetter(failing)(owner).side_effect = RuntimeError("the network\nis [gone]")
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


def test_a_summary_and_copies_of_files_are_kept(wandb, tmp_path):
    mirror_rows(tmp_path)
    wandb.init.return_value.summary.update.assert_called_once_with({"final_test_accuracy": 0.2})
    wandb.Artifact.assert_called_once_with("growth-any-seed0-net2net", "growth")
    wandb.Artifact.return_value.add_file.assert_called_once_with(str(tmp_path / "growth.json"))
    wandb.init.return_value.log_artifact.assert_called_once_with(wandb.Artifact.return_value)


@pytest.mark.slow
def test_offline_a_run_of_every_arm_and_a_report_are_written(train_py, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ("logger=wandb", "arms=[net2net,random_init]")
    assert train_py(*arguments) == 0
    folders = {
        path.name.rpartition("-seed0-")[2].rpartition("-")[0]: path for path in tmp_path.glob("runs/wandb/offline-*")
    }
    assert set(folders) == {"teacher", "net2net", "random_init", "report"}
    summaries = {name: inspect(folder, "--summary")[0]["summary"] for name, folder in folders.items()}
    seed = tmp_path / "runs/quickstart/seed0"
    for arm in ("teacher", "net2net", "random_init"):
        last = parse_curve((seed / arm / "curve.csv").read_bytes(), arm)[-1]
        for part in ("holdout", "test"):
            assert summaries[arm][f"final_{part}_accuracy"] == pytest.approx(last[f"{part}_accuracy"], rel=1e-5)
    runs = load(seed.parent).runs.droplevel(["experiment", "case", "seed"])
    report = summaries["report"]
    for arm in ("net2net", "random_init"):
        assert report[f"{arm}/final_test_accuracy"] == runs["final"][arm]
        assert report.get(f"{arm}/steps_to_target", math.nan) == pytest.approx(runs["reached_step"][arm], nan_ok=True)
    files = {}
    for name, folder in folders.items():
        for artifact in [record["artifact"] for record in inspect(folder) if record["type"] == "artifact"]:
            for entry in artifact["manifest"]["contents"]:
                assert Path(entry["local_path"]).is_relative_to(tmp_path / "runs/wandb")
                files[name, artifact["type"], entry["path"]] = Path(entry["local_path"]).read_bytes()
    assert set(files) == {
        ("net2net", "growth", "growth.json"),
        ("net2net", "growth", "manifest.json"),
        ("report", "figure", "figure.png"),
    }
    for (name, _, file), content in files.items():
        assert content == ((seed.parent if name == "report" else seed / name) / file).read_bytes()
    assert b'"certificate"' in files["net2net", "growth", "manifest.json"]
    assert train_py(*arguments) == 0  # nothing is missing, so nothing is sent
    assert len(list(tmp_path.glob("runs/wandb/offline-*"))) == 4


@pytest.mark.parametrize("name", ["teacher", "report"])
def test_what_belongs_to_no_arm_of_a_sweep_is_not_mirrored(wandb, monkeypatch, tmp_path, name):
    monkeypatch.setenv("WANDB_SWEEP_ID", "any")
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
