"""What the terminal shows while a network trains: a bar on a terminal, one line an evaluation elsewhere."""

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Row = Mapping[str, float]
Log = Callable[[Row], object]


class Follower:
    """Shows the training of one network while its block runs, from step `first` on; `log` receives every row, too."""

    def __init__(
        self, console: Console, name: str, total: int, first: int, batch_size: int, log: Log | None = None
    ) -> None:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.console, self.batch_size, self.log = console, batch_size, log
        self.has_bar = console.is_terminal and not console.quiet
        self.bar = Progress(*columns, console=console, expand=True, disable=not self.has_bar)
        self.bar.add_task(name, total=total, completed=first, text="")
        (self.task,) = self.bar.tasks
        self.accuracy = ""

    def __enter__(self) -> "Follower":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int, loss: float) -> None:
        """Note that `step` steps are done. The loss is NaN while nobody has looked at it."""
        text = f"loss {loss:.3f}  " * (loss == loss) + self.accuracy + self._speed() if self.has_bar else ""
        self.bar.update(self.task.id, completed=step, text=text)

    def evaluate(self) -> None:
        """Say on the bar that an evaluation goes on."""
        self.bar.update(self.task.id, text="evaluates")

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
            f"{self.task.description:<22} step {int(row['step']):>6}/{self.task.total:.0f}  {loss}"
            f"holdout {row['holdout_accuracy']:.2%}  {self.accuracy}{self._speed()}"
            + (f"  {duration(left)} left" if left else ""),
            soft_wrap=True,
            highlight=False,
        )

    def _speed(self) -> str:
        return f"  {self.task.speed * self.batch_size:,.0f} images/s" if self.task.speed else ""


def duration(seconds: float) -> str:
    """Return a time in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
