"""Kill runs at random moments and compare their results with those of a run that nobody killed.

    python -m tests.torture --kills 200

Every run is a process of its own that trains the smallest network on the digits. It is killed with SIGKILL at a random
moment, or while a file is being written, and the same command continues it until it is complete. Its curves (without
the seconds), weights and optimizer state must then equal those of the undisturbed run, bit for bit. Prints one line,
and exits with 0 if they do, with 1 if not.
"""

import argparse
import json
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

import torch

from experiments import checkpoint
from experiments.command import main as train_py

SETTINGS = (
    *("experiment=quickstart", "model.name=resnet", "+model.blocks=1", "~model.layers", "schedule.teacher_epochs=null"),
    *("teacher.width=0.25", "students.wider.width=0.5", "growth.calibrate=64", "arms=[net2net]", "target=net2net"),
    *("schedule.epochs=60it", "schedule.evaluate=20it"),
    *("device=cpu", "precision=float32", "layout=channels_last", "logger=none"),
)
STAGES = ("teacher", "net2net")

# Importing torch takes longer than a run: one process imports it, and is forked for every run.
context = multiprocessing.get_context("forkserver")
modules = "experiments.experiment experiments.command experiments.analysis.pages sklearn.datasets matplotlib.figure"
modules += " matplotlib.backends.backend_agg torch._dynamo torch.utils.flop_counter"
context.set_forkserver_preload(modules.split())


def start(settings: Sequence[str], folder: Path, log: Path) -> BaseProcess:
    """Start a process that runs `train.py` with these settings in `folder` and appends its output to `log`."""
    process = context.Process(target=run, args=(list(settings), folder, log))
    process.start()
    return process


def run(settings: list[str], folder: Path, log: Path) -> None:
    """Run `train.py` in this process, then end the process with its exit status."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    sys.argv = ["train.py"]
    multiprocessing.set_start_method(None, force=True)  # its own workers start as they do in any other process
    torch.set_num_threads(1)
    status = train_py(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # multiprocessing would replace the status by its own


def product(seed: Path) -> dict[str, Any]:
    """Read what must not differ between two runs of a seed: curves without seconds, weights, and so on."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        lines = (seed / stage / "curve.csv").read_text().splitlines()
        found[f"{stage} curve"] = [[cell for n, cell in enumerate(line.split(",")) if n != 3] for line in lines]
        # The error is rounding, which depends on the layout of a teacher that was trained just now or loaded.
        step0 = json.loads((seed / stage / "manifest.json").read_text()).get("step0") or {}
        found[f"{stage} step0"] = [step0.get("agree"), step0.get("of")]
        state = checkpoint.load(seed / stage)
        found[f"{stage} network"], found[f"{stage} optimizer"] = state["network"], state["optimizer"]
    return found


def equal(a: Any, b: Any) -> bool:
    """Return whether two nested structures of tensors and numbers are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@dataclass
class Outcome:
    """How many processes were killed, how many of them inside a write, and which runs came out right or wrong."""

    kills: int = 0
    inside_write: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, kills: int, seed: int) -> Outcome:
    """Kill `kills` processes at random moments; continue every run to its end and compare it with the reference."""
    rng, outcome = random.Random(seed), Outcome()
    log = folder / "log.txt"
    reference = folder / "reference"
    reference.mkdir(parents=True)
    start((), reference, log).join()  # lists the experiments: the fork server imports torch meanwhile
    started = time.monotonic()
    start(SETTINGS, reference, log).join()
    length = time.monotonic() - started
    expected = product(reference / "runs/quickstart/seed0")
    while outcome.kills < kills:
        place = folder / f"run{outcome.right + len(outcome.wrong)}"
        place.mkdir()
        status = _finish(place, log, rng, length, kills, outcome)
        if faults := _compare(place, status, expected):
            outcome.wrong.append(f"{place.name}: {', '.join(faults)}")
        else:
            outcome.right += 1
    return outcome


def _finish(place: Path, log: Path, rng: random.Random, length: float, kills: int, outcome: Outcome) -> int:
    """Start a run, kill and continue it until it comes to its end or the kills are used up; return its status."""
    while True:
        process = start((*SETTINGS, f"checkpoint_seconds={rng.choice(('0', '0.1', '60'))}"), place, log)
        if outcome.kills < kills:
            _wait(process, place, rng, length)
        if outcome.kills == kills or not process.is_alive():
            process.join()
            return process.exitcode or 0
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        outcome.kills += 1
        outcome.inside_write += any(place.rglob("*.partial"))


def _wait(process: BaseProcess, place: Path, rng: random.Random, length: float) -> None:
    """Wait until a random moment of the run, and every other time from there until a file is being written."""
    process.join(rng.uniform(0.2, 1) * length)
    if rng.random() < 0.5:
        while process.is_alive() and not any(place.rglob("*.partial")):
            process.join(0.0005)


def _compare(place: Path, status: int, expected: dict[str, Any]) -> list[str]:
    """List the exit status if it is not 0, the results that differ from the expected, and the temporary files left."""
    faults = [f"exit status {status}"] if status else []
    try:
        found = product(place / "runs/quickstart/seed0")
        faults += [key for key in expected if not equal(expected[key], found[key])]
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults + [path.name for path in place.rglob(".*")]


def main(arguments: list[str] | None = None) -> int:
    """Run the torture and print its outcome; return 1 if a run came out wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seeds the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = torture(Path(folder), options.kills, options.seed)
        if outcome.wrong:
            print((Path(folder) / "log.txt").read_text()[-4000:], file=sys.stderr)
    for line in outcome.wrong:
        print(line, file=sys.stderr)
    print(
        f"{outcome.kills} kills, {outcome.inside_write} of them inside a write: {outcome.right} runs ended with the"
        f" weights, optimizer state and curve of the reference, {len(outcome.wrong)} did not"
        f" ({time.monotonic() - started:.0f} s)"
    )
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
