"""Results of experiments that were never run: curves and manifests by a formula, for a test to throw away."""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from experiments import run_log
from experiments.config import STARTS_FROM_TEACHER, Config, arm_folders, steps

PER_EPOCH = 351
GAIN = {"net2net": 0.06, "random_pad": 0.04, "teacher_continued": 0.03, "random_init_low_lr": -0.2}


def write(results: Path, configs: Iterable[Config], seeds: int = 3) -> None:
    """Curves of every arm of the configurations, and of their teachers, for some seeds, under results/curves.

    Accuracy grows with the logarithm of the epochs; what starts from a teacher starts high and gains little.
    """
    for config in configs:
        for seed in range(seeds):
            stages = {"teacher": ("teacher", None)} | arm_folders(config.students, config.arms)
            for name, (arm, student) in stages.items():
                _write(results / "curves" / config.name / f"seed{seed}" / name, config, seed, arm, student)


def _write(path: Path, config: Config, seed: int, arm: str, student: str | None) -> None:
    noise = random.Random(f"{config.name}-{seed}-{arm}-{student}")
    schedule = config.schedule
    length = (schedule.teacher_epochs if arm == "teacher" else None) or schedule.epochs
    total, every = steps(length, PER_EPOCH), max(1, steps(schedule.evaluate, PER_EPOCH))
    level = 0.5 + 0.08 * math.log2(total / PER_EPOCH) + GAIN.get(arm, 0.0) * 4 / (total / PER_EPOCH + 3)
    level += noise.gauss(0, 0.006) + 0.02 * (seed % 3) - 0.3 * (student == "deeper" and arm == "random_init") / 4
    first = level - 0.05 if arm in STARTS_FROM_TEACHER else 0.1
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(run_log.COLUMNS)
    for step in [*range(0, total, every), total]:
        accuracy = first + (level - first) * (1 - math.exp(-4 * step / total)) / (1 - math.exp(-4))
        training = [1 - accuracy, accuracy + 0.01] if step else ["", ""]
        flops = step * 128 * (24e6 if student is None else 74e6)
        table.writerow(
            [step, step / PER_EPOCH, 128 * step, step * 0.1, flops, *training, *[1 - accuracy, accuracy] * 2]
        )
    data = text.getvalue().encode()
    manifest = {
        "experiment": config.name,
        "arm": arm,
        "student": student,
        "seed": seed,
        "config": asdict(config) | {"seed": seed},
        "data": "CIFAR-10, 50,000 train / 10,000 test",
        "commit": "0" * 40,
        "dirty": False,
        "versions": {"torch": "2.14.1"},
        "device": "cpu",
        "hardware": "simulated",
        "precision": "float32",
        "command": f"python train.py experiment={config.experiment}",
        "complete": True,
        "step0": {"agree": 10000, "of": 10000, "max_relative_error": 1e-7} if arm == "net2net" else None,
        "curve_sha256": hashlib.sha256(data).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.csv").write_bytes(data)
    path.with_name(f"{path.name}.json").write_text(json.dumps(manifest))
