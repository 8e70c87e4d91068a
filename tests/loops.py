"""The smallest training run: a network of four channels, twelve steps, images of noise."""

import csv
import signal
import time
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from experiments import training
from experiments.config import Config, Data, Schedule
from experiments.data import Images, Splits, load
from experiments.machine import Arithmetic
from experiments.run import Run
from experiments.training import Job

CPU = torch.device("cpu")


class Quiet:
    """A follower that remembers the steps that it was told of, and does something at one of them."""

    def __init__(self, at: int = 0, action: Callable[[], object] = lambda: None) -> None:
        self.steps: list[int] = []
        self.at, self.action = at, action

    def evaluate(self, share: float) -> None: ...

    def advance(self, step: int, loss: float) -> None:
        self.steps.append(step)
        if step == self.at:
            self.action()

    def row(self, row: Mapping[str, float]) -> None:
        pass


def signalled(number: int, step: int) -> Quiet:
    """A follower that sends this process a signal during a step."""
    return Quiet(step, partial(signal.raise_signal, number))


def images(count: int, seed: int) -> Images:
    pixels = torch.randint(256, (count, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, torch.arange(count) % 3, (0.5,), (0.25,), pad=1, flip=True)


def network() -> nn.Module:
    """Convolution, batch norm and dropout: weights, buffers, and randomness of its own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


def small_job(folder: Path) -> Job:
    """Twelve steps, three an epoch, an evaluation every four."""
    schedule = Schedule(batch_size=8, evaluate="4it", lr=0.01, warmup="2it", momentum=0.9, weight_decay=0.01)
    config = Config(experiment="any", schedule=schedule, data=Data(pad=1))
    splits = Splits(images(28, 1), images(9, 2), images(10, 3), 3, (0.5,), (0.25,), "noise")
    return Job(folder, config, splits, CPU, Arithmetic(), 0.01, "4ep", 100, "arm")


def without_seconds(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The cells of the curve in an arm's folder, but for the seconds."""
    with open(folder / "curve.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def run_of(config: Config) -> Run:
    return Run(config, load(config.data), CPU, Console(quiet=True))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def interrupt(patch: pytest.MonkeyPatch, name: str, calls: Container[int], fault: Callable[[], object]) -> None:
    """Have a fault happen when a function of the training loop is called, at these calls, of which the first is 1."""
    real, made = getattr(training, name), 0

    def with_fault(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made in calls:
            fault()
        return real(*arguments)

    patch.setattr(training, name, with_fault)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr, which has to be all that is there."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert line.startswith("Error: ")
    return line


def wait_for(path: Path, text: str = "") -> None:
    """Wait until a file is there and has this text in it."""
    for _ in range(6000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{path} never says {text!r}")


def pictures(root: Path, side: int = 20, **parts: dict[str, int]) -> Path:
    """Write a tree of small pictures, made up: for each part how many are in each class. Return its root."""
    draw = np.random.default_rng(0)
    for part, classes in (parts or {"train": {"a": 40, "b": 40}, "val": {"a": 8, "b": 8}}).items():
        for label, count in classes.items():
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    return root
