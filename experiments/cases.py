"""Cases: variants of one experiment, each run as an experiment of its own, in a folder below the experiment's."""

import copy
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from .config import FOLDER, ExperimentError, flatten, nearest

GROUPS = ("data", "scale", "experiment")  # `data=digits` names a file of settings, and none of the settings in it
RESERVED = ("experiment", "case", "cases", "seed", "runs")  # which run it is, not how it is made


def resolve(composed: DictConfig, overrides: Iterable[str]) -> list[DictConfig]:
    """The configurations to run: the one composed or, where it has cases, one for each (for `case` alone if it is set).

    A case changes what it names, in dotted or nested keys, but not what the command line (`overrides`) names.
    Raises ExperimentError for a case that is not there, or that is none.
    """
    cases = OmegaConf.to_container(composed.cases)
    assert isinstance(cases, dict)
    if composed.case is not None and composed.case not in cases:
        known = ", ".join(map(str, cases)) or "none"
        raise ExperimentError(
            f"{composed.experiment} has no case {composed.case!r}{nearest(composed.case, map(str, cases))}. "
            f"There are: {known}."
        )
    named = {word.lstrip("+").partition("=")[0] for word in overrides} - set(GROUPS)
    chosen = {str(name): cases[name] for name in cases if composed.case in (None, name)}
    return [_changed(composed, name, changes, named) for name, changes in chosen.items()] or [composed]


def _changed(composed: DictConfig, name: str, changes: object, named: set[str]) -> DictConfig:
    if not FOLDER.fullmatch(name):
        raise ExperimentError(f"The case {name!r} cannot name a folder: use letters, digits, dots and dashes.")
    if not isinstance(changes, dict):
        raise ExperimentError(
            f"The case {name} is {changes}: write the settings it changes, as in {{growth.noise: 0}}."
        )
    result = copy.deepcopy(composed)
    for key, value in flatten(changes).items():
        if key.partition(".")[0] in RESERVED:
            raise ExperimentError(
                f"The case {name} sets {key}, which says which run it is: name it on the command line."
            )
        if not any(key == word or key.startswith(f"{word}.") for word in named):
            OmegaConf.update(result, key, value, force_add=True)
    result.cases, result.case = {}, name
    return result
