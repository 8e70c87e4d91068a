"""Files that are complete under their name, or not there at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .config import ExperimentError


def write(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written: under a temporary name, to the disk, then renamed.

    Raises ExperimentError if the disk refuses it; what stood under the name before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another folder. "
            "What was written before is complete, and the same command goes on from it."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


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
