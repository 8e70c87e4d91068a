"""Judge every claim by the committed curves: python scripts/claims.py [--results results] [--rates EXPERIMENT].

It reads results/claims.yaml and results/curves alone and prints the verdict on each claim and what was measured;
scripts/figures.py writes the same into results/README.md. With --rates it prints the best initial rate of each arm in
a search of rates, such as tune_ladder, by final holdout accuracy over the seeds that all rates of an arm have. The last
line of each budget can be copied to `rates` in a configuration.
"""

import argparse
import itertools
import sys
from pathlib import Path

from experiments.analysis.cases import tabulate_rates, varies_only_rates
from experiments.analysis.claims import judge, read_claims
from experiments.analysis.curves import Results, load_all
from experiments.analysis.pages import count_verdicts
from experiments.config import ExperimentError


def print_rates(experiment: str, results: Results) -> None:
    """Print a line for each budget and arm, and the best rates of each budget."""
    if results.experiments.get(experiment, [""]) == [""]:
        raise ExperimentError(f"There are no curves of cases of {experiment}: run and collect them first.")
    selected = results.select(experiment)
    if not varies_only_rates(selected):
        raise ExperimentError(f"The cases of {experiment} differ in more than rates: it is no search of them.")
    for budget, table in tabulate_rates(selected).groupby(level="budget", sort=False):
        chosen: dict[str, float] = {}
        for arm, row in table.droplevel("budget").iterrows():
            tried = row.dropna()
            if tried.empty:
                print(f"{budget} {arm}: no seed has all of its rates")
                continue
            best = chosen[str(arm)] = tried.idxmax()
            edge = " (at the edge of the search)" if best in (tried.index.min(), tried.index.max()) else ""
            accuracies = ", ".join(f"{rate:g} {100 * accuracy:.2f}" for rate, accuracy in tried.items())
            print(f"{budget} {arm}: {best:g}{edge} by holdout accuracy (%): {accuracies}")
        print(f"{budget} rates: {{" + ", ".join(f"{arm}: {rate:g}" for arm, rate in chosen.items()) + "}")


def main(arguments: list[str] | None = None) -> int:
    """Print the verdicts, or the rates; return 1, with one line, if a claim or a curve cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results (results)")
    parser.add_argument(
        "--rates", metavar="EXPERIMENT", help="print the best learning rates of this experiment instead"
    )
    options = parser.parse_args(arguments)
    try:
        results = load_all(options.results / "curves")
        if options.rates:
            print_rates(options.rates, results)
            return 0
        findings = [judge(claim, results) for claim in read_claims(options.results / "claims.yaml")]
    except (ExperimentError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for group, members in itertools.groupby(findings, key=lambda finding: finding.claim.group):
        if group:
            print(group)
        for finding in members:
            note = f" ({finding.note})" if finding.note else ""
            print(f"{finding.verdict:<12} {finding.claim.claim}: {finding.value}{note}")
    print(count_verdicts(findings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
