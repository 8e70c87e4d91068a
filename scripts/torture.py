"""Kills runs at random moments, and compares what they become with a run that nobody killed.

python scripts/torture.py --kills 200

Every run is a process of its own, on the digits with the smallest network; it ends by SIGKILL, some time after its
start or while a file is being written, and the same command goes on, until it is done. Its curves, but for the
seconds, and its weights and optimizer have to be those of the reference, bit for bit. Prints a line and returns 0 if
they are, else 1.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS = (
    "experiment=quickstart",
    *("model.name=resnet", "+model.blocks=1", "~model.slim", "~model.stem"),
    *("teacher.width=0.25", "students.wider.width=0.5"),
    "schedule.epochs=60it",
    "schedule.evaluate=20it",
    "growth.calibrate=64",
    "arms=[net2net]",
    "target=net2net",
    "device=cpu",
    "precision=float32",
    "layout=channels_last",
    "logger=none",
)
STAGES = ("teacher", "net2net")

# Torch is loaded once, by a process that is then forked for every run: it takes longer than the run.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "experiments.experiment",
        "experiments.command",
        "sklearn.datasets",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "torch._dynamo",
        "torch.utils.flop_counter",
    ]
)


def start(settings: Sequence[str], folder: Path, log: Path) -> BaseProcess:
    """A process that runs `train.py` with these settings in a folder; what it says is appended to the log."""
    process = context.Process(target=run, args=(list(settings), folder, log))
    process.start()
    return process


def run(settings: list[str], folder: Path, log: Path) -> None:
    """Be `train.py` in this process, and end it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    sys.argv = ["train.py"]
    multiprocessing.set_start_method(None, force=True)  # for its own workers, as in any other process
    import torch

    from experiments.command import main

    torch.set_num_threads(1)
    status = main(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not what multiprocessing makes of it


def product(seed: Path) -> dict[str, Any]:
    """All that a seed's stages left that has to be the same: curves but for their seconds, weights, optimizers."""
    from experiments import checkpoint

    found: dict[str, Any] = {}
    for stage in STAGES:
        lines = (seed / stage / "curve.csv").read_text().splitlines()
        found[f"{stage} curve"] = [[cell for n, cell in enumerate(line.split(",")) if n != 3] for line in lines]
        state = checkpoint.load(seed / stage)
        found[f"{stage} network"], found[f"{stage} optimizer"] = state["network"], state["optimizer"]
    return found


def equal(a: Any, b: Any) -> bool:
    """Whether two products are the same to the bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@dataclass
class Found:
    """What became of the runs."""

    kills: int = 0
    in_write: int = 0  # of the kills: a file was being written
    done: int = 0  # runs that came to their end
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, kills: int, seed: int) -> Found:
    """Kill that many processes; every run is then brought to its end and compared."""
    draw, found = random.Random(seed), Found()
    log = folder / "log.txt"
    reference = folder / "reference"
    reference.mkdir(parents=True)
    start((), reference, log).join()  # which lists the experiments: by now torch is loaded
    started = time.monotonic()
    start(SETTINGS, reference, log).join()
    length = time.monotonic() - started
    expected = product(reference / "runs/quickstart/seed0")
    while found.kills < kills:
        place = folder / f"run{found.done + len(found.wrong)}"
        place.mkdir()
        while True:
            process = start((*SETTINGS, f"checkpoint_seconds={draw.choice(('0', '0.1', '60'))}"), place, log)
            if found.kills < kills:
                _wait(process, place, draw, length)
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGKILL)
                    process.join()
                    found.kills += 1
                    found.in_write += any(place.rglob("*.partial"))
                    continue
            process.join()
            break
        name = f"{place.name}: exit status {process.exitcode}" if process.exitcode else place.name
        try:
            result = product(place / "runs/quickstart/seed0")
            differ = [key for key in expected if not equal(expected[key], result[key])]
        except Exception as error:
            differ = [f"{type(error).__name__}: {error}"]
        left = [path.name for path in place.rglob(".*")]
        if process.exitcode or differ or left:
            found.wrong.append(f"{name}: {', '.join(differ + left)}")
        else:
            found.done += 1
    return found


def _wait(process: BaseProcess, place: Path, draw: random.Random, length: float) -> None:
    """Until a random moment of the run; every other time, until the next file is being written after it."""
    process.join(draw.uniform(0.2, 1) * length)
    if draw.random() < 0.5:
        while process.is_alive() and not any(place.rglob("*.partial")):
            process.join(0.0005)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = torture(Path(folder), options.kills, options.seed)
        if found.wrong:
            print((Path(folder) / "log.txt").read_text()[-4000:], file=sys.stderr)
    for line in found.wrong:
        print(line, file=sys.stderr)
    print(
        f"{found.kills} kills, {found.in_write} of them inside a write; {found.done} runs went on to the weights, "
        f"optimizer and curve of the reference, {len(found.wrong)} did not ({time.monotonic() - started:.0f} s)"
    )
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
