"""Show the state of runs while they go on: python scripts/status.py [RUNS].

For each experiment it prints a table of arms by seeds: finished runs with their final test accuracy, running ones with
their progress, test accuracy and remaining time, and those that wait for their turn in a sweep, have failed or were
stopped; then the last words of the failed ones. It only reads.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from experiments.analysis.curves import find_arms
from experiments.config import TEACHER, ordered
from experiments.files import LOCK, is_owner_here
from experiments.progress import duration
from experiments.sweep import FAILURE, PLAN, is_alive, read_plan

STATES = ("done", "running", "waiting", "failed", "stopped")
QUIET = 600  # seconds without a sign of life until a process on another machine counts as dead; it saves every minute
CELL = 22  # characters of a seed's column
MOST_LINES = 20  # of failures


@dataclass(frozen=True)
class Stage:
    """The present state of one arm of one seed."""

    state: str  # one of STATES
    epoch: str = ""  # its progress, as `1.5/4ep`
    accuracy: float | None = None  # test accuracy at the last evaluation, in 0..1
    left: float | None = None  # seconds to its end, if it is running
    failure: str = ""  # the last words of its last job

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f"{100 * self.accuracy:.2f}"
        if self.state == "done":
            return accuracy
        left = "" if self.left is None else duration(self.left)
        word = "" if self.state == "running" else self.state
        return " ".join(part for part in (word, self.epoch, accuracy, left) if part)


def read_stage(curve: Path, manifest: Path, is_awaited: bool = False) -> Stage:
    """Return the state of one arm by its files, and by whether a sweep that goes on will run it."""
    try:
        record: Any = json.loads(_read_text(manifest))
    except ValueError:
        record = {}
    record, row = record if isinstance(record, dict) else {}, _read_last_row(curve)
    accuracy = float(row["test_accuracy"]) if row else None
    if record.get("complete") is True:
        return Stage("done", accuracy=accuracy)
    folder = manifest.parent
    length = str(record.get("settings", {}).get("schedule", {}).get("epochs", ""))
    total = float(re.sub(r"[a-z]+$", "", length) or 0)
    epoch, share = "", 0.0
    if row and total:
        now = float(row["step"] if length.endswith("it") else row["epoch"])
        epoch, share = f"{now:.3g}/{length}", now / total
    if is_held(folder):
        return Stage("running", epoch, accuracy, _estimate_left(record, row, share, curve, manifest))
    if failure := _read_text(folder / FAILURE):
        return Stage("failed", epoch, accuracy, failure=failure.splitlines()[-1])
    return Stage("waiting" if is_awaited else "stopped", epoch, accuracy)


def is_held(folder: Path) -> bool:
    """Say whether a process trains in the folder, by the text of its lock: trying the lock might stop a process.

    A process on another machine counts as alive if it has written in the last minutes.
    """
    lock = folder / LOCK
    if not lock.exists():
        return False
    if (lives := is_owner_here(_read_text(lock))) is not None:
        return lives
    times = [path.stat().st_mtime for path in (lock, folder / "checkpoint.pt", folder / "curve.csv") if path.exists()]
    return time.time() - max(times, default=0) < QUIET


def _read_text(path: Path) -> str:
    """Return the text of a file, or "" if it is not there or was just removed."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_last_row(curve: Path) -> dict[str, str]:
    """Return the last row of the curve, {} if it has none."""
    lines = _read_text(curve).splitlines()
    return dict(zip(lines[0].split(","), lines[-1].split(","), strict=False)) if len(lines) > 1 else {}


def _estimate_left(
    record: dict[str, Any], row: dict[str, str], share: float, curve: Path, manifest: Path
) -> float | None:
    """Return the seconds to the end at this process's pace, evaluations included; None before it has evaluated."""
    first = int((record.get("processes") or [{}])[-1].get("from", 0))
    steps = int(row.get("step", 0))
    try:
        evaluated, started = curve.stat().st_mtime, manifest.stat().st_mtime
    except OSError:
        return None
    if not share or steps <= first or evaluated <= started:
        return None
    remaining = steps * (1 - share) / share
    return max(0.0, remaining * (evaluated - started) / (steps - first) - (time.time() - evaluated))


def read_stages(experiment: Path) -> dict[str, dict[int, Stage]]:
    """Return the stages of an experiment by arm, in reading order, and seed: all that have begun or are planned."""
    found: dict[str, dict[int, Stage]] = {}
    planned = {(int(seed), arm): owner for seed, arms in read_plan(experiment).items() for arm, owner in arms.items()}
    alive = {owner: is_alive(owner) for owner in set(planned.values())}
    awaited = {place: alive[owner] for place, owner in planned.items()}
    awaited |= {(seed, TEACHER): True for (seed, _), lives in awaited.items() if lives}
    for seed, arm, curve, manifest in find_arms(experiment):
        found.setdefault(arm, {})[seed] = read_stage(curve, manifest, awaited.get((seed, arm), False))
    for seed, arm in planned:
        found.setdefault(arm, {}).setdefault(seed, Stage("waiting" if awaited[seed, arm] else "stopped"))
    return {arm: found[arm] for arm in ordered(found)}


def make_tables(arms: dict[str, dict[int, Stage]], width: int) -> list[Table]:
    """Return an experiment as tables that fit the width: arms by seeds or, with too many seeds, arms by states."""
    seeds = sorted({seed for stages in arms.values() for seed in stages})
    fit = max(1, (width - max(map(len, arms)) - 2) // CELL)
    if len(seeds) > 3 * fit:
        table = _make_table(["arm", "mean", *STATES, "left"])
        for arm, stages in arms.items():
            counts = Counter(stage.state for stage in stages.values())
            done = [stage.accuracy for stage in stages.values() if stage.state == "done" and stage.accuracy is not None]
            left = [stage.left for stage in stages.values() if stage.left is not None]
            mean = f"{100 * sum(done) / len(done):.2f}" if done else ""
            numbers = [str(counts[state] or "") for state in STATES]
            table.add_row(arm, mean, *numbers, duration(max(left)) if left else "")
        return [table]
    tables: list[Table] = []
    for start in range(0, len(seeds), fit):
        part = seeds[start : start + fit]
        tables.append(_make_table(["arm", *(f"seed {seed}" for seed in part)]))
        for arm, stages in arms.items():
            tables[-1].add_row(arm, *(str(stages[seed]) if seed in stages else "" for seed in part))
    return tables


def _make_table(heads: Sequence[str]) -> Table:
    return Table(*(Column(head, no_wrap=True) for head in heads), box=box.SIMPLE, padding=(0, 1, 0, 0))


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and the failures; return 1 if there are no runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of the runs (runs)")
    runs = Path(str(parser.parse_args(arguments).runs).removeprefix("runs="))  # as train.py has it
    console = Console(highlight=False)
    # The folders of experiments and their cases that have begun or are planned.
    places = {path.parent for folder in ("*/", "*/*/") for name in ("seed*", PLAN) for path in runs.glob(folder + name)}
    found = {path.relative_to(runs).as_posix(): read_stages(path) for path in sorted(places)}
    if not found:
        print(f"There are no runs in {runs}: start some, or name their folder.", file=sys.stderr)
        return 1
    for name, arms in found.items():
        states = Counter(stage.state for stages in arms.values() for stage in stages.values())
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        console.print(f"{name}: {counts}", soft_wrap=True)
        for table in make_tables(arms, console.width):
            console.print(table)
    stages = [stage for arms in found.values() for row in arms.values() for stage in row.values() if stage.failure]
    failures = list(dict.fromkeys(stage.failure for stage in stages))
    for failure in failures[:MOST_LINES]:
        console.print(f"failed    {failure}", markup=False, soft_wrap=True)
    if more := len(failures[MOST_LINES:]):
        console.print(f"          and {more} more")
    console.print("done: final test accuracy (%)   else: epochs, test accuracy (%), time left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
