"""What a run leaves on disk to be read: a curve and a manifest, each complete under its name, or not there at all."""

import csv
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .config import ExperimentError
from .files import write

Point = dict[str, float]  # column of curve.csv -> value; NaN where the cell is empty
COLUMNS: tuple[str, ...] = (
    *("step", "epoch", "examples", "seconds", "flops"),
    *("train_loss", "train_accuracy", "holdout_loss", "holdout_accuracy", "test_loss", "test_accuracy"),
)


def write_curve(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the curve so far; every reader sees whole rows."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    table.writeheader()
    table.writerows({key: _shown(value) for key, value in row.items()} for row in rows)
    write(folder / "curve.csv", text.getvalue().encode())


def parse_curve(data: bytes, name: str | Path) -> list[Point]:
    """The points of a curve's CSV; `name` is what messages call it.

    Raises ExperimentError if a column is missing, a cell is no number or there is no point.
    """
    heads, *rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""))) or [[]]
    missing = [column for column in COLUMNS if column not in heads]
    if missing:
        raise ExperimentError(f"The curve {name} has no column {missing[0]}: run its arm again.")
    places = [heads.index(column) for column in COLUMNS]
    padding = [""] * len(heads)  # a row may be cut off
    try:
        points = [
            dict(zip(COLUMNS, [float(cells[i]) if cells[i] else math.nan for i in places], strict=True))
            for cells in (row + padding for row in rows if row)
        ]
    except ValueError as error:
        raise ExperimentError(f"The curve {name} has a cell that is no number ({error}): run its arm again.") from None
    if not points:
        raise ExperimentError(f"The curve {name} has no rows: run its arm again.")
    return points


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


def processes(before: Mapping[str, Any] | None, now: Mapping[str, Any], first: int) -> list[dict[str, Any]]:
    """The processes that made the steps of a stage, and which: the last is this one, from `first` on.

    `before` is the manifest so far, `now` the provenance and the machine of this process. `to` is None until the stage
    is done, or another process has gone on from where this one was saved; a process whose steps were all lost is not
    named.
    """
    made: list[dict[str, Any]] = []
    for process in (before or {}).get("processes", ()):
        last = first if process["to"] is None else min(first, process["to"])
        made += [process | {"to": last}] * (last > process["from"])
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return [*made, {"started": started, **now, "from": first, "to": None}]


def provenance() -> dict[str, Any]:
    """What tells later where a curve came from: commit, versions, machine, command."""
    return {
        "commit": _git("rev-parse", "HEAD") or "",
        "dirty": _is_dirty(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "hydra-core")},
        "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _is_dirty() -> bool | None:
    """Whether the code is another than the commit's: files changed, or new modules and configurations are there.

    None where git cannot say.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no")
    added = _git("status", "--porcelain", "--untracked-files=all", "--", "net2net", "experiments", "configs")
    return None if changed is None or added is None else bool(changed or added)


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
