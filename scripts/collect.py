"""Copies finished runs into the results that are committed: python scripts/collect.py [experiment ...].

Each finished arm's curve and manifest go from runs/<experiment>/seed<k>/<arm>/ to
results/curves/<experiment>/seed<k>/<arm>.csv and .json, with a case's folder in between where there are
cases. Unfinished arms are skipped, a curve that differs from what its manifest was written for is refused,
nothing is deleted. Safe while runs go on.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis.curves import arm_files, experiments, read_complete, varied
from experiments.config import ExperimentError
from experiments.files import write
from experiments.run_log import parse_curve

# An absolute path inside a longer text; not the slashes of a URL, of `a/b` or of `~/a`.
_PATH = re.compile(r"(?<![\w.~/-])/(?!/)[^\s'\"`,;:=()\[\]{}]+")


def last_component(path: str) -> str:
    """`cifar10` for `/data/cifar10/`."""
    return Path(path).name or path


def without_folders(value: Any) -> Any:
    """`value` with every absolute path in it, at any depth, replaced by the path's last component.

    Where data and programs lie on one machine means nothing on another, may name its user, and would make
    two equal runs differ; the last component still tells which data set or program it was.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("/"):  # a setting that is a path is one to its end, blanks included
        return last_component(value)
    return _PATH.sub(lambda match: last_component(match[0]), value)


def without_folders_in_words(command: str) -> str:
    """A command line with the same done to each of its words, and to what follows a word's first `=`."""
    try:
        words = shlex.split(command)
    except ValueError:  # no shell quoting: nothing tells a blank in a path from one between words
        return _PATH.sub(lambda match: last_component(match[0]), command)
    short: list[str] = []
    for word in words:
        setting = word if word.startswith("/") or "=" not in word else word.split("=", 1)[1]
        short.append(word.removesuffix(setting) + without_folders(setting))
    return shlex.join(short)


def portable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without machine paths; nothing else is taken from it."""
    command = manifest.get("command")
    result = without_folders(manifest)
    return result | {"command": without_folders_in_words(command)} if isinstance(command, str) else result


def copy(curve: Path, manifest: Path, target: Path, replace: bool = False) -> str | None:
    """The arm's files lie beside each other as `target` + .csv and .json; returns a phrase on the curve.

    None, and nothing is written, if the arm is unfinished.
    Raises ExperimentError if the curve and its manifest do not belong together, or, unless it may `replace` it, if
    there is a curve that was made with other settings.
    """
    complete = read_complete(curve, manifest)
    if complete is None:
        return None
    data, record = complete
    points = parse_curve(data, curve)
    there = None if replace else read_complete(*(target.with_name(target.name + end) for end in (".csv", ".json")))
    if there is not None and (other := varied([portable(record), there[1]])):
        raise ExperimentError(
            f"{target} holds a curve that was made with other settings ({', '.join(other)}): collect with --results "
            "FOLDER into another folder, or with --replace in its place."
        )
    files = {
        target.with_name(f"{target.name}.csv"): data,
        target.with_name(f"{target.name}.json"): (json.dumps(portable(record), indent=2) + "\n").encode(),
    }
    changed = [path for path, new in files.items() if not path.is_file() or path.read_bytes() != new]
    for path in changed:
        write(path, files[path], flush=False)  # the run keeps its own, and a copy that differs is made again
    accuracy = f"{len(points)} points, final test accuracy {100 * points[-1]['test_accuracy']:.2f} %"
    return accuracy + ("" if changed else " (unchanged)")


def experiments_in(runs: Path, names: list[str]) -> dict[str, Path]:
    """The folders of the experiments named, with all their cases, or of all if none is named.

    Raises ExperimentError if one is not there.
    """
    if not runs.is_dir():
        raise ExperimentError(f"There is no folder {runs}: run an experiment first, or give its place with --runs.")
    there = experiments(runs)
    for name in names:
        if not any(_belongs(found, name) for found in there):
            known = ", ".join(there) or "none"
            raise ExperimentError(f"There is no experiment {name} in {runs}: name one of those there ({known}).")
    return {found: path for found, path in there.items() if not names or any(_belongs(found, name) for name in names)}


def _belongs(found: str, name: str) -> bool:
    return found == name or found.startswith(f"{name}/")


def main(arguments: list[str] | None = None) -> int:
    """Collects, prints a line an arm and a total; returns 1 if something was refused or is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--replace", action="store_true", help="also curves that were made with other settings")
    parser.add_argument("experiment", nargs="*", help="all of them if none is named")
    options = parser.parse_args(arguments)
    collected = skipped = refused = 0
    try:
        folders = experiments_in(options.runs, options.experiment)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    for experiment, folder in folders.items():
        for seed, arm, curve, manifest in arm_files(folder):
            name = f"{experiment}/seed{seed}/{arm}"
            try:
                copied = copy(curve, manifest, options.results / "curves" / name, options.replace)
            except ExperimentError as error:
                refused += 1
                print(f"{name}: refused. {error}", file=sys.stderr)
                continue
            collected, skipped = collected + (copied is not None), skipped + (copied is None)
            print(f"{name}: {copied or 'skipped, unfinished'}")
    print(f"{collected} collected, {skipped} skipped, {refused} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
