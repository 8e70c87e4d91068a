"""How long an experiment will take: every network takes a few steps in a trial, and the rest is counted."""

import copy
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import nn

from . import wandb_log
from .arms import ARMS
from .config import TEACHER, ExperimentError
from .evaluation import evaluate, measure_agreement
from .progress import Follower, Row
from .run import Run
from .run_log import parse_curve
from .training import Job, train

FEW = 32  # images on which a comparison of two networks is timed
TRIAL = 0.1  # seconds, at least, over which the steps of a network are timed
# Seconds on one core of an AMD EPYC. They count in runs of seconds only.
FIGURE = 1.0  # to load pandas and matplotlib, and to draw
LOADING = 1.3  # to load W&B's client
MIRROR = 0.1  # to begin and to end a run in W&B


@dataclass(frozen=True)
class Speed:
    """The seconds that a network takes for a training step, and for an evaluation, with the files that it writes."""

    step: float
    evaluation: float


def estimate(
    run: Run,
    networks: Mapping[str | None, nn.Module],
    stages: Mapping[str, tuple[str, str | None]],
    missing: Collection[str],
    growth: float,
) -> float:
    """Return the seconds that the missing stages and the figure take; a growth takes `growth` seconds.

    `stages` are the arm and the student of each stage. What is done of a stage that was stopped does not count. Nothing
    is learnt, and no file stays. Raises ExperimentError if the trial cannot write, read its images, or count its loss.
    """
    total = 0.0
    students = dict.fromkeys(stages[name][1] for name in missing)  # in the same order on all ranks
    with tempfile.TemporaryDirectory(prefix="net2net-trial-", ignore_cleanup_errors=True) as name:  # none of the runs
        folder = Path(name)
        speeds = {student: _measure(run, networks[student], folder / (student or TEACHER)) for student in students}
    for name in missing:
        arm, student = stages[name]
        job, speed = run.job(name, student, 1.0), speeds[student]
        done = _steps_done(job.folder)
        guided = job.flops / run.costs[student][1]  # with the passes of a guide
        evaluations = math.ceil(job.total / job.every) - math.ceil(done / job.every) + (not done)
        total += (job.total - done) * speed.step * guided + evaluations * speed.evaluation
        if arm != TEACHER and ARMS[arm].starts_from_teacher and ARMS[arm].has_student:
            total += growth if done else 2 * growth  # its certificate takes as long
        if arm != TEACHER and ARMS[arm].keeps_function and not done:
            total += _measure_agreement(run, networks[None], networks[student])
    if run.config.logger != "none" and wandb_log.mode() != "disabled":
        total += MIRROR * (len(missing) + 1) + LOADING * ("wandb" not in sys.modules)
    return total + FIGURE * ("matplotlib" not in sys.modules)


def _measure(run: Run, network: nn.Module, folder: Path) -> Speed:
    """Train a copy of a network at a rate of zero, and evaluate it on few images; return its speed with all of them."""
    job = run.job(TEACHER, None, 0.0, folder)
    few = replace(run.splits.thin(0, job.evaluation_batch * run.ranks.count), train=run.splits.train)
    job = replace(
        job,
        name="a trial of the speed",
        config=replace(job.config, schedule=replace(job.config.schedule, evaluate="50%")),
        splits=few,
        arithmetic=replace(run.arithmetic, compile=False),  # to compile takes minutes
        augment=True,
    )
    speed = _try(job, network, 1)  # which also makes kernels and buffers
    enough = max(math.ceil(TRIAL / max(speed.step, 1e-4)), 4 * run.config.data.workers)  # which begin with a full queue
    (count,) = run.ranks.maximum(enough)
    if count > 1:
        speed = _try(job, network, count)
    left = sum(len(split) for split in (run.splits.holdout, run.splits.test)) - len(few.holdout) - len(few.test)
    more = left / run.ranks.count * _measure_image(run, network, job.evaluation_batch)
    return replace(speed, evaluation=speed.evaluation + more)


def _try(job: Job, network: nn.Module, count: int) -> Speed:
    """Train a copy for twice `count` steps, with an evaluation after each half, and return the speed of the second."""
    rows: list[tuple[float, Row]] = []
    job = replace(job, epochs=f"{2 * count}it", folder=job.folder / str(count))
    with Follower(
        Console(quiet=True), job.name, job.length, 0, lambda row: rows.append((time.perf_counter(), row))
    ) as follower:
        train(copy.deepcopy(network), job, follower)
    (began, before), (ended, after) = rows[1:]
    step = (after["seconds"] - before["seconds"]) / count
    return Speed(step, ended - began - count * step)


def _measure_image(run: Run, network: nn.Module, size: int) -> float:
    """Return the seconds in which one image is read and evaluated, in batches of `size`."""
    layout = run.arithmetic.memory_format
    network = copy.deepcopy(network).to(run.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    images, times = [0], [time.perf_counter()]
    for batch in itertools.islice(run.splits.test.ordered(size), 2 + 2 * run.config.data.workers):
        evaluate(network, iter([batch]), layout)
        images.append(len(batch[1]))
        times.append(time.perf_counter())
    first = min(1, len(times) - 2)  # workers start with the first batch
    return (times[-1] - times[first]) / sum(images[first + 1 :])


def _measure_agreement(run: Run, *networks: nn.Module) -> float:
    """Return the seconds in which a student is compared with its teacher on all test images."""
    teacher, student = (copy.deepcopy(network).to(run.device) for network in networks)
    started = time.perf_counter()
    measured = measure_agreement(teacher, student, itertools.islice(run.splits.test.ordered(FEW), 1))
    return (time.perf_counter() - started) * len(run.splits.test) / measured["of"]


def _steps_done(folder: Path) -> int:
    """Return the last step that the curve of a stage has, 0 if there is none."""
    path = folder / "curve.csv"
    with suppress(ExperimentError, OSError):
        return int(parse_curve(path.read_bytes(), path)[-1]["step"])
    return 0
