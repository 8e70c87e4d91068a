"""Copy finished runs into the committed results: python scripts/collect.py [experiment ...].

The curve and the manifest of each finished arm go from runs/<experiment>/seed<k>/<arm>/ to
results/curves/<experiment>/seed<k>/<arm>.csv and .json, with the case's folder in between where there are cases.
Unfinished arms are skipped, a curve that does not match its manifest is refused, and nothing is deleted. It can be used
while runs go on.
"""

import argparse
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.analysis.curves import find_arms, find_differences, find_experiments
from experiments.config import ExperimentError
from experiments.files import write
from experiments.run_log import parse_curve, read_complete

# An absolute path inside a longer text, but not the slashes of a URL, of `a/b` or of `~/a`.
_PATH = re.compile(r"(?<![\w.~/-])/(?!/)[^\s'\"`,;:=()\[\]{}]+")


def remove_folders(value: Any) -> Any:
    """Return `value` with every absolute path in it, at any depth, replaced by the path's last component.

    A path on one machine means nothing on another, may name its user, and would make two equal runs differ. The last
    component still tells which data set or program it was.
    """
    if isinstance(value, dict):
        return {key: remove_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [remove_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("/"):  # the whole setting is a path, blanks included
        return Path(value).name or value
    return _PATH.sub(lambda match: Path(match[0]).name, value)


def make_portable(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest without machine paths and otherwise unchanged."""
    try:
        words = shlex.split(manifest.get("command", ""))
    except ValueError:  # it has no shell quoting: a blank in a path looks like one between words
        return remove_folders(manifest)
    short: list[str] = []
    for word in words:
        setting = word if word.startswith("/") or "=" not in word else word.split("=", 1)[1]
        short.append(word.removesuffix(setting) + remove_folders(setting))
    return remove_folders(manifest) | ({"command": shlex.join(short)} if words else {})


def copy(curve: Path, manifest: Path, target: Path, replace: bool = False) -> str | None:
    """Copy an arm's files to `target` + .csv and .json, and return a phrase on the curve; None if it is unfinished.

    A curve that does not match its manifest, or that would replace one made with other settings, is an ExperimentError.
    """
    complete = read_complete(curve, manifest)
    if complete is None:
        return None
    data, record = complete
    points = parse_curve(data, curve)
    table, notes = (target.with_name(target.name + suffix) for suffix in (".csv", ".json"))
    old = None if replace else read_complete(table, notes)
    if old is not None and (other := find_differences([make_portable(record), old[1]])):
        raise ExperimentError(
            f"{target} holds a curve that was made with other settings ({', '.join(other)}): collect with --results "
            "FOLDER into another folder, or with --replace in its place."
        )
    files = {table: data, notes: (json.dumps(make_portable(record), indent=2) + "\n").encode()}
    changed = [path for path, new in files.items() if not path.is_file() or path.read_bytes() != new]
    for path in changed:
        write(path, files[path], flush=False)  # the run keeps the original, so a copy can be made again
    accuracy = f"{len(points)} points, final test accuracy {100 * points[-1]['test_accuracy']:.2f} %"
    return accuracy + ("" if changed else " (unchanged)")


def select_experiments(runs: Path, names: list[str]) -> dict[str, Path]:
    """Return the folders of the named experiments with all their cases, or of all experiments if none is named."""
    if not runs.is_dir():
        raise ExperimentError(f"There is no folder {runs}: run an experiment first, or give its place with --runs.")
    found = find_experiments(runs)
    for name in names:
        if not any(name in (other, other.partition("/")[0]) for other in found):
            known = ", ".join(found) or "none"
            raise ExperimentError(f"There is no experiment {name} in {runs}: name one of those there ({known}).")
    return {name: path for name, path in found.items() if not names or {name, name.partition("/")[0]} & {*names}}


def main(arguments: list[str] | None = None) -> int:
    """Collect, and print a line an arm and a total; return 1 if something was refused or is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results (results)")
    parser.add_argument("--replace", action="store_true", help="also replace curves that were made with other settings")
    parser.add_argument("experiment", nargs="*", help="which experiments; all of them if you name none")
    options = parser.parse_args(arguments)
    counts = Counter({"collected": 0, "skipped": 0, "refused": 0})
    try:
        folders = select_experiments(options.runs, options.experiment)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    for experiment, folder in folders.items():
        for seed, arm, curve, manifest in find_arms(folder):
            name = f"{experiment}/seed{seed}/{arm}"
            try:
                copied = copy(curve, manifest, options.results / "curves" / name, options.replace)
            except ExperimentError as error:
                counts["refused"] += 1
                print(f"{name}: refused. {error}", file=sys.stderr)
            else:
                counts["collected" if copied else "skipped"] += 1
                print(f"{name}: {copied or 'skipped, unfinished'}")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if counts["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
