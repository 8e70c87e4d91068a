"""Prints the best rate of each arm in a search of rates: python scripts/rates.py ablation_rate [--results results].

Reads results/curves/<experiment> alone, whose cases are rates (configs/experiment/ablation_rate.yaml), and chooses by
the final holdout accuracy over the seeds that all cases have. The last line is for the `rates` of a configuration.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.config import ExperimentError
from experiments.family import best, families, lines


def main(arguments: list[str] | None = None) -> int:
    """Prints a line an arm; returns 1, with one line, if the search was not run or a curve cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("experiment")
    options = parser.parse_args(arguments)
    curves: Path = options.results / "curves"
    try:
        names = [name for name in report.experiments(curves) if name.startswith(f"{options.experiment}/")]
        if not names:
            raise ExperimentError(f"There are no cases of {options.experiment} under {curves}: collect them first.")
        cases = families({name: report.load(curves / name) for name in names})[options.experiment]
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    chosen = best(cases)
    for arm, (case, _) in chosen.items():
        tried = ", ".join(f"{line.case} {100 * line.holdout:.2f}" for line in lines(cases) if line.arm == arm)
        tested = [name for name, (curves, _) in cases.items() if arm in curves]
        edge = " (at the edge of the search)" if case in (tested[0], tested[-1]) else ""
        print(f"{arm}: {case}{edge} by holdout accuracy (%): {tried}")
    rates = {arm: report.own(cases[case][1])[0]["config"]["rates"][arm] for arm, (case, _) in chosen.items()}
    print("rates: {" + ", ".join(f"{arm}: {rate:g}" for arm, rate in rates.items()) + "}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
