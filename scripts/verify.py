"""Checks that every committed curve is what its manifest says: python scripts/verify.py [--results results].

Of each curve under results/curves and results/trials: it has the checksum in its manifest and lies where that says;
the manifest's commits are in the history of this checkout, and nothing was uncommitted there; its command, composed
by the code and the configurations of that commit, gives the configuration in the manifest; that one names the arm, and
its settings are what that determines; the processes that it names made every step; the teacher that it started from
lies beside it; the seeds of an arm differ in no setting. What training alone could tell (accuracies, what was measured
before the first step, seconds) is taken as it stands. Prints a line a fault and exits with 1 if there is any. A shallow
clone has no history to look into, which is said and is no fault.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import curves as report
from experiments.analysis.curves import mixed
from experiments.config import TEACHER, Config, ExperimentError, arm_folders, flatten
from experiments.run import digest, stage_settings

ROOT = Path(__file__).resolve().parents[1]
# What the machine decides, and no command says. Paths are shortened when curves are collected, on both sides.
MACHINE = {"data.cache"}

# Runs inside the tree of a commit, old or new: reads [[command's words, default scale], ...], prints for each the
# configurations that the command runs, or the error it ends with.
COMPOSE = r"""
import dataclasses, itertools, json, sys
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
sys.path.insert(0, ".")
from experiments import command

def configurations(words, scale):
    command.default_scale = lambda: scale
    command.register()
    words = [word for word in words if not word.startswith(("-", "hydra"))]
    parsed = OverridesParser.create().parse_overrides(words)
    swept = [[f"{o.input_line.partition('=')[0]}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override()
             else [o.input_line] for o in parsed]
    found = []
    for one in itertools.product(*swept):
        with initialize_config_dir(str(command.CONFIGS), version_base="1.3"):
            composed = compose("train", list(one))
        many = getattr(command, "configurations", lambda composed, words: [OmegaConf.to_object(composed)])
        found += [dataclasses.asdict(config) for config in many(composed, one)]
    return found

answers = []
for words, scale in json.load(sys.stdin):
    try:
        answers.append(configurations(words, scale))
    except Exception as error:
        answers.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
print(json.dumps(answers))
"""


def git(*arguments: str) -> str:
    """What git says in this checkout; raises ExperimentError where there is none."""
    try:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExperimentError(f"git {arguments[0]} fails: this is no checkout with a history.") from error


def reachable() -> set[str] | None:
    """Every commit in the history of this checkout; None if the clone is shallow, so that there is no saying."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        return None
    return set(git("rev-list", "HEAD").split())


def compose(commit: str, commands: list[tuple[tuple[str, ...], str]]) -> list[list[dict[str, Any]] | str]:
    """What each command, given as its words and the default scale of its machine, runs at that commit, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", ROOT, "archive", commit, "experiments", "configs"], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        done = subprocess.run(
            [sys.executable, "-c", COMPOSE],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
    if done.returncode:
        return [f"nothing can be composed there: {done.stderr.strip().splitlines()[-1]}"] * len(commands)
    return json.loads(done.stdout)


def folders(results: Path) -> dict[str, Path]:
    """Every folder with seeds in it, by what messages call it."""
    found = {f"curves/{name}": path for name, path in report.experiments(results / "curves").items()}
    for trial in sorted(results.glob("trials/*/curves")):
        found |= {f"trials/{trial.parent.name}/{name}": path for name, path in report.experiments(trial).items()}
    return found


def file_faults(
    place: str, seed: int, arm: str, curve: Path, manifest: Path
) -> tuple[list[str], dict[str, Any] | None]:
    """What is wrong with the two files themselves, and the manifest if it can be read."""
    try:
        complete = report.read_complete(curve, manifest)
        if complete is None:
            return [f"{manifest.name} is missing or says that the run was not finished"], None
        data, record = complete
        last = report.parse_curve(data, curve)[-1]["step"]
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), record["config"])))
    except (ExperimentError, OmegaConfBaseException) as error:
        return [str(error)], None
    of = (record.get("arm"), record.get("student"))
    named = ({TEACHER: (TEACHER, None)} | arm_folders(config.students, config.arms)).get(arm)
    if named is None or record.get("seed") != seed or of != named:
        whose = f"{of[0]} of {of[1]}" if of[1] else of[0]
        return [f"its manifest is of {whose} of seed {record.get('seed')}"], record
    faults: list[str] = []
    # A teacher is trained once for all experiments that start from it: its manifest names the first of them.
    name = place.split("/", 1 if place.startswith("curves/") else 2)[-1]
    if arm != TEACHER and not record.get("experiment") == config.name == name:
        faults.append(f"its manifest is of the experiment {record.get('experiment')}")
    says, is_ = flatten(stage_settings(config, *named)), flatten(record["settings"])
    faults += [
        f"{key} is {says[key]} by its configuration, {is_[key]} in its settings"
        for key in sorted(says.keys() & is_.keys())  # of what has become a setting since, it says nothing
        if says[key] != is_[key]
    ]
    steps = [(process["from"], process["to"]) for process in record.get("processes", ())]
    if [0, *(end for _, end in steps)] != [*(start for start, _ in steps), last]:
        faults.append(f"its processes made the steps {steps}, its curve ends at {last:.0f}")
    return faults, record


def company_faults(folder: Path, records: dict[tuple[int, str], dict[str, Any]]) -> Iterator[tuple[int, str, str]]:
    """(seed, arm, fault) of what does not belong together in the folder of an experiment."""
    for manifest in sorted(folder.glob("seed*/*.json")):
        if not manifest.with_suffix(".csv").exists():
            yield int(manifest.parent.name[4:]), manifest.stem, "there is a manifest without its curve"
    for arm in dict.fromkeys(arm for _, arm in records):
        if found := mixed(record for (_, other), record in records.items() if other == arm):
            yield min(seed for seed, other in records if other == arm), arm, f"its seeds differ in {', '.join(found)}"
    for (seed, arm), record in records.items():
        if arm != TEACHER and "teacher" in record["settings"]:
            beside = records.get((seed, TEACHER))
            if beside is None:
                yield seed, arm, "the teacher that it started from is missing"
            elif digest(beside["settings"]) != record["settings"]["teacher"]:
                yield seed, arm, "it started from another teacher than the one beside it"


def commits(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The processes that made the curve, what it is grown from and the manifest, those of one commit once."""
    every = [record, *record.get("processes", []), *record.get("grown_from", {}).get("processes", [])]
    return list({(one.get("commit"), one.get("dirty")): one for one in every}.values())


def differences(record: dict[str, Any], composed: list[dict[str, Any]] | str) -> list[str]:
    """Why none of the configurations that the command runs is the manifest's; nothing if one is."""
    if isinstance(composed, str):
        return [f"its command does not compose: {composed}"]
    mine = flatten(record["config"])
    best: list[str] | None = None
    for config in composed:
        theirs = flatten(_portable(config))
        wrong = [
            f"{key} is {theirs.get(key, 'absent')} by the command, {mine.get(key, 'absent')} in the manifest"
            for key in sorted(mine.keys() | theirs.keys())
            if key not in MACHINE and mine.get(key) != theirs.get(key)
        ]
        if best is None or len(wrong) < len(best):
            best = wrong
    return ["its command runs nothing"] if best is None else best


def default_scale(record: dict[str, Any]) -> str:
    """The scale that the machine of the run chose for commands that name none."""
    scale = record["config"]["scale"]
    return scale if scale in ("cpu", "gpu") else {"cuda": "gpu"}.get(record["device"], "cpu")


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    from scripts.collect import without_folders

    return without_folders(json.loads(json.dumps(config)))


def faults(results: Path) -> Iterator[str]:
    """A line for each thing that is wrong with a committed curve."""
    history = reachable()
    if history is None:
        print("This clone is shallow: commits and commands are not checked. Run git fetch --unshallow first.")
    records: dict[str, dict[str, Any]] = {}
    for place, folder in folders(results).items():
        read: dict[tuple[int, str], dict[str, Any]] = {}
        for seed, arm, curve, manifest in report.arm_files(folder):
            found, record = file_faults(place, seed, arm, curve, manifest)
            yield from (f"{place}/seed{seed}/{arm}: {fault}" for fault in found)
            if record is not None:
                read[seed, arm] = record
        yield from (f"{place}/seed{seed}/{arm}: {fault}" for seed, arm, fault in company_faults(folder, read))
        records |= {f"{place}/seed{seed}/{arm}": record for (seed, arm), record in read.items()}
    for name, record in records.items() if history is not None else ():
        for process in commits(record):
            if process.get("dirty") is not False:
                known = "made with" if process.get("dirty") else "nobody knows whether there were"
                yield f"{name}: {known} uncommitted changes at {str(process.get('commit'))[:10]}"
            if history is not None and process.get("commit") not in history:
                yield f"{name}: its commit {str(process.get('commit'))[:10]} is not in the history"
    at: dict[str, list[str]] = {}
    for name, record in records.items():
        if history is not None and record.get("commit") in history:
            at.setdefault(record["commit"], []).append(name)
    for commit, names in at.items():
        asked = {
            name: (tuple(shlex.split(records[name]["command"])[2:]), default_scale(records[name])) for name in names
        }
        commands = list(dict.fromkeys(asked.values()))  # one command has made many a curve
        answers = dict(zip(commands, compose(commit, commands), strict=True))
        for name in names:
            yield from (f"{name}: {fault}" for fault in differences(records[name], answers[asked[name]]))


def main(arguments: list[str] | None = None) -> int:
    """Prints the faults and how many curves were checked; returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    results: Path = parser.parse_args(arguments).results
    checked = sum(len(report.arm_files(folder)) for folder in folders(results).values())
    found = 0
    try:
        for fault in faults(results):
            found += 1
            print(fault, file=sys.stderr)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    if not checked:
        print(f"There are no curves under {results / 'curves'}.", file=sys.stderr)
        return 1
    print(f"{checked} curves checked, {found} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
