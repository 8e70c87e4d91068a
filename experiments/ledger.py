"""What a run leaves on disk: a curve, a manifest, a checkpoint; each complete under its name, or not there at all."""

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .config import ExperimentError
from .files import write
from .report import COLUMNS


def write_curve(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the curve so far; every reader sees whole rows."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    table.writeheader()
    table.writerows({key: _shown(value) for key, value in row.items()} for row in rows)
    write(folder / "curve.csv", text.getvalue().encode())


def _shown(value: float) -> float | str:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest as readable JSON."""
    write(folder / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run, None if the folder has none; ExperimentError if it cannot be read."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not {"settings", "complete"} <= set(manifest):
            raise ValueError("settings or complete is missing")
    except (OSError, ValueError, TypeError) as error:
        raise ExperimentError(f"{path} is no manifest ({error}): delete {folder} to run this stage anew.") from error
    return manifest


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write everything that a run needs to go on, or that a student needs of its teacher."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write(folder / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote (plain data and tensors, nothing executed); ExperimentError if it cannot be read."""
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ExperimentError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): delete {folder} to run this stage anew."
        ) from error
    if not isinstance(state, dict) or not {"network", "optimizer", "step", "rows"} <= set(state):
        raise ExperimentError(f"{path} is not a checkpoint of this project: delete {folder} to run this stage anew.")
    return state


def provenance() -> dict[str, Any]:
    """What tells later where a curve came from: commit, versions, machine, command."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "hydra-core")},
        "command": " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
