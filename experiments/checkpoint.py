"""Checkpoints: everything that a run needs to continue, verified when it is read, with the previous one in reserve.

A checkpoint is a file of `torch.save` (`torch.load` reads it) followed by its SHA-256, because torch loads most files
with a flipped bit without noticing. It holds no random generator: data order, augmentation and dropout depend on the
run's seed and the step alone (`randomness.py`).
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
_DIGEST_SIZE = hashlib.sha256().digest_size


def exists(folder: Path) -> bool:
    """Return whether the folder holds a checkpoint."""
    return any((folder / name).exists() for name in (NEWEST, PREVIOUS))


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint and keep the previous one beside it; a process killed in here leaves one of them whole."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    files.write(folder / NEWEST, buffer.getbuffer(), keep=folder / PREVIOUS)


def load(folder: Path, repair: bool = False) -> dict[str, Any]:
    """Return the newest checkpoint, or the previous one with a warning; ExperimentError if neither can be read.

    With `repair` a damaged file is removed, so that the next save does not keep it as the previous one.
    """
    faults: list[str] = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if not path.exists():  # a process may have been killed between the two renames of a save
            continue
        try:
            state = _read(path)
        except (OSError, ValueError) as error:
            faults.append(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")
            continue
        if faults:
            print(f"Warning: {faults[0]}; continuing from {path.name}.", file=sys.stderr)
        if faults and repair:
            (folder / NEWEST).unlink()
        return state
    what = "; ".join(faults) or f"There is no checkpoint in {folder}"
    raise ExperimentError(f"{what}: delete {folder} to run this stage anew.")


def resume(folder: Path) -> dict[str, Any]:
    """Return the state that a run in this folder continues from: its checkpoint, or the state before the first step."""
    return load(folder, repair=True) if exists(folder) else {"step": 0, "rows": [], "seconds": 0.0, "meter": None}


def drop_previous(folder: Path) -> None:
    """Remove the previous checkpoint of a run that is complete."""
    (folder / PREVIOUS).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """Read and verify one file; a ValueError says what is wrong with it."""
    content = path.read_bytes()
    body = memoryview(content)[:-_DIGEST_SIZE]
    if hashlib.sha256(body).digest() != content[-_DIGEST_SIZE:]:
        raise ValueError("its checksum is wrong")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may make the reader fail in any way
        raise ValueError(type(error).__name__) from error
    if not isinstance(state, dict) or not {"network", "optimizer", "step", "rows"} <= set(state):
        raise ValueError("it is not one of this project")
    return state
