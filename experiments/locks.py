"""One writer a folder: locks that the kernel gives back when their owner dies, however it dies."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import ExperimentError
from .files import remove_partial

NAME = ".lock"  # in the folder that it guards, while somebody holds it

_open: set[int] = set()  # descriptors of this process


class BusyError(ExperimentError):
    """Another process writes in the folder."""


@contextmanager
def hold(folder: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Be the only one that writes in `folder`, which is made if it is not there, while the block runs.

    If another process is: raises BusyError, which says who; with `waiting`, calls it once with the same words and
    waits. What a killed writer left half-written is removed. Raises ExperimentError where there are no locks.
    """
    path = folder / NAME
    descriptor = _acquire(path, waiting)
    try:
        remove_partial(folder)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it sees that it is gone, and asks for the new one
        _close(descriptor)


def tidy(folder: Path) -> None:
    """Remove the file of a lock whose owner was killed before it could; a lock that is held stays."""
    if (folder / NAME).exists():
        with suppress(BusyError), hold(folder):
            pass


def _acquire(path: Path, waiting: Callable[[str], None] | None) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ExperimentError(
                f"The folder {path.parent} cannot be written ({error.strerror}): make room, or choose another folder."
            ) from error
        _open.add(descriptor)
        try:
            if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                owner = os.pread(descriptor, 200, 0).decode() or "a process that has just begun"
                if waiting is None:
                    raise BusyError(
                        f"{path.parent} is being written by {owner}: "
                        "let that run end, or write elsewhere with runs=FOLDER."
                    )
                waiting(owner)
                waiting = lambda _: None  # noqa: E731 (said once)
                _lock(descriptor, fcntl.LOCK_EX)
            if _names(path, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException as error:
            _close(descriptor)
            if isinstance(error, OSError):
                raise ExperimentError(
                    f"The file system of {path.parent} has no locks ({error.strerror}), so that two runs could write "
                    "there at once: choose another with runs=FOLDER."
                ) from error
            raise
        _close(descriptor)  # its owner before us has removed it


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)


def _close(descriptor: int) -> None:
    _open.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    # A data-loading worker lives some seconds longer than a run that is killed, and would hold its lock on.
    for descriptor in list(_open):
        _close(descriptor)


os.register_at_fork(after_in_child=_forget)
