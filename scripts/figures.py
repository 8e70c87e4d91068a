"""Draws the committed curves and writes the tables: python scripts/figures.py [--results results].

From results/curves alone, offline: results/figures/<experiment>.png and .svg, results/README.md, and the
block between the results markers of the README.md beside the results; from results/trials, the block between the
trials markers of the PAPER.md there. The same curves give the same bytes.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.config import ARMS, ExperimentError, flatten
from experiments.figure import draw
from experiments.files import write

COMMAND = "python scripts/figures.py"
# Settings that may differ between seeds of one experiment without making their mean meaningless.
_PER_RUN = {
    "seed",
    "arms",
    "claim",
    "device",
    "logger",
    "runs",
    "checkpoint_seconds",
    "data.root",
    "data.cache",
    "data.workers",
}

Results = dict[str, tuple[report.Curves, report.Manifests]]


def markdown_table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose first column is left-aligned and the others right-aligned."""
    rule = [":--"] + ["--:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def mixed_settings(records: list[dict[str, Any]]) -> list[str]:
    """`schedule.lr (0.01, 0.02)` for each setting that should be the same in all curves and is not."""
    # A precision of "auto" is another one on another device.
    settings = [flatten(record["config"]) | {"precision": record["precision"]} for record in records]
    result: list[str] = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = distinct(one.get(key) for one in settings)
        if key not in _PER_RUN and len(values) > 1:
            result.append(f"`{key}` ({', '.join(values)})")
    return result


def distinct(values: Iterable[Any]) -> list[str]:
    """The different ones among `values` as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))


def data_phrase(record: dict[str, Any]) -> str:
    """What the images are and what is done to them."""
    data = record["config"]["data"]
    parts = [record["data"], f"{data['size']} × {data['size']} pixels"]
    parts.append(f"{100 * data['holdout']:g} % of the training images held out to make choices")
    parts.append(f"random crop after {data['pad']} pixels of padding" if data["pad"] else "no random crop")
    parts.append("random flip" if data["flip"] else "no flip")
    return ", ".join(parts)


def schedule_phrase(config: dict[str, Any]) -> str:
    """How long and how the networks are trained."""
    schedule = config["schedule"]
    teacher = schedule.get("teacher_epochs") or schedule["epochs"]
    return (
        f"students {schedule['epochs']}, teacher {teacher}, batches of {schedule['batch_size']}, "
        f"{schedule['optimizer']}, rate {schedule['lr']:g} times each arm's own, {schedule['decay']} decay; "
        f"evaluated every {schedule['evaluate']}"
    )


def command_phrase(records: list[dict[str, Any]]) -> str:
    """The commands that made the curves, each once, as code."""
    return "<br>".join(f"`{command}`" for command in distinct(record["command"] for record in records))


def section(name: str, curves: report.Curves, manifests: report.Manifests) -> str:
    """One experiment's part of results/README.md."""
    records = [record for seeds in manifests.values() for record in seeds.values()]
    own = report.own(manifests)
    config = own[0]["config"]
    seeds = sorted({seed for arm in curves.values() for seed in arm})
    versions = [", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items())) for record in records]
    hardware = [f"{record['device']}: {record['hardware']}, {record['precision']}" for record in records]
    commits = [
        str(record["commit"])[:10] + (" with uncommitted changes" if record["dirty"] else "") for record in records
    ]
    facts = {
        "Claim": config["claim"],
        "Command": command_phrase(records),
        "Data": "; ".join(distinct(data_phrase(record) for record in own)),
        "Schedule": schedule_phrase(config),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Hardware": "; ".join(distinct(hardware)),
        "Versions": "; ".join(distinct(versions)),
        "Commit": "; ".join(distinct(commits)),
    }
    mixed = mixed_settings(own)
    if mixed:
        facts["Not all curves share"] = ", ".join(mixed)
    heads, lines = report.cells(report.summarise(curves, config["target"]), manifests)
    return "\n\n".join(
        [
            f"## {name}",
            "\n".join(f"- **{fact}:** {text}" for fact, text in facts.items()),
            f"![Accuracy of each arm over training steps and over compute: {name}](figures/{name}.png)",
            f"[As SVG](figures/{name}.svg), [curves and manifests](curves/{name})",
            f"The target is the final holdout accuracy of `{report.target_source(curves, config['target'])}`.",
            markdown_table(heads, [[f"`{line[0]}`", *line[1:]] for line in lines]),
        ]
    )


def results_readme(results: Results) -> str:
    """The text of results/README.md."""
    intro = f"""<!-- Generated by `{COMMAND}` from curves/. Do not edit: the next run overwrites it. -->
# Results

Generated by `{COMMAND}` from the curves in [curves/](curves), which `python scripts/collect.py` copied from
finished runs with the manifest of each.

Numbers are means over seeds; in brackets, and as bands in the figures, the lowest and highest seed. Steps to
target: the first evaluated step at which an arm's holdout accuracy is at least the target's, the final
holdout accuracy of the target arm of the same student and seed, or the teacher's where there is none; where
some seeds alone reach it, the mean is over those, as said in brackets. FLOPs are those of training; "with
teacher's" adds what the teacher cost to the arms that start from it. Top-1 as teacher's: on how many test
images the student's first choice is the teacher's before it is trained, over all seeds, and the largest
relative error of its outputs, both computed in float64."""
    return "\n\n".join([intro, *(section(name, *loaded) for name, loaded in results.items())]) + "\n"


def summary(results: Results) -> str:
    """The table over experiments for the top-level README: a line for each experiment and student."""
    lines: list[list[str]] = []
    used: set[str] = set()
    texts: list[tuple[str, str, dict[str, str], dict[str, str]]] = []
    for name, (curves, _) in results.items():
        rows = report.summarise(curves, report.target_arm(results[name][1]))
        split = [(*report.split_arm(row.arm), row) for row in rows]
        students = {student for student, _, _ in split if student is not None} or {None}
        for student in sorted(students, key=str):
            mine = {arm: row for owner, arm, row in split if owner in (student, None)}
            counts = sorted({row.n for row in mine.values()})
            n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            label = f"[{name}](results/README.md#{name})" + (f", {student}" if student else "")
            accuracy = {arm: report.percent(row.final) for arm, row in mine.items()}
            steps = {arm: report.steps_cell(row) for arm, row in mine.items()}
            used |= set(accuracy)
            texts.append((label, n, accuracy, steps))
    arms = [arm for arm in ("teacher", *ARMS) if arm in used]
    raced = [arm for arm in ("net2net", "random_init") if arm in used]
    for label, n, accuracy, steps in texts:
        final = [accuracy.get(arm, "–") for arm in arms]
        lines.append([label, n, *final, " / ".join(steps.get(arm, "–") for arm in raced)])
    heads = ["experiment", "n", *(f"`{arm}`" for arm in arms), f"steps to target: {' / '.join(raced)}"]
    return "\n\n".join(
        [
            "Final test accuracy in per cent, mean over n seeds (lowest–highest).",
            markdown_table(heads, lines),
            f"Figures, settings and costs: [results/README.md](results/README.md). Generated by `{COMMAND}`.",
        ]
    )


def trials(folder: Path) -> str:
    """The table of rate trials: one run each, made to choose the optimizer's defaults; best first."""
    lines: list[tuple[float, list[str]]] = []
    for trial in sorted(folder.glob("*/curves/*")):
        curves, manifests = report.load(trial)
        for arm, seeds in curves.items():
            for seed, points in seeds.items():
                record, last = manifests[arm][seed], points[-1]
                schedule = record["config"]["schedule"]
                setting = f"{schedule['optimizer']}, {schedule['lr']:g}"
                score = last["holdout_accuracy"]
                facts = [setting, f"`{arm}` of {trial.name}", schedule["epochs"], str(seed), f"{100 * score:.2f}"]
                lines.append((-score, facts))
    heads = ["optimizer, initial rate", "run", "length", "seed", "holdout accuracy (%)"]
    ranked = [facts for _, facts in sorted(lines)]
    return f"{markdown_table(heads, ranked)}\n\nOne run each. Generated by `{COMMAND}` from `results/trials`."


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


def read_results(folder: Path) -> Results:
    """Every experiment under results/curves; raises ExperimentError if none is or a curve was changed."""
    found = report.experiments(folder / "curves")
    if not found:
        raise ExperimentError(f"There are no curves under {folder / 'curves'}: run python scripts/collect.py first.")
    return {name: report.load(path) for name, path in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Writes figures and tables and prints what it wrote; returns 1, with one line, if it cannot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    folder: Path = parser.parse_args(arguments).results
    try:
        results = read_results(folder)
        for name, (curves, _) in results.items():
            for path in draw(curves, name, folder / "figures" / name):
                print(path)
        write(folder / "README.md", results_readme(results).encode())
        print(folder / "README.md")
        blocks = {"README.md": ("results", summary(results)), "PAPER.md": ("trials", trials(folder / "trials"))}
        for page, (name, text) in blocks.items():
            if fill_block(folder.resolve().parent / page, name, text):
                print(f"{page}, between its {name} markers")
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
