"""Fixtures that several test files share: the smallest experiments."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from loops import small_job

from experiments import command
from experiments.config import Config
from experiments.training import Job

# The digits, a network of 2,000 weights, twenty steps: a second per arm.
TINY = (
    *("experiment=quickstart", "teacher.width=0.15", "students.wider.width=0.25", "growth.calibrate=64"),
    *("schedule.epochs=20it", "schedule.teacher_epochs=null", "schedule.evaluate=10it", "schedule.warmup=0it"),
    *("schedule.optimizer=rmsprop", "schedule.lr=0.01"),
    *("device=cpu", "precision=float32", "layout=channels_last", "logger=none"),
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Let torch use one thread: sums have a fixed order, and tests do not compete for the cores."""
    torch.set_num_threads(1)


def cases(*overrides: str) -> list[Config]:
    """Return the configurations that the command line runs with these settings."""
    command.register()
    with initialize_config_dir(str(command.CONFIGS), version_base="1.3"):
        return command.make_configs(compose("train", list(overrides)), overrides)


def composed(*overrides: str) -> Config:
    """Return the configuration that the command line runs with these settings, or the first of several cases."""
    return cases(*overrides)[0]


@pytest.fixture
def float64() -> Iterator[None]:
    """Make networks in float64, from the same random state in every test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that makes the smallest experiment, with more settings if given. It writes to tmp_path/runs."""
    return lambda *overrides: composed(*TINY, f"runs={tmp_path}/runs", *overrides)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Return the smallest training run."""
    return small_job(tmp_path / "arm")


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs the command line in an empty folder and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *arguments: command.main(list(arguments))


@pytest.fixture
def train_py(command_line: Callable[..., int]) -> Callable[..., int]:
    """Return a function that runs the smallest experiment in an empty folder and returns its exit status."""
    return lambda *arguments: command_line(*TINY, "runs=runs", *arguments)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one seed of the smallest experiment, with all of its arms. Do not change its files."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    argv = sys.argv
    sys.argv = ["train.py"]
    try:
        assert command.main([*TINY, f"runs={runs}"]) == 0
    finally:
        sys.argv = argv
    return runs / "quickstart" / "seed0"
