"""The experiment: train a teacher, fill the student once an arm, train every arm alike, compare the curves."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import net2net

from . import arms, checkpoint, files, locks, progress, teachers
from .analysis import figures, pages
from .config import (
    FIRST,
    LENGTHS,
    STARTS_FROM_TEACHER,
    TEACHER,
    Config,
    DivergedError,
    ExperimentError,
    arm_folders,
    steps,
)
from .data import complete_batches, load
from .distributed import join
from .machine import describe, pick_device
from .memory import keep_freed, out_of_memory
from .optimizers import make_optimizer
from .run import Run
from .stage import carry_out, is_complete
from .training import learn


@out_of_memory()
def compare(config: Config, console: Console, skip_busy: bool = False) -> Path | None:
    """Run what is missing of an experiment, print its table and return the path of its figure.

    Each stage has one writer: what another process is training is waited for if it is the teacher; an arm raises
    BusyError, or is left to that process with `skip_busy`. None if no arm is finished then.
    Raises ExperimentError for what the user can put right, before anything is trained wherever that can be known.
    """
    ranks = join()
    console = console if ranks.rank == 0 else Console(quiet=True)
    device = ranks.together(lambda: pick_device(config.device))
    if device.type == "cpu":  # elsewhere it holds no batch for long
        keep_freed()
    ranks.first(lambda: files.writable(Path(config.runs), "set runs to one that can"))
    run = Run(config, ranks.in_turn(lambda: load(config.data)).to(device), device, console, ranks)
    networks = ranks.together(lambda: _checked_networks(run))
    stages = arm_folders(config.students, config.arms)
    if {arm for arm, _ in stages.values()} & set(STARTS_FROM_TEACHER):
        stages = {TEACHER: (TEACHER, None)} | stages
    todo = [name for name, (arm, student) in stages.items() if not _done(run, name, arm, student)]
    _announce(run, networks, stages, todo)
    if TEACHER in stages:
        teachers.obtain(run, networks[None])
    diverged: list[str] = []
    for name in todo:
        if name != TEACHER:
            try:
                _run_arm(run, name, *stages[name], networks[None])
            except DivergedError as error:
                if ranks.count > 1:  # the other ranks have not noticed, and wait for this one
                    raise
                diverged.append(f"{name}: {error}" if len(config.arms) > 1 else str(error))
                run.console.print(f"{name:<22} {error}", highlight=False, soft_wrap=True)
            except locks.BusyError as busy:
                if not skip_busy:
                    raise
                run.console.print(f"{name:<22} skipped: {busy}", highlight=False, soft_wrap=True)
    picture = ranks.first(lambda: _shown_results(run, stages, skip_busy or bool(diverged)))
    if diverged:
        raise DivergedError("\n".join(diverged))
    return picture


def _shown_results(run: Run, stages: dict[str, tuple[str, str | None]], may_be_empty: bool) -> Path | None:
    """Print the table and return the path of the figure; with `may_be_empty`, None if no arm is finished."""
    with locks.hold(run.experiment, waiting=lambda _: None):  # or a job that read fewer curves might draw last
        finished = any(
            is_complete(run.folder / name, run.settings(*stages[name])) for name in stages if name != TEACHER
        )
        if not finished and may_be_empty:
            return None
        run.console.print(pages.make_terminal_table(run.experiment))
        return figures.draw_runs(run.experiment)


def _checked_networks(run: Run) -> dict[str | None, nn.Module]:
    """The teacher (None) and the students, fresh; ExperimentError for what would fail later."""
    networks = {None: run.fresh(None)} | {student: run.fresh(student) for student in run.config.students}
    run.ranks.share(run.config.schedule.batch_size)
    _check_lengths(run)
    _ = run.costs  # which a network that cannot read the images has not
    _check_growth(run, networks)
    return networks


def _check_lengths(run: Run) -> None:
    """Refuse a duration that rounds to no step at all."""
    schedule = run.config.schedule
    per_epoch = complete_batches(len(run.splits.train), schedule.batch_size)
    for key in LENGTHS:
        duration = getattr(schedule, key)
        if duration is not None and steps(duration, per_epoch) < 1:
            raise ExperimentError(f"schedule.{key} is {duration}, less than a step: an epoch has {per_epoch} steps.")


def _check_growth(run: Run, networks: dict[str | None, nn.Module]) -> None:
    """Refuse a student that its teacher cannot be carried into before the teacher is trained."""
    for student in run.config.students:
        for arm in [arm for arm in ("net2net", "random_pad") if arm in run.config.arms][:1]:
            teacher, trial = (copy.deepcopy(networks[name]).to(run.device) for name in (None, student))
            arms.fill(arm, teacher, trial, run.config, run.images)
    if run.earlier is not None:
        first, trial = run.earlier.fresh(None), copy.deepcopy(networks[None])
        try:
            arms.fill("net2net", first.to(run.device), trial.to(run.device), run.config, run.images)
        except ExperimentError as error:
            raise ExperimentError(f"The teacher (student) cannot grow from `first` (teacher): {error}") from error


def _done(run: Run, name: str, arm: str, student: str | None) -> bool:
    settings = run.settings(arm, student)
    done = teachers.is_trained(run) if arm == TEACHER else _is_complete(run, run.folder / name, settings)
    if done:
        run.ranks.first(
            lambda: locks.tidy(run.folder / name)
        )  # left by one that was killed after it wrote its manifest
        run.console.print(f"{name:<22} complete, skipped ({run.folder / name})", highlight=False, soft_wrap=True)
    return done


def _is_complete(run: Run, folder: Path, settings: dict[str, Any]) -> bool:
    return run.ranks.first(lambda: is_complete(folder, settings))


def _run_arm(run: Run, name: str, arm: str, student: str | None, teacher: nn.Module) -> None:
    """Fill the student (or go on with the teacher), measure how far it is from the teacher, train it.

    Raises BusyError if another process does.
    """
    job = run.job(name, student, run.config.rates[arm])
    settings = run.settings(arm, student)
    with run.ranks.entered_by_first(lambda: locks.hold(job.folder)):
        if _is_complete(run, job.folder, settings):  # since we looked
            return
        facts: dict[str, Any] = {}
        record = None
        if arm == arms.CONTINUED:
            network = copy.deepcopy(teacher)
        else:
            network = run.fresh(student)
            started = time.perf_counter()
            teacher.to(run.device)
            record = arms.fill(arm, teacher, network.to(run.device), run.config, run.images)
            if record is not None:
                facts["growth"] = {"record": str(record), "seconds": time.perf_counter() - started}
            if arm == "net2net" and run.ranks.rank == 0 and not checkpoint.exists(job.folder):
                facts["step0"] = _agreement(run, teacher, network)
                run.console.print(f"{name:<22} {_shown(facts['step0'])}", highlight=False, soft_wrap=True)
        optimizer = None
        if run.config.growth.optimizer_state == "carried" and arm in ("net2net", arms.CONTINUED):
            optimizer = arms.carried(record, teacher, network, teachers.optimizer_state(run), run.config)
        carry_out(run, job, arm, student, network, facts, optimizer)


def _agreement(run: Run, teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """How many test images the student, before any training, classifies as its teacher does; in float64 and float32."""
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        pair = [copy.deepcopy(network).to(dtype) for network in (teacher, student)]
        agree = of = 0
        worst = 0.0
        for images, _ in run.splits.test.ordered(256):
            measured = net2net.equivalence(pair[0], pair[1], images.to(dtype))
            agree, of = agree + measured.agree, of + measured.examples
            worst = max(worst, measured.max_relative)
        found[str(dtype).removeprefix("torch.")] = {"agree": agree, "of": of, "max_relative_error": worst}
    return found["float64"] | {"float32": found["float32"]}


def _shown(step0: dict[str, Any]) -> str:
    single = step0["float32"]
    return (
        f"agrees with its teacher on {step0['agree']} of {step0['of']} test images in float64 "
        f"(error {step0['max_relative_error']:.0e}), on {single['agree']} in float32"
    )


def _announce(
    run: Run,
    networks: dict[str | None, nn.Module],
    stages: dict[str, tuple[str, str | None]],
    todo: list[str],
) -> None:
    """Say what will be done, how large it is and how long it will take, before anything is trained."""
    config = run.config
    say = lambda text: run.console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    say(f"[bold]{config.name}[/bold]: {config.claim}")
    say(f"data      {run.splits.description}")
    say(f"machine   {describe(run.device)}, {run.choice.arithmetic}, scale={config.scale}")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head, justify in (
        ("network", "left"),
        ("parameters", "right"),
        ("FLOPs forward", "right"),
        ("epochs", "right"),
    ):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]

    def row(label: str, network: nn.Module, of: Run, student: str | None) -> float:
        size = f"{sum(p.numel() for p in network.parameters()):,}"
        table.add_row(
            label,
            size,
            f"{of.costs[student][0] / 1e6:,.1f} M",
            of.epochs(TEACHER if student is None else student),
        )
        return _seconds_a_step(run, network) if todo else 0.0

    first = 0.0 if run.earlier is None else row(FIRST, run.earlier.fresh(None), run.earlier, None)
    seconds = {student: row(student or TEACHER, network, run, student) for student, network in networks.items()}
    run.console.print(table)
    say(f"arms      {', '.join(name for name in stages if name != TEACHER)}")
    if todo:
        per_epoch = complete_batches(len(run.splits.train), config.schedule.batch_size)
        total = sum(seconds[stages[name][1]] * steps(run.epochs(name), per_epoch) for name in todo)
        if run.earlier is not None and TEACHER in todo and not teachers.is_trained(run.earlier):
            total += first * steps(run.earlier.epochs(TEACHER), per_epoch)
        say(f"to do     {', '.join(todo)}: about {progress.duration(total)} of training, by the speed of a few steps")


def _seconds_a_step(run: Run, network: nn.Module) -> float:
    """The time of a training step, measured on a copy of the network."""
    arithmetic = replace(run.choice.arithmetic, compile=False)
    trial = copy.deepcopy(network).to(run.device, memory_format=arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(trial, run.config.schedule)
    batch_size, seed = run.config.schedule.batch_size, run.config.seed
    share = run.ranks.share(batch_size)
    images, labels = next(iter(run.splits.train.batches(batch_size, epoch=0, seed=seed, augment=False, share=share)))
    images = images.contiguous(memory_format=arithmetic.memory_format)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        learn(trial, optimizer, images, labels, run.device, arithmetic)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
