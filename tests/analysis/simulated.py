"""Results of experiments that were never run: curves and manifests by a formula, for a test to throw away."""

import copy
import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pandas import DataFrame

from experiments.config import STARTS_FROM_TEACHER, Config, arm_folders, steps
from experiments.run_log import COLUMNS

Rows = list[dict[str, float]]
PER_EPOCH = 351
GAIN = {"net2net": 0.06, "random_pad": 0.04, "teacher_continued": 0.03, "random_init_low_lr": -0.2}


def make_curve(
    test: Sequence[float], holdout: Sequence[float] = (), flops: float = 1.0, at: Sequence[int] = ()
) -> Rows:
    """Return rows of these accuracies, at these steps or a row every ten steps; the last one has cost `flops`."""
    at = at or range(0, 10 * len(test), 10)
    rows: Rows = []
    for step, t, h in zip(at, test, holdout or test, strict=True):
        trained = t if step else math.nan  # nothing was trained before step 0
        spent = [step, step / 20, 128 * step, step / 10, flops * step / max(1, at[-1])]
        rows.append(dict(zip(COLUMNS, [*spent, 1 - trained, trained, 1 - h, h, 1 - t, t], strict=True)))
    return rows


def make_manifest(arm: str, seed: int, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the manifest of a finished arm."""
    step0 = {"agree": 999 + seed, "of": 1000, "max_relative_error": 1e-14 * (seed + 1)}
    record: dict[str, Any] = {
        **{"experiment": config["experiment"], "arm": arm, "student": None, "seed": seed, "teacher": "teacher"},
        **{"config": copy.deepcopy(config) | {"seed": seed}, "settings": {"seed": seed}},
        **{"command": f"python train.py experiment={config['experiment']}", "commit": "0123456789abcdef"},
        **{"data": "CIFAR-10, 50,000 train / 10,000 test", "dirty": False, "device": "cuda", "hardware": "One GPU"},
        **{"versions": {"torch": "2.14.1", "python": "3.11.2"}, "precision": "bfloat16", "complete": True},
        "step0": step0 if arm.endswith("net2net") else None,
    }
    return record | changes


def write_run(curve: Path, manifest: Path, rows: Rows, record: dict[str, Any]) -> None:
    """Write a curve, and its manifest with the checksum."""
    data = DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False).encode()
    curve.parent.mkdir(parents=True, exist_ok=True)
    curve.write_bytes(data)
    manifest.write_text(json.dumps({"curve_sha256": hashlib.sha256(data).hexdigest()} | record))


def write(results: Path, configs: Iterable[Config], seeds: int = 3) -> None:
    """Write curves of every arm of the configurations, and of their teachers, under results/curves.

    Accuracy grows with the logarithm of the epochs; what starts from a teacher starts high and gains little.
    """
    for config in configs:
        for seed in range(seeds):
            stages = {"teacher": ("teacher", None)} | arm_folders(config.students, config.arms)
            for name, (arm, student) in stages.items():
                path = results / "curves" / config.name / f"seed{seed}" / name
                record = make_manifest(arm, seed, asdict(config), experiment=config.name, student=student)
                rows = _simulate(config, seed, arm, student)
                write_run(path.with_name(f"{name}.csv"), path.with_name(f"{name}.json"), rows, record)


def _simulate(config: Config, seed: int, arm: str, student: str | None) -> Rows:
    noise = random.Random(f"{config.name}-{seed}-{arm}-{student}")
    schedule = config.schedule
    length = (schedule.teacher_epochs if arm == "teacher" else None) or schedule.epochs
    total, every = steps(length, PER_EPOCH), max(1, steps(schedule.evaluate, PER_EPOCH))
    level = 0.5 + 0.08 * math.log2(total / PER_EPOCH) + GAIN.get(arm, 0.0) * 4 / (total / PER_EPOCH + 3)
    level += noise.gauss(0, 0.006) + 0.02 * (seed % 3) - 0.3 * (student == "deeper" and arm == "random_init") / 4
    first = level - 0.05 if arm in STARTS_FROM_TEACHER else 0.1
    at = [*range(0, total, every), total]
    accuracies = [first + (level - first) * (1 - math.exp(-4 * step / total)) / (1 - math.exp(-4)) for step in at]
    return make_curve(accuracies, flops=total * 128 * (24e6 if student is None else 74e6), at=at)
