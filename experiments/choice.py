"""Which arithmetic a training step uses: chosen by timing a few steps, once, and remembered beside the runs.

Curves are compared, so whatever trains one teacher's students, on however many machines, has to compute alike. The
choice is therefore one file in the runs folder for a teacher, a batch and a kind of device; who comes later reads it.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, locks
from .config import Config, ExperimentError
from .machine import Arithmetic, candidates, describe
from .optimizers import make_optimizer

GAIN = 1.05  # a less precise arithmetic has to be faster by so much
ROUNDS, SECONDS = 3, 2.0  # timed steps of each candidate, and when to stop after a first one of each
FEW, STEP = 8, 0.3  # images that tell how many make a timed step of so many seconds, the batch at most

Images = Callable[[int], tuple[Tensor, Tensor]]  # so many of them, with their labels, on the device


@dataclass(frozen=True)
class Choice:
    """An arithmetic, and how it came to be chosen."""

    arithmetic: Arithmetic
    why: dict[str, Any]  # for the manifest: what was measured, and where


def choose(
    config: Config,
    device: torch.device,
    network: Callable[[], nn.Module],
    images: Images,
) -> Choice:
    """The arithmetic that `config` forces, or that was chosen before for this teacher, or else the fastest.

    `network` makes the largest network.
    """
    possible = candidates(device, config.precision, config.layout, config.compile)
    if len(possible) == 1:
        return Choice(possible[0], {"forced": True})
    file = Path(config.runs) / "choices" / f"{_key(config, device)}.json"
    found = _read(file)
    if found is None:
        with locks.hold(file.parent, waiting=lambda _: None):  # nor do those who start at once disturb the measurement
            found = _read(file)
            if found is None:
                speeds = measure(possible, network(), images, config, device)
                found = asdict(fastest(speeds)) | {
                    "images_per_second": {str(arithmetic): speed for arithmetic, speed in speeds.items()},
                    "hardware": describe(device),
                }
                files.write(file, (json.dumps(found, indent=1) + "\n").encode())
    names = Arithmetic.__dataclass_fields__
    return Choice(
        Arithmetic(**{key: found[key] for key in names}), {key: found[key] for key in found if key not in names}
    )


def measure(
    possible: Sequence[Arithmetic], network: nn.Module, images: Images, config: Config, device: torch.device
) -> dict[Arithmetic, float]:
    """Images a second of a training step in each arithmetic, not compiled, the best of a few steps taken in turn.

    One that is twice as slow as another is not timed again. The network stays as it was.
    """
    from .training import learn

    def step_of(arithmetic: Arithmetic, count: int) -> Callable[[], object]:
        plain = Arithmetic(arithmetic.precision, arithmetic.layout)
        trial = copy.deepcopy(network).to(device, memory_format=plain.memory_format)  # pyright: ignore[reportCallIssue]
        pixels, labels = images(count)
        pixels = pixels.contiguous(memory_format=plain.memory_format)
        return partial(learn, trial, make_optimizer(trial, config.schedule), pixels, labels, device, plain)

    def spent_on(few: int) -> float:
        probe = step_of(possible[0], few)
        return [_seconds(probe, device) for _ in range(2)][-1]  # the first step makes kernels and buffers

    count = _timed_images(config.schedule.batch_size, device, spent_on)
    steps = {arithmetic: step_of(arithmetic, count) for arithmetic in possible}
    best = dict.fromkeys(possible, float("inf"))
    started = time.perf_counter()
    for turn in range(1 + ROUNDS):
        for arithmetic in [one for one in possible if turn < 2 or best[one] <= 2 * min(best.values())]:
            spent = _seconds(steps[arithmetic], device)
            if turn > 0:
                best[arithmetic] = min(best[arithmetic], spent)
        if turn > 0 and time.perf_counter() - started > SECONDS:
            break
    return {arithmetic: count / seconds for arithmetic, seconds in best.items()}


def _timed_images(batch_size: int, device: torch.device, spent_on: Callable[[int], float]) -> int:
    """How many images a timed step has: as many as a CPU takes in STEP seconds, by what it has spent on few.

    A GPU gets the batch that it will train on: on a few images it waits for its kernels to be launched, which takes as
    long in any arithmetic.
    """
    if device.type == "cuda":
        return batch_size
    few = min(FEW, batch_size)
    return max(few, min(batch_size, round(few * STEP / spent_on(few))))


def fastest(speeds: Mapping[Arithmetic, float]) -> Arithmetic:
    """The first, thus the most precise, that none of the others outruns by `GAIN`."""
    return next(one for one, speed in speeds.items() if speed * GAIN >= max(speeds.values()))


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _key(config: Config, device: torch.device) -> str:
    """Not the hardware: the jobs of a sweep may run on machines that differ, and their curves are compared."""
    determines = {
        "network": config.model | (config.first or config.teacher),
        "data": [config.data.name, config.data.size],
        "batch_size": config.schedule.batch_size,
        "device": device.type,
        "asked": [config.precision, config.layout, config.compile],
    }
    return sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        if not {*Arithmetic.__dataclass_fields__} <= found.keys():
            raise ValueError("a key is missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ExperimentError(
            f"{file}, which says in which arithmetic these runs compute, cannot be read ({error}): delete it, and it "
            "is measured anew; or force it with precision=... and layout=..., as the manifests have it."
        ) from error
    return found
