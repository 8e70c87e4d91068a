"""Draw the committed curves and write the tables: python scripts/figures.py [--results results].

It reads results/curves, results/trials and results/claims.yaml alone, and needs no network. It writes
results/figures/*.png and .svg (a figure for each experiment, and the paper's figures 4 to 6), results/README.md, and
beside the results the blocks between the results markers of README.md, and between the ladder and the trials markers
of docs/reproduction.md. The same curves give the same bytes.
"""

import argparse
import sys
from pathlib import Path

from experiments.analysis import figures, pages
from experiments.analysis.claims import judge, read_claims
from experiments.analysis.curves import Results, load_all
from experiments.config import ExperimentError
from experiments.files import fill_block, write


def draw_all(folder: Path, results: Results) -> list[Path]:
    """Draw every figure into folder/figures and return their paths."""
    written: list[Path] = []
    for name, cases in results.experiments.items():
        draw = figures.draw if cases == [""] else figures.draw_cases
        selected = results.select(name)
        written += draw(name, selected, folder / "figures" / name)
        if name in figures.PAPER:
            written += figures.draw_paper(name, selected, folder / "figures" / f"paper_figure_{figures.PAPER[name][0]}")
    return written


def write_pages(folder: Path, results: Results) -> list[str]:
    """Write folder/README.md and the blocks of the pages beside the folder; return what was written."""
    claims = folder / "claims.yaml"
    findings = [judge(claim, results) for claim in read_claims(claims)] if claims.is_file() else []
    write(folder / "README.md", pages.results_page(results, findings).encode())
    blocks = [
        ("README.md", "results", pages.summary_block(results, findings)),
        ("docs/reproduction.md", "ladder", pages.ladder_block(findings)),
        ("docs/reproduction.md", "trials", pages.trials_block(folder / "trials")),
    ]
    parent = folder.resolve().parent
    filled = [(page, name) for page, name, text in blocks if fill_block(parent / page, name, text)]
    return [str(folder / "README.md"), *(f"{page}, between its {name} markers" for page, name in filled)]


def main(arguments: list[str] | None = None) -> int:
    """Write figures and tables and print their paths; return 1, with one line, if they cannot be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results (results)")
    folder: Path = parser.parse_args(arguments).results
    try:
        results = load_all(folder / "curves")
        for written in [*draw_all(folder, results), *write_pages(folder, results)]:
            print(written)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
