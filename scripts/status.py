"""Shows sweeps at a glance while they go on: python scripts/status.py [RUNS].

Of each experiment, a table of arms by seeds: what is done (final test accuracy), running (how far, test accuracy, time
left), waiting, failed or stopped, and what failed runs said last. Reads only.
"""

import argparse
import json
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.analysis.curves import arm_files
from experiments.config import ordered
from experiments.files import LOCK
from experiments.progress import duration
from experiments.sweep import FAILURE, PLAN, read_plan

STATES = ("done", "running", "waiting", "failed", "stopped")
QUIET = 600  # seconds without a word after which a process on another machine is taken for dead; it saves every minute
CELL = 22  # characters of a seed's column
MOST_LINES = 20  # of failures


@dataclass(frozen=True)
class Stage:
    """One arm of one seed, as it is now."""

    state: str  # one of STATES
    epoch: str = ""  # how far it is: `1.5/4ep`
    accuracy: float | None = None  # test accuracy at the last evaluation, in 0..1
    left: float | None = None  # seconds to its end, if it is running
    failure: str = ""  # what its last job said

    def __str__(self) -> str:
        shown = "" if self.accuracy is None else f"{100 * self.accuracy:.2f}"
        if self.state == "done":
            return shown
        left = "" if self.left is None else duration(self.left)
        word = "" if self.state == "running" else self.state
        return " ".join(part for part in (word, self.epoch, shown, left) if part)


def look(curve: Path, manifest: Path) -> Stage:
    """What the files of one arm say about it."""
    record, row = _manifest(manifest), _last_row(curve)
    accuracy = float(row["test_accuracy"]) if row else None
    if record.get("complete") is True:
        return Stage("done", accuracy=accuracy)
    folder = manifest.parent
    length = str(record.get("settings", {}).get("schedule", {}).get("epochs", ""))
    epoch, share = _progress(row, length)
    if held(folder):
        return Stage("running", epoch, accuracy, _left(record, row, share, curve, manifest))
    if failure := _text(folder / FAILURE):
        return Stage("failed", epoch, accuracy, failure=failure.splitlines()[-1])
    return Stage("stopped" if record else "waiting", epoch, accuracy)


def held(folder: Path) -> bool:
    """Whether a process trains in the folder, by what its lock says: without trying it, which might stop a process.

    Of a process on another machine, whether it has written in the last minutes.
    """
    lock = folder / LOCK
    if not lock.exists():
        return False
    owner = re.match(r"process (\d+) on (\S+)", _text(lock))
    if owner and owner[2] == socket.gethostname():
        return Path("/proc", owner[1]).exists()
    times = [path.stat().st_mtime for path in (lock, folder / "checkpoint.pt", folder / "curve.csv") if path.exists()]
    return time.time() - max(times, default=0) < QUIET


def _text(path: Path) -> str:
    """The text of a file that may not be there, or no more."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _manifest(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _last_row(curve: Path) -> dict[str, str]:
    """The last row of the curve, empty if it has none."""
    lines = _text(curve).splitlines()
    return dict(zip(lines[0].split(","), lines[-1].split(","), strict=False)) if len(lines) > 1 else {}


def _progress(row: dict[str, str], length: str) -> tuple[str, float]:
    """How far a run of this length is, in its own unit, and as a share."""
    total = float(re.sub(r"[a-z]+$", "", length) or 0)
    if not row or not total:
        return "", 0.0
    now = float(row["step"] if length.endswith("it") else row["epoch"])
    return f"{now:.3g}/{length}", now / total


def _left(record: dict[str, Any], row: dict[str, str], share: float, curve: Path, manifest: Path) -> float | None:
    """Seconds to the end, at the pace since this process began, evaluations included; None before it evaluated."""
    if not row or not share:
        return None
    begun = int((record.get("processes") or [{}])[-1].get("from", 0))
    steps = int(row["step"])
    try:
        evaluated, since = curve.stat().st_mtime, manifest.stat().st_mtime
    except OSError:
        return None
    if steps <= begun or evaluated <= since:
        return None
    remaining = steps * (1 - share) / share
    return max(0.0, remaining * (evaluated - since) / (steps - begun) - (time.time() - evaluated))


def read(experiment: Path) -> dict[str, dict[int, Stage]]:
    """Arm -> seed -> how it is, of all that has begun or is planned, in reading order."""
    found: dict[str, dict[int, Stage]] = {}
    for seed, arm, curve, manifest in arm_files(experiment):
        found.setdefault(arm, {})[seed] = look(curve, manifest)
    for seed, arms in read_plan(experiment).items():
        for arm in arms if seed.isdigit() else ():
            found.setdefault(arm, {}).setdefault(int(seed), Stage("waiting"))
    return {arm: found[arm] for arm in ordered(found)}


def experiments(runs: Path) -> list[Path]:
    """The folders of experiments and their cases that have begun or are planned."""
    places = [path.parent for pattern in ("*/", "*/*/") for path in runs.glob(f"{pattern}seed*")]
    places += [path.parent for pattern in ("*/", "*/*/") for path in runs.glob(f"{pattern}{PLAN}")]
    return sorted(set(places))


def heading(name: str, arms: dict[str, dict[int, Stage]]) -> str:
    """How many of the experiment's runs are in which state."""
    states = Counter(stage.state for stages in arms.values() for stage in stages.values())
    return f"{name}: " + ", ".join(f"{states[state]} {state}" for state in STATES if states[state])


def tables(arms: dict[str, dict[int, Stage]], width: int) -> list[Table]:
    """An experiment as tables that fit the width: arms by seeds or, where there are too many seeds, arms by states."""
    seeds = sorted({seed for stages in arms.values() for seed in stages})
    fit = max(1, (width - max(map(len, arms)) - 2) // CELL)
    if len(seeds) > 3 * fit:
        result = _table(["arm", "mean", *STATES, "left"])
        for arm, stages in arms.items():
            counts = Counter(stage.state for stage in stages.values())
            done = [stage.accuracy for stage in stages.values() if stage.state == "done" and stage.accuracy is not None]
            left = [stage.left for stage in stages.values() if stage.left is not None]
            mean = f"{100 * sum(done) / len(done):.2f}" if done else ""
            numbers = [str(counts[state] or "") for state in STATES]
            result.add_row(arm, mean, *numbers, duration(max(left)) if left else "")
        return [result]
    blocks: list[Table] = []
    for first in range(0, len(seeds), fit):
        shown = seeds[first : first + fit]
        blocks.append(_table(["arm", *(f"seed {seed}" for seed in shown)]))
        for arm, stages in arms.items():
            blocks[-1].add_row(arm, *(str(stages.get(seed, "")) for seed in shown))
    return blocks


def _table(heads: Sequence[str]) -> Table:
    result = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in heads:
        result.add_column(head, no_wrap=True)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and the failures; returns 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    runs: Path = parser.parse_args(arguments).runs
    console = Console(highlight=False)
    found = {path.relative_to(runs).as_posix(): read(path) for path in experiments(runs)}
    if not found:
        print(f"There are no runs in {runs}: start some, or name their folder.", file=sys.stderr)
        return 1
    for name, arms in found.items():
        console.print(heading(name, arms), soft_wrap=True)
        for table in tables(arms, console.width):
            console.print(table)
    stages = [stage for arms in found.values() for row in arms.values() for stage in row.values()]
    said = list(dict.fromkeys(stage.failure for stage in stages if stage.failure))
    for sentence in said[:MOST_LINES]:
        console.print(f"failed    {sentence}", markup=False, soft_wrap=True)
    if len(said) > MOST_LINES:
        console.print(f"          and {len(said) - MOST_LINES} more")
    console.print("done: final test accuracy (%)   else: epochs, test accuracy (%), time left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
