"""Prints the best rate of each arm in a search of rates: python scripts/rates.py ablation_rate [--results results].

Reads results/curves/<experiment> alone, whose cases are rates (configs/experiment/ablation_rate.yaml), and chooses by
the final holdout accuracy over the seeds that all rates of an arm have, with each budget. The last line of a budget is
for the `rates` of a configuration.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import curves as report
from experiments.analysis.cases import families
from experiments.analysis.search import are_rates, best, tried
from experiments.config import ExperimentError


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each arm and budget; returns 1, with one line, if there are no curves or one cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("experiment")
    options = parser.parse_args(arguments)
    curves: Path = options.results / "curves"
    try:
        names = [name for name in report.experiments(curves) if name.startswith(f"{options.experiment}/")]
        cases = families({name: report.load(curves / name) for name in names}).get(options.experiment)
        if cases is None:
            raise ExperimentError(f"There are no cases of {options.experiment} under {curves}: collect them first.")
        if not are_rates(cases):
            raise ExperimentError(
                f"The cases of {options.experiment} differ in more than rates: it is no search of them."
            )
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    found = tried(cases)
    for budget, arms in found.items():
        chosen: dict[str, float] = {}
        for arm, rates in arms.items():
            if not rates:
                print(f"{budget} {arm}: no seed has all of its rates")
                continue
            chosen[arm] = best(rates)
            edge = " (at the edge of the search)" if chosen[arm] in (min(rates), max(rates)) else ""
            said = ", ".join(f"{rate:g} {100 * accuracy:.2f}" for rate, accuracy in rates.items())
            print(f"{budget} {arm}: {chosen[arm]:g}{edge} by holdout accuracy (%): {said}")
        print(f"{budget} rates: {{" + ", ".join(f"{arm}: {rate:g}" for arm, rate in chosen.items()) + "}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
