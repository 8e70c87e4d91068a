"""What several test files share: the smallest experiments that still are experiments."""

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

# The digits, a network of 3,000 weights, thirty steps: two seconds an arm.
TINY = (
    "experiment=quickstart",
    "model.slim=0.03",
    "schedule.epochs=30it",
    "schedule.evaluate=10it",
    "schedule.lr=0.01",
    "growth.calibrate=64",
    "device=cpu",
    "precision=float32",
    "layout=channels_last",
    "logger=none",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in a fixed order, and no fight over the cores."""
    torch.set_num_threads(1)


def cases(*overrides: str) -> list[Config]:
    """The configurations that the command line with these settings runs."""
    command.register()
    with initialize_config_dir(str(command.CONFIGS), version_base="1.3"):
        return command.configurations(compose("train", list(overrides)), overrides)


def composed(*overrides: str) -> Config:
    """The configuration that the command line with these settings runs; the first, if it has cases."""
    return cases(*overrides)[0]


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks are made in float64, from the same random state in every test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(name="composed")
def composed_fixture() -> Callable[..., Config]:
    """`composed` as a fixture."""
    return composed


@pytest.fixture(name="cases")
def cases_fixture() -> Callable[..., list[Config]]:
    """`cases` as a fixture."""
    return cases


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """The smallest experiment, which writes under tmp_path/runs; more settings may be given."""
    return lambda *overrides: composed(*TINY, f"runs={tmp_path}/runs", *overrides)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """The smallest training run."""
    return small_job(tmp_path / "arm")


@pytest.fixture
def train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line of the smallest experiment, in this process and in an empty folder; gives the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *arguments: command.main([*TINY, "runs=runs", *arguments])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one seed of the smallest experiment, with all of its arms. Not to be changed."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    argv = sys.argv
    sys.argv = ["train.py"]
    try:
        assert command.main([*TINY, f"runs={runs}"]) == 0
    finally:
        sys.argv = argv
    return runs / "quickstart" / "seed0"
