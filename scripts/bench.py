"""Measure speed, and print every number with the bar that it has to meet.

    python scripts/bench.py [PART ...] [--photos FOLDER]

startup   questions to train.py that need no torch
training  the training loop against a bare loop of forward, backward and step on one batch
gpu       the same on a GPU for the full-width speed-run network, plain and compiled, with images and FLOPs a second
loader    photographs from disk against torchvision's reference pipeline, and against what the paper's network consumes
growth    `net2net.transfer` against loading the student's weights and one forward pass of each network
memory    what `net2net.transfer` needs on top of the two networks and their forward passes

What is compared runs in turn in one process, so that a busy machine slows both; a ratio is the median of the rounds.
growth and memory run on the CPU.
"""

import argparse
import copy
import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, models, transforms

import net2net
from experiments import flops
from experiments.config import Config, Data, Schedule
from experiments.data import Folder, Images, Splits, load
from experiments.machine import choose_arithmetic, describe, pick_device
from experiments.models import build
from experiments.optimizers import make_optimizer
from experiments.progress import Follower, Length
from experiments.training import Job, train, train_step

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("--help", "--cfg job", "experiment=wider_inception --help", "experiment=wider_inception --cfg job")

Make = Callable[[], nn.Module]
Epoch = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def verdict(value: float, bar: float, unit: str = "", at_least: bool = False) -> str:
    """Write a value beside its bar, the largest allowed one, or with `at_least` the smallest."""
    met = value >= bar if at_least else value <= bar
    return f"{value:.2f}{unit}, bar {'at least ' * at_least}{bar:.2f}{unit}: {'met' if met else 'NOT MET'}"


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summarise(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median of the first numbers, of the second numbers, and of the ratios second / first."""
    first, second = (statistics.median(numbers) for numbers in zip(*pairs, strict=True))
    return first, second, statistics.median(b / a for a, b in pairs)


def print_startup() -> None:
    for question in QUESTIONS:
        command = [sys.executable, ROOT / "train.py", *question.split()]
        ask = partial(subprocess.run, command, check=True, capture_output=True)
        print(f"train.py {question}: {verdict(statistics.median(seconds(ask) for _ in range(5)), 1.0, ' s')}")


class Alternate(Follower):
    """A follower of the real loop that runs as many steps of the bare loop after every block of real steps."""

    BLOCK = 20  # steps on a GPU: to wait for it after every step would slow both loops

    def __init__(self, bare: Callable[[], object], device: torch.device) -> None:
        super().__init__(Console(quiet=True), "bench", Length(steps=1, every=1, batch_size=1), first=0)
        self.bare, self.device = bare, device
        self.block = 1 if device.type == "cpu" else self.BLOCK
        self.pairs: list[tuple[float, float]] = []  # seconds of a block of the real and of the bare loop
        self.started = 0.0

    def advance(self, step: int, loss: float) -> None:
        """Note the time of a block of real steps, then time as many bare ones."""
        if step % self.block:
            return
        real = self.now() - self.started
        started = self.now()
        for _ in range(self.block):
            self.bare()
        self.started = self.now()
        self.pairs.append((real, self.started - started))

    def row(self, row: object) -> None:
        """Evaluations are not timed: one precedes the first step, the next one follows the last."""

    def now(self) -> float:
        """Return the time at which the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def make_step(network: nn.Module, images: Tensor, labels: Tensor, compile: bool = False) -> Callable[[], object]:
    """Return a bare training step of the network on one batch, in the arithmetic of the machine."""
    device = pick_device("auto")
    arithmetic = choose_arithmetic(device, "auto", "auto", compile)
    network.to(device, memory_format=arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
    images = images.to(device).contiguous(memory_format=arithmetic.memory_format)
    optimizer = make_optimizer(network, Schedule())
    learner = cast(nn.Module, torch.compile(network)) if compile else network
    return lambda: train_step(learner, optimizer, images, labels.to(device), device, arithmetic)


def compare_loops(
    spec: Mapping[str, Any], batch_size: int, steps: int, compile: bool = False
) -> list[tuple[float, float]]:
    """Return the seconds of blocks of the real loop, and of a bare loop that repeats one batch."""
    device = pick_device("auto")
    draw = torch.Generator().manual_seed(0)

    def noise(count: int) -> Images:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return Images(pixels, torch.arange(count) % 10, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)

    few = noise(batch_size)
    splits = Splits(noise(50_000), few, few, 10, (0.5,) * 3, (0.25,) * 3, "noise").to(device)
    network = build(spec, 10, 3)
    images, labels = next(splits.train.batches(batch_size, epoch=0, seed=0, augment=False))
    alternate = Alternate(make_step(copy.deepcopy(network), images, labels, compile), device)
    config = Config(experiment="bench", schedule=Schedule(batch_size=batch_size, evaluate="1000ep"), data=Data())
    arithmetic = choose_arithmetic(device, "auto", "auto", compile)
    with tempfile.TemporaryDirectory() as folder:
        epochs = f"{steps * alternate.block}it"
        train(network, Job(Path(folder), config, splits, device, arithmetic, 0.001, epochs, 1), alternate)
    return alternate.pairs[3:]


def print_training(steps: int) -> None:
    """Compare the loops on the networks that this machine trains, and on a small one, where the loop weighs more."""
    device = pick_device("auto")
    is_cpu = device.type == "cpu"
    slim, batch_size = (0.125, 128) if is_cpu else (1.0, 256)
    networks = [  # name, network, images in a batch
        (f"Inception x {slim}", {"name": "inception", "slim": slim}, batch_size),
        ("ResNet-8", {"name": "resnet", "blocks": 1}, batch_size),
        ("The speed-run network", {"name": "speedrun", "slim": 0.5 if is_cpu else 1.0, "activation": "gelu"}, 512),
    ]
    for name, spec, size in networks:
        real, bare, ratio = summarise(compare_loops(spec, size, steps))
        print(f"{name} on 32 pixels, {describe(device)}: a step takes {real:.4f} s, a bare one {bare:.4f} s")
        print(f"speed of the loop relative to the bare one {verdict(ratio, 0.97, at_least=True)}")


def print_gpu(steps: int) -> None:
    """Measure how fast a GPU trains the full-width speed-run network, plain and compiled, in blocks of 20 steps."""
    if not torch.cuda.is_available():
        print("gpu: not measured, because torch finds no GPU")
        return
    spec, size = {"name": "speedrun", "widths": [64, 256, 256], "activation": "gelu"}, 512
    work = flops.count(build(spec, 10, 3), 3, 32)[1]
    print(
        f"The speed-run network, 64/256/256 channels, {work / 1e6:,.0f} MFLOP an image, {describe(pick_device('auto'))}"
    )
    for compile in (False, True):
        real, _, ratio = summarise(compare_loops(spec, size, steps, compile))
        speed = Alternate.BLOCK * size / real
        how = choose_arithmetic(pick_device("auto"), "auto", "auto", compile)
        print(f"{how}: {speed:,.0f} images/s, {speed * work / 1e12:,.1f} TFLOP/s, 10 epochs in {450_000 / speed:.1f} s")
        print(f"speed of the loop relative to the bare one {verdict(ratio, 0.9, at_least=True)}")


def torchvision_epoch(root: Path, files: int, size: int, batch_size: int, workers: int) -> Epoch:
    """Return an epoch of torchvision's reference pipeline, whose workers live on between epochs, as ours do."""
    steps = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    pictures = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    chosen = Subset(pictures, range(0, len(pictures), max(1, len(pictures) // files))[:files])
    options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader: DataLoader[Any] = DataLoader(chosen, batch_size, **options)
    return lambda: loader


def our_epoch(root: Path, files: int, size: int, batch_size: int, workers: int) -> Epoch:
    """Return an epoch of as many pictures in our pipeline, a new one at every call."""
    whole = load(Data(name="imagenet", root=str(root), size=size, workers=workers, holdout=0.01)).train
    assert isinstance(whole, Folder)
    chosen = range(0, len(whole), max(1, len(whole) // files))[:files]
    part = replace(whole, files=whole.files[chosen], labels=whole.labels[list(chosen)])
    epochs = itertools.count()
    return lambda: part.batches(batch_size, epoch=next(epochs), seed=0)


def print_loader(rounds: int, photos: str | None) -> None:
    """Compare our pipeline with torchvision's, and with what the paper's network consumes."""
    size, batch_size, files, workers = 224, 64, 1024, os.cpu_count() or 1
    network = build({"name": "inception", "stem": size}, 1000, 3)
    step = make_step(network, torch.randn(batch_size, 3, size, size), torch.arange(batch_size))
    consumed = batch_size / min(
        seconds(lambda: (step(), torch.zeros(1, device=pick_device("auto")).item())) for _ in range(4)
    )
    print(f"Inception on {size} pixels, {describe(pick_device('auto'))}: consumes {consumed:,.0f} images/s")
    if photos is None:
        print("loader: not measured without --photos FOLDER with train/CLASS/*.JPEG and val/CLASS/*.JPEG")
        return
    epochs = [make(Path(photos), files, size, batch_size, workers) for make in (torchvision_epoch, our_epoch)]

    def speed(epoch: Epoch) -> float:
        started = time.perf_counter()
        return sum(len(labels) for _, labels in epoch()) / (time.perf_counter() - started)

    theirs, ours, ratio = summarise([(speed(epochs[0]), speed(epochs[1])) for _ in range(1 + rounds)][1:])
    print(f"{files} photographs, {workers} workers: torchvision {theirs:,.0f} images/s, ours {ours:,.0f} images/s")
    print(f"ours relative to torchvision's {verdict(ratio, 1.0, at_least=True)}")
    print(f"ours relative to what the network consumes {verdict(ours / consumed, 1.0, at_least=True)}")


def time_growth(make_teacher: Make, make_student: Make, images: Tensor, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of loading the student with a forward pass of each network, and of a transfer."""
    teacher, student = make_teacher().eval(), make_student().eval()
    state = copy.deepcopy(student.state_dict())

    @torch.no_grad()
    def load_and_run() -> None:
        student.load_state_dict(state)
        teacher(images)
        student(images)

    grow = partial(net2net.transfer, teacher, student, images)
    return [(seconds(load_and_run), seconds(grow)) for _ in range(1 + rounds)][1:]


def print_growth(rounds: int) -> None:
    """Time resnet50 -> wide_resnet50_2 in float32."""
    pairs = time_growth(models.resnet50, models.wide_resnet50_2, torch.randn(8, 3, 224, 224), rounds)
    plain, grown, ratio = summarise(pairs)
    print(f"resnet50 -> wide_resnet50_2, 8 images of 224 x 224, CPU, {torch.get_num_threads()} threads:")
    print(f"load_state_dict with a forward pass of each {plain:.2f} s, transfer {grown:.2f} s")
    print(f"transfer relative to that {verdict(ratio, 2.0)}")


def peak_memory(work: Callable[[], object]) -> float:
    """Return by how many MB the process grows, at most, while it works (Linux only)."""

    def read(key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def print_memory() -> None:
    """Measure resnet50 -> wide_resnet50_2 on one small image: activations of larger ones would hide the rest."""
    teacher, student, image = models.resnet50().eval(), models.wide_resnet50_2().eval(), torch.randn(1, 3, 64, 64)
    record = net2net.transfer(teacher, student, image)  # the first growth loads libraries

    @torch.no_grad()
    def run() -> None:
        for images in (image, torch.randn(5, 3, 64, 64)):  # a transfer checks itself on five drawn images, too
            teacher(images)
            student(images)

    passes, writing, growth = map(
        peak_memory,
        (run, lambda: net2net.replay(record, teacher, student), lambda: net2net.transfer(teacher, student, image)),
    )
    largest = max(tensor.nbytes for tensor in student.state_dict().values()) / 2**20
    print(f"resnet50 -> wide_resnet50_2, one image of 64 x 64: transfer {growth:.0f} MB, its passes {passes:.0f} MB")
    print(f"the rest, or writing the weights if that is more, {verdict(max(writing, growth - passes), largest, ' MB')}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; default: all")
    parser.add_argument("--rounds", type=int, default=8, help="how often loader and growth are measured (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="how many training steps are measured (%(default)s)")
    parser.add_argument(
        "--photos", metavar="FOLDER", help="has train/CLASS/*.JPEG and val/CLASS/*.JPEG, for the loader"
    )
    options = parser.parse_args(arguments)
    parts: dict[str, Callable[[], None]] = {
        "startup": print_startup,
        "training": partial(print_training, options.steps),
        "gpu": partial(print_gpu, options.steps),
        "loader": partial(print_loader, options.rounds, options.photos),
        "growth": partial(print_growth, options.rounds),
        "memory": print_memory,
    }
    if unknown := [part for part in options.parts if part not in parts]:
        parser.error(f"there is no part {unknown[0]}: there are {', '.join(parts)}")
    if options.photos and not Path(options.photos, "train").is_dir():
        parser.error(f"{options.photos} has no folder train: --photos takes a folder with train/CLASS/*.jpg")
    for name in options.parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
