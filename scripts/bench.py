"""Training-loop overhead: the real loop against a bare forward/backward/step loop on one fixed batch.

Both run in turn in one process, with the same network, precision and batch size, so that a noisy machine slows both;
the ratio is that of the medians. Evaluation is not counted. `python scripts/bench.py [--rounds 8] [--steps 20]`
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import flops  # noqa: E402 (the checkout is not installed)
from experiments.config import Config, Data, Schedule  # noqa: E402
from experiments.data import Images, Splits  # noqa: E402
from experiments.device import describe, pick_device, pick_precision  # noqa: E402
from experiments.models import build  # noqa: E402
from experiments.optimizers import make_optimizer  # noqa: E402
from experiments.training import Job, learn, train  # noqa: E402


class Quiet:
    """A follower that shows nothing."""

    def advance(self, step: int, loss: float) -> None:
        """Ignore a step."""

    def row(self, row: object) -> None:
        """Ignore an evaluation."""


def synthetic(count: int, size: int) -> Images:
    """Random images of ten classes: the loop's work does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 10, (0.5,) * 3, (0.25,) * 3)


def main() -> None:
    """Print images/s of both loops and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slim", type=float, default=None, help="width of the network; default: as the scale's")
    options = parser.parse_args()
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    slim = options.slim or (0.125 if device.type == "cpu" else 1.0)
    batch_size = 128 if device.type == "cpu" else 256
    config = Config(
        experiment="bench",
        schedule=Schedule(batch_size=batch_size, evaluate=f"{options.steps}it", lr=0.001),
        data=Data(),
    )
    network = build({"name": "inception", "slim": slim}, 10, 3)
    few = synthetic(batch_size, 32)
    splits = Splits(synthetic(50_000, 32), few, few, 10, (0.5,) * 3, (0.25,) * 3, "synthetic").to(device)
    cost = flops.count(network, 3, 32)[1]
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(network, config.schedule)
    images, labels = next(iter(splits.train.batches(batch_size, epoch=0, seed=0, augment=False, pad=0, flip=False)))
    images = images.contiguous(memory_format=torch.channels_last)

    def bare() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(options.steps):
            learn(network, optimizer, images, labels, device, precision)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return options.steps * batch_size / (time.perf_counter() - started)

    def real() -> float:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder), config, splits, device, precision, 0.001, f"{options.steps}it", cost)
            rows = train(network, job, Quiet())
        return rows[-1]["examples"] / rows[-1]["seconds"]

    bare()
    real()
    pairs = [(bare(), real()) for _ in range(options.rounds)]
    plain, loop = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{describe(device)}, {str(precision).removeprefix('torch.')}, Inception x {slim}, batch {batch_size}")
    print(f"bare {plain:,.0f} images/s, real loop {loop:,.0f} images/s, ratio {ratio:.3f} (median of {len(pairs)})")


if __name__ == "__main__":
    main()
