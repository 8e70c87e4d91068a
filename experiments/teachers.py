"""The teacher: trained once, for all arms and experiments that start from the same.

It lies in `runs/teachers/<hash>`, where the hash is of all that determines it, and each seed of an experiment has a
link to it where its other stages are. A teacher may itself be grown, from a network that is trained in the same way and
lies beside it; its curve begins with what that one has cost.
"""

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import net2net

from . import arms, checkpoint, locks
from . import run_log as ledger
from .config import FIRST, TEACHER, ExperimentError
from .run import Run, rate
from .stage import carry_out, is_complete
from .training import load_network


def is_trained(run: Run) -> bool:
    """Whether nobody has to train the teacher any more.

    Raises ExperimentError, showing the difference, if the seed's stages started from another one.
    """
    settings, place = run.settings(TEACHER, None), _place(run)
    places = [place] if run.later is not None else [run.folder / TEACHER, place]
    return run.ranks.first(lambda: any(is_complete(one, settings) for one in places))


def obtain(run: Run, network: nn.Module) -> None:
    """Load the trained teacher into `network`: train it, or wait for the process that does, if it is not there."""
    place, ranks = _place(run), run.ranks
    if place != run.folder / TEACHER and run.later is None:
        ranks.first(lambda: _link(run.folder / TEACHER, place))
    if _load(run, network, place):
        return
    waiting = lambda owner: _say(run, f"waits for {owner}, which trains it ({place})")  # noqa: E731
    with ranks.entered_by_first(lambda: locks.hold(place, waiting)):
        if not _load(run, network, place):
            facts, optimizer = ({}, None) if run.earlier is None else _grow(run, run.earlier, network)
            job = run.job(TEACHER, None, rate(run.config, TEACHER), place, facts.get("before"))
            job = replace(job, name=FIRST) if run.later is not None else job
            carry_out(run, job, TEACHER, None, network, facts, optimizer)


def _grow(run: Run, earlier: Run, network: nn.Module) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Fill the teacher from the network before it; what the manifest says of that, and the state of the optimizer."""
    small = earlier.fresh(None)
    obtain(earlier, small)
    started = time.perf_counter()
    small.to(run.device)
    record = arms.fill("net2net", small, network.to(run.device), run.config, run.images)
    assert isinstance(record, net2net.Transfer)
    state = run.ranks.first(lambda: checkpoint.load(_place(earlier)))
    spent = {key: state["rows"][-1][key] for key in ("examples", "seconds", "flops")}
    origin = run.ranks.first(lambda: ledger.read_manifest(_place(earlier))) or {}
    facts = {
        "growth": {"record": str(record), "seconds": time.perf_counter() - started},
        "before": spent,
        "grown_from": {key: origin.get(key) for key in ("settings", "processes", "hardware", "curve_sha256")},
    }
    if run.config.growth.optimizer_state != "carried":
        return facts, None
    return facts, arms.carried(record, small, network, state["optimizer"], run.config)


def optimizer_state(run: Run) -> dict[str, Any]:
    """What the optimizer of the trained teacher had gathered in the end."""
    return checkpoint.load(_place(run))["optimizer"]


def _place(run: Run) -> Path:
    """Where the teacher lies: among all teachers, unless the seed has one of its own, as a copy without links does."""
    own = run.folder / TEACHER
    if run.later is None and run.ranks.first(lambda: own.is_dir() and not own.is_symlink()):
        return own
    return Path(run.config.runs) / "teachers" / run.teacher


def _load(run: Run, network: nn.Module, place: Path) -> bool:
    """Load the teacher if it is there, whole and trained to its end."""
    settings = run.settings(TEACHER, None)
    state = run.ranks.first(lambda: checkpoint.load(place) if is_complete(place, settings) else None)
    if state is None:
        return False
    load_network(network, state, place)
    return state["step"] == run.job(TEACHER, None, 1.0).total  # false if only the older checkpoint could be read


def _link(link: Path, place: Path) -> None:
    target = os.path.relpath(place, link.parent)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and os.readlink(link) != target:  # to a teacher that is no longer there
            link.unlink()
        with suppress(FileExistsError):  # by another process, a moment ago
            link.symlink_to(target)
    except OSError as error:
        raise ExperimentError(
            f"The link {link} cannot be made ({error.strerror}): choose a file system that has links with runs=FOLDER."
        ) from error


def _say(run: Run, text: str) -> None:
    run.console.print(f"{TEACHER if run.later is None else FIRST:<22} {text}", highlight=False, soft_wrap=True)
