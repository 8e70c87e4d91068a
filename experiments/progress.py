"""What the terminal shows while a network trains: a bar on a terminal, a line an evaluation elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Follower(Protocol):
    """Is told of every step and every row."""

    def advance(self, step: int, loss: float) -> None:
        """`step` steps are done."""

    def row(self, row: Mapping[str, float]) -> None:
        """An evaluation is done."""


@contextmanager
def follow(console: Console, name: str, total: int, first: int, batch_size: int) -> Iterator[Follower]:
    """Show the training of `name` on the console until the block ends."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console, expand=True) as bar:
            yield _Bar(bar, bar.add_task(name, total=total, completed=first, text=""), batch_size, first)
    else:
        yield _Lines(console, name, total, batch_size, first)


class _Rate:
    """Images a second since the start, evaluations included: what an ETA needs."""

    def __init__(self, batch_size: int, first: int) -> None:
        self.batch_size, self.first, self.started = batch_size, first, time.perf_counter()

    def __call__(self, step: int) -> float:
        return max(0, step - self.first) * self.batch_size / max(1e-9, time.perf_counter() - self.started)


class _Bar:
    def __init__(self, bar: Progress, task: Any, batch_size: int, first: int) -> None:
        self.bar, self.task, self.rate, self.accuracy = bar, task, _Rate(batch_size, first), ""

    def advance(self, step: int, loss: float) -> None:
        shown = f"loss {loss:.3f}  " if loss == loss else ""  # not looked at yet
        text = f"{shown}{self.accuracy}  {self.rate(step):,.0f} images/s"
        self.bar.update(self.task, completed=step, text=text)

    def row(self, row: Mapping[str, float]) -> None:
        self.accuracy = f"test {row['test_accuracy']:.2%}"
        self.bar.update(self.task, text=self.accuracy)


class _Lines:
    def __init__(self, console: Console, name: str, total: int, batch_size: int, first: int) -> None:
        self.console, self.name, self.total = console, name, total
        self.rate = _Rate(batch_size, first)

    def advance(self, step: int, loss: float) -> None:
        pass

    def row(self, row: Mapping[str, float]) -> None:
        rate = self.rate(int(row["step"]))
        left = (self.total - row["step"]) * self.rate.batch_size / rate if rate else 0.0
        loss = f"loss {row['train_loss']:.3f}  " if "train_loss" in row else ""
        speed = f"  {rate:,.0f} images/s  {duration(left)} left" if rate else ""
        self.console.print(
            f"{self.name:<22} step {int(row['step']):>6}/{self.total}  {loss}"
            f"holdout {row['holdout_accuracy']:.2%}  test {row['test_accuracy']:.2%}{speed}",
            soft_wrap=True,
            highlight=False,
        )


def duration(seconds: float) -> str:
    """A time in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
