"""What a run leaves on disk to be read: a curve (CSV) and a manifest (JSON), each complete or absent.

Nothing here imports torch: the reports read these files, too.
"""

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
MANIFEST = "manifest.json"
COLUMNS: tuple[str, ...] = (
    *("step", "epoch", "examples", "seconds", "flops"),
    *("train_loss", "train_accuracy", "holdout_loss", "holdout_accuracy", "test_loss", "test_accuracy"),
)


def write_curve(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the curve so far; readers always see whole rows."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    table.writeheader()
    for row in rows:
        table.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write(folder / "curve.csv", text.getvalue().encode())


def parse_curve(data: bytes, name: str | Path) -> list[Point]:
    """Return the points of a curve, one an evaluation; ExperimentError, which calls it `name`, if it is not whole."""
    table = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
    missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
    if missing:
        raise ExperimentError(f"The curve {name} has no column {missing[0]}: run its arm again.")
    try:  # a row may be cut off
        points = [{column: float(row[column] or math.nan) for column in COLUMNS} for row in table]
    except ValueError as error:
        raise ExperimentError(f"The curve {name} has a cell that is no number ({error}): run its arm again.") from None
    if not points:
        raise ExperimentError(f"The curve {name} has no rows: run its arm again.")
    return points


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest as readable JSON."""
    write(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest in a file, or None if there is none; ExperimentError if it cannot be read."""
    try:
        manifest = json.loads(path.read_bytes())
        if not {"settings", "complete"} <= set(manifest):
            raise ValueError("settings or complete is missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ExperimentError(f"{path} is no manifest ({error}): remove its arm and run it again.") from error
    return manifest


def read_complete(curve: Path, manifest: Path) -> tuple[bytes, dict[str, Any]] | None:
    """Return the bytes of a finished arm's curve and its manifest, or None while the arm is unfinished.

    A file that is no manifest, or that was written for another curve, is an ExperimentError.
    """
    record = read_manifest(manifest)
    if record is None or record["complete"] is not True or not curve.exists():
        return None
    data = curve.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.get("curve_sha256"):
        raise ExperimentError(
            f"The curve {curve} does not match curve_sha256 in its manifest: remove its arm and run it again."
        )
    return data, record


def list_processes(
    manifest: Mapping[str, Any] | None, provenance: Mapping[str, Any], first: int
) -> list[dict[str, Any]]:
    """Return the processes that trained a stage, each with the steps `from` .. `to` that it made.

    The last one is this process, which continues from step `first`; its `to` is None until the stage is complete. A
    process whose steps were all lost is left out.
    """
    processes: list[dict[str, Any]] = []
    for process in (manifest or {}).get("processes", ()):
        last = first if process["to"] is None else min(first, process["to"])
        if last > process["from"]:
            processes.append(process | {"to": last})
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return [*processes, {"started": started, **provenance, "from": first, "to": None}]


def describe_provenance() -> dict[str, Any]:
    """Return the commit, versions and command that this process runs."""
    return {
        "commit": _git("rev-parse", "HEAD") or "",
        "dirty": _is_dirty(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "hydra-core")},
        "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _is_dirty() -> bool | None:
    """Whether the code differs from its commit, new modules and configurations included; None without git."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    added = _git("status", "--porcelain", "--untracked-files=all", "--", "net2net", "experiments", "configs")
    return None if changed is None or added is None else bool(changed or added)


def _git(*arguments: str) -> str | None:
    """What git answers about this checkout; None where it cannot."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
