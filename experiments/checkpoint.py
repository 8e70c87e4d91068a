"""Checkpoints: all that a run needs to go on, checked when it is read, and the one before in reserve.

A checkpoint is a file of `torch.save` (`torch.load` reads it) that ends with the SHA-256 of what is before. No
generator is in it, because none lasts from one step to the next: data order, augmentation and dropout depend on
the run's seed and the step alone (`randomness.py`), so the step is their position.
"""

import hashlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import files
from .config import ExperimentError

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_DIGEST = hashlib.sha256().digest_size


class _DamagedError(Exception):
    """The file is not as it was written."""


def exists(folder: Path) -> bool:
    """Whether a run has left a checkpoint in the folder."""
    return any((folder / name).exists() for name in (NEWEST, PREVIOUS))


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a run needs to go on, or a student of its teacher; the checkpoint before is kept beside it.

    A run that is killed in here leaves the one or the other, whole.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    files.write(folder / NEWEST, buffer.getbuffer(), keep=folder / PREVIOUS)


def load(folder: Path) -> dict[str, Any]:
    """What `save` wrote last (plain data and tensors, nothing executed).

    If that is damaged: the one before, and a line on stderr. Raises ExperimentError if neither can be read.
    """
    return _load(folder)[0]


def resume(folder: Path) -> dict[str, Any]:
    """As `load`, for the one who will write there next: a damaged checkpoint is removed, lest it be kept as good.

    A folder without a checkpoint gives the state before the first step.
    """
    if not exists(folder):
        return {"step": 0, "rows": [], "seconds": 0.0, "meter": None}
    state, damaged = _load(folder)
    if damaged:
        (folder / NEWEST).unlink(missing_ok=True)
    return state


def drop_previous(folder: Path) -> None:
    """Remove the reserve of a run that is finished."""
    (folder / PREVIOUS).unlink(missing_ok=True)


def _load(folder: Path) -> tuple[dict[str, Any], bool]:
    """The state, and whether the newest file is damaged."""
    newest, previous = folder / NEWEST, folder / PREVIOUS
    if not newest.exists() and previous.exists():  # killed between the two renames of a save
        newest, previous = previous, newest
    try:
        return _read(newest), False
    except _DamagedError as error:
        reason = str(error)
    again = f"delete {folder} to run this stage anew."
    if not previous.exists():
        raise ExperimentError(f"The checkpoint {newest} cannot be read ({reason}): {again}")
    try:
        state = _read(previous)
    except _DamagedError as error:
        raise ExperimentError(
            f"Neither checkpoint in {folder} can be read ({newest.name}: {reason}; {previous.name}: {error}): {again}"
        ) from error
    print(f"Warning: {newest} cannot be read ({reason}); going on from {previous.name}.", file=sys.stderr)
    return state, True


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _DamagedError(error.strerror or type(error).__name__) from error
    body = memoryview(content)[:-_DIGEST]
    if hashlib.sha256(body).digest() != content[-_DIGEST:]:
        raise _DamagedError("its checksum is wrong")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever makes a foreign file's reader fail
        raise _DamagedError(type(error).__name__) from error
    if not isinstance(state, dict) or not {"network", "optimizer", "step", "rows"} <= set(state):
        raise _DamagedError("it is not one of this project")
    return state
