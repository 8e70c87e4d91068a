"""The words of a command line: values that Hydra could not read are quoted, and mistakes get the line to type.

Nothing here imports torch.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

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
