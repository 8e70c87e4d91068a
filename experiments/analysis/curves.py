"""Read finished runs into two tidy tables: one row an evaluation, and one row a run.

Both tables are indexed by experiment, case ("" where the experiment has no cases), arm and seed. An arm is named as its
folder is: `net2net`, or `wider_net2net` where an experiment has several students.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from pandas import DataFrame, Series

from ..config import CONFIGS, TEACHER, ExperimentError, flatten, ordered, split_arm
from ..run_log import MANIFEST, parse_curve, read_complete

INDEX = ["experiment", "case", "arm", "seed"]
COSTS = ["step", "examples", "flops", "seconds"]  # columns of a curve that say what was spent so far
# Settings that may differ between the seeds of one experiment. A mean over such seeds still has a meaning.
PER_RUN = {
    *("seed", "arms", "claim", "device", "threads", "logger", "runs", "checkpoint_seconds"),
    *("data.root", "data.cache", "data.workers", "data.download"),
    # The scale sets these. They also stand in `model`, `data` and `schedule` of the network that is trained.
    *("inception.slim", "inception.stem", "inception.epochs", "inception.photographs", "speedrun.slim"),
}
Rows = list[dict[str, float]]
Run = tuple[str, int, dict[str, Any], Rows]  # arm, seed, manifest, rows of the curve
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


@dataclass(frozen=True)
class Results:
    """Finished runs as two tables, both indexed by INDEX.

    Attributes:
        curves: One row an evaluation, with the columns of curve.csv. Accuracies are in 0..1, FLOPs those of training.
        runs: One row a run. `start`, `final`: test accuracy at the first and last evaluation. `lowest`: the lowest one.
            `holdout`: holdout accuracy at the last evaluation. `average`: its mean over training. `step`, `examples`,
            `flops`, `seconds`: what the run cost. `teacher_*`: what its teacher had cost, NaN where that is not known.
            `total_*`: the sum of both. `target`: the holdout accuracy to reach, NaN where there is none. `reached_*`:
            the costs at which the run reaches it, NaN where it never does; `reached_total_*`: those with the teacher's.
            `manifest`: the manifest, a dict.
    """

    curves: DataFrame
    runs: DataFrame

    def select(self, experiment: str | None = None, case: str | None = None, arm: str | None = None) -> "Results":
        """Return the results of one experiment, of one of its cases, or of one arm."""
        tables: list[DataFrame] = [self.curves, self.runs]
        for level, name in {"experiment": experiment, "case": case, "arm": arm}.items():
            if name is not None:
                tables = [table[table.index.get_level_values(level) == name] for table in tables]
        return Results(*tables)

    @property
    def arms(self) -> list[str]:
        """The arms in reading order, the teacher first."""
        return ordered(set(self.runs.index.get_level_values("arm")))

    @property
    def title(self) -> str:
        """The name of the first experiment, with its case."""
        return "/".join(part for part in self.runs.index[0][:2] if part)

    @property
    def experiments(self) -> dict[str, list[str]]:
        """The cases of each experiment, [""] for one without cases. A case with only a teacher is no result."""
        students = self.runs[self.runs.index.get_level_values("arm") != TEACHER]
        pairs = students.index.droplevel(["arm", "seed"]).unique()
        return {experiment: [case for other, case in pairs if other == experiment] for experiment, _ in pairs}


def find_arms(directory: Path) -> list[tuple[int, str, Path, Path]]:
    """Return (seed, arm, curve, manifest) of each arm in an experiment's folder, finished or not, in reading order.

    The folder has the layout of `runs`, seed<k>/<arm>/curve.csv, or that of `results/curves`, seed<k>/<arm>.csv.
    """
    found: list[tuple[int, str, Path, Path]] = []
    for seed, folder in sorted(_find_seeds(directory).items()):
        entries = {p.name: (p / "curve.csv", p / MANIFEST) for p in folder.glob("[!.]*/")}
        entries |= {p.stem: (p, p.with_suffix(".json")) for p in folder.glob("[!.]*.csv")}
        found += [(seed, arm, *entries[arm]) for arm in ordered(entries)]
    return found


def _find_seeds(directory: Path) -> dict[int, Path]:
    """Return the folder of each seed, seed<k>."""
    matches = {re.fullmatch(r"seed(\d+)", folder.name): folder for folder in directory.glob("seed*/")}
    return {int(match[1]): folder for match, folder in matches.items() if match}


def find_experiments(directory: Path) -> dict[str, Path]:
    """Return the folder of each experiment below `runs` or `results/curves`; a case is named `experiment/case`.

    A folder counts if it has a seed in it. Experiments are sorted by name, cases as in the experiment's configuration.
    """
    found: list[Path] = []
    for experiment in sorted(directory.glob("*/")):
        cases = [experiment / case for case in read_config(experiment.name).get("cases") or {}]
        found += [experiment, *cases, *(folder for folder in sorted(experiment.glob("*/")) if folder not in cases)]
    return {folder.relative_to(directory).as_posix(): folder for folder in found if _find_seeds(folder)}


def read_config(experiment: str) -> dict[str, Any]:
    """Return an experiment's configuration file as it is written, or {} if there is none."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return config


def load_all(directory: Path) -> Results:
    """Return all finished runs below `runs` or `results/curves`; ExperimentError if there are none."""
    found = find_experiments(directory)
    if not found:
        raise ExperimentError(f"There are no curves under {directory}: run python scripts/collect.py first.")
    return make_results((name, *run) for name, path in found.items() for run in _read_folder(path))


def load(directory: Path) -> Results:
    """Return the finished runs in the folder of an experiment, or of a case; ExperimentError if there are none."""
    runs = _read_folder(directory)
    # The manifest of the teacher names the experiment that trained it first.
    name = next((manifest for arm, _, manifest, _ in runs if arm != TEACHER), runs[0][2])["experiment"]
    return make_results((name, *run) for run in runs)


def _read_folder(directory: Path) -> list[Run]:
    """Return the finished runs in an experiment's folder, arms in reading order."""
    files = find_arms(directory)
    arms = ordered({arm for _, arm, _, _ in files})
    runs: list[Run] = []
    for seed, arm, curve, manifest in sorted(files, key=lambda file: (arms.index(file[1]), file[0])):
        complete = read_complete(curve, manifest)
        if complete is not None:
            runs.append((arm, seed, complete[1], parse_curve(complete[0], curve)))
    if not runs:
        raise ExperimentError(f"There is no finished arm under {directory}: run the experiment first.")
    return runs


def make_results(runs: Iterable[tuple[str, str, int, dict[str, Any], Rows]]) -> Results:
    """Return the tables of runs, given as (experiment or experiment/case, arm, seed, manifest, rows of the curve)."""
    found = {(*name.partition("/")[::2], *key): (manifest, curve) for name, *key, manifest, curve in runs}
    keys = [key for key, (_, curve) in found.items() for _ in curve]
    rows = [row for _, curve in found.values() for row in curve]
    curves = DataFrame(rows, index=pd.MultiIndex.from_tuples(keys, names=INDEX))
    index = pd.MultiIndex.from_tuples(found, names=INDEX)
    return Results(curves, summarise_runs(curves, Series([manifest for manifest, _ in found.values()], index)))


def summarise_runs(curves: DataFrame, manifests: Series) -> DataFrame:
    """Return the table with one row a run; `Results` lists its columns."""
    per_run = curves.groupby(level=INDEX, sort=False)
    first, last = per_run.head(1), per_run.tail(1)
    runs = last[COSTS].assign(
        start=first["test_accuracy"],
        final=last["test_accuracy"],
        holdout=last["holdout_accuracy"],
        lowest=per_run["test_accuracy"].min(),
        average=average_over_training(curves),
    )
    arms = runs.index.get_level_values("arm")
    starts_fresh = np.array([manifest.get("teacher") is None for manifest in manifests])
    teacher = runs.reindex(_replace_arm(runs.index, [TEACHER] * len(runs)))
    for column in COSTS:
        before = np.where(starts_fresh, 0.0, teacher[column])
        runs[f"teacher_{column}"], runs[f"total_{column}"] = before, runs[column] + before
    targets = find_targets(manifests)
    labels = [  # the target arm of the same student
        arm.removesuffix(split_arm(arm)[1]) + targets[experiment, case] for experiment, case, arm, _ in runs.index
    ]
    target = runs["holdout"].reindex(_replace_arm(runs.index, labels)).to_numpy()
    runs["target"] = np.where(np.isnan(target) & (arms != TEACHER), teacher["holdout"], target)
    reached = find_first_reach(curves, runs["target"])
    for column in COSTS:
        runs[f"reached_{column}"] = reached[column]
        runs[f"reached_total_{column}"] = reached[column] + runs[f"teacher_{column}"]
    return runs.assign(manifest=manifests)


def average_over_training(curves: DataFrame) -> Series:
    """Return each run's mean holdout accuracy over its steps; it says how fast a run learns, without a target."""
    levels = list(curves.index.names)
    steps, accuracy = (curves[column].groupby(level=levels, sort=False) for column in ("step", "holdout_accuracy"))
    areas = steps.diff() * (curves["holdout_accuracy"] + accuracy.shift()) / 2
    return areas.groupby(level=levels, sort=False).sum() / (steps.last() - steps.first())


def find_targets(manifests: Series) -> dict[tuple[str, str], str]:
    """Return, for each (experiment, case), the arm that its configuration counts steps to."""
    groups = manifests.groupby(level=["experiment", "case"], sort=False)
    return {key: own_manifests(records)[0]["config"]["target"] for key, records in groups}


def own_manifests(manifests: Series) -> list[dict[str, Any]]:
    """Return the manifests of the arms, or the teacher's if there is nothing else.

    A teacher's manifest may belong to another experiment, which trained it first.
    """
    own = manifests[manifests.index.get_level_values("arm") != TEACHER]
    return list(own if len(own) else manifests)


def find_first_reach(curves: DataFrame, targets: Series) -> DataFrame:
    """Return, for each run that reaches its target, the first evaluation at which it does; NaN is never reached.

    A run reaches its target where its holdout accuracy, and that of the next evaluation, is at least the target. One
    evaluation alone may be above it by chance. The last evaluation has no next one.
    """
    levels = list(curves.index.names)
    above = curves["holdout_accuracy"] >= targets.reindex(curves.index)
    followed = above.groupby(level=levels, sort=False).shift(-1, fill_value=True)
    return curves[above & followed].groupby(level=levels, sort=False).head(1)


def find_target(results: Results) -> str:
    """Return the arm whose final holdout accuracy is one experiment's target: the teacher if the target was not run."""
    target = next(iter(find_targets(results.runs["manifest"]).values()))
    return target if any(split_arm(arm)[1] == target for arm in results.arms) else TEACHER


def summarise(results: Results) -> DataFrame:
    """Return one row for each case and arm of one experiment: `n` seeds, `final_mean` and so on.

    Each column has its mean, min and max over the seeds that have it, and their count.
    """
    groups = results.runs.groupby(level=["case", "arm"], sort=False)
    columns = ["start", "final", "holdout", "target", "reached_step", "flops", "total_flops"]
    table = groups[columns].agg(["mean", "min", "max", "count"])
    table.columns = [f"{column}_{statistic}" for column, statistic in table.columns]
    return table.assign(n=groups.size())


def summarise_seed(results: Results, seed: int) -> dict[str, Any]:
    """Return one number a name, such as `net2net/final_test_accuracy`, for the arms of one seed, and the `target` arm.

    `steps_to_target` is missing for an arm that never reaches the target.
    """
    names = {"final": "final_test_accuracy", "total_flops": "total_flops", "reached_step": "steps_to_target"}
    found: dict[str, Any] = {"target": find_target(results)}
    for (_, _, arm), run in results.runs.xs(seed, level="seed").iterrows():
        found |= {f"{arm}/{name}": float(run[column]) for column, name in names.items() if pd.notna(run[column])}
    return found


def summarise_arms(results: Results) -> DataFrame:
    """Return that table of an experiment without cases, or of one case: a row an arm, in reading order."""
    return summarise(results).droplevel("case").loc[results.arms]


def _replace_arm(index: pd.Index, arms: list[str]) -> pd.MultiIndex:
    """Return the index with other arms in it."""
    keys = [(experiment, case, arm, seed) for (experiment, case, _, seed), arm in zip(index, arms, strict=True)]
    return pd.MultiIndex.from_tuples(keys, names=INDEX)


def list_distinct(values: Iterable[Any]) -> list[str]:
    """Return the distinct values as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))


def find_differences(manifests: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the distinct values of each setting that should be the same in all of these manifests and is not."""
    # The precision "auto" means another precision on another device.
    settings = [
        # A teacher's configuration is that of whichever case happened to train it.
        flatten(one["settings" if one.get("arm") == TEACHER else "config"]) | {"precision": one.get("precision")}
        for one in manifests
    ]
    keys = dict.fromkeys(key for one in settings for key in one if key not in PER_RUN)
    # A run that is older than an arm has no rate for it.
    given = {key: [one for one in settings if key in one or not key.startswith("rates.")] for key in keys}
    found = {key: list_distinct(one.get(key) for one in given[key]) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def describe_differences(manifests: Iterable[dict[str, Any]]) -> list[str]:
    """Return a phrase like `schedule.lr (0.01, 0.02)` for each setting that differs between these manifests."""
    return [f"`{key}` ({', '.join(values)})" for key, values in find_differences(manifests).items()]


def flops_unit(largest: float) -> tuple[float, str]:
    """Return the SI unit in which `largest` FLOPs are at least 1: the FLOPs in one unit, and its name."""
    return next(((size, name) for size, name in UNITS if largest >= size), (1.0, "FLOP"))


def cost_unit(runs: DataFrame) -> tuple[float, str]:
    """Return the SI unit for the largest mean training cost of an arm, with its teacher's where that is known."""
    means = runs.groupby(level=["case", "arm"])[["flops", "total_flops"]].mean()
    return flops_unit(float(means.max(axis=None)))
