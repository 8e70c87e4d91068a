"""Measures what reads runs on many of them: python scripts/bench_runs.py [--runs 10000] [--rows 100].

Simulates finished runs (curves that rise, the manifests of real runs), in a folder that is removed afterwards, and
prints how long status, collect (of new runs, and of the same again) and figures take.
"""

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.config import ARMS
from experiments.run_log import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("teacher", *ARMS[:4])
SEEDS = 400  # of an experiment, at most


def curve(rows: int, rng: random.Random) -> str:
    """A curve.csv that rises to a level of its own."""
    lines = [",".join(COLUMNS)]
    best, speed = rng.uniform(0.6, 0.9), rng.uniform(5, 20)
    for index in range(rows):
        accuracies = [best * (1 - math.exp(-index / speed)) + rng.uniform(0, 0.02) for _ in range(3)]
        pairs = [(f"{2.3 * (1 - accuracy):.6g}", f"{accuracy:.6g}") for accuracy in accuracies]
        if index == 0:
            pairs[0] = ("", "")  # nothing has been trained yet
        count = [index * 176, index / 2, index * 22528, index * 11.5, index * 22528 * 6.3e7]
        lines.append(",".join([*(f"{value:.6g}" for value in count), *(cell for pair in pairs for cell in pair)]))
    return "\n".join(lines) + "\n"


def simulate(folder: Path, runs: int, rows: int) -> int:
    """About so many finished runs are in the folder, as train.py leaves them; returns how many."""
    rng = random.Random(0)
    template = json.loads((ROOT / "results/curves/wider_inception/seed0/net2net.json").read_text())
    made = 0
    while made < runs:
        seed, experiment = made // len(STAGES) % SEEDS, f"simulated{made // len(STAGES) // SEEDS}"
        for arm in STAGES:
            run = folder / experiment / f"seed{seed}" / arm
            run.mkdir(parents=True)
            text = curve(rows, rng)
            (run / "curve.csv").write_text(text)
            own = {"arm": arm, "seed": seed, "experiment": experiment}
            own |= {"config": template["config"] | {"seed": seed, "experiment": experiment}}
            own |= {"curve_sha256": hashlib.sha256(text.encode()).hexdigest()}
            (run / "manifest.json").write_text(json.dumps(template | own, indent=1, sort_keys=True))
            made += 1
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each measurement; returns 1 if a script fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        runs, results = Path(scratch, "runs"), Path(scratch, "results")
        made = simulate(runs, options.runs, options.rows)
        print(f"{made} runs of {options.rows} rows", flush=True)
        collect = ["collect.py", "--runs", runs, "--results", results]
        commands = {
            "status": ["status.py", runs],
            "collect": collect,
            "collect again": collect,
            "figures": ["figures.py", "--results", results],
        }
        for name, (script, *rest) in commands.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, ROOT / "scripts" / str(script), *rest], stdout=subprocess.DEVNULL)
            print(f"{name:<14} {time.perf_counter() - started:6.1f} s", flush=True)
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
