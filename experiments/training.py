"""The training loop: one network, one schedule, one curve."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint
from .config import Config, DivergedError, ExperimentError, steps
from .data import Splits, complete_batches
from .distributed import ALONE, Ranks
from .evaluation import Batch, evaluate
from .loss import Loss, label_loss, make_loss
from .machine import Arithmetic
from .optimizers import falling_steps, make_optimizer, rate_at
from .progress import Follower, Length
from .randomness import seed_layers
from .run_log import write_curve
from .signals import Requests, SignalPending

Row = dict[str, float]
CPU_BATCH = 128  # images of an evaluation batch on the CPU, at most: larger ones do not fit its caches
LOOK_EVERY = 50  # steps: to look at a loss makes the CPU wait for a GPU, or for the other ranks


@dataclass(frozen=True)
class Job:
    """One training run, everything resolved to numbers."""

    folder: Path
    config: Config
    splits: Splits
    device: torch.device
    arithmetic: Arithmetic
    rate: float  # initial learning rate
    epochs: str
    flops: int  # of training on one image
    name: str = "training"  # the stage
    ranks: Ranks = ALONE  # the processes that share each batch
    augment: bool = True  # whether training images are cropped and mirrored
    guide: nn.Module | None = None  # the teacher whose outputs are learnt, too, on the device

    @property
    def per_epoch(self) -> int:
        """Number of steps in one pass over the training images."""
        return complete_batches(len(self.splits.train), self.config.schedule.batch_size)

    @property
    def total(self) -> int:
        """Number of steps of the run."""
        return steps(self.epochs, self.per_epoch)

    @property
    def every(self) -> int:
        """Number of steps between evaluations."""
        return max(1, steps(self.config.schedule.evaluate, self.per_epoch, self.total))

    @property
    def length(self) -> Length:
        """The work of the run; an image that is evaluated costs a third of one that is trained on."""
        images = len(self.splits.holdout) + len(self.splits.test)
        batch_size = self.config.schedule.batch_size
        return Length(self.total, self.every, batch_size, images / batch_size / 3)

    @property
    def evaluation_batch(self) -> int:
        """Number of images that a process evaluates at once."""
        size = 4 * self.config.schedule.batch_size
        return max(1, (min(size, CPU_BATCH) if self.device.type == "cpu" else size) // self.ranks.count)


def train(network: nn.Module, job: Job, follower: Follower, state: dict[str, Any] | None = None) -> list[Row]:
    """Train a network in place and return its curve, one row an evaluation, the first at step 0.

    It continues from `state`, or else from the checkpoint in the job's folder. Data order, augmentation and dropout
    depend on seed and step alone, so it then sees what it would have seen. A checkpoint is written at every evaluation
    and after `checkpoint_seconds`. All ranks do this and end alike; rank 0 alone writes.
    """
    run = _Run(network, job, follower, state)
    loss_of = make_loss(job.config, job.guide)
    with Requests() as requests:
        evaluate_if_due(run, requests)
        for images, labels in remaining_batches(run):
            set_rate(run.optimizer, job, run.step)
            seed_layers(job.device, job.config.seed, "dropout", run.step, *job.ranks.seed_parts)
            logits, loss = train_step(run.learner, run.optimizer, images, labels, job.device, job.arithmetic, loss_of)
            run.meter.add(run.step, loss, logits, labels)
            run.step += 1
            follower.advance(run.step, run.meter.last_loss)
            if is_save_due(run, requests):
                run.save()
                requests.deliver(run.where)
            evaluate_if_due(run, requests)
        requests.add(*job.ranks.maximum(requests.next))
        requests.deliver(run.where)
    return run.rows


class _Run:
    """What the loop changes: the network and its optimizer, the step, the curve, the meter and the clocks."""

    def __init__(self, network: nn.Module, job: Job, follower: Follower, state: dict[str, Any] | None) -> None:
        self.network, self.job, self.follower = network, job, follower
        network.to(job.device, memory_format=job.arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
        self.optimizer = make_optimizer(network, job.config.schedule)
        state = checkpoint.resume(job.folder) if state is None else state
        if "network" in state:
            load(network, state, job.folder)
            load(self.optimizer, state, job.folder)
        self.step, self.rows = int(state["step"]), list(state["rows"])
        self.meter = _Meter(job.device, state["meter"], job.ranks)
        # The wrappers have the network's weights under other names, so the checkpoint holds the network itself.
        learner = job.ranks.wrap(network, job.device)
        self.learner = cast(nn.Module, torch.compile(learner)) if job.arithmetic.compile else learner
        self.stopwatch = _Stopwatch(state["seconds"])
        self.saved_at, self.evaluation_seconds = time.monotonic(), 0.0
        if self.rows:
            # The curve on disk may be a row ahead of the checkpoint, or behind.
            job.ranks.on_first(partial(write_curve, job.folder, self.rows))
            follower.row(self.rows[-1])

    @property
    def where(self) -> str:
        """How far the run is, in words."""
        return f"{self.job.name} stopped at step {self.step} of {self.job.total}"

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the curve lacks the row of the current step."""
        is_due = self.step % self.job.every == 0 or self.step == self.job.total
        return is_due and not (self.rows and self.rows[-1]["step"] == self.step)

    def save(self) -> None:
        """Write a checkpoint, on rank 0."""
        self.meter.check()
        self.job.ranks.on_first(partial(self._write_checkpoint, self.meter.state()))
        self.saved_at = time.monotonic()

    def _write_checkpoint(self, meter: Mapping[str, Any]) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "seconds": self.stopwatch.seconds(),
            "meter": meter,
        }
        if not all(bool(tensor.isfinite().all()) for tensor in state["network"].values()):
            raise DivergedError(_describe_divergence("A weight is", self.step))  # the next loss would not be finite
        checkpoint.save(self.job.folder, state)


def load(part: nn.Module | Optimizer, state: Mapping[str, Any], folder: Path) -> None:
    """Load a network or its optimizer from the checkpoint in `folder`; raise ExperimentError if it is another's."""
    try:
        part.load_state_dict(state["network" if isinstance(part, nn.Module) else "optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"The checkpoint in {folder} is another network's: delete {folder} to run this stage anew."
        ) from error


def remaining_batches(run: _Run) -> Iterator[Batch]:
    """Yield the training batches that the run has left. Saves the run if they cannot be read on some rank."""
    batches = make_batches(run.job, run.step)
    for _ in range(run.step, run.job.total):
        try:
            batch = run.job.ranks.on_all(partial(next, batches))
        except ExperimentError:
            run.save()
            raise
        yield batch


def make_batches(job: Job, first: int) -> Iterator[Batch]:
    """Yield the training batches from step `first` on, epoch after epoch, without end."""
    batch_size = job.config.schedule.batch_size
    share = job.ranks.share(batch_size)
    first_epoch, start = divmod(first, job.per_epoch)
    for epoch in itertools.count(first_epoch):
        skip = start if epoch == first_epoch else 0
        for images, labels in job.splits.train.batches(
            batch_size, epoch=epoch, seed=job.config.seed, augment=job.augment, start=skip, share=share
        ):
            yield images.contiguous(memory_format=job.arithmetic.memory_format), labels


def set_rate(optimizer: Optimizer, job: Job, step: int) -> None:
    """Set the learning rate of a step."""
    schedule = job.config.schedule
    warmup = steps(schedule.warmup, job.per_epoch, job.total)
    falling = falling_steps(schedule.decay, job.per_epoch, job.total, warmup)
    rate = job.rate * rate_at(step, job.total, warmup, falling)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def train_step(
    network: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    arithmetic: Arithmetic,
    loss_of: Loss = label_loss,
) -> tuple[Tensor, Tensor]:
    """Do one step of training; return the logits (N x classes) and the mean loss of the batch, detached."""
    network.train()
    with arithmetic.step():
        with arithmetic.forward(device):
            logits = network(images)
            loss = loss_of(logits.float(), labels, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return logits.detach(), loss.detach()


def is_save_due(run: _Run, requests: Requests) -> bool:
    """Return whether to save now: a signal has arrived, or `checkpoint_seconds` have passed, or would in an evaluation.

    The evaluation itself saves, too.
    """
    passed = time.monotonic() - run.saved_at + run.is_evaluation_due * run.evaluation_seconds
    is_late = int(passed >= run.job.config.checkpoint_seconds)
    signal, is_late = run.job.ranks.maximum(requests.next, is_late)
    requests.add(signal)
    return bool(requests.pending or is_late)


def evaluate_if_due(run: _Run, requests: Requests) -> None:
    """Add the row of the current step to the curve if it is due, and save; save also if the images cannot be read.

    An evaluation that a signal interrupts is abandoned; if the run is to continue it is done again.
    """
    while run.is_evaluation_due:
        began = time.monotonic()
        run.follower.evaluate(0.0)
        run.meter.check()  # which waits for the device, so that no training counts as evaluation
        try:
            with run.stopwatch.paused():
                found = evaluate_splits(run.network, run.job, requests, run.follower)
        except SignalPending:
            run.save()
            requests.deliver(run.where)
            continue
        except ExperimentError:
            run.save()
            raise
        run.rows.append(_costs(run) | run.meter.take() | found)
        with run.stopwatch.paused():
            run.save()
            run.job.ranks.on_first(partial(write_curve, run.job.folder, run.rows))
        run.evaluation_seconds = time.monotonic() - began
        run.follower.row(run.rows[-1] | ({"learning_rate": run.optimizer.param_groups[0]["lr"]} if run.step else {}))


def _costs(run: _Run) -> Row:
    """The columns of a row that say what it has cost."""
    examples, seconds = run.step * run.job.config.schedule.batch_size, run.stopwatch.seconds() if run.step else 0.0
    row = {"step": run.step, "epoch": run.step / run.job.per_epoch}
    return row | {"examples": examples, "seconds": seconds, "flops": examples * run.job.flops}


def evaluate_splits(network: nn.Module, job: Job, requests: Requests, follower: Follower) -> Row:
    """Return losses and accuracies on the holdout and test images; raise SignalPending if a signal arrives."""
    row, ranks, splits = {}, job.ranks, {"holdout": job.splits.holdout, "test": job.splits.test}
    images = sum(map(len, splits.values())) / ranks.count
    ranks.copy_buffers(network)
    for name, split in splits.items():
        batches = split.ordered(job.evaluation_batch, ranks.rank, ranks.count)
        before = 0 if name == "holdout" else len(splits["holdout"]) / ranks.count
        batches = _follow(batches, follower, before, images)
        if ranks.count == 1:  # several ranks would wait for one another
            batches = _until_signal(batches, requests)
        row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(network, batches, job.arithmetic.memory_format, ranks)
    return row


def _follow(batches: Iterator[Batch], follower: Follower, seen: float, total: float) -> Iterator[Batch]:
    """Pass the batches on, and tell the follower which share of all images is done."""
    for batch in batches:
        yield batch
        seen += len(batch[1])
        follower.evaluate(min(1.0, seen / total))


def _until_signal(batches: Iterator[Batch], requests: Requests) -> Iterator[Batch]:
    for batch in batches:
        requests.raise_if_pending()
        yield batch


class _Stopwatch:
    """The seconds spent on training, those of earlier processes included."""

    def __init__(self, seconds: float) -> None:
        self._since = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began


class _Meter:
    """Training loss and accuracy since the last evaluation, summed on the device so that no step waits for them.

    Each rank counts its share of the batches; all ranks call every method at the same steps.
    """

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.last_loss = math.nan  # the last loss that was looked at
        self._reset()
        if state is not None:
            self.loss += state["loss"][ranks.rank]
            self.right += state["right"][ranks.rank]
            self.batches, self.images = int(state["batches"]), int(state["images"])

    def _reset(self) -> None:
        self.loss, self.right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.batches = self.images = self.first_pending = 0
        self.pending: list[Tensor] = []  # losses that nobody has looked at

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        self.loss += loss
        self.right += (logits.argmax(1) == labels).sum()
        self.batches += 1
        self.images += len(labels) * self.ranks.count
        if not self.pending:
            self.first_pending = step
        self.pending.append(loss)
        is_free = self.device.type == "cpu" and self.ranks.count == 1
        if is_free or len(self.pending) >= LOOK_EVERY:
            self.check()

    def check(self) -> None:
        """Raise DivergedError, on all ranks, if a loss since the last check was not finite on any rank."""
        self.ranks.on_all(self._look)

    def _look(self) -> None:
        losses = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        for step, loss in enumerate(losses, self.first_pending + 1):
            self.last_loss = loss
            if not math.isfinite(loss):
                raise DivergedError(_describe_divergence("The loss is", step))

    def take(self) -> Row:
        """Return the training columns of a row, none before the first batch; and start anew."""
        state = self.state()
        self._reset()
        if not state["batches"]:
            return {}
        return {
            "train_loss": sum(state["loss"]) / len(state["loss"]) / state["batches"],
            "train_accuracy": sum(state["right"]) / state["images"],
        }

    def state(self) -> dict[str, Any]:
        """Return what a new meter needs to continue after an interruption."""
        loss, right = self.ranks.gather(float(self.loss)), self.ranks.gather(float(self.right))
        return {"loss": loss, "right": right, "batches": self.batches, "images": self.images}


def _describe_divergence(what: str, step: int) -> str:
    return (
        f"{what} not finite at step {step}; the last good checkpoint is kept. "
        "Try a lower schedule.lr, or a longer schedule.warmup."
    )
