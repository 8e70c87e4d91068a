"""Write the results as one page that needs no network: python scripts/report.py [--results results].

It reads results/curves, results/claims.yaml and the figures that scripts/figures.py has drawn, and writes
results/report.html: the claims in a table that a click on a column sorts, and for each experiment its finding, its
figures, its table, and its curves over all seeds or of one seed.
"""

import argparse
import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

from experiments.analysis import figures, pages, titles
from experiments.analysis.claims import Finding, judge, read_claims
from experiments.analysis.curves import Results, load_all
from experiments.config import ExperimentError
from experiments.files import write

TEMPLATE = Path(__file__).with_name("report.html")


def make_report(folder: Path) -> str:
    """Return the page."""
    results = load_all(folder / "curves")
    findings = [judge(claim, results) for claim in read_claims(folder / "claims.yaml")]
    sections = [make_section(name, results.select(name), folder / "figures") for name in results.experiments]
    curves = {
        f"{name}/{case}".rstrip("/"): tabulate_curves(results.select(name, case))
        for name, cases in results.experiments.items()
        for case in cases
    }
    heads = ["group", "claim", "paper", "ours (95 % interval), n", "verdict"]
    filled = {
        "verdicts": pages.count_verdicts(findings),
        "claims": make_table(heads, map(list_cells, findings)),
        "sections": "\n".join(sections),
        "curves": json.dumps(curves, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, text in filled.items():
        page = page.replace(f"<!-- {name} -->", text, 1)
    return page


def list_cells(finding: Finding) -> list[str]:
    """Return the cells of a claim's line."""
    claim = finding.claim
    paper = claim.source if claim.paper == "–" else f"{claim.source}: {claim.paper}"
    value = f"{finding.value} ({finding.note})" if finding.note else finding.value
    return [claim.group, claim.claim, paper, value, finding.verdict]


def make_section(name: str, results: Results, drawn: Path) -> str:
    """Return the part of an experiment: what it found, its figures, and its arms where it has no cases."""
    paper = f"paper_figure_{figures.PAPER[name][0]}" if name in figures.PAPER else ""
    images = [inline_figure(drawn / f"{figure}.svg") for figure in (name, paper) if figure]
    parts = [f"<h2 id={name}>{name}</h2>", f"<p>{html.escape(titles.describe(results))}</p>", *images]
    if results.experiments[name] == [""]:
        heads, lines = pages.tabulate_arms(results)
        parts.append(make_table(heads, lines))
    return "\n".join(parts)


def inline_figure(path: Path) -> str:
    """Return a figure as an image that holds its own bytes."""
    if not path.is_file():
        raise ExperimentError(f"There is no {path}: run python scripts/figures.py first.")
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/svg+xml;base64,{content}">'


def make_table(heads: list[str], lines: Any) -> str:
    """Return a table whose columns can be sorted."""
    top = "".join(f"<th><button>{html.escape(head)}</button></th>" for head in heads)
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def tabulate_curves(results: Results) -> dict[str, Any]:
    """Return each arm's test accuracy in per cent: [step, mean, low, high] over seeds, and [step, value] of each."""
    looks, found = figures.choose_looks(results.arms), {}
    for arm in results.arms:
        band = figures.make_band(results, arm, "test_accuracy")[["mean", "low", "high"]]
        found[arm] = {"colour": looks[arm]["color"], "all": round_rows(band.reset_index()), "seeds": {}}
        for seed, curve in results.select(arm=arm).curves.groupby(level="seed"):
            percent = curve[["step", "test_accuracy"]].mul([1, 100]).dropna()
            found[arm]["seeds"][str(seed)] = round_rows(percent)
    return found


def round_rows(table: Any) -> list[list[float]]:
    """Return the rows of a table, its numbers with two decimals."""
    return [[round(value, 2) for value in row] for row in table.to_numpy().tolist()]


def main(arguments: list[str] | None = None) -> int:
    """Write the page and print its path; return 1, with one line, if it cannot be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results (results)")
    folder: Path = parser.parse_args(arguments).results
    try:
        write(folder / "report.html", make_report(folder).encode())
    except (ExperimentError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
