"""The training loop: one network, one schedule, one curve."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ledger
from .config import Config, ExperimentError, steps
from .data import Splits, complete_batches
from .device import autocast
from .optimizers import make_optimizer, rate_at
from .progress import Follower
from .randomness import derive_seed


@dataclass(frozen=True)
class Job:
    """One training run, everything resolved to numbers."""

    folder: Path
    config: Config
    splits: Splits
    device: torch.device
    precision: torch.dtype
    rate: float  # initial learning rate
    epochs: str
    flops: int  # of training on one image

    @property
    def per_epoch(self) -> int:
        """Steps in one pass over the training images."""
        return complete_batches(len(self.splits.train), self.config.schedule.batch_size)

    @property
    def total(self) -> int:
        """Steps in all."""
        return steps(self.epochs, self.per_epoch)


class Interrupted(Exception):
    """The run was asked to stop, and has written what it needs to go on."""


def train(network: nn.Module, job: Job, follower: Follower) -> list[dict[str, float]]:
    """Train `network` in place and return its curve, one row an evaluation, the first at step 0.

    The curve and a checkpoint are written at every evaluation. A run whose folder has a checkpoint goes on from there;
    data order, augmentation and dropout depend on seed and step alone, so it sees what it would have seen.
    Raises ExperimentError at a loss that is not finite (the last checkpoint stays), Interrupted after Ctrl-C.
    """
    schedule, device = job.config.schedule, job.device
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(network, schedule)
    warmup, every = (steps(d, job.per_epoch) for d in (schedule.warmup, schedule.evaluate))
    state = _resume(network, optimizer, job)
    rows, first, meter = state["rows"], state["step"], _Meter(device, state["meter"])
    if rows:
        ledger.write_curve(job.folder, rows)  # the checkpoint may be one evaluation ahead of it
    else:
        rows.append(_row(job, 0, 0.0, None, None) | evaluate_all(network, job))
        _save(network, optimizer, job, 0, rows, 0.0)
    follower.row(rows[-1])
    started = time.perf_counter() - state["seconds"]
    with _stop_request() as stop:
        for step, (images, labels) in zip(range(first, job.total), _batches(job, first), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = job.rate * rate_at(step, job.total, warmup, schedule.decay)
            torch.manual_seed(derive_seed(job.config.seed, "dropout", step))
            logits, loss = learn(network, optimizer, images, labels, device, job.precision)
            meter.add(step, loss, logits, labels)
            follower.advance(step + 1, meter.shown)
            last = step + 1 == job.total
            if (step + 1) % every == 0 or last:
                meter.check()
                pause = time.perf_counter()
                rows.append(_row(job, step + 1, pause - started, *meter.take()) | evaluate_all(network, job))
                started += time.perf_counter() - pause  # evaluation is not counted as training
                follower.row(rows[-1])
                _save(network, optimizer, job, step + 1, rows, rows[-1]["seconds"])
            if stop():
                meter.check()
                _save(network, optimizer, job, step + 1, rows, time.perf_counter() - started, meter.state())
                raise Interrupted(f"{job.folder.name} stopped at step {step + 1} of {job.total}")
    return rows


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> dict[str, Any]:
    """What the folder's checkpoint holds, loaded into network and optimizer; the initial state without one."""
    if not (job.folder / "checkpoint.pt").exists():
        return {"step": 0, "rows": [], "seconds": 0.0, "meter": None}
    state = ledger.load_checkpoint(job.folder)
    load_network(network, state, job.folder)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(_foreign(job.folder)) from error
    return state


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
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One step of training; return logits (N x classes) and loss of the batch, detached."""
    network.train()
    with autocast(device, precision):
        logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return logits.detach(), loss.detach()


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy of the network, in eval mode, over all batches.

    In float32 whatever the precision of training: bfloat16 rounds a teacher and the student that computes the same
    function differently, and their accuracies would differ by some images.
    """
    network.eval()
    loss = torch.zeros((), dtype=torch.float64)
    right = seen = 0
    for images, labels in batches:
        logits = network(images.contiguous(memory_format=torch.channels_last))
        loss = loss + F.cross_entropy(logits, labels, reduction="sum").double().cpu()
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return loss.item() / seen, right / seen


def evaluate_all(network: nn.Module, job: Job) -> dict[str, float]:
    """The columns of a row that come from evaluation."""
    row = {}
    for name in ("holdout", "test"):
        batches = getattr(job.splits, name).ordered(4 * job.config.schedule.batch_size)
        row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(network, batches)
    return row


def _batches(job: Job, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches from step `first` on, epoch after epoch, without end."""
    data, epoch, start = job.config.data, first // job.per_epoch, first % job.per_epoch
    while True:
        for images, labels in job.splits.train.batches(
            job.config.schedule.batch_size,
            epoch=epoch,
            seed=job.config.seed,
            augment=True,
            start=start,
            pad=data.pad,
            flip=data.flip,
        ):
            yield images.contiguous(memory_format=torch.channels_last), labels
        epoch, start = epoch + 1, 0


class _Meter:
    """Training loss and accuracy since the last evaluation, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device, state: Mapping[str, float] | None = None) -> None:
        self.device = device
        self.shown = float("nan")  # the last loss that was looked at
        self.take()
        if state is not None:  # go on counting where an interrupted run stopped
            self.loss += state["loss"]
            self.right += state["right"]
            self.batches, self.images = int(state["batches"]), int(state["images"])

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        self.loss += loss
        self.right += (logits.argmax(1) == labels).sum()
        self.batches += 1
        self.images += len(labels)
        if not self.pending:
            self.since = step
        self.pending.append(loss)
        if self.device.type == "cpu" or len(self.pending) >= 50:  # on a GPU a look at the loss makes the CPU wait
            self.check()

    def check(self) -> None:
        """Raise ExperimentError if any loss since the last check was not finite."""
        if self.pending:
            finite = torch.stack(self.pending).isfinite()
            self.shown = float(self.pending[-1])
            if not bool(finite.all()):
                step = self.since + int((~finite).int().argmax()) + 1
                raise ExperimentError(_not_finite("The loss is", step))
        self.pending = []

    def take(self) -> tuple[float | None, float | None]:
        """Mean loss and accuracy since the last call, which starts them anew."""
        mean = None, None
        if getattr(self, "batches", 0):
            mean = float(self.loss) / self.batches, float(self.right) / self.images
        self.loss, self.right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.batches = self.images = self.since = 0
        self.pending: list[Tensor] = []
        return mean

    def state(self) -> dict[str, float]:
        """What a new meter needs to go on counting after an interruption."""
        return {"loss": float(self.loss), "right": float(self.right), "batches": self.batches, "images": self.images}


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
        "seconds": seconds,
        "flops": examples * job.flops,
    }
    return row if loss is None or accuracy is None else row | {"train_loss": loss, "train_accuracy": accuracy}


def _save(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    job: Job,
    step: int,
    rows: list[dict[str, float]],
    spent: float,
    meter: Mapping[str, float] | None = None,
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rows": rows,
        "seconds": spent,
        "meter": meter,
    }
    if not all(bool(t.isfinite().all()) for t in network.state_dict().values()):
        raise ExperimentError(_not_finite("A weight is", step))  # the next loss would not be
    ledger.save_checkpoint(job.folder, state)
    ledger.write_curve(job.folder, rows)


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a question that the loop asks between two steps; a second one stops at once."""
    asked = []

    def ask(*_: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
