"""W&B may be absent, offline or broken: training goes on, and the curve on disk is whole."""

import itertools
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
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
FAST = ("arms=[random_init]", "schedule.epochs=2it", "schedule.evaluate=2it", "logger=wandb")


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nobody is logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is restored after the test
    monkeypatch.setenv("HOME", str(tmp_path))


class Service:
    """A W&B that notes how it is called, and of which one call fails."""

    def __init__(self, failing: str) -> None:
        self.failing, self.calls, self.options = failing, [], {}
        self.Settings = SimpleNamespace

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise RuntimeError("the network\nis [gone]")

    def init(self, **options: Any) -> "Service":
        self.options = options
        self.call("init")
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.call(f"log {step} {row}")

    def finish(self) -> None:
        self.call("finish")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Service]:
    def make(failing: str) -> Service:
        made = Service(failing)
        monkeypatch.setitem(sys.modules, "wandb", made)  # type: ignore[arg-type]
        return made

    return make


def mirror_rows(tmp_path: Path, name: str = "net2net", last_step: int = -1) -> str:
    """Mirror both rows; return what the terminal says."""
    text = StringIO()
    config = Config(experiment="any", runs=str(tmp_path))
    with wandb_log.mirror(config, name, MANIFEST, Console(file=text), last_step) as log:
        for row in ROWS:
            log(row)
    return text.getvalue()


LOGGED = ["log 0 {'test_accuracy': 0.1}", "log 5 {'test_accuracy': 0.2}"]


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("init", ["init"]),
        (LOGGED[0], ["init", LOGGED[0]]),
        ("finish", ["init", *LOGGED, "finish"]),
        ("", ["init", *LOGGED, "finish"]),
    ],
)
def test_a_failure_is_said_once_and_ends_the_mirror_of_the_process(
    service: Callable[[str], Service], tmp_path: Path, failing: str, calls: list[str]
) -> None:
    made = service(failing)
    said = mirror_rows(tmp_path)
    assert made.calls == calls
    assert said.count("W&B fails (RuntimeError: the network is [gone]). Training continues") == bool(failing)
    mirror_rows(tmp_path)
    assert made.calls == calls * (1 if failing else 2)


def test_a_stage_keeps_its_identity_and_repeats_no_row(service: Callable[[str], Service], tmp_path: Path) -> None:
    made = service("")
    mirror_rows(tmp_path)
    first = made.options
    assert (first["resume"], first["mode"], first["group"]) == ("allow", "offline", "any")
    made.calls.clear()
    mirror_rows(tmp_path, last_step=0)
    assert made.calls == ["init", LOGGED[1], "finish"] and made.options["id"] == first["id"]


@pytest.mark.slow
def test_without_wandb_installed_the_experiment_runs(
    train_py: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    assert train_py(*FAST) == 0
    assert "W&B fails (ModuleNotFoundError: " in capsys.readouterr().out
    assert (tmp_path / "runs/quickstart/seed0/random_init/curve.csv").exists()


@pytest.mark.slow
def test_offline_a_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mirror_rows(tmp_path) == ""
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("name", "variable"), [("first", "ANY"), ("teacher", "WANDB_SWEEP_ID")])
def test_what_belongs_to_no_arm_is_not_mirrored(
    service: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, variable: str
) -> None:
    monkeypatch.setenv(variable, "any")
    made = service("")
    mirror_rows(tmp_path, name)
    assert made.calls == []


def test_the_sweep_file_drives_the_command_line(composed: Callable[..., Config]) -> None:
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
