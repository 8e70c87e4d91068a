"""Files that are complete under their name, or not there at all."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from .config import ExperimentError


def write(path: Path, content: bytes | memoryview, keep: Path | None = None, flush: bool = True) -> None:
    """Write a file that is never seen half-written: under a temporary name, to the disk, then renamed.

    Without `flush` the disk is not waited for: for what can be made again, should the machine lose power meanwhile.

    What stood under the name before stands under `keep` afterwards, if that is given. The temporary name is nobody
    else's, so of several that write one file at once each leaves a whole one, the last for good.
    Raises ExperimentError if the disk refuses it; what was there before still is, under its name or as `keep`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another folder. "
            "What was written before is complete, and the same command goes on from it."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what writers left that were killed while they wrote. Only for who alone writes in the folder."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError):
            partial.unlink()


def writable(folder: Path, instead: str) -> Path:
    """The folder, which exists and can be written; ExperimentError if that cannot be brought about.

    `instead` says how to choose another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ExperimentError(f"The folder {folder} cannot be written ({error.strerror}): {instead}.") from error
