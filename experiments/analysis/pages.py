"""The pages that are made from curves: results/README.md, and the tables of README.md and docs/reproduction.md."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import ARMS, TEACHER, flatten
from . import cases as family
from . import costs, search
from . import curves as report
from .claims import Finding
from .curves import PER_RUN, Results, distinct, mixed
from .figures import PAPER
from .frontier import budgets, is_frontier
from .statistics import CLAIM_SEEDS, HEADLINE_SEEDS, Estimate

COMMAND = "python scripts/figures.py"


def markdown_table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose first column is left-aligned and the others right-aligned."""
    rule = [":--"] + ["--:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def data_phrase(record: dict[str, Any]) -> str:
    """What the images are and what is done to them."""
    data = record["config"]["data"]
    parts = [record["data"], f"{data['size']} × {data['size']} pixels"]
    parts.append(f"{100 * data['holdout']:g} % of the training images held out to make choices")
    parts.append(f"random crop after {data['pad']} pixels of padding" if data["pad"] else "no random crop")
    parts.append("random flip" if data["flip"] else "no flip")
    return ", ".join(parts)


def schedule_phrase(configs: list[dict[str, Any]]) -> str:
    """How long and how the networks are trained; where cases differ, each way once."""
    teachers = [{"teacher": one["schedule"].get("teacher_epochs") or one["schedule"]["epochs"]} for one in configs]
    schedules = [one["schedule"] | own for one, own in zip(configs, teachers, strict=True)]
    said = {key: " / ".join(distinct(one.get(key) for one in schedules)) for key in schedules[0]}
    return (
        f"students {said['epochs']}, teacher {said['teacher']}, batches of {said['batch_size']}, {said['optimizer']}, "
        f"rate {said['lr']} times each arm's own, {said['decay']} decay after a warm-up of {said['warmup']}; evaluated "
        f"every {said['evaluate']}"
    )


def case_phrase(cases: family.Cases) -> str:
    """What the cases change: first what more than half of them have, then of each what it has instead."""
    settings = {case: flatten(report.own(manifests)[0]["config"]) for case, (_, manifests) in cases.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one if key not in ("case", *PER_RUN))
    found = {key: Counter(str(one.get(key)) for one in settings.values()) for key in keys}
    varied = {key: counts.most_common(1)[0] for key, counts in found.items() if len(counts) > 1}
    usual = {key: value for key, (value, count) in varied.items() if 2 * count > len(cases)}
    said = ", ".join(f"{key} {value}" for key, value in usual.items() if value != "None")
    others = {
        case: ", ".join(f"{key} {one.get(key)}" for key in varied if str(one.get(key)) != usual.get(key))
        for case, one in settings.items()
    }
    return "; ".join(
        [f"{said} where nothing else is said"] * bool(said)
        + [f"`{case}`: {other}" if other else f"`{case}`" for case, other in others.items()]
    )


def command_phrase(commands: Iterable[str]) -> str:
    """The commands that made the curves, as code: each once, and those that differ in seed or case alone as a sweep."""
    found = distinct(commands)
    for key in ("seed", "case"):
        found = _swept(found, key)
    return "<br>".join(f"`{command}`" for command in found)


def _swept(commands: list[str], key: str) -> list[str]:
    """The commands, those that differ in the value of `key` alone as one."""
    values: dict[tuple[str, ...], list[str]] = {}
    for command in commands:
        words = tuple(f"{key}=" if word.startswith(f"{key}=") else word for word in shlex.split(command))
        values.setdefault(words, []).extend(
            word.partition("=")[2] for word in shlex.split(command) if word.startswith(f"{key}=")
        )
    made: list[str] = []
    for words, found in values.items():
        said = [f"{key}={','.join(distinct(found))}" if word == f"{key}=" else word for word in words]
        if len(distinct(found)) > 1 and "-m" not in said:
            said.insert(2, "-m")
        made.append(shlex.join(said))
    return made


def facts(manifests: Iterable[report.Manifests]) -> dict[str, str]:
    """What is to be known of an experiment, or of all cases of one: what was run where, on what, at which commit."""
    manifests = list(manifests)
    records = [record for one in manifests for seeds in one.values() for record in seeds.values()]
    own = [record for one in manifests for record in report.own(one)]
    seeds = sorted({record["seed"] for record in records})
    versions = [", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items())) for record in records]
    hardware = [  # of every process that made a part of a curve, where they say it
        f"{process['device']}: {process['hardware']}, {record['precision']}"
        for record in records
        for process in [one for one in record.get("processes", ()) if "hardware" in one] or [record]
    ]
    commits = [
        str(record["commit"])[:10] + (" with uncommitted changes" if record["dirty"] else "") for record in records
    ]
    found = {
        "Claim": own[0]["config"]["claim"],
        "Command": command_phrase(record["command"] for record in own),
        "Data": "; ".join(distinct(data_phrase(record) for record in own)),
        "Schedule": schedule_phrase([record["config"] for record in own]),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Hardware": "; ".join(distinct(hardware)),
        "Versions": "; ".join(distinct(versions)),
        "Commit": "; ".join(distinct(commits)),
    }
    return found


def bullets(found: Mapping[str, str]) -> str:
    """Facts as a list."""
    return "\n".join(f"- **{fact}:** {text}" for fact, text in found.items())


def section(name: str, curves: report.Curves, manifests: report.Manifests) -> str:
    """The part of results/README.md on an experiment without cases."""
    found = facts([manifests])
    apart = mixed(report.own(manifests))
    if apart:
        found["Not all curves share"] = ", ".join(apart)
    target = report.target_arm(manifests)
    heads, lines = report.cells(report.summarise(curves, target), manifests)
    number = PAPER[name][0] if name in PAPER else None
    as_printed = [f"![Figure {number} of the paper](figures/paper_figure_{number}.png)"] if number else []
    parts = [
        f"## {name}",
        bullets(found),
        f"![Accuracy of each arm over training steps and over compute: {name}](figures/{name}.png)",
        f"[As SVG](figures/{name}.svg), [curves and manifests](curves/{name})",
        *as_printed,
        f"The target is the final holdout accuracy of `{report.target_source(curves, target)}`.",
        markdown_table(heads, code_first(lines)),
    ]
    spent = costs.costs(curves, target)
    if any(cost.own for cost in spent):
        heads, lines = costs.cells(spent)
        parts += [
            "What it took to reach the target, on average over the seeds that did. The machines had other work, too: "
            "seconds hardly compare, FLOPs do."
        ]
        parts += [markdown_table(heads, code_first(lines))]
    return "\n\n".join(parts)


def code_first(lines: list[list[str]]) -> list[list[str]]:
    """The lines with the first cell of each as code."""
    return [[f"`{line[0]}`", *line[1:]] for line in lines]


def family_section(name: str, cases: family.Cases) -> str:
    """The part of results/README.md on an experiment with cases."""
    frontier, searched = is_frontier(cases), search.is_search(cases)
    shown = "Accuracy against training budget" if frontier else "Accuracy of each case"
    shown = "Accuracy against initial rate" if searched else shown
    told = {} if searched else {"Cases": case_phrase(cases)}
    parts = [
        f"## {name}",
        bullets(facts(manifests for _, manifests in cases.values()) | told),
        f"![{shown}: {name}](figures/{name}.png)",
        f"[As SVG](figures/{name}.svg), [curves and manifests](curves/{name})",
    ]
    if frontier:
        heads, lines = budgets(name, cases)
        parts += [
            """Which share of the FLOPs of `random_init` an arm needs to end as well as it does: the geometric mean over
seeds, its 95 % interval, n. Between the budgets that were run it is interpolated; ≤ and ≥ stand where the smallest
or the largest of them says no more than that. Untrained already: what was grown is as good without training. The last
column is the same run read as a curve: the share of the steps of `random_init`, under one schedule, until the holdout
accuracy is what it ends with.""",
            markdown_table(heads, lines),
        ]
    if searched:
        heads, lines = search.cells(search.tried(cases))
        parts += ["Holdout accuracy (%) at the end, at each multiple of `schedule.lr`; the best of each line in bold."]
        return "\n\n".join([*parts, markdown_table(heads, lines)])
    found = family.lines(cases)
    size, unit = report.flops_unit(max(line.flops_total or line.flops for line in found))
    heads = [
        "case",
        "arm",
        "n",
        "test accuracy at step 0 (%), lowest–highest",
        "final test accuracy (%), 95 % interval",
    ]
    heads += ["final holdout accuracy (%)"]
    heads += [f"{unit}, own", f"{unit}, with teacher's"]
    table = [
        [
            f"`{line.case}`",
            f"`{line.arm}`",
            str(line.final.n),
            report.percent(line.start),
            interval(line.final),
            f"{100 * line.holdout:.2f}",
            f"{line.flops / size:.3g}",
            "–" if line.flops_total is None else f"{line.flops_total / size:.3g}",
        ]
        for line in found
    ]
    parts += [markdown_table(heads, table)]
    best = [f"`{arm}` `{case}` ({100 * accuracy:.2f} %)" for arm, (case, accuracy) in family.best(cases).items()]
    if best and not frontier:
        parts += [f"Best by holdout accuracy: {', '.join(best)}."]
    return "\n\n".join(parts)


def interval(found: Estimate) -> str:
    """`61.20 (60.80 to 61.60)`, in per cent; the mean alone of one seed."""
    mean, low, high = (f"{100 * value:.2f}" for value in (found.mean, found.low, found.high))
    return mean if found.n == 1 else f"{mean} ({low} to {high})"


def claim_line(finding: Finding) -> list[str]:
    """The cells of one claim."""
    claim = finding.claim
    names = list(dict.fromkeys(text.partition(":")[0].partition("/")[0] for text in (claim.of, claim.against) if text))
    configs = ", ".join(f"[{name}](../configs/experiment/{name}.yaml)" for name in names)
    commands = [record["command"] for one in finding.operands for record in one.manifests[one.arm].values()]
    planned = [] if commands else [f"python train.py experiment={name}" for name in names]
    shown = command_phrase(commands or planned)
    said = f"**{finding.verdict}**" if finding.verdict in ("holds", "fails") else finding.verdict
    return [claim.claim, claim.source, claim.paper, finding.shown, said, configs, shown]


def tally(found: Iterable[Finding]) -> str:
    """`3 hold, 1 fails, 4 undecided, 20 not run`."""
    counts = Counter(finding.verdict.partition(" (")[0] for finding in found)
    words = {"holds": "hold", "fails": "fail"}
    return ", ".join(
        f"{counts[word]} {word if counts[word] == 1 else words.get(word, word)}"
        for word in ("holds", "fails", "undecided", "not run")
        if counts[word]
    )


def claims_section(found: list[Finding]) -> str:
    """The table of the claims."""
    heads = ["claim", "source", "paper", "ours", "verdict", "config", "command"]
    return "\n\n".join(
        [
            "## Claims",
            f"""Each claim is a test in [claims.yaml](claims.yaml), judged from the curves alone: {tally(found)}.
Differences and ratios are paired by seed; in brackets their 95 % interval, the wider of Student's t and the bootstrap
at either end ([statistics.py](../experiments/analysis/statistics.py) says why). A claim holds if all of the interval lies where
it says, fails if none of it does. There is no verdict on fewer than {CLAIM_SEEDS} seeds, and none on what is to be
quoted on fewer than {HEADLINE_SEEDS}; of what is undecided the table says what would tell. The best of several cases
is, for each seed, the one that ends best on the holdout images of the other seeds. Of so many tests at 95 % some are
wrong by chance: one that holds narrowly, alone among its kind, is weak evidence. Seeds differ in the networks' first
weights, in the order and the crops of the images, and not in the split of the images, which is always the same.
In the commands `data.root` is the name of the folder that had the images; without `data` and `data.root` CIFAR-10 is
downloaded.""",
            markdown_table(heads, [claim_line(finding) for finding in found]),
        ]
    )


def results_readme(results: Results, findings: list[Finding]) -> str:
    """The text of results/README.md."""
    intro = f"""<!-- Generated by `{COMMAND}` from curves/. Do not edit: the next run overwrites it. -->
# Results

Generated by `{COMMAND}` from the curves in [curves/](curves), which `python scripts/collect.py` copied from
finished runs with the manifest of each.

Numbers are means over seeds; in brackets, and as bands in the figures, the lowest and highest seed, unless a table
says otherwise. Steps to target: the first evaluated step at which an arm's holdout accuracy, and that of the next
evaluation, is at least the target's, the final holdout accuracy of the target arm of the same student and seed, or the
teacher's where there is none; where some seeds alone reach it, the mean is over those, as said in brackets. FLOPs are
those of training; "with teacher's" adds what the teacher cost to the arms that start from it, and a teacher that was
grown itself has cost what the network before it has. Top-1 as teacher's: on
how many test images the student's first choice is the teacher's before it is trained, over all seeds, and the largest
relative error of its outputs, both computed in float64."""
    parts = [intro, *([claims_section(findings)] if findings else [])]
    parts += [section(name, *loaded) for name, loaded in results.items() if "/" not in name]
    parts += [family_section(name, cases) for name, cases in family.families(results).items()]
    return "\n\n".join(parts) + "\n"


def summary(results: Results, findings: list[Finding]) -> str:
    """For the top-level README: a line for each experiment and student, and how the claims stand."""
    lines: list[list[str]] = []
    used: set[str] = set()
    texts: list[tuple[str, str, dict[str, str], dict[str, str]]] = []
    for name, (curves, manifests) in results.items():
        if "/" in name:  # a case: its table is in results/README.md
            continue
        rows = report.summarise(curves, report.target_arm(manifests))
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
    arms = [arm for arm in (TEACHER, *ARMS) if arm in used]
    raced = [arm for arm in ("net2net", "random_init") if arm in used]
    for label, n, accuracy, steps in texts:
        final = [accuracy.get(arm, "–") for arm in arms]
        lines.append([label, n, *final, " / ".join(steps.get(arm, "–") for arm in raced)])
    heads = ["experiment", "n", *(f"`{arm}`" for arm in arms), f"steps to target: {' / '.join(raced)}"]
    return "\n\n".join(
        [
            "Final test accuracy in per cent, mean over n seeds (lowest–highest).",
            markdown_table(heads, lines),
            *(
                [f"The claims, each a test: {tally(findings)} ([the table](results/README.md#claims))."]
                if findings
                else []
            ),
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
                run, warmup = f"`{arm}` of {trial.name}", schedule["warmup"]
                facts = [setting, warmup, run, schedule["epochs"], str(seed), f"{100 * score:.2f}"]
                lines.append((-score, facts))
    heads = ["optimizer, initial rate", "warm-up", "run", "length", "seed", "holdout accuracy (%)"]
    ranked = [facts for _, facts in sorted(lines)]
    return f"{markdown_table(heads, ranked)}\n\nOne run each. Generated by `{COMMAND}` from `results/trials`."
