"""Write what the curves say: the table in the terminal, results/README.md, and the tables in README.md and docs/."""

import itertools
import shlex
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pandas import Series
from rich import box
from rich.console import Console
from rich.table import Table

from ..config import flatten, ordered
from . import cases, curves
from .claims import Finding, Noted, tabulate_budgets
from .curves import COSTS, PER_RUN, Results, cost_unit, list_distinct, own_manifests
from .figures import PAPER
from .statistics import CLAIM_SEEDS, HEADLINE_SEEDS
from .titles import describe, describe_race

COMMAND = "python scripts/figures.py"
LADDER = ("ladder_wider", "10ep")  # the experiment and the budget that README.md shows
WAYS = {  # its arms there
    "random_init": "the large network, from the start",
    "net2net": "a small network, grown with net2net and trained on",
    "teacher_continued": "the small network alone, trained on",
}
TEXTS: Any = OmegaConf.load(Path(__file__).with_name("texts.yaml"))
Cells = tuple[list[str], list[list[str]]]  # of a table: its heads, and its lines
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
PER_COMMAND = ("seed=", "case=", "arms=", "runs=", "logger=", "-")  # how words begin that are one run's own


def describe_agreement(manifests: Iterable[dict[str, Any]]) -> str:
    """Say how far an arm computes the teacher's function at step 0, in float64, over its seeds; "" if not measured."""
    measured = [record["step0"] for record in manifests if record.get("step0")]
    if not measured:
        return ""
    agree, total = (sum(int(one[key]) for one in measured) for key in ("agree", "of"))
    errors = [float(one["max_relative_error"]) for one in measured if one.get("max_relative_error") is not None]
    return f"{agree} of {total}" + (f" (error {max(errors):.1e})" if errors else "")


def format_percent(row: Series, name: str) -> str:
    """Return `91.20 (90.80–91.50)`: mean, min and max of a column in per cent; the mean alone where they coincide."""
    mean, low, high = (f"{100 * row[f'{name}_{statistic}']:.2f}" for statistic in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"


def format_steps(row: Series) -> str:
    """Return the mean steps to the target, and over how many seeds if not all; `never`; `–` without a target."""
    reached, n = int(row["reached_step_count"]), int(row["n"])
    if not row["target_count"] or not reached:
        return "never" if row["target_count"] else "–"
    return f"{row['reached_step_mean']:.0f}" + ("" if reached == n else f" ({reached} of {n})")


def tabulate_arms(results: Results) -> Cells:
    """Return the table of an experiment's arms: its heads, and a line of cells an arm."""
    size, unit = cost_unit(results.runs)
    heads = ["arm", "n", "test accuracy at step 0 (%)", "final test accuracy (%)", "target: holdout accuracy (%)"]
    heads += ["steps to target", f"{unit}, own", f"{unit}, with teacher's", "top-1 as teacher's at step 0"]
    lines: list[list[str]] = []
    for arm, row in curves.summarise_arms(results).iterrows():
        n = int(row["n"])
        target = format_percent(row, "target") if row["target_count"] else "–"
        own = f"{row['flops_mean'] / size:.3g}"
        total = f"{row['total_flops_mean'] / size:.3g}" if row["total_flops_count"] == n else "–"
        agreement = describe_agreement(results.runs["manifest"].xs(arm, level="arm")) or "–"
        accuracies = [format_percent(row, "start"), format_percent(row, "final"), target]
        lines.append([str(arm), str(n), *accuracies, format_steps(row), own, total, agreement])
    return heads, lines


def make_terminal_table(experiment_dir: Path) -> Table:
    """Return the table of the finished arms under `runs/<experiment>`, for 80 columns."""
    results = curves.load(experiment_dir)
    heads, lines = tabulate_arms(results)
    unit = heads[6].partition(",")[0]
    notes = [f"steps to target: until the holdout accuracy that {curves.find_target(results)} ends with"]
    notes += ["total: with the teacher's, for arms that need one"]
    notes += [f"{line[0]}, step 0, float64: top-1 as teacher's {line[-1]}" for line in lines if line[-1] != "–"]
    groups = results.runs["manifest"].groupby(level="arm")
    differences = dict.fromkeys(text for _, manifests in groups for text in curves.describe_differences(manifests))
    if differences:
        notes += [f"The means are over runs that differ in {', '.join(differences)}: give each its own tag=NAME."]
    title, caption = f"{results.title}, test accuracy (%)", "\n".join(notes)
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", no_wrap=True)
    for head in ("n", "step 0", "final", "steps\nto target", f"{unit}\nown", f"{unit}\ntotal"):
        table.add_column(head, justify="right", overflow="fold")
    for arm, n, start, final, _, steps, own, total, _ in lines:
        table.add_row(arm, n, start.partition(" ")[0], final, steps.replace(" (", "\n("), own, total)
    return table


def print_results(experiment_dir: Path, console: Console) -> None:
    """Print the table of the finished arms under `runs/<experiment>`, where their figure is, and what they show."""
    console.print(make_terminal_table(experiment_dir))
    console.print(f"figure    {experiment_dir / 'figure.png'}", highlight=False, soft_wrap=True)
    verdict = describe_race(curves.load(experiment_dir), starts=True)
    console.print(f"verdict   {verdict}", highlight=False, soft_wrap=True)


def tabulate_costs(results: Results) -> Cells | None:
    """Return the table of what each arm needs to reach the target, over the seeds that do; None if none does."""
    groups = results.runs[results.runs["target"].notna()].groupby(level="arm", sort=False)
    columns = [f"reached_{total}{column}" for total in ("", "total_") for column in COSTS]
    means, counts = groups[columns].mean(), groups[columns].count()
    reached = counts["reached_step"]
    if not reached.any():
        return None
    size, unit = curves.flops_unit(means[[column for column in columns if column.endswith("flops")]].max(axis=None))
    lines: list[list[str]] = []
    for arm in ordered(means.index):
        cells = [f"{reached[arm]} of {groups.size()[arm]}"]
        for column in columns:
            mean = means.at[arm, column]
            text = f"{mean / size:.3g}" if column.endswith("flops") else f"{mean:,.0f}"
            # A mean over some of the seeds would not compare with its neighbours.
            cells.append(text if counts.at[arm, column] == reached[arm] > 0 else "–")
        lines.append([arm, *cells])
    heads = ["steps", "images", unit, "seconds"]
    return ["arm", "reached by", *heads, *(f"{head}, with teacher's" for head in heads)], lines


def markdown_table(heads: list[str], lines: list[list[str]], code: bool = False, rule: str = "--:") -> str:
    """Return a Markdown table, its first column left-aligned, and as code if wanted, the others as `rule` says."""
    rules = [":--"] + [rule] * (len(heads) - 1)
    cells = [[f"`{line[0]}`", *line[1:]] for line in lines] if code else lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rules, *cells])


def noted_table(heads: list[str], lines: list[list[Noted]]) -> str:
    """Return a Markdown table of text, with the notes of its cells below; equal notes share a number."""
    notes = list(dict.fromkeys(cell[1] for line in lines for cell in line if not isinstance(cell, str) and cell[1]))
    numbers = {note: str(place).translate(RAISED) for place, note in enumerate(notes, 1)}
    cells = [
        [cell if isinstance(cell, str) else f"{cell[0]} {numbers.get(cell[1], '')}".rstrip() for cell in line]
        for line in lines
    ]
    table = markdown_table(heads, cells, rule=":--")
    return "\n\n".join([table, *(wrap(f"{number} {note}") for note, number in numbers.items())])


def wrap(text: str, indent: str = "") -> str:
    """Return a paragraph, or an item of a list, as lines of up to 120 characters; all but the first are indented."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def describe_data(manifest: dict[str, Any]) -> str:
    """Say what the images are and what is done to them."""
    data = manifest["config"]["data"]
    crop = f"random crop after {data['pad']} pixels of padding" if data["pad"] else "no random crop"
    return (
        f"{manifest['data']}, {data['size']} × {data['size']} pixels, {100 * data['holdout']:g} % of the training "
        f"images held out to make choices, {crop}, {'random flip' if data['flip'] else 'no flip'}"
    )


def describe_schedule(configs: list[dict[str, Any]]) -> str:
    """Say how long and how the networks are trained; settings that differ between cases are all given."""
    schedules = [one["schedule"] for one in configs]
    text = {key: " / ".join(list_distinct(one.get(key) for one in schedules)) for key in schedules[0]}
    teacher = " / ".join(list_distinct(one.get("teacher_epochs") or one["epochs"] for one in schedules))
    return (
        f"students {text['epochs']}, teacher {teacher}, batches of {text['batch_size']}, {text['optimizer']}, "
        f"rate {text['lr']} times each arm's own, {text['decay']} decay after a warm-up of {text['warmup']}; evaluated "
        f"every {text['evaluate']}"
    )


def describe_cases(results: Results) -> str:
    """Say what the cases change: first what more than half of them have, then a line each on what it has instead."""
    settings = {case: flatten(one["config"]) for case, one in cases.case_manifests(results).items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one if key not in ("case", *PER_RUN))
    counts = {key: Counter(str(one.get(key)) for one in settings.values()) for key in keys}
    varied = {key: found.most_common(1)[0] for key, found in counts.items() if len(found) > 1}
    usual = {key: value for key, (value, count) in varied.items() if 2 * count > len(settings)}
    common = ", ".join(f"{key} {value}" for key, value in usual.items() if value != "None")
    phrases = [f"{common} where nothing else is said" if common else ""]
    for case, one in settings.items():
        other = ", ".join(f"{key} {one.get(key)}" for key in varied if str(one.get(key)) != usual.get(key))
        phrases.append(f"`{case}`: {other}" if other else f"`{case}`")
    return "\n".join(phrases)


def join_commands(records: Sequence[dict[str, Any]]) -> str:
    """Return one command that repeats these runs with all of their seeds, of the words that their commands share."""
    first, *others = [shlex.split(record["command"]) for record in records]
    shared = [word for word in first if all(word in words for words in others) and not word.startswith(PER_COMMAND)]
    seeds = sorted({int(record["seed"]) for record in records})
    sweep = ["-m"] if len(seeds) > 1 else []
    return shlex.join([*shared[:2], *sweep, *shared[2:], f"seed={','.join(map(str, seeds))}"])


def collect_facts(results: Results) -> dict[str, str]:
    """Return what a reader should know of one experiment: what was run where, on which data, at which commit."""
    records = list(results.runs["manifest"])
    groups = results.runs["manifest"].groupby(level="case", sort=False)
    own = [record for _, manifests in groups for record in own_manifests(manifests)]
    seeds = sorted({record["seed"] for record in records})
    versions = [", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items())) for record in records]
    hardware = [  # of every process that made a part of a curve, where the manifest says it
        f"{process['device']}: {process['hardware']}, {record['precision']}"
        for record in records
        for process in [one for one in record.get("processes", ()) if "hardware" in one] or [record]
    ]
    dirty = " with uncommitted changes"
    commits = [str(record["commit"])[:10] + (dirty if record["dirty"] else "") for record in records]
    return {
        "Claim": own[0]["config"]["claim"],
        "Found": f"{describe(results)}.",
        "Data": "; ".join(list_distinct(describe_data(record) for record in own)),
        "Schedule": describe_schedule([record["config"] for record in own]),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Hardware": "; ".join(list_distinct(hardware)),
        "Versions": "; ".join(list_distinct(versions)),
        "Commit": "; ".join(list_distinct(commits)),
    }


def _section_head(name: str, results: Results, facts: Mapping[str, str], caption: str) -> str:
    """Return the head of an experiment's section: its command, its facts as a list, its figure, links to its files."""
    command = join_commands(own_manifests(results.runs["manifest"]))
    bullets: list[str] = []
    for fact, text in facts.items():
        first, *others = text.split("\n")
        bullets += [wrap(f"- **{fact}:** {first}", "  "), *(wrap(f"  - {line}", "    ") for line in others)]
    image = f"![{caption}: {name}](figures/{name}.png)"
    links = f"[As SVG](figures/{name}.svg), [curves and manifests](curves/{name})"
    return "\n\n".join([f"## {name}", f"```bash\n{command}\n```", "\n".join(bullets), image, links])


def experiment_section(name: str, results: Results) -> str:
    """Return the part of results/README.md on an experiment without cases."""
    facts = collect_facts(results)
    if differences := curves.describe_differences(own_manifests(results.runs["manifest"])):
        facts["Not all curves share"] = ", ".join(differences)
    parts = [_section_head(name, results, facts, "Accuracy of each arm over training steps and over compute")]
    if name in PAPER:
        number = PAPER[name][0]
        image = f"![Figure {number} of the paper, from our curves](figures/paper_figure_{number}.png)"
        parts += [image, TEXTS.paper_figure.format(number=number)]
    parts += [
        TEXTS.target.format(target=curves.find_target(results)),
        markdown_table(*tabulate_arms(results), code=True),
    ]
    if costs := tabulate_costs(results):
        parts += [TEXTS.costs, markdown_table(*costs, code=True)]
    return "\n\n".join(parts)


def cases_section(name: str, results: Results) -> str:
    """Return the part of results/README.md on an experiment with cases."""
    frontier, search = cases.is_frontier(results), cases.is_search(results)
    kind = "against training budget" if frontier else "against initial rate" if search else "of each case"
    facts = collect_facts(results) | ({} if search else {"Cases": describe_cases(results)})
    parts = [_section_head(name, results, facts, f"Accuracy {kind}")]
    if search:
        return "\n\n".join([*parts, TEXTS.search, markdown_table(*_tabulate_search(results))])
    if frontier:
        parts += [TEXTS.frontier, noted_table(*tabulate_budgets(name, results))]
    parts.append(markdown_table(*_tabulate_cases(results)))
    best = [f"`{arm}` `{case}` ({100 * accuracy:.2f} %)" for arm, (case, accuracy) in cases.best_cases(results).items()]
    if best and not frontier:
        parts.append(wrap(f"Best by holdout accuracy: {', '.join(best)}."))
    return "\n\n".join(parts)


def _tabulate_cases(results: Results) -> Cells:
    """Return the table of how every arm of every case starts and ends, and what it costs."""
    size, unit = cost_unit(results.runs)
    heads = ["case", "arm", "n", "test accuracy at step 0 (%), lowest–highest"]
    heads += ["final test accuracy (%), 95 % interval", "final holdout accuracy (%)"]
    lines: list[list[str]] = []
    for (case, arm), row in cases.summarise_cases(results).iterrows():
        mean, low, high = (f"{100 * getattr(row['final'], name):.2f}" for name in ("mean", "low", "high"))
        ends = [mean if row["n"] == 1 else f"{mean} ({low} to {high})", f"{100 * row['holdout_mean']:.2f}"]
        costs = [f"{row[column] / size:.3g}".replace("nan", "–") for column in ("flops", "total_flops")]
        lines.append([f"`{case}`", f"`{arm}`", str(row["n"]), format_percent(row, "start"), *ends, *costs])
    return [*heads, f"{unit}, own", f"{unit}, with teacher's"], lines


def _tabulate_search(results: Results) -> Cells:
    """Return the table of a search of rates: a line for each budget and arm, its highest accuracy in bold."""
    table = cases.tabulate_rates(results)
    lines: list[list[str]] = []
    for (budget, arm), row in table.iterrows():
        best = row.idxmax() if row.notna().any() else None
        shown = {rate: f"{100 * accuracy:.2f}" for rate, accuracy in row.dropna().items()}
        cells = [f"**{shown[rate]}**" if rate == best else shown.get(rate, "–") for rate in table.columns]
        lines.append([str(budget), f"`{arm}`", *cells])
    return ["budget", "arm", *(f"{rate:g} ×" for rate in table.columns)], lines


def claim_line(finding: Finding, drawn: Collection[str]) -> list[Noted]:
    """Return the cells of one claim in the table of its group; `drawn` are the experiments with a section."""
    claim = finding.claim
    links = [
        f"[figure](#{name})" if name in drawn else f"[config](../configs/experiment/{name}.yaml)"
        for name in sorted(claim.experiments)
    ]
    paper = claim.source if claim.paper == "–" else f"{claim.source}: {claim.paper}"
    verdict = f"**{finding.verdict}**" if finding.verdict in ("holds", "fails") else finding.verdict
    return [claim.claim, paper, (finding.value, finding.note), verdict, ", ".join(links)]


def claims_section(findings: list[Finding], drawn: Collection[str]) -> str:
    """Return the part of results/README.md on the claims: a table for each group."""
    verdicts = count_verdicts(findings)
    parts = [TEXTS.claims.format(verdicts=verdicts, seeds=CLAIM_SEEDS, headline_seeds=HEADLINE_SEEDS), TEXTS.measures]
    heads = ["claim", "paper", "ours (95 % interval), n", "verdict", "figure"]
    for group, members in itertools.groupby(findings, key=lambda finding: finding.claim.group):
        table = noted_table(heads, [claim_line(finding, drawn) for finding in members])
        parts += [f"### {group}", table] if group else [table]
    return "\n\n".join(parts)


def count_verdicts(findings: Iterable[Finding]) -> str:
    """Return `3 hold, 1 fails, 4 undecided, 20 not run`."""
    counts = Counter(finding.verdict.partition(" (")[0] for finding in findings)
    plurals = {"holds": "hold", "fails": "fail", "undecided": "undecided", "not run": "not run"}
    words = {one: one if counts[one] == 1 else many for one, many in plurals.items()}
    return ", ".join(f"{counts[one]} {word}" for one, word in words.items() if counts[one])


def results_page(results: Results, findings: list[Finding]) -> str:
    """Return the text of results/README.md."""
    parts = [TEXTS.introduction.format(command=COMMAND)]
    if findings:
        parts.append(claims_section(findings, results.experiments))
    plain = [name for name, found in results.experiments.items() if found == [""]]
    parts += [experiment_section(name, results.select(name)) for name in plain]
    parts += [cases_section(name, results.select(name)) for name in results.experiments if name not in plain]
    return "\n\n".join(parts) + "\n"


def summary_block(results: Results, findings: list[Finding]) -> str:
    """Return the block of the top-level README: three ways to spend compute, and how the claims stand."""
    parts: list[str] = []
    ladder = results.select(*LADDER)
    if len(ladder.runs):
        rows = cases.summarise_cases(ladder).droplevel("case")
        size, unit = cost_unit(ladder.runs)
        lines = [_way_line(WAYS[arm], rows.loc[arm], size) for arm in WAYS if arm in rows.index]
        heads = ["what is trained", f"{unit} in all", "without the teacher's", "test accuracy (%)", "seeds"]
        parts.append(markdown_table(heads, lines))
    if findings:
        parts.append(f"The claims, each a test: {count_verdicts(findings)} ([the tables](results/README.md#claims)).")
    parts.append(f"Figures, settings and costs: [results/README.md](results/README.md). Generated by `{COMMAND}`.")
    return "\n\n".join(parts)


def _way_line(way: str, row: Series, size: float) -> list[str]:
    own, total = (f"{row[column] / size:.0f}" for column in ("flops", "total_flops"))
    ends = [f"{100 * number:.2f}" for number in (row["final"].mean, row["final"].low, row["final"].high)]
    accuracy = ends[0] if row["n"] == 1 else f"{ends[0]} ({ends[1]} to {ends[2]})"
    return [way, total, own if own != total else "–", accuracy, f"{row['n']:.0f}"]


def ladder_block(findings: list[Finding]) -> str:
    """Return the verdicts on growing in width on the strong baseline."""
    own = [finding for finding in findings if LADDER[0] in finding.claim.experiments and finding.claim.against]
    lines = [[line[0], line[2], line[3]] for line in (claim_line(finding, ()) for finding in own)]
    table = noted_table(["claim", "ours (95 % interval)", "verdict"], lines)
    return f"{table}\n\nGenerated by `{COMMAND}` from `results/claims.yaml` and the curves."


def trials_block(folder: Path) -> str:
    """Return the table of rate trials, best first: one run each, made to choose the optimizer's defaults."""
    lines: list[tuple[float, list[str]]] = []
    for trial in sorted(folder.glob("*/curves/*")):
        runs = curves.load(trial).runs
        for (_, _, arm, seed), record, score in zip(runs.index, runs["manifest"], runs["holdout"], strict=True):
            schedule = record["config"]["schedule"]
            facts = [f"{schedule['optimizer']}, {schedule['lr']:g}", schedule["warmup"], f"`{arm}` of {trial.name}"]
            lines.append((-score, [*facts, schedule["epochs"], str(seed), f"{100 * score:.2f}"]))
    heads = ["optimizer, initial rate", "warm-up", "run", "length", "seed", "holdout accuracy (%)"]
    table = markdown_table(heads, [cells for _, cells in sorted(lines)])
    return f"{table}\n\nOne run each. Generated by `{COMMAND}` from `results/trials`."
