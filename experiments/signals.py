"""Ctrl-C, and the signals by which a launcher takes its machine back: heard at once, obeyed between two steps."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; what a system or a scheduler ends a job with; what submitit tells a job with that its time is up.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has written what it needs to go on."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)  # both, so that it can be sent to another process
        self.number = signal.Signals(number)
        self.where = where

    def __str__(self) -> str:
        return self.where

    def __reduce__(self) -> tuple[Any, ...]:
        return Interrupted, (self.number, str(self))  # from a job's process to the one that started the sweep


class Asked(Exception):
    """A signal has come: long work ends early."""


class Requests:
    """The signals that came while the block ran, kept until the run has saved what it has.

    A second Ctrl-C is not kept: it stops the run at once.
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        for number in CAUGHT:
            before = signal.getsignal(number)
            # What is ignored stays ignored, and a handler that is not Python's cannot be put back.
            if number == signal.SIGINT or before not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @property
    def next(self) -> int:
        """The signal that came first, 0 if none did."""
        return self.pending[0] if self.pending else 0

    def hear(self, number: int) -> None:
        """A signal that another process of this run was given is this one's, too; 0 is none."""
        if number and not self.pending:
            self.pending.append(number)

    def check(self) -> None:
        """Raise Asked if a signal has come."""
        if self.pending:
            raise Asked

    def deliver(self, where: str) -> None:
        """Do what each signal that came asks for, now that the run is saved; return if the run is to go on.

        A launcher's own handler is called as if nobody had stood before it: it may requeue the job and raise
        SystemExit, or only take note. Without one, and for Ctrl-C, raises Interrupted; `where` says how far the run is.
        """
        while self.pending:
            number = self.pending.pop(0)
            handler: Callable[[int, FrameType | None], Any] | Any = self._before[number]
            if number == signal.SIGINT or not callable(handler):
                raise Interrupted(number, where)
            handler(number, None)
