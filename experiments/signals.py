"""Ctrl-C, and the signals by which a launcher takes its machine back: noted at once, obeyed between two steps."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# Ctrl-C; how a system or a scheduler ends a job; how submitit tells a job that its time is up.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved what it needs to continue."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)  # both, so that it can be pickled
        self.number = signal.Signals(number)

    def __str__(self) -> str:
        return self.args[1]


class SignalPending(Exception):
    """A signal has arrived during an evaluation, which is abandoned."""


class Requests:
    """The signals that arrive while the block runs, kept until the run has saved.

    A second Ctrl-C is not kept: it stops the run at once.
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self._handlers: dict[int, Any] = {}  # those that were installed before

    def __enter__(self) -> "Requests":
        for number in CAUGHT:
            handler = signal.getsignal(number)
            # What is ignored stays ignored, and a handler that is not Python's could not be restored.
            if number == signal.SIGINT or handler not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @property
    def next(self) -> int:
        """The signal that arrived first; 0 if there is none."""
        return self.pending[0] if self.pending else 0

    def add(self, number: int) -> None:
        """Note a signal that another process of this run has received; 0 is none."""
        if number and not self.pending:
            self.pending.append(number)

    def raise_if_pending(self) -> None:
        """Raise SignalPending if a signal has arrived."""
        if self.pending:
            raise SignalPending

    def deliver(self, where: str) -> None:
        """Do what each pending signal asks for, after the run has saved. Returns if the run is to continue.

        A launcher's own handler is called as if it had received the signal: it may requeue the job and raise
        SystemExit, or only take note. Without one, and for Ctrl-C, raises Interrupted, which says `where` the run is.
        """
        while self.pending:
            number = self.pending.pop(0)
            handler: Callable[[int, FrameType | None], Any] | Any = self._handlers[number]
            if number == signal.SIGINT or not callable(handler):
                raise Interrupted(number, where)
            handler(number, None)
