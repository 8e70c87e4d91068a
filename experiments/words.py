"""The words of a command line: values that Hydra could not read are quoted, and mistakes get the line to type.

Nothing here imports torch.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .arms import ARMS
from .config import CONFIGS, Config, ExperimentError

SWEEP = {"-m", "--multirun"}
UNREADABLE = re.compile(r"[=#~]")  # what Hydra's grammar has no place for in a value without quotes
HOME = re.compile(r"""^(['"]?)~(?=/|['"]?$)""")  # a value that begins in the home folder
SETTING = re.compile(r"(?P<key>[+~]{0,2}[\w./@]+)=(?P<value>.*)", re.DOTALL)


def list_choices(group: str) -> list[str]:
    """Return the options of a group of settings, as `experiment` or `scale`, by name."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def quote_values(words: Iterable[str]) -> list[str]:
    """Return the words with the values quoted that Hydra could not read; a leading `~` becomes the home folder."""
    return [_quote(word) for word in words]


def _quote(word: str) -> str:
    found = SETTING.fullmatch(word)
    if found is None:
        return word
    value = HOME.sub(lambda quote: quote[1] + str(Path.home()), found["value"])
    if UNREADABLE.search(value) and value[0] not in "'\"[{$":
        value = "'{}'".format(value.replace("'", "\\'"))
    return f"{found['key']}={value}"


def complete(line: str) -> list[str]:
    """Return the words that Tab offers where Hydra has none: arms, their rates, and the cases of the experiment."""
    word = line.rpartition(" ")[2]
    key, equals, _ = word.partition("=")
    named = re.findall(r"experiment=(\w+)", line)
    if not equals:
        return [f"rates.{arm}=" for arm in ARMS] if word.startswith("rates.") else []
    if key == "arms":  # one, or a list that has begun
        begun = re.match(r"arms=(\[?(?:\w+,)*)", word)
        return [f"arms={begun[1] if begun else ''}{arm}" for arm in ARMS]
    if key == "target":
        return [f"target={arm}" for arm in ARMS]
    if key == "case" and named:
        return [f"case={case}" for case in list_cases(named[-1])]
    return []


def list_cases(experiment: str) -> list[str]:
    """Return the cases that an experiment's file names, or those of the experiments that it begins with."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    text: Any = OmegaConf.load(path) if path.is_file() else {}
    if cases := OmegaConf.select(text, "cases") if text else None:
        return [str(case) for case in cases]
    return [case for one in text.get("defaults") or () if isinstance(one, str) for case in list_cases(one)]


def check_words(words: list[str]) -> None:
    """Raise ExperimentError with the line to type for words that mean a setting and do not say it as KEY=VALUE."""
    known = [field.name for field in fields(Config)]
    options = {word: word.lstrip("-").partition("=")[0] for word in words if word.startswith("--")}
    wrong = next((word for word, name in options.items() if name.partition(".")[0] in known), None)
    if wrong is not None:
        rest = list(words)
        place = rest.index(wrong)
        follows = rest[place + 1 : place + 2] if "=" not in wrong else []
        rest[place : place + 1 + len(follows)] = [wrong.lstrip("-") + "".join(f"={value}" for value in follows)]
        raise ExperimentError(f"A setting is written without dashes: {_line(rest)}")
    names = list_choices("experiment")
    if bare := next((word for word in words if word in names), None):
        rest = [f"experiment={word}" if word == bare else word for word in words]
        raise ExperimentError(f"{bare} is an experiment: {_line(rest)}")
    several = [word for word in words if _has_several(word)]
    if several and not SWEEP & set(words):
        raise ExperimentError(f"{several[0]} has several values, which takes a sweep: {_line(['-m', *words])}")


def _has_several(word: str) -> bool:
    """Whether a setting has several values with commas between them, outside quotes and brackets."""
    found = SETTING.fullmatch(word)
    return found is not None and "," in found["value"] and found["value"][0] not in "'\"[{$"


def _line(words: Iterable[str]) -> str:
    return "python train.py " + shlex.join(words)
