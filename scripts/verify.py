"""Check that every committed curve is what its manifest says: python scripts/verify.py [--results results].

With --growth runs/<experiment>/seed<k>/<arm> it instead grows the student of a finished arm again, from the checkpoint
of its teacher, and checks the certificate in the arm's manifest (`net2net.verify`).

For each curve under results/curves and results/trials it checks that the curve has the checksum in its manifest and
lies where the manifest says; that the manifest's commits are in the history of this checkout and had no uncommitted
changes; that the settings in its command are those of its configuration; that the configuration names the arm and
determines its settings; that the processes it names made every step; that the teacher it started from lies beside it;
that certificates of growths are whole, and name one teacher for all students that started from it; that the seeds of
an arm differ in no setting; and that a claim which is registered stood in claims.yaml at the commit that began each
curve of its experiment. It does not compose old commands again, and what only training could tell (accuracies, what was
measured before the first step, seconds) it takes as it stands. It prints one line a fault and exits with 1 if there is
any. A shallow clone has no history to look into: that is printed and is no fault.
"""

import argparse
import functools
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from experiments.analysis.claims import Claim, parse_claims, read_claims
from experiments.analysis.curves import describe_differences, find_arms, find_experiments
from experiments.config import TEACHER, Config, ExperimentError, Schedule, arm_folders, flatten
from experiments.experiment import prepare
from experiments.run import digest, stage_settings
from experiments.run_log import MANIFEST, parse_curve, read_complete, read_manifest
from experiments.stage import certified_images, is_teacher_trained, obtain_teacher
from experiments.start import fill
from net2net import TransferError, certify, verify
from net2net.certificate import check_certificate

ROOT = Path(__file__).resolve().parents[1]
Records = dict[tuple[int, str], dict[str, Any]]  # seed and arm -> manifest


def read_history() -> set[str] | None:
    """Return every commit in the history of this checkout, or None if the clone is shallow."""
    try:
        shallow, commits = (
            subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.split()
            for words in (["rev-parse", "--is-shallow-repository"], ["rev-list", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExperimentError("git gives no history: run this in a checkout.") from error
    return None if shallow == ["true"] else set(commits)


def find_folders(results: Path) -> dict[str, Path]:
    """Return every folder with seeds in it, named as the messages name it."""
    parents = {"curves": results / "curves"}
    parents |= {f"trials/{trial.parent.name}": trial for trial in sorted(results.glob("trials/*/curves"))}
    return {f"{kind}/{name}": path for kind, at in parents.items() for name, path in find_experiments(at).items()}


def check_files(place: str, seed: int, arm: str, curve: Path, manifest: Path) -> tuple[list[str], dict[str, Any]]:
    """Return what is wrong with a curve and its manifest, and the manifest, {} if it cannot be read."""
    try:
        complete = read_complete(curve, manifest)
        if complete is None:
            return [f"{manifest.name} is missing or says that the run was not finished"], {}
        data, record = complete
        last = parse_curve(data, curve)[-1]["step"]
        config = compose_again(record)
    except (ExperimentError, OmegaConfBaseException) as error:
        return [str(error)], {}
    owner = (record.get("arm"), record.get("student"))
    expected = ({TEACHER: (TEACHER, None)} | arm_folders(config.students, config.arms)).get(arm)
    if expected is None or record.get("seed") != seed or owner != expected:
        whose = f"{owner[0]} of {owner[1]}" if owner[1] else owner[0]
        return [f"its manifest is of {whose} of seed {record.get('seed')}"], record
    faults: list[str] = []
    # A teacher is trained once for all experiments that start from it: its manifest names the first of them.
    name = place.split("/", 1 if place.startswith("curves/") else 2)[-1]
    if arm != TEACHER and not record.get("experiment") == config.name == name:
        faults.append(f"its manifest is of the experiment {record.get('experiment')}")
    given, actual = flatten(stage_settings(config, *expected)), flatten(record["settings"])
    faults += [
        f"{key} is {given[key]} by its configuration, {actual[key]} in its settings"
        for key in sorted(given.keys() & actual.keys())  # a key that is in one alone became a setting later
        if given[key] != actual[key]
    ]
    steps = [(process["from"], process["to"]) for process in record.get("processes", ())]
    if [0, *(end for _, end in steps)] != [*(start for start, _ in steps), last]:
        faults.append(f"its processes made the steps {steps}, its curve ends at {last:.0f}")
    if "certificate" in record:
        try:
            check_certificate(record["certificate"])
        except TransferError as error:
            faults.append(str(error))
    return faults + list(check_command(record)), record


def compose_again(record: dict[str, Any]) -> Config:
    """Return the configuration in a manifest. Settings that have been removed since are left out if they were unset."""
    tree = _drop_removed(record["config"], Config)
    tree |= {"schedule": _drop_removed(tree["schedule"], Schedule)}
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree)))


def _drop_removed(tree: dict[str, Any], kind: type) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    return {key: value for key, value in tree.items() if key in known or value not in (None, {})}


def check_command(record: dict[str, Any]) -> Iterator[str]:
    """Yield each setting to which the manifest's command gives another value than its configuration has."""
    config = flatten(record["config"])
    for word in shlex.split(record["command"])[2:]:
        key, _, text = word.lstrip("+").partition("=")
        values = [text] if text.startswith(("[", "{")) else text.split(",")  # a sweep gives several
        if key in config and config[key] not in [OmegaConf.from_dotlist([f"value={one}"]).value for one in values]:
            yield f"{key} is {text} in its command, {config[key]} in its configuration"


def check_folder(folder: Path, records: Records) -> Iterator[tuple[int, str, str]]:
    """Yield (seed, arm, fault) for what does not belong together in the folder of an experiment."""
    for manifest in sorted(folder.glob("seed*/*.json")):
        if not manifest.with_suffix(".csv").exists():
            yield int(manifest.parent.name[4:]), manifest.stem, "there is a manifest without its curve"
    for arm in dict.fromkeys(arm for _, arm in records):
        seeds = {seed: record for (seed, other), record in records.items() if other == arm}
        if found := describe_differences(seeds.values()):
            yield min(seeds), arm, f"its seeds differ in {', '.join(found)}"
    teachers: dict[str, str] = {}  # the teacher's settings -> its hash in the first certificate
    for (seed, arm), record in records.items():
        if arm != TEACHER and "teacher" in record["settings"]:
            beside = records.get((seed, TEACHER))
            if beside is None:
                yield seed, arm, "the teacher that it started from is missing"
            elif digest(beside["settings"]) != record["settings"]["teacher"]:
                yield seed, arm, "it started from another teacher than the one beside it"
            if "certificate" in record:
                first = teachers.setdefault(record["settings"]["teacher"], record["certificate"]["teacher"])
                if record["certificate"]["teacher"] != first:
                    yield seed, arm, "its certificate names another teacher than that of an arm beside it"


def check_commits(record: dict[str, Any], history: set[str]) -> Iterator[str]:
    """Yield what is wrong with the commits that made a curve."""
    processes = [record, *record.get("processes", [])]
    for commit, dirty in dict.fromkeys((process.get("commit"), process.get("dirty")) for process in processes):
        if dirty is not False:
            how = "made with" if dirty else "nobody knows whether there were"
            yield f"{how} uncommitted changes at {str(commit)[:10]}"
        if commit not in history:
            yield f"its commit {str(commit)[:10]} is not in the history"


def check_registration(record: dict[str, Any], claims: list[Claim]) -> Iterator[str]:
    """Yield each registered claim on the record's experiment that its first commit does not ask as it stands."""
    experiment = record["experiment"].partition("/")[0]
    own = f":{record['arm']}"
    asked = [claim for claim in claims if experiment in claim.experiments and claim.registered]
    asked = [claim for claim in asked if claim.registered is True or claim.of.endswith(own)]
    if asked and record["arm"] != TEACHER:
        commit = (record.get("processes") or [record])[0].get("commit")
        before = read_claims_at(str(commit))
        yield from (
            f"{claim.claim!r} was not yet claimed at its commit" for claim in asked if claim.question not in before
        )


@functools.cache
def read_claims_at(commit: str) -> set[tuple[Any, ...]]:
    """Return the questions that the claims of a commit ask; none if it has none that can be read."""
    found = subprocess.run(
        ["git", "-C", ROOT, "show", f"{commit}:results/claims.yaml"], capture_output=True, text=True, check=False
    )
    try:
        return {claim.question for claim in parse_claims(found.stdout, commit)}
    except (ExperimentError, AttributeError):  # it reads none, or another form
        return set()


def find_faults(results: Path, history: set[str] | None) -> Iterator[str]:
    """Yield a line for each thing that is wrong with a committed curve; without a history commits are not checked."""
    path = results / "claims.yaml"
    claims = read_claims(path) if path.exists() else []
    for place, folder in find_folders(results).items():
        records: Records = {}
        found: list[tuple[int, str, str]] = []
        for seed, arm, curve, manifest in find_arms(folder):
            faults, record = check_files(place, seed, arm, curve, manifest)
            if record:
                records[seed, arm] = record
                if history is not None:
                    faults += [*check_commits(record, history), *check_registration(record, claims)]
            found += [(seed, arm, fault) for fault in faults]
        for seed, arm, fault in [*found, *check_folder(folder, records)]:
            yield f"{place}/seed{seed}/{arm}: {fault}"


def verify_growth(folder: Path) -> str:
    """Grow the student of a finished arm again, and return a sentence on what is as its certificate says.

    A TransferError, or an ExperimentError, says what is not.
    """
    manifest = read_manifest(folder / MANIFEST) or {}
    if "certificate" not in manifest:
        raise ExperimentError(f"There is no certificate in {folder / MANIFEST}: name the folder of an arm that grows.")
    run = prepare(compose_again(manifest), Console(quiet=True))
    if not is_teacher_trained(run):
        raise ExperimentError(
            f"The teacher of {folder} is not in {run.config.runs}: call this where the experiment ran."
        )
    teacher, student = (run.make_network(name).to(run.device) for name in (None, manifest["student"]))
    obtain_teacher(run, teacher)
    record = fill(manifest["arm"], teacher, student, run.config, run.images)
    assert record is not None
    images, certificate = certified_images(run), manifest["certificate"]
    found = verify(certificate, teacher, student, images)
    again = certify(record, teacher, student, images, manifest["settings"].get("growth"))
    other = [key for key in certificate if key not in ("difference", "sha256") and certificate[key] != again[key]]
    if other:
        raise ExperimentError(f"The growth has another {', '.join(other)} than its certificate says.")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the faults and how many curves were checked; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument(
        "--growth", type=Path, metavar="FOLDER", help="check the growth of the arm in this folder instead"
    )
    options = parser.parse_args(arguments)
    if options.growth is not None:
        try:
            print(verify_growth(options.growth))
        except (ExperimentError, TransferError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    results: Path = options.results
    checked = sum(len(find_arms(folder)) for folder in find_folders(results).values())
    if not checked:
        print(f"There are no curves under {results / 'curves'}.", file=sys.stderr)
        return 1
    try:
        history = read_history()
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    if history is None:
        print("This clone is shallow: commits are not checked. Run git fetch --unshallow first.")
    faults = list(find_faults(results, history))
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    print(f"{checked} curves checked, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
