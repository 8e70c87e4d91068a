"""Judges every claim by the committed curves: python scripts/claims.py [--results results].

Reads results/claims.yaml and results/curves alone and prints a line a claim: its verdict, what was measured.
scripts/figures.py puts the same into results/README.md.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.claims import Finding, Results, judge, read_claims
from experiments.config import ExperimentError

HEADS = ["claim", "source", "paper", "ours", "verdict", "config", "command"]


def findings(folder: Path, results: Results) -> list[Finding]:
    """The verdict on every claim of `folder`/claims.yaml, in its order; none if there is no such file."""
    path = folder / "claims.yaml"
    return [judge(claim, results) for claim in read_claims(path)] if path.is_file() else []


def line(finding: Finding) -> list[str]:
    """The cells of one claim, in Markdown."""
    claim = finding.claim
    names = list(dict.fromkeys(text.partition(":")[0].partition("/")[0] for text in (claim.of, claim.against) if text))
    configs = ", ".join(f"[{name}](../configs/experiment/{name}.yaml)" for name in names)
    commands = [record["command"] for one in finding.operands for record in one.manifests[one.arm].values()]
    planned = [] if commands else [f"python train.py experiment={name}" for name in names]
    shown = "<br>".join(f"`{command}`" for command in dict.fromkeys(commands or planned))
    said = f"**{finding.verdict}**" if finding.verdict in ("holds", "fails") else finding.verdict
    return [claim.claim, claim.source, claim.paper, finding.shown, said, configs, shown]


def tally(found: list[Finding]) -> str:
    """`3 hold, 1 fails, 4 undecided, 20 not run`."""
    counts = Counter(finding.verdict.partition(" (")[0] for finding in found)
    return ", ".join(f"{counts[word]} {word}" for word in ("holds", "fails", "undecided", "not run") if counts[word])


def main(arguments: list[str] | None = None) -> int:
    """Prints the verdicts; returns 1, with one line, if a claim or a curve cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    folder: Path = parser.parse_args(arguments).results
    try:
        found = findings(
            folder, {name: report.load(path) for name, path in report.experiments(folder / "curves").items()}
        )
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    for finding in found:
        print(f"{finding.verdict:<12} {finding.claim.claim}: {finding.shown}")
    print(tally(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
