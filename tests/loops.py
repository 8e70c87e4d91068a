"""The smallest training run: a network of four channels, twelve steps, images of noise."""

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from experiments.config import Config, Data, Schedule
from experiments.data import Images, Splits, load
from experiments.machine import Arithmetic
from experiments.run import Run
from experiments.training import Job

CPU = torch.device("cpu")


class Quiet:
    """A follower that remembers the steps that it was told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def advance(self, step: int, loss: float) -> None:
        self.steps.append(step)

    def row(self, row: Mapping[str, float]) -> None:
        pass


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


def pictures(root: Path) -> None:
    """A tree of small pictures, made up, in two classes."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("val", 8)):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8, generator=draw).numpy()
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
