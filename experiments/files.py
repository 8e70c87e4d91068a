"""Write files that are complete or absent, and lock folders so that each has one writer.

Nothing here imports torch.
"""

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .config import ExperimentError

LOCK = ".lock"  # the lock's file, in the folder that it guards; it is there while somebody holds the lock


class BusyError(ExperimentError):
    """Another process writes in the folder."""


def write(path: Path, content: bytes | memoryview, keep: Path | None = None, flush: bool = True) -> None:
    """Write a file that no reader ever sees half-written, and move the previous one to `keep` if that is given.

    If the disk refuses it, raises ExperimentError, and the previous content is still at `path` or at `keep`.
    `flush` waits until the disk has the content; False is for what can be made again.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with explain_refusal(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as file:
                file.write(content)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def fill_block(page: Path, name: str, text: str) -> bool:
    """Put `text` between the markers `name` of a page; return False if there is no such page or block."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in old and end not in old:
        return False
    before, _, rest = old.partition(begin)
    _, found, after = rest.partition(end)
    if not found or old.count(begin) != 1 or old.count(end) != 1:
        raise ExperimentError(f"The {name} markers in {page} are no pair: write {begin} once, then {end} once.")
    write(page, f"{before}{begin}\n{text}\n{end}{after}".encode())
    return True


@contextmanager
def explain_refusal(path: Path) -> Iterator[None]:
    """Raise ExperimentError if the disk refuses the file that the block writes."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another folder. "
            "Everything written earlier is complete, and the same command continues from it."
        ) from error


def writable(folder: Path, advice: str) -> Path:
    """Make the folder and return it; raise ExperimentError, with advice, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ExperimentError(f"The folder {folder} cannot be written ({error.strerror}): {advice}.") from error


@contextmanager
def hold(folder: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the folder's lock while the block runs, so that no other process writes there.

    The kernel frees the lock when its owner dies, even by kill -9. Temporary files of a killed writer are removed.
    If another process holds it, calls `on_wait` with a description of the owner and waits, or else raises BusyError.
    """
    path, owner = folder / LOCK, "another process"
    lock = FileLock(path, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with suppress(OSError):
                owner = path.read_text() or owner
            if on_wait is None:
                raise BusyError(
                    f"{folder} is being written by {owner}: let that run end, or write elsewhere with runs=FOLDER."
                ) from None
            on_wait(owner)
            lock.acquire(timeout=-1)
    except OSError as error:
        raise ExperimentError(
            f"The folder {folder} cannot be locked ({error.strerror}): "
            "make room, or choose a folder on another file system with runs=FOLDER."
        ) from error
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same
            path.write_text(name_owner())
        for partial in folder.glob(".*.partial"):
            with suppress(OSError):
                partial.unlink()
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while the lock is held: whoever waits for it notices and makes the file anew
        lock.release()


def name_owner() -> str:
    """Return how this process signs what it holds."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_owner_here(owner: str) -> bool | None:
    """Return whether the process of that name lives; None if it is on another machine, or no name is known."""
    found = re.match(r"process (\d+) on (\S+)", owner)
    return Path("/proc", found[1]).exists() if found and found[2] == socket.gethostname() else None


def remove_stale_lock(folder: Path) -> None:
    """Remove the lock's file that a killed process has left; a lock that is held stays."""
    if (folder / LOCK).exists():
        with suppress(BusyError), hold(folder):
            pass
