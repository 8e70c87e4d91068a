"""Judges every claim by the committed curves: python scripts/claims.py [--results results].

Reads results/claims.yaml and results/curves alone and prints a line a claim: its verdict, what was measured.
scripts/figures.py puts the same into results/README.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import curves as report
from experiments.analysis.claims import judge, read_claims
from experiments.analysis.pages import tally
from experiments.config import ExperimentError


def main(arguments: list[str] | None = None) -> int:
    """Prints the verdicts; returns 1, with one line, if a claim or a curve cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    folder: Path = parser.parse_args(arguments).results
    try:
        results = report.load_all(folder / "curves")
        found = [judge(claim, results) for claim in read_claims(folder / "claims.yaml")]
    except (ExperimentError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for finding in found:
        print(f"{finding.verdict:<12} {finding.claim.claim}: {finding.shown}")
    print(tally(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
