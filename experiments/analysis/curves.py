"""Numbers from finished runs: reads curves, computes a table row per arm. No torch, no matplotlib.

A curve is a list of points, one an evaluation; curves are kept as {arm: {seed: curve}}, where the arm is
spelled as its folder is (`net2net`, or `wider_net2net` where an experiment has several students).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import STARTS_FROM_TEACHER, TEACHER, ExperimentError, flatten, ordered, split_arm
from ..run_log import COLUMNS, Point, parse_curve

if TYPE_CHECKING:
    from rich.table import Table

Curves = dict[str, dict[int, list[Point]]]
Manifests = dict[str, dict[int, dict[str, Any]]]
Results = Mapping[str, tuple[Curves, Manifests]]  # experiment, or experiment/case -> what was run

# Settings that may differ between seeds of one experiment without making their mean meaningless.
PER_RUN = {
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
    # What the scale makes of the paper's network: it stands in `model`, too, where the network is that one.
    "inception.slim",
    "inception.stem",
    "first",  # a teacher's hash of the network that it is grown from, its seed's
}


@dataclass(frozen=True)
class Spread:
    """The mean of some numbers, one a seed, and the smallest and largest of them."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One arm over its seeds. Accuracies are in 0..1, FLOPs are those of training."""

    arm: str
    n: int  # seeds
    start: Spread  # test accuracy at the first evaluation
    final: Spread  # test accuracy at the last evaluation
    target: Spread | None  # holdout accuracy that `steps` are counted to; None: no such arm in any seed
    steps: Spread | None  # over the seeds that reach the target; None: none does, or there is no target
    reached: int  # seeds that reach it
    flops: Spread  # this arm alone
    flops_total: Spread | None  # with the teacher's, for arms that start from it; None: no teacher there


def read_arm(path: Path) -> list[Point]:
    """The points of a curve, given its CSV or the folder that holds `curve.csv`; errors as `parse_curve`."""
    file = path / "curve.csv" if path.is_dir() else path
    if not file.is_file():
        raise ExperimentError(f"There is no curve {file}: run its arm first.")
    return parse_curve(file.read_bytes(), file)


def read_complete(curve: Path, manifest: Path) -> tuple[bytes, dict[str, Any]] | None:
    """The bytes of a finished arm's curve and its manifest; None while the arm is unfinished.

    Raises ExperimentError if the manifest is no JSON object or the curve is not the one it was written for.
    """
    try:
        record = json.loads(manifest.read_bytes())
        data = curve.read_bytes()
    except FileNotFoundError:
        return None
    except ValueError:
        record, data = None, b""
    if not isinstance(record, dict):
        raise ExperimentError(f"The manifest {manifest} is not a JSON object: remove its arm and run it again.")
    if record.get("complete") is not True:
        return None
    if hashlib.sha256(data).hexdigest() != record.get("curve_sha256"):
        raise ExperimentError(
            f"The curve {curve} does not match curve_sha256 in its manifest: remove its arm and run it again."
        )
    return data, record


def arm_files(directory: Path) -> list[tuple[int, str, Path, Path]]:
    """(seed, arm, curve, manifest) of each arm under an experiment's folder, finished or not, in reading order.

    Understands both layouts: seed<k>/<arm>/curve.csv of `runs`, seed<k>/<arm>.csv of `results/curves`.
    """
    found: list[tuple[int, str, Path, Path]] = []
    for folder in directory.glob("seed*"):
        match = re.fullmatch(r"seed(\d+)", folder.name)
        if match is None or not folder.is_dir():
            continue
        entries = {p.name: (p / "curve.csv", p / "manifest.json") for p in folder.iterdir() if p.is_dir()}
        entries |= {p.stem: (p, p.with_suffix(".json")) for p in folder.glob("*.csv")}
        found += [(int(match[1]), arm, *entries[arm]) for arm in ordered(entries) if not arm.startswith(".")]
    return sorted(found, key=lambda entry: entry[0])


def load_all(directory: Path) -> Results:
    """What was run of every experiment below `runs` or `results/curves`; ExperimentError if there is none."""
    found = experiments(directory)
    if not found:
        raise ExperimentError(f"There are no curves under {directory}: run python scripts/collect.py first.")
    return {name: load(path) for name, path in found.items()}


def experiments(directory: Path) -> dict[str, Path]:
    """The folder of each experiment and of each case below `runs` or `results/curves`, in order of their names.

    A case goes by `experiment/case`. A folder counts if it has a seed in it.
    """
    folders = [folder for pattern in ("*/seed*", "*/*/seed*") for folder in directory.glob(pattern) if folder.is_dir()]
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted({folder.parent for folder in folders if re.fullmatch(r"seed\d+", folder.name)})
    }


def load(directory: Path) -> tuple[Curves, Manifests]:
    """Curves and manifests of the finished arms under an experiment's folder; errors as `read_complete`."""
    curves: Curves = {}
    manifests: Manifests = {}
    for seed, arm, curve, manifest in arm_files(directory):
        complete = read_complete(curve, manifest)
        if complete is not None:
            curves.setdefault(arm, {})[seed] = parse_curve(complete[0], curve)
            manifests.setdefault(arm, {})[seed] = complete[1]
    if not curves:
        raise ExperimentError(f"There is no finished arm under {directory}: run the experiment first.")
    return {arm: curves[arm] for arm in ordered(curves)}, {arm: manifests[arm] for arm in ordered(manifests)}


def spread(values: Sequence[float]) -> Spread:
    """The mean, smallest and largest of at least one number."""
    return Spread(math.fsum(values) / len(values), min(values), max(values))


def before(curves: Curves, arm: str, seed: int) -> Point | None:
    """What was spent before `arm` began: where its teacher ended, zeros for a fresh start; None without the teacher."""
    if split_arm(arm)[1] not in STARTS_FROM_TEACHER:
        return dict.fromkeys(COLUMNS, 0.0)
    teacher = curves.get(TEACHER, {}).get(seed)
    return teacher[-1] if teacher else None


def target_accuracy(curves: Curves, arm: str, seed: int, target_arm: str) -> float | None:
    """The holdout accuracy that `arm` is to reach: the final one of the target arm of its student and seed.

    Where there is no such arm, the teacher's of that seed; None without either. The teacher's own
    aim is the target arm of a sole student; with several students it has none.
    """
    student, kind = split_arm(arm)
    same = curves.get(target_arm if student is None else f"{student}_{target_arm}", {}).get(seed)
    if same is None and kind != TEACHER:
        same = curves.get(TEACHER, {}).get(seed)
    return same[-1]["holdout_accuracy"] if same else None


def reach(curve: list[Point], target: float) -> Point | None:
    """The first evaluation whose holdout accuracy is at least `target`, as is the next one's; None if there is none.

    One evaluation alone may be above by chance. After the last one there is no next.
    """
    above = [point["holdout_accuracy"] >= target for point in curve]
    return next((point for i, point in enumerate(curve) if all(above[i : i + 2])), None)


def summarise(curves: Curves, target_arm: str) -> list[Row]:
    """One row an arm, in reading order; every statistic is over the seeds that the arm has."""
    rows: list[Row] = []
    for arm in ordered(curves):
        seeds = curves[arm]
        targets = {seed: target_accuracy(curves, arm, seed, target_arm) for seed in seeds}
        aims = {seed: target for seed, target in targets.items() if target is not None}
        steps = [at["step"] for seed, target in aims.items() if (at := reach(seeds[seed], target)) is not None]
        past = [before(curves, arm, seed) for seed in seeds]
        own = [curve[-1]["flops"] for curve in seeds.values()]
        total = [mine + theirs["flops"] for mine, theirs in zip(own, past, strict=True) if theirs is not None]
        rows.append(
            Row(
                arm=arm,
                n=len(seeds),
                start=spread([curve[0]["test_accuracy"] for curve in seeds.values()]),
                final=spread([curve[-1]["test_accuracy"] for curve in seeds.values()]),
                target=spread(list(aims.values())) if aims else None,
                steps=spread(steps) if steps else None,
                reached=len(steps),
                flops=spread(own),
                # A mean over some of the seeds would not be comparable with the column beside it.
                flops_total=spread(total) if len(total) == len(own) else None,
            )
        )
    return rows


def target_source(curves: Curves, target_arm: str) -> str:
    """Whose final holdout accuracy the steps are counted to: the target arm, or the teacher where it was not run."""
    return target_arm if any(split_arm(arm)[1] == target_arm for arm in curves) else TEACHER


def agreement(manifests: dict[int, dict[str, Any]]) -> str:
    """How far an arm computes the teacher's function at step 0, in float64, over its seeds; "" if not measured."""
    measured = [record["step0"] for record in manifests.values() if record.get("step0")]
    if not measured:
        return ""
    agree, total = (sum(int(m[key]) for m in measured) for key in ("agree", "of"))
    errors = [float(m["max_relative_error"]) for m in measured if m.get("max_relative_error") is not None]
    return f"{agree} of {total}" + (f" (error {max(errors):.1e})" if errors else "")


def own(manifests: Manifests) -> list[dict[str, Any]]:
    """The manifests of the experiment's own arms, or else the teacher's, which another experiment may have trained."""
    records = [record for arm, seeds in manifests.items() if arm != TEACHER for record in seeds.values()]
    return records or [record for seeds in manifests.values() for record in seeds.values()]


def name(manifests: Manifests) -> str:
    """The experiment that was run, with its case."""
    return own(manifests)[0]["experiment"]


def target_arm(manifests: Manifests) -> str:
    """The arm that the configuration counts steps to."""
    return own(manifests)[0]["config"]["target"]


def flops_unit(largest: float) -> tuple[float, str]:
    """The SI unit in which `largest` is a number from 1 up: (FLOPs in one of it, its name)."""
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    return next(((size, name) for size, name in units if largest >= size), (1.0, "FLOP"))


def percent(value: Spread) -> str:
    """`91.20 (90.80–91.50)`: mean and range over seeds; the mean alone where they coincide. Per cent."""
    mean, low, high = (f"{100 * x:.2f}" for x in (value.mean, value.low, value.high))
    return mean if low == high else f"{mean} ({low}–{high})"


def steps_cell(row: Row) -> str:
    """Mean steps to the target, and over how many of the seeds if not all; `never`; `–` without target."""
    if row.target is None:
        return "–"
    if row.steps is None:
        return "never"
    return f"{row.steps.mean:.0f}" + ("" if row.reached == row.n else f" ({row.reached} of {row.n})")


def cost_cell(flops: Spread | None, size: float) -> str:
    """Mean training FLOPs in units of `size`."""
    return "–" if flops is None else f"{flops.mean / size:.3g}"


def cells(rows: list[Row], manifests: Manifests) -> tuple[list[str], list[list[str]]]:
    """The whole table as text: its heads, and a line of cells an arm."""
    size, unit = flops_unit(max((row.flops_total or row.flops).high for row in rows))
    columns: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: row.arm,
        "n": lambda row: str(row.n),
        "test accuracy at step 0 (%)": lambda row: percent(row.start),
        "final test accuracy (%)": lambda row: percent(row.final),
        "target: holdout accuracy (%)": lambda row: percent(row.target) if row.target else "–",
        "steps to target": steps_cell,
        f"{unit}, own": lambda row: cost_cell(row.flops, size),
        f"{unit}, with teacher's": lambda row: cost_cell(row.flops_total, size),
        "top-1 as teacher's at step 0": lambda row: agreement(manifests.get(row.arm, {})) or "–",
    }
    return list(columns), [[text(row) for text in columns.values()] for row in rows]


def table(experiment_dir: Path) -> "Table":
    """The table of the finished arms under `runs/<experiment>`, for 80 columns; errors as `load`."""
    from rich import box
    from rich.table import Table

    curves, manifests = load(experiment_dir)
    target = target_arm(manifests)
    rows = summarise(curves, target)
    size, unit = flops_unit(max((row.flops_total or row.flops).high for row in rows))
    agreements = {arm: agreement(records) for arm, records in manifests.items()}
    notes = [f"steps to target: until the holdout accuracy that {target_source(curves, target)} ends with"]
    notes += ["total: with the teacher's, for arms that start from it"]
    notes += [f"{arm}, step 0, float64: top-1 as teacher's {text}" for arm, text in agreements.items() if text]
    result = Table(
        title=f"{name(manifests)}, test accuracy (%)",
        caption="\n".join(notes),
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("arm", no_wrap=True)
    for head in ("n", "step 0", "final", "steps\nto target", f"{unit}\nown", f"{unit}\ntotal"):
        result.add_column(head, justify="right", overflow="fold")
    for row in rows:
        start, steps = f"{100 * row.start.mean:.2f}", steps_cell(row).replace(" (", "\n(")
        costs = (cost_cell(row.flops, size), cost_cell(row.flops_total, size))
        result.add_row(row.arm, str(row.n), start, percent(row.final), steps, *costs)
    return result


def varied(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Each setting that should be the same in all of these manifests and is not, with its different values."""
    # A precision of "auto" is another one on another device.
    settings = [flatten(_decisive(record)) | {"precision": record.get("precision")} for record in records]
    keys = dict.fromkeys(key for one in settings for key in one if key not in PER_RUN)
    found = {key: distinct(one.get(key) for one in settings) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
    """A teacher's own settings: the rest of its configuration is that of whichever case happened to train it."""
    return record["settings"] if record.get("arm") == TEACHER else record["config"]


def mixed(records: Iterable[dict[str, Any]]) -> list[str]:
    """The same as text: `schedule.lr (0.01, 0.02)` for each."""
    return [f"`{key}` ({', '.join(values)})" for key, values in varied(records).items()]


def distinct(values: Iterable[Any]) -> list[str]:
    """The different ones among `values` as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))
