"""What the terminal shows while a network trains: a bar on a terminal, one line an evaluation elsewhere."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Row = Mapping[str, float]
Log = Callable[[Row], object]


@dataclass(frozen=True)
class Length:
    """What a run has to do: steps, and evaluations between them, at the first and after the last one."""

    steps: int
    every: int  # steps between evaluations
    batch_size: int
    evaluation: float = 0.0  # an evaluation takes as long as so many steps, about

    def work(self, step: int, share: float = 0.0) -> float:
        """Return the work before a step, in steps; with a `share` of the evaluation that may stand there."""
        return step + self.evaluation * (math.ceil(step / self.every) + share)


class Follower:
    """Shows the training of one network while its block runs, from step `first` on; `log` receives every row, too."""

    def __init__(self, console: Console, name: str, length: Length, first: int, log: Log | None = None) -> None:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.console, self.length, self.log = console, length, log
        self.has_bar = console.is_terminal and not console.quiet
        self.bar = Progress(*columns, console=console, expand=True, disable=not self.has_bar)
        self.bar.add_task(name, total=length.work(length.steps, 1.0), completed=int(length.work(first)), text="")
        (self.task,) = self.bar.tasks
        self.accuracy, self.step = "", first

    def __enter__(self) -> "Follower":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int, loss: float) -> None:
        """Note that `step` steps are done. The loss is NaN while nobody has looked at it."""
        text = f"loss {loss:.3f}  " * (loss == loss) + self.accuracy + self._speed() if self.has_bar else ""
        self.step = step
        self.bar.update(self.task.id, completed=self.length.work(step), text=text)

    def evaluate(self, share: float) -> None:
        """Note that a share of an evaluation is done."""
        text = f"evaluates on holdout and test images: {share:.0%}" if self.has_bar else ""
        self.bar.update(self.task.id, completed=self.length.work(self.step, share), text=text)

    def row(self, row: Row) -> None:
        """Show an evaluation and log it."""
        if self.log is not None:
            self.log(row)
        self.accuracy = f"test {row['test_accuracy']:.2%}"
        loss = f"loss {row['train_loss']:.3f}  " if "train_loss" in row else ""
        if self.has_bar:
            self.bar.update(self.task.id, text=self.accuracy)
            return
        left = self.task.time_remaining
        self.console.print(
            f"{self.task.description:<22} step {int(row['step']):>6}/{self.length.steps}  {loss}"
            f"holdout {row['holdout_accuracy']:.2%}  {self.accuracy}{self._speed()}"
            + (f"  {duration(left)} left" if left else ""),
            soft_wrap=True,
            highlight=False,
        )

    def _speed(self) -> str:
        return f"  {self.task.speed * self.length.batch_size:,.0f} images/s" if self.task.speed else ""


def duration(seconds: float) -> str:
    """Return a time in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
