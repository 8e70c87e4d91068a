"""The experiment: train a teacher, fill the student once an arm, train every arm alike, compare the curves."""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import net2net

from . import arms, figure, files, flops, ledger, mirror, progress, report
from .config import Config, ExperimentError, steps
from .data import Splits, complete_batches, load
from .device import describe, pick_device, pick_precision
from .optimizers import make_optimizer
from .stages import is_complete
from .training import Interrupted, Job, learn, load_network, train

TEACHER = "teacher"


@dataclass(frozen=True)
class Run:
    """One experiment of one seed: configuration, images and machine."""

    config: Config
    splits: Splits
    device: torch.device
    precision: torch.dtype
    console: Console

    @property
    def folder(self) -> Path:
        """Where the seed's stages are written."""
        return self.experiment / f"seed{self.config.seed}"

    @property
    def experiment(self) -> Path:
        """Where all seeds of the experiment are written."""
        return Path(self.config.runs) / self.config.name

    def fresh(self, student: str | None) -> nn.Module:
        """A network as its constructor draws it; the teacher for None."""
        images, _ = next(self.splits.test.ordered(1))
        return arms.fresh(self.config, student, self.splits.classes, images.shape[1])

    def images(self, count: int) -> Tensor:
        """The first `count` training images of the run's own order and augmentation (all, if there are fewer)."""
        data, count = self.config.data, min(count, len(self.splits.train))
        batches = self.splits.train.batches(
            count, epoch=0, seed=self.config.seed, augment=True, pad=data.pad, flip=data.flip
        )
        return next(iter(batches))[0]

    def job(self, name: str, student: str | None, rate: float) -> Job:
        """The training run of one stage."""
        return Job(
            self.folder / name,
            self.config,
            self.splits,
            self.device,
            self.precision,
            rate * self.config.schedule.lr,
            self.epochs(name),
            self.costs[student][1],
        )

    def epochs(self, name: str) -> str:
        """How long a stage trains."""
        schedule = self.config.schedule
        return (schedule.teacher_epochs if name == TEACHER else None) or schedule.epochs

    @cached_property
    def costs(self) -> dict[str | None, tuple[int, int]]:
        """FLOPs an image, of a forward pass and of a training step, of the teacher (None) and each student."""
        images, _ = next(self.splits.test.ordered(1))
        return {
            student: flops.count(self.fresh(student), images.shape[1], self.config.data.size)
            for student in (None, *self.config.students)
        }


def compare(config: Config, console: Console) -> Path:
    """Run what is missing of an experiment, print its table and return the path of its figure.

    Raises ExperimentError for what the user can put right, before anything is trained wherever that can be known.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    files.writable(Path(config.runs), "set runs to one that can")
    run = Run(config, load(config.data).to(device), device, precision, console)
    stages = arms.folders(config)
    networks = {None: run.fresh(None)} | {student: run.fresh(student) for student in config.students}
    _check_lengths(run)
    _ = run.costs  # which a network that cannot read the images has not
    _check_growth(run, networks)
    if {arm for arm, _ in stages.values()} & set(report.STARTS_FROM_TEACHER):
        stages = {TEACHER: (TEACHER, None)} | stages
    todo = [name for name, (arm, student) in stages.items() if not _done(run, name, arm, student)]
    _announce(run, networks, stages, todo)
    teacher = networks[None]
    if TEACHER in todo:
        _train(run, TEACHER, TEACHER, None, teacher, 1.0, {})
    elif TEACHER in stages:
        load_network(teacher, ledger.load_checkpoint(run.folder / TEACHER), run.folder / TEACHER)
    stages.pop(TEACHER, None)
    for name, (arm, student) in stages.items():
        if name in todo:
            _run_arm(run, name, arm, student, teacher)
    console.print(report.table(run.experiment))
    return figure.draw_runs(run.experiment)


def _check_lengths(run: Run) -> None:
    """Refuse a duration that rounds to no step at all."""
    schedule = run.config.schedule
    per_epoch = complete_batches(len(run.splits.train), schedule.batch_size)
    for key in ("epochs", "teacher_epochs", "evaluate"):
        duration = getattr(schedule, key)
        if duration is not None and steps(duration, per_epoch) < 1:
            raise ExperimentError(f"schedule.{key} is {duration}, less than a step: an epoch has {per_epoch} steps.")


def _check_growth(run: Run, networks: dict[str | None, nn.Module]) -> None:
    """Refuse a student that its teacher cannot be carried into before the teacher is trained."""
    for student in run.config.students:
        for arm in [arm for arm in ("net2net", "random_pad") if arm in run.config.arms][:1]:
            teacher, trial = (copy.deepcopy(networks[name]).to(run.device) for name in (None, student))
            arms.fill(arm, teacher, trial, run.config, run.images)


def _settings(run: Run, arm: str, student: str | None) -> dict[str, Any]:
    """All that determines the product of a stage, and nothing else."""
    config = asdict(run.config)
    data = {key: value for key, value in config["data"].items() if key not in ("root", "cache", "workers")}
    schedule = dict(config["schedule"])
    settings = {
        "seed": config["seed"],
        "data": data | {"description": run.splits.description},
        "network": config["model"] | (config["teacher"] if student is None else config["students"][student]),
        "schedule": schedule,
        "precision": str(run.precision).removeprefix("torch."),
    }
    if arm == TEACHER:
        schedule["epochs"] = schedule.pop("teacher_epochs") or schedule["epochs"]
        return settings
    settings["rate"] = config["rates"][arm]
    if arm in report.STARTS_FROM_TEACHER:
        settings["teacher"] = config["model"] | config["teacher"]
    else:
        schedule.pop("teacher_epochs")
    if arm == "net2net":
        settings["growth"] = config["growth"]
    return settings


def _done(run: Run, name: str, arm: str, student: str | None) -> bool:
    done = is_complete(run.folder / name, _settings(run, arm, student))
    if done:
        run.console.print(f"{name:<22} complete, skipped ({run.folder / name})", highlight=False, soft_wrap=True)
    return done


def _run_arm(run: Run, name: str, arm: str, student: str | None, teacher: nn.Module) -> None:
    """Fill the student (or go on with the teacher), measure how far it is from the teacher, train it."""
    facts: dict[str, Any] = {}
    if arm == arms.CONTINUED:
        network = copy.deepcopy(teacher)
    else:
        network = run.fresh(student)
        started = time.perf_counter()
        teacher.to(run.device)
        record = arms.fill(arm, teacher, network.to(run.device), run.config, run.images)
        if record is not None:
            facts["growth"] = {"record": str(record), "seconds": time.perf_counter() - started}
        if arm == "net2net" and not (run.folder / name / "checkpoint.pt").exists():
            facts["step0"] = _agreement(run, teacher, network)
            run.console.print(f"{name:<22} {_shown(facts['step0'])}", highlight=False, soft_wrap=True)
    _train(run, name, arm, student, network, run.config.rates[arm], facts)


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


def _train(
    run: Run, name: str, arm: str, student: str | None, network: nn.Module, rate: float, facts: dict[str, Any]
) -> None:
    """Train one stage and write its manifest: first as incomplete, so that a folder always says what it holds."""
    job = run.job(name, student, rate)
    began = ledger.read_manifest(job.folder)
    manifest: dict[str, Any] = {
        "experiment": run.config.name,
        "arm": arm,
        "student": student,
        "seed": run.config.seed,
        "settings": _settings(run, arm, student),
        "config": asdict(run.config),
        "data": run.splits.description,
        "device": str(run.device),
        "hardware": describe(run.device),
        "precision": str(run.precision).removeprefix("torch."),
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_flops": run.costs[student][0],
        "train_flops_per_image": job.flops,
        "teacher": TEACHER if arm in report.STARTS_FROM_TEACHER else None,
        "complete": False,
    }
    manifest |= ledger.provenance() | facts
    if began is not None:  # an interrupted run: what was measured before its first step still holds
        manifest |= {key: began[key] for key in ("growth", "step0") if key in began}
    ledger.write_manifest(job.folder, manifest)
    first = 0 if began is None else _steps_done(job.folder)
    with (
        progress.follow(run.console, name, job.total, first, run.config.schedule.batch_size) as follower,
        mirror.mirror(run.config, name, manifest, run.console) as log,
    ):
        try:
            train(network, job, _Both(follower, log))
        except Interrupted as stop:
            raise KeyboardInterrupt(str(stop)) from None
    ledger.write_manifest(
        job.folder, manifest | {"complete": True, "curve_sha256": ledger.checksum(job.folder / "curve.csv")}
    )


def _steps_done(folder: Path) -> int:
    return int(ledger.load_checkpoint(folder)["step"]) if (folder / "checkpoint.pt").exists() else 0


@dataclass(frozen=True)
class _Both:
    """The terminal and the mirror are told of the same rows."""

    follower: progress.Follower
    log: mirror.Log

    def advance(self, step: int, loss: float) -> None:
        self.follower.advance(step, loss)

    def row(self, row: Mapping[str, float]) -> None:
        self.follower.row(row)
        self.log(row)


def _announce(
    run: Run,
    networks: dict[str | None, nn.Module],
    stages: dict[str, tuple[str, str | None]],
    todo: list[str],
) -> None:
    """Say what will be done, how large it is and how long it will take, before anything is trained."""
    config = run.config
    say = lambda text: run.console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    precision = str(run.precision).removeprefix("torch.")
    say(f"[bold]{config.name}[/bold]: {config.claim}")
    say(f"data      {run.splits.description}")
    say(f"machine   {describe(run.device)}, {precision}, scale={config.scale}")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head, justify in (
        ("network", "left"),
        ("parameters", "right"),
        ("FLOPs forward", "right"),
        ("epochs", "right"),
    ):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    seconds = {}
    for student, network in networks.items():
        table.add_row(
            student or TEACHER,
            f"{sum(p.numel() for p in network.parameters()):,}",
            f"{run.costs[student][0] / 1e6:,.1f} M",
            run.epochs(TEACHER if student is None else student),
        )
        seconds[student] = _seconds_a_step(run, network) if todo else 0.0
    run.console.print(table)
    say(f"arms      {', '.join(name for name in stages if name != TEACHER)}")
    if todo:
        per_epoch = len(run.splits.train) // config.schedule.batch_size
        total = sum(seconds[stages[name][1]] * steps(run.epochs(name), per_epoch) for name in todo)
        say(f"to do     {', '.join(todo)}: about {progress.duration(total)} of training, by the speed of a few steps")


def _seconds_a_step(run: Run, network: nn.Module) -> float:
    """The time of a training step, measured on a copy of the network."""
    trial = copy.deepcopy(network).to(run.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(trial, run.config.schedule)
    batch_size = run.config.schedule.batch_size
    images, labels = next(
        iter(run.splits.train.batches(batch_size, epoch=0, seed=run.config.seed, augment=False, pad=0, flip=False))
    )
    times = []
    for _ in range(4):
        started = time.perf_counter()
        learn(trial, optimizer, images, labels, run.device, run.precision)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
