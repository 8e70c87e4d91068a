"""What an arm is. Nothing here imports torch, so that a wrong command line fails at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Start(Protocol):
    """What an arm can do to the student before it is trained. `experiments/start.py` does it."""

    def transfer(self, split: str | None = None) -> None:
        """Fill the student so that it computes its teacher's function, as `split` and the settings of `growth` say."""

    def random_pad(self) -> None:
        """Fill one corner of each tensor with the teacher's; the rest stays as the constructor drew it."""

    def shrink_towards_fresh(self, share: float) -> None:
        """Multiply all weights by `share`, and add (1 - share) times those that the constructor drew."""

    @property
    def growth(self) -> Any:
        """The settings of `growth`."""


@dataclass(frozen=True)
class Arm:
    """How a network starts, and what it learns from. All arms share the student, the data and the schedule."""

    name: str
    place: int  # among the arms, in tables and legends
    summary: str  # one line
    look: tuple[str, Any, str]  # colour, line style and marker in figures
    rate: float  # initial learning rate as a multiple of schedule.lr, unless the experiment sets rates.<name>
    start: Callable[[Start], None] = lambda start: None  # how the student is filled; by default it stays random
    needs_teacher: bool = False  # its teacher's training counts in the total cost
    starts_from_teacher: bool = False  # growth.warmup applies
    has_student: bool = True  # otherwise the teacher itself is trained on
    is_default: bool = True  # runs where an experiment names no arms
    keeps_function: bool = False  # the student begins as its teacher, which is measured
    is_guided: bool = False  # it also learns the teacher's outputs on each batch
    reads: tuple[str, ...] = ()  # settings of `growth` that change its result
