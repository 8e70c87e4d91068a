"""Which settings runs share: what may be averaged, and what cases change."""

from collections.abc import Iterable
from typing import Any

from .config import flatten

# Settings that may differ between seeds of one experiment without making their mean meaningless.
PER_RUN = {
    "seed",
    "arms",
    "claim",
    "device",
    "logger",
    "runs",
    "checkpoint_seconds",
    "data.root",
    "data.cache",
    "data.workers",
    # What the scale makes of the paper's network: it stands in `model`, too, where the network is that one.
    "inception.slim",
    "inception.stem",
}


def mixed(records: list[dict[str, Any]]) -> list[str]:
    """`schedule.lr (0.01, 0.02)` for each setting that should be the same in all of these manifests and is not."""
    # A precision of "auto" is another one on another device.
    settings = [flatten(record["config"]) | {"precision": record.get("precision")} for record in records]
    result: list[str] = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = distinct(one.get(key) for one in settings)
        if key not in PER_RUN and len(values) > 1:
            result.append(f"`{key}` ({', '.join(values)})")
    return result


def distinct(values: Iterable[Any]) -> list[str]:
    """The different ones among `values` as text, in order of appearance."""
    return list(dict.fromkeys(str(value) for value in values))
