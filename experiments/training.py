"""The training loop: one network, one schedule, one curve."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from . import run_log as ledger
from .config import Config, DivergedError, ExperimentError, steps
from .data import Splits, complete_batches
from .distributed import ALONE, Ranks
from .machine import Arithmetic
from .optimizers import make_optimizer, rate_at
from .progress import Follower
from .randomness import seed_layers
from .signals import Asked, Requests


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
    name: str = "training"  # what the stage is called
    ranks: Ranks = ALONE  # the processes that share each batch
    augment: bool = True  # whether training images are cropped and mirrored
    before: Mapping[str, float] = field(default_factory=dict)  # what was spent to come here: added to these columns

    @property
    def per_epoch(self) -> int:
        """Steps in one pass over the training images."""
        return complete_batches(len(self.splits.train), self.config.schedule.batch_size)

    @property
    def total(self) -> int:
        """Steps in all."""
        return steps(self.epochs, self.per_epoch)


def train(
    network: nn.Module, job: Job, follower: Follower, state: dict[str, Any] | None = None
) -> list[dict[str, float]]:
    """Train `network` in place and return its curve, one row an evaluation, the first at step 0.

    Goes on from `state`, or from the checkpoint in the job's folder: data order, augmentation and dropout depend on
    seed and step alone, so it sees what it would have seen. A checkpoint is written at every epoch, at every
    evaluation and after `checkpoint_seconds`, the curve at every evaluation.
    Raises ExperimentError at a loss that is not finite (the last checkpoint stays) or at images that cannot be read,
    signals.Interrupted, or what a launcher's handler raises, when it was asked to stop; these two are saved first.
    Of several ranks all do this and end alike; rank 0 alone writes.
    """
    schedule, device, ranks = job.config.schedule, job.device, job.ranks
    network.to(device, memory_format=job.arithmetic.memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(network, schedule)
    state = checkpoint.resume(job.folder) if state is None else state
    _restore(network, optimizer, state, job.folder)
    step, rows, meter = int(state["step"]), list(state["rows"]), _Meter(device, state["meter"], ranks)
    warmup, every = (steps(d, job.per_epoch) for d in (schedule.warmup, schedule.evaluate))
    # What learns has the network's weights under other names, which the checkpoint is not to have.
    learner = ranks.wrapped(network, device)
    learner = cast(nn.Module, torch.compile(learner)) if job.arithmetic.compile else learner
    batches, watch = _batches(job, step), _Watch(state["seconds"])
    saved, pause = time.monotonic(), 0.0  # when; how long the last evaluation took

    def save() -> None:
        nonlocal saved
        meter.check()
        counted = meter.state()
        ranks.first(lambda: _save(network, optimizer, job, step, rows, watch.seconds(), counted))
        saved = time.monotonic()

    def where() -> str:
        return f"{job.name} stopped at step {step} of {job.total}"

    if rows:
        # The checkpoint may be an evaluation ahead of it, or behind.
        ranks.first(lambda: ledger.write_curve(job.folder, rows))
        follower.row(rows[-1])
    with Requests() as requests:
        while True:
            evaluating = _is_due(step, every, job.total) and not (rows and rows[-1]["step"] == step)
            if step == job.total and not evaluating:
                requests.hear(*ranks.most(requests.next))
                requests.deliver(where())
                return rows
            began = time.monotonic()
            if evaluating:
                meter.check()  # which also waits for the device, so that no training is taken for evaluation
            found, batch = {}, None
            try:
                if evaluating:
                    with watch.paused():
                        found = evaluate_all(network, job, requests)
                else:
                    batch = ranks.together(lambda: next(batches))
            except Asked:  # a long evaluation is left for a signal, and done again
                save()
                requests.deliver(where())
                continue
            except ExperimentError:  # the images are gone, but not what was learned from them
                save()
                raise
            if batch is None:
                rows.append(_row(job, step, watch.seconds(), *meter.take()) | found)
                with watch.paused():
                    save()
                    ranks.first(lambda: ledger.write_curve(job.folder, rows))
                pause = time.monotonic() - began
                follower.row(rows[-1])
                continue
            for group in optimizer.param_groups:
                group["lr"] = job.rate * rate_at(step, job.total, warmup, schedule.decay)
            seed_layers(device, job.config.seed, "dropout", step, *ranks.own_stream)
            logits, loss = learn(learner, optimizer, *batch, device, job.arithmetic)
            meter.add(step, loss, logits, batch[1])
            step += 1
            follower.advance(step, meter.shown)
            ahead = _is_due(step, every, job.total)  # an evaluation, which saves
            late = time.monotonic() - saved + ahead * pause >= job.config.checkpoint_seconds
            number, late = ranks.most(requests.next, int(late))
            requests.hear(number)
            if requests.pending or late or (step % job.per_epoch == 0 and not ahead):
                save()
                requests.deliver(where())


def _is_due(step: int, every: int, total: int) -> bool:
    """Whether there is an evaluation after so many steps."""
    return step % every == 0 or step == total


def _restore(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], folder: Path) -> None:
    """Load a checkpoint's state; the one before the first step changes nothing."""
    if "network" not in state:
        return
    load_network(network, state, folder)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(_foreign(folder)) from error


def load_network(network: nn.Module, state: Mapping[str, Any], folder: Path) -> None:
    """Load the network of a checkpoint; ExperimentError if it is another network's."""
    try:
        network.load_state_dict(state["network"])
    except (RuntimeError, TypeError) as error:
        raise ExperimentError(_foreign(folder)) from error


def _foreign(folder: Path) -> str:
    return f"The checkpoint in {folder} is another network's: delete {folder} to run this stage anew."


def learn(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor]:
    """One step of training; return logits (N x classes) and loss of the batch, detached."""
    network.train()
    with arithmetic.step():
        with arithmetic.forward(device):
            logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return logits.detach(), loss.detach()


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    layout: torch.memory_format = torch.channels_last,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Mean loss and accuracy of the network, in eval mode, over all batches of all ranks.

    In float32 whatever the precision of training: bfloat16 rounds a teacher and the student that computes the same
    function differently, and their accuracies would differ by some images.
    """
    network.eval()

    def here() -> tuple[float, int, int]:
        loss = torch.zeros((), dtype=torch.float64)
        right = seen = 0
        for images, labels in batches:
            logits = network(images.contiguous(memory_format=layout))
            loss = loss + F.cross_entropy(logits, labels, reduction="sum").double().cpu()
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        return loss.item(), right, seen

    loss, right, seen = ranks.sum(*ranks.together(here))
    return loss / seen, right / seen


def evaluate_all(network: nn.Module, job: Job, requests: Requests) -> dict[str, float]:
    """The columns of a row that come from evaluation. Raises signals.Asked if a signal comes meanwhile."""
    row, ranks = {}, job.ranks
    ranks.copy_buffers(network)
    for name in ("holdout", "test"):
        size = max(1, 4 * job.config.schedule.batch_size // ranks.count)
        batches = getattr(job.splits, name).ordered(size, ranks.rank, ranks.count)
        if ranks.count == 1:  # one of several would leave the others waiting
            batches = _until_asked(batches, requests)
        row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(network, batches, job.arithmetic.memory_format, ranks)
    return row


def _until_asked(batches: Iterator[tuple[Tensor, Tensor]], requests: Requests) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        requests.check()
        yield batch


def _batches(job: Job, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches from step `first` on, epoch after epoch, without end."""
    data, epoch, start = job.config.data, first // job.per_epoch, first % job.per_epoch
    while True:
        for images, labels in job.splits.train.batches(
            job.config.schedule.batch_size,
            epoch=epoch,
            seed=job.config.seed,
            augment=job.augment,
            start=start,
            pad=data.pad,
            flip=data.flip,
            share=job.ranks.share(job.config.schedule.batch_size),
        ):
            yield images.contiguous(memory_format=job.arithmetic.memory_format), labels
        epoch, start = epoch + 1, 0


class _Watch:
    """The seconds spent on training, those of the runs before included."""

    def __init__(self, seconds: float) -> None:
        self.since = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Until now."""
        return time.perf_counter() - self.since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is not counted."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - began


class _Meter:
    """Training loss and accuracy since the last evaluation, kept on the device so that no step waits for them.

    Of several ranks each counts its share; all of them look, take and save at the same steps.
    """

    def __init__(
        self,
        device: torch.device,
        state: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.device, self.ranks = device, ranks
        self.shown = float("nan")  # the last loss that was looked at
        self.take()
        if state is not None:  # go on counting where an interrupted run stopped
            self.loss += state["loss"][ranks.rank]
            self.right += state["right"][ranks.rank]
            self.batches, self.images = int(state["batches"]), int(state["images"])

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        self.loss += loss
        self.right += (logits.argmax(1) == labels).sum()
        self.batches += 1
        self.images += len(labels) * self.ranks.count
        if not self.pending:
            self.since = step
        self.pending.append(loss)
        alone = self.device.type == "cpu" and self.ranks.count == 1
        if alone or len(self.pending) >= 50:  # a look at the loss makes the CPU wait for a GPU, or for other ranks
            self.check()

    def check(self) -> None:
        """Raise ExperimentError if any loss since the last check was not finite, on any rank."""
        self.ranks.together(self._look)

    def _look(self) -> None:
        if self.pending:
            losses = torch.stack(self.pending).tolist()
            self.shown = losses[-1]
            for step, loss in enumerate(losses, self.since + 1):
                if not math.isfinite(loss):
                    raise DivergedError(_not_finite("The loss is", step))
        self.pending = []

    def take(self) -> tuple[float | None, float | None]:
        """Mean loss and accuracy since the last call, which starts them anew."""
        mean = None, None
        if getattr(self, "batches", 0):
            state = self.state()
            mean = sum(state["loss"]) / len(state["loss"]) / self.batches, sum(state["right"]) / self.images
        self.loss, self.right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.batches = self.images = self.since = 0
        self.pending: list[Tensor] = []
        return mean

    def state(self) -> dict[str, Any]:
        """What a new meter needs to go on counting after an interruption."""
        loss, right = self.ranks.each(float(self.loss)), self.ranks.each(float(self.right))
        return {"loss": loss, "right": right, "batches": self.batches, "images": self.images}


def _not_finite(what: str, step: int) -> str:
    return (
        f"{what} not finite at step {step}; the last good checkpoint is kept. "
        "Try a lower schedule.lr, or a longer schedule.warmup."
    )


def _row(job: Job, step: int, seconds: float, loss: float | None, accuracy: float | None) -> dict[str, float]:
    examples = step * job.config.schedule.batch_size
    row: dict[str, float] = {
        "step": step,
        "epoch": step / job.per_epoch,
        "examples": examples,
        "seconds": seconds if step else 0.0,
        "flops": examples * job.flops,
    }
    row |= {key: row[key] + spent for key, spent in job.before.items()}
    return row if loss is None or accuracy is None else row | {"train_loss": loss, "train_accuracy": accuracy}


def _save(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    job: Job,
    step: int,
    rows: list[dict[str, float]],
    seconds: float,
    meter: Mapping[str, Any],
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rows": rows,
        "seconds": seconds,
        "meter": meter,
    }
    if not all(bool(t.isfinite().all()) for t in network.state_dict().values()):
        raise DivergedError(_not_finite("A weight is", step))  # the next loss would not be
    checkpoint.save(job.folder, state)
