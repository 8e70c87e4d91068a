"""The parts of bench.py that are about training: how soon it answers, how fast it steps, how fast pictures come."""

import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments import flops
from experiments.config import Config, Data, Schedule
from experiments.data import Folder, Images, Splits, load
from experiments.machine import Arithmetic, choose_arithmetic, describe, pick_device
from experiments.models import build
from experiments.optimizers import make_optimizer
from experiments.training import Job, train, train_step
from scripts.measure import seconds, side_by_side, verdict

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("--help", "--cfg job", "experiment=wider_inception --help", "experiment=wider_inception --cfg job")


def print_startup() -> None:
    """How long a question takes that needs no torch."""
    for question in QUESTIONS:
        command = [sys.executable, str(ROOT / "train.py"), *question.split()]
        times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)]  # noqa: B023
        print(f"train.py {question}: {verdict(statistics.median(times), 1.0, ' s')} (median of 5)")


# -- the loop -----------------------------------------------------------------------------------------------------


def synthetic(count: int, size: int) -> Images:
    """Random images of ten classes: the loop's work does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 10, (0.5,) * 3, (0.25,) * 3)


class Alternate:
    """A follower of the real loop that lets the bare one do as many steps whenever the real one has done some."""

    def __init__(self, bare: Callable[[], object], device: torch.device) -> None:
        self.bare, self.device = bare, device
        self.block = 1 if device.type == "cpu" else 20  # waiting for a GPU after every step would cost both
        self.pairs: list[tuple[float, float]] = []  # seconds of a block of the bare and of the real loop
        self.began = 0.0

    def advance(self, step: int, loss: float) -> None:
        """Time what has been done since, then as much of the bare loop."""
        if step % self.block:
            return
        real = self.now() - self.began
        begin = self.now()
        for _ in range(self.block):
            self.bare()
        self.began = self.now()
        self.pairs.append((self.began - begin, real))

    def row(self, row: object) -> None:
        """Evaluation is not counted: the first is before the first step, the next after the last."""

    def now(self) -> float:
        """The time at which the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def loop(spec: Mapping[str, Any], batch_size: int, steps: int) -> tuple[Arithmetic, list[tuple[float, float]]]:
    """The arithmetic that `auto` is here; seconds of a step of a bare loop on one batch, and of the real loop."""
    device = pick_device("auto")
    schedule = Schedule(batch_size=batch_size, evaluate="1000ep", lr=0.001)
    config = Config(experiment="bench", schedule=schedule, data=Data())
    network = build(spec, 10, 3)
    few = synthetic(batch_size, 32)
    splits = Splits(synthetic(50_000, 32), few, few, 10, (0.5,) * 3, (0.25,) * 3, "synthetic").to(device)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return next(iter(splits.train.batches(count, epoch=0, seed=0, augment=False)))

    arithmetic = choose_arithmetic(device, "auto", "auto", False)
    cost = flops.count(network, 3, 32)[1]
    same = copy.deepcopy(network).to(device, memory_format=arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(same, config.schedule)
    images, labels = batch(batch_size)
    images = images.contiguous(memory_format=arithmetic.memory_format)
    alternate = Alternate(lambda: train_step(same, optimizer, images, labels, device, arithmetic), device)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), config, splits, device, arithmetic, 0.001, f"{steps * alternate.block}it", cost)
        train(network, job, alternate)
    return arithmetic, [(bare / alternate.block, real / alternate.block) for bare, real in alternate.pairs[3:]]


def print_loop(steps: int, slim: float | None) -> None:
    """The network of the scale that this machine has, and a small one, beside which the loop weighs more."""
    device = pick_device("auto")
    slim = slim or (0.125 if device.type == "cpu" else 1.0)
    batch_size = 128 if device.type == "cpu" else 256
    specs = {
        f"Inception x {slim}": {"name": "inception", "slim": slim},
        "ResNet-8": {"name": "resnet", "blocks": 1},
    }
    for name, spec in specs.items():
        arithmetic, pairs = loop(spec, batch_size, steps)
        bare, real = (batch_size / statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{name} on 32 pixels, batch {batch_size}, {arithmetic}, {describe(device)}:")
        print(f"bare {bare:,.0f} images/s, real loop {real:,.0f} images/s")
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"ratio {verdict(ratio, 0.97, least=True)} (median of {len(pairs)} pairs)")


# -- pictures from disk -------------------------------------------------------------------------------------------


def consumption(size: int, classes: int, count: int) -> float:
    """Images per second of a training step of the paper's network, at full width."""
    device = pick_device("auto")
    arithmetic = choose_arithmetic(device, "auto", "auto", False)
    network = build({"name": "inception", "stem": size}, classes, 3)
    network.to(device, memory_format=arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
    images = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=arithmetic.memory_format)
    labels = torch.arange(count, device=device) % classes
    optimizer = make_optimizer(network, Schedule())

    def step() -> None:
        train_step(network, optimizer, images, labels, device, arithmetic)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return count / min(seconds(step) for _ in range(4))


def torchvisions(root: Path, files: int, size: int, batch_size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """An epoch of torchvision's reference pipeline, whose workers stay alive between epochs, as ours do."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = datasets.ImageFolder(str(root / "train"), change)
    chosen = Subset(pictures, range(0, len(pictures), max(1, len(pictures) // files))[:files])
    loader: DataLoader[Any] = DataLoader(
        chosen, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )
    return lambda: iter(loader)


def ours(root: Path, files: int, size: int, batch_size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """An epoch of as many pictures of this project's pipeline, a new one at every call."""
    whole = load(Data(name="imagenet", root=str(root), size=size, workers=workers, holdout=0.01)).train
    assert isinstance(whole, Folder)
    chosen = range(0, len(whole), max(1, len(whole) // files))[:files]
    part = replace(whole, files=whole.files[chosen], labels=whole.labels[list(chosen)])
    epochs = iter(range(10**9))
    return lambda: part.batches(batch_size, epoch=next(epochs), seed=0)


def print_loader(rounds: int, photos: str | None) -> None:
    """Pictures a second: torchvision's pipeline, ours, and what the paper's network takes in."""
    size, batch_size, files, workers = 224, 64, 1024, os.cpu_count() or 1
    consumed = consumption(size, 1000, 8 if pick_device("auto").type == "cpu" else batch_size)
    print(f"Inception x 1.0 on {size} pixels, {describe(pick_device('auto'))}: consumes {consumed:,.0f} images/s")
    if photos is None:
        print("loader: not measured, no photographs: --photos FOLDER with train/CLASS/*.JPEG and val/CLASS/*.JPEG")
        return

    def speed(epoch: Callable[[], Iterator[Any]]) -> Callable[[], float]:
        def images_per_second() -> float:
            started = time.perf_counter()
            seen = sum(len(labels) for _, labels in epoch())
            return seen / (time.perf_counter() - started)

        return images_per_second

    theirs, own, ratio = side_by_side(
        speed(torchvisions(Path(photos), files, size, batch_size, workers)),
        speed(ours(Path(photos), files, size, batch_size, workers)),
        rounds,
    )
    print(f"{files} photographs of {Path(photos).name} a round, {workers} workers:")
    print(f"torchvision's pipeline {theirs:,.0f} images/s, ours {own:,.0f} images/s")
    print(f"ratio {verdict(ratio, 1.0, least=True)} (median of {rounds})")
    print(f"ours to what the network consumes {verdict(own / consumed, 1.0, least=True)}")
