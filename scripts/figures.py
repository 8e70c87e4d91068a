"""Draws the committed curves and writes the tables: python scripts/figures.py [--results results].

From results/curves and results/claims.yaml alone, offline: results/figures/*.png and .svg (a figure an experiment, and
the paper's figures 4 to 6), results/README.md, and the block between the results markers of the README.md beside
the results; from results/trials, the block between the trials markers of docs/reproduction.md there. The same
curves give the same bytes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import curves as report
from experiments.analysis.cases import families
from experiments.analysis.claims import judge, read_claims
from experiments.analysis.curves import Results
from experiments.analysis.figure_cases import draw_family
from experiments.analysis.figures import PAPER, draw, draw_paper
from experiments.analysis.pages import results_readme, summary, trials
from experiments.config import ExperimentError
from experiments.files import write


def fill_block(readme: Path, name: str, text: str) -> bool:
    """The block between the markers `name` of `readme` is `text`; False if there is no such file or block.

    Raises ExperimentError if the markers are not one pair in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if begin not in old and end not in old:
        return False
    before, _, rest = old.partition(begin)
    _, found, after = rest.partition(end)
    if not found or old.count(begin) != 1 or old.count(end) != 1:
        raise ExperimentError(f"The {name} markers in {readme} are no pair: write {begin} once, then {end} once.")
    write(readme, f"{before}{begin}\n{text}\n{end}{after}".encode())
    return True


def draw_all(folder: Path, results: Results) -> list[Path]:
    """Every figure, in folder/figures; returns their paths."""
    written: list[Path] = []
    for name, (curves, _) in results.items():
        if "/" not in name:
            written += draw(curves, name, folder / "figures" / name)
        if name in PAPER:
            written += draw_paper(curves, name, folder / "figures" / f"paper_figure_{PAPER[name][0]}")
    for name, cases in families(results).items():
        written += draw_family(name, cases, folder / "figures" / name)
    return written


def write_pages(folder: Path, results: Results) -> list[str]:
    """Every table: folder/README.md, and the blocks of the pages beside the folder; returns what was written."""
    claims = folder / "claims.yaml"
    findings = [judge(claim, results) for claim in read_claims(claims)] if claims.is_file() else []
    write(folder / "README.md", results_readme(results, findings).encode())
    blocks = {
        "README.md": ("results", summary(results, findings)),
        "docs/reproduction.md": ("trials", trials(folder / "trials")),
    }
    filled = {
        page: name for page, (name, text) in blocks.items() if fill_block(folder.resolve().parent / page, name, text)
    }
    return [str(folder / "README.md"), *(f"{page}, between its {name} markers" for page, name in filled.items())]


def main(arguments: list[str] | None = None) -> int:
    """Writes figures and tables and prints what it wrote; returns 1, with one line, if it cannot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    folder: Path = parser.parse_args(arguments).results
    try:
        results = report.load_all(folder / "curves")
        for written in [*draw_all(folder, results), *write_pages(folder, results)]:
            print(written)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
