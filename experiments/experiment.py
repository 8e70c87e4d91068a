"""The experiment: train a teacher, fill the student once for each arm, train all arms alike, compare the curves."""

import copy
import importlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import checkpoint, files, progress, start, wandb_log
from .arms import ARMS
from .config import (
    LENGTHS,
    TEACHER,
    Config,
    DivergedError,
    ExperimentError,
    arm_folders,
    steps,
)
from .data import complete_batches, load
from .distributed import join
from .estimate import estimate
from .evaluation import AGREEMENT_BATCH, measure_agreement
from .machine import describe, explain_lack_of_memory, keep_freed_memory, pick_device
from .optimizers import make_optimizer
from .run import Run
from .run_log import MANIFEST, read_manifest
from .stage import (
    describe_growth,
    is_complete,
    is_teacher_trained,
    obtain_teacher,
    run_stage,
    teacher_optimizer_state,
)

LEAST_TESTED = 100  # holdout and test images of a trial, which otherwise has a fifth of its training images
Stages = dict[str, tuple[str, str | None]]  # name of each stage -> its arm and its student
Networks = dict[str | None, nn.Module]  # the teacher (None) and the students


@explain_lack_of_memory()
def run_experiment(config: Config, console: Console, in_sweep: bool = False) -> Path | None:
    """Run what is missing of one seed of an experiment, print its results, and return the figure's path.

    A teacher that another process trains is waited for. An arm that another process trains is refused with BusyError.
    `in_sweep` such an arm is left out, and the sweep prints the results at its end. Returns None if no arm is complete.
    """
    run = prepare(config, console)
    networks, growth = run.ranks.on_all(partial(_make_networks, run))
    stages: Stages = arm_folders(config.students, config.arms)
    if any(ARMS[arm].needs_teacher for arm, _ in stages.values()):
        stages = {TEACHER: (TEACHER, None)} | stages
    missing = [name for name, (arm, student) in stages.items() if not _is_done(run, name, arm, student)]
    _announce(run, networks, growth, stages, missing)
    if TEACHER in stages:
        obtain_teacher(run, networks[None])
    diverged: list[str] = []
    for name in missing:
        try:
            if name != TEACHER:
                _run_arm(run, name, *stages[name], networks[None])
        except DivergedError as error:
            if run.ranks.count > 1:  # the other ranks have not noticed, and wait for this one
                raise
            diverged.append(f"{name}: {error}" if len(config.arms) > 1 else str(error))
            _say(run, f"{name:<22} {error}")
        except files.BusyError as error:
            if not in_sweep:
                raise
            _say(run, f"{name:<22} skipped: {error}")
    may_be_empty = in_sweep or bool(diverged)
    figure = run.ranks.on_first(lambda: _draw_results(run, stages, may_be_empty, mirrored=bool(missing)))
    if figure is not None and run.ranks.rank == 0 and not in_sweep:
        importlib.import_module("experiments.analysis.pages").print_results(run.experiment, console)
    if diverged:
        raise DivergedError("\n".join(diverged))
    return figure


def prepare(config: Config, console: Console) -> Run:
    """Find the device, check that runs can be written, and load the images."""
    ranks = join()
    console = console if ranks.rank == 0 else Console(quiet=True)
    device = ranks.on_all(lambda: pick_device(config.device))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":  # batches are in the memory of the host
        keep_freed_memory()
    ranks.on_first(lambda: files.writable(Path(config.runs), "choose another with runs=FOLDER"))
    with torch.device("meta"):  # a wrong argument is found before the images are read, which may take long
        for student in (None, *config.students):
            make_optimizer(start.make_network(config, student, classes=10, channels=3), config.schedule)
    splits = ranks.first_then_others(lambda: load(config.data))
    if config.limit is not None:
        splits = splits.thin(config.limit, max(LEAST_TESTED, config.limit // 5))
    return Run(config, splits.to(device), device, console, ranks)


def _say(run: Run, text: str) -> None:
    run.console.print(text, highlight=False, soft_wrap=True)


def _draw_results(run: Run, stages: Stages, may_be_empty: bool, mirrored: bool) -> Path | None:
    """Draw the figure and return its path; with `may_be_empty`, return None if no arm is complete.

    What was `mirrored` to W&B gets a report there.
    """
    with files.hold(run.experiment, lambda owner: None):  # or a job that read fewer curves might draw last
        names = [name for name in stages if name != TEACHER]
        if may_be_empty and not any(is_complete(run.folder / name, run.settings(*stages[name])) for name in names):
            return None
        # They load pandas and matplotlib, which takes seconds that no training has to wait for.
        figures, curves = (importlib.import_module(f"experiments.analysis.{name}") for name in ("figures", "curves"))
        figure = figures.draw_runs(run.experiment)
        if mirrored:
            results = curves.load(run.experiment)
            _report(run, figure, curves.summarise_seed(results, run.config.seed))
        return figure


def _report(run: Run, figure: Path, summary: dict[str, Any]) -> None:
    """Send what compares the arms of this seed to W&B, as a run of its own."""
    manifests = [read_manifest(path) or {} for path in run.folder.glob(f"*/{MANIFEST}")]
    arms = [manifest for manifest in manifests if manifest.get("arm", TEACHER) != TEACHER]
    began = [process["started"] for manifest in arms for process in manifest["processes"]]
    # While arms are added to the seed's folder, its report in W&B continues.
    facts = {"settings": {"seed": run.config.seed}, "processes": [{"started": min(began)}]}
    with wandb_log.mirror(run.config, wandb_log.REPORT, facts, run.console) as report:
        report.summarise(summary)
        report.keep("figure", figure)


def _make_networks(run: Run) -> tuple[Networks, float]:
    """Return the teacher and the students, fresh, and the seconds of a growth.

    Raises ExperimentError for everything that would fail later.
    """
    networks = {student: run.make_network(student) for student in (None, *run.config.students)}
    run.ranks.share(run.config.schedule.batch_size)
    per_epoch = complete_batches(len(run.splits.train), run.config.schedule.batch_size)
    for key in LENGTHS:
        duration = getattr(run.config.schedule, key)
        if duration is not None and not duration.endswith("%") and steps(duration, per_epoch) < 1:
            raise ExperimentError(f"schedule.{key} is {duration}, less than a step: an epoch has {per_epoch} steps.")
    _ = run.costs  # raises if a network cannot read the images
    return networks, _check_growth(run, networks)


def _check_growth(run: Run, networks: Networks) -> float:
    """Refuse a student that cannot be grown before its teacher is trained; return the seconds of a growth."""
    started = time.perf_counter()
    arm = next((arm for arm in run.config.arms if ARMS[arm].starts_from_teacher and ARMS[arm].has_student), None)
    for student in run.config.students if arm else ():
        teacher, trial = (copy.deepcopy(networks[name]).to(run.device) for name in (None, student))
        start.fill(str(arm), teacher, trial, run.config, run.images)
    return (time.perf_counter() - started) / len(run.config.students)


def _is_done(run: Run, name: str, arm: str, student: str | None) -> bool:
    """Whether a stage is complete; says so if it is."""
    folder = run.folder / name
    if arm == TEACHER:
        is_done = is_teacher_trained(run)
    else:
        settings = run.settings(arm, student)
        is_done = run.ranks.on_first(lambda: is_complete(folder, settings))
    if is_done:
        run.ranks.on_first(lambda: files.remove_stale_lock(folder))  # a process was killed after its manifest
        _say(run, f"{name:<22} complete, skipped ({folder})")
    return is_done


def _run_arm(run: Run, name: str, arm: str, student: str | None, teacher: nn.Module) -> None:
    """Fill the student (or continue with the teacher), measure how far it is from the teacher, and train it."""
    job = run.job(name, student, run.config.rates[arm])
    if ARMS[arm].is_guided:
        job = replace(job, guide=teacher.to(run.device, memory_format=run.arithmetic.memory_format))  # pyright: ignore[reportCallIssue]
    settings = run.settings(arm, student)
    with run.ranks.enter_on_first(lambda: files.hold(job.folder)):
        if run.ranks.on_first(lambda: is_complete(job.folder, settings)):  # by now
            return
        facts: dict[str, Any] = {}
        transfer = None
        if not ARMS[arm].has_student:
            network = copy.deepcopy(teacher)
        else:
            network = run.make_network(student)
            started = time.perf_counter()
            teacher.to(run.device)
            transfer = start.fill(arm, teacher, network.to(run.device), run.config, run.images)
            if transfer is not None:
                facts = describe_growth(run, job.folder, (teacher, network), transfer, settings, started)
            if ARMS[arm].keeps_function and run.ranks.rank == 0 and not checkpoint.exists(job.folder):
                facts["step0"] = measure_agreement(teacher, network, run.splits.test.ordered(AGREEMENT_BATCH))
                step0 = facts["step0"]
                _say(
                    run,
                    f"{name:<22} agrees with its teacher on {step0['agree']} of {step0['of']} test images in float64 "
                    f"(error {step0['max_relative_error']:.0e}), on {step0['float32']['agree']} in float32",
                )
        optimizer = None
        if run.config.growth.optimizer_state != "dropped" and "optimizer_state" in ARMS[arm].reads:
            state = teacher_optimizer_state(run)
            optimizer = start.carry_optimizer_state(transfer, teacher, network, state, run.config)
        run_stage(run, job, arm, student, network, facts, optimizer)


def _announce(run: Run, networks: Networks, growth: float, stages: Stages, missing: list[str]) -> None:
    """Say what will be done, how large it is and how long it will take, before anything is trained."""
    config = run.config
    _say(run, f"[bold]{config.name}[/bold]: {config.claim}")
    _say(run, f"data      {run.splits.description}")
    _say(run, f"machine   {describe(run.device)}, {run.arithmetic}, scale={config.scale}")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("network")
    for head in ("parameters", "FLOPs forward", "epochs"):
        table.add_column(head, justify="right")
    for student, network in networks.items():
        label, parameters = student or TEACHER, sum(p.numel() for p in network.parameters())
        table.add_row(label, f"{parameters:,}", f"{run.costs[student][0] / 1e6:,.1f} M", run.epochs(label))
    run.console.print(table)
    _say(run, f"arms      {', '.join(name for name in stages if name != TEACHER)}")
    if missing:
        try:
            total = progress.duration(estimate(run, networks, stages, missing, growth))
            time_needed = f"about {total}, by the speed of a few steps"
        except ExperimentError:  # the stages say what is wrong, and one may find it right
            time_needed = "a trial of the speed failed, so it may take any time"
        _say(run, f"to do     {', '.join(missing)}: {time_needed}")
    _say(run, f"log       {wandb_log.describe(config)}")
