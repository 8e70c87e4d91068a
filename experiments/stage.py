"""Stages: train one network once. What is complete is skipped; what was made with other settings is refused.

The teacher is shared by all arms and experiments that start from the same one. It lies in `runs/teachers/<hash>`, where
the hash is of all that determines it, and each seed has a link to it beside its other stages.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import net2net

from . import checkpoint, files, run_log, wandb_log
from .arms import ARMS
from .config import TEACHER, ExperimentError, flatten
from .machine import describe
from .progress import Follower
from .run import Run
from .training import Job, load, train

State = dict[str, Any]
GROWTH = "growth.json"  # the record of a growth, in the folder of the stage that it begins
CERTIFIED = 64  # test images on which a student is compared with its teacher in eval and train mode
MEASURED = ("growth", "certificate", "step0")  # facts of a stage from before its first step


def is_complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the stage in a folder has been completed with these settings.

    If it holds a run with other settings, complete or not, raises an ExperimentError that shows the difference.
    """
    manifest = run_log.read_manifest(folder / run_log.MANIFEST)
    if manifest is None:
        if checkpoint.exists(folder):
            raise ExperimentError(
                f"{folder} holds a checkpoint but no manifest, so nobody knows what made it: delete the folder."
            )
        return False
    before, now = flatten(manifest["settings"]), flatten(settings)
    changed = [
        f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ExperimentError(
            f"{folder} holds a run made with other settings:\n" + "\n".join(changed) + "\n"
            "Add tag=NAME to run these settings in a folder of their own."
        )
    return bool(manifest["complete"])


def run_stage(
    run: Run, job: Job, arm: str, student: str | None, network: nn.Module, facts: State, optimizer: State | None
) -> None:
    """Train one stage and write its manifest, at first as incomplete, so that a folder always says what it holds.

    `facts` are added to the manifest; `optimizer` is the optimizer state to start with.
    """
    state = run.ranks.on_first(partial(checkpoint.resume, job.folder))
    if optimizer is not None and "network" not in state:
        state |= {"network": network.state_dict(), "optimizer": optimizer}
    manifest: dict[str, Any] = {}
    if run.ranks.rank == 0:
        manifest = _describe_stage(run, job, arm, student, network, state["step"]) | facts
        before = (
            run_log.read_manifest(job.folder / run_log.MANIFEST) or {}
        )  # what was measured before its first step still holds
        manifest |= {key: before[key] for key in MEASURED if key in before}
        run_log.write_manifest(job.folder, manifest)
    last_step = state["rows"][-1]["step"] if state["rows"] else -1
    logger = run.config if run.ranks.rank == 0 else replace(run.config, logger="none")
    with (
        wandb_log.mirror(logger, job.name, manifest, run.console, last_step) as mirrored,
        Follower(run.console, job.name, job.length, state["step"], mirrored.log) as follower,
    ):
        rows = train(network, job, follower, state)
        if run.ranks.rank == 0:
            if arm != TEACHER:  # others need the teacher's weights: it keeps its reserve
                checkpoint.drop_previous(job.folder)
            curve = job.folder / "curve.csv"
            manifest["processes"][-1]["to"] = job.total
            manifest |= {"complete": True, "curve_sha256": hashlib.sha256(curve.read_bytes()).hexdigest()}
            run_log.write_manifest(job.folder, manifest)
            mirrored.summarise({f"final_{key}": rows[-1][key] for key in ("holdout_accuracy", "test_accuracy")})
            if (job.folder / GROWTH).exists():
                mirrored.keep("growth", job.folder / GROWTH, job.folder / run_log.MANIFEST)


def _describe_stage(run: Run, job: Job, arm: str, student: str | None, network: nn.Module, first: int) -> State:
    """The manifest of a stage that this process continues from step `first`."""
    provenance = run_log.describe_provenance() | {"device": str(run.device), "hardware": describe(run.device)}
    return {
        "experiment": run.config.name,
        "arm": arm,
        "student": student,
        "seed": run.config.seed,
        "settings": run.settings(arm, student),
        "config": asdict(run.config),  # what the command composes
        "data": run.splits.description,
        **asdict(run.arithmetic),
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_flops": run.costs[student][0],
        "train_flops_per_image": job.flops,
        "teacher": TEACHER if arm != TEACHER and ARMS[arm].needs_teacher else None,
        "complete": False,
        **provenance,
        "processes": run_log.list_processes(run_log.read_manifest(job.folder / run_log.MANIFEST), provenance, first),
    }


def is_teacher_trained(run: Run) -> bool:
    """Return whether the teacher is complete; ExperimentError if the seed's stages started from another one."""
    settings, place = run.settings(TEACHER, None), _place(run)
    return run.ranks.on_first(lambda: any(is_complete(one, settings) for one in (run.folder / TEACHER, place)))


def obtain_teacher(run: Run, network: nn.Module) -> None:
    """Load the trained teacher into `network`. If there is none, train it, or wait for the process that does."""
    place, ranks = _place(run), run.ranks
    if place != run.folder / TEACHER:
        ranks.on_first(partial(_link, run.folder / TEACHER, place))
    if _load_teacher(run, network, place):
        return
    with ranks.enter_on_first(lambda: files.hold(place, partial(_announce_wait, run, place))):
        if not _load_teacher(run, network, place):
            run_stage(run, run.job(TEACHER, None, 1.0, place), TEACHER, None, network, {}, None)


def _announce_wait(run: Run, place: Path, owner: str) -> None:
    run.console.print(f"{TEACHER:<22} waits for {owner}, which trains it ({place})", highlight=False, soft_wrap=True)


def describe_growth(
    run: Run,
    folder: Path,
    networks: tuple[nn.Module, nn.Module],
    transfer: net2net.Transfer,
    settings: Mapping[str, Any],
    started: float,
) -> State:
    """Return the facts of a growth for the manifest; before the first step, also keep its record and certify it.

    `networks` are the teacher and the student; `started` is when it began, by the performance counter.
    """
    facts = {"growth": {"record": str(transfer), "seconds": time.perf_counter() - started}}

    def keep_and_certify() -> State:
        if checkpoint.exists(folder):
            return {}
        with files.explain_refusal(folder / GROWTH):
            net2net.save_record(transfer, folder / GROWTH)
        try:
            images = certified_images(run)
            return {"certificate": net2net.certify(transfer, *networks, images, settings.get("growth"))}
        except net2net.TransferError as error:
            raise ExperimentError(str(error)) from error

    return facts | run.ranks.on_first(keep_and_certify)


def certified_images(run: Run) -> Tensor:
    """Return the test images on which a growth is certified, as `net2net.verify` needs them."""
    return next(run.splits.test.ordered(CERTIFIED))[0]


def teacher_optimizer_state(run: Run) -> dict[str, Any]:
    """Return the state of the trained teacher's optimizer."""
    return checkpoint.load(_place(run))["optimizer"]


def _place(run: Run) -> Path:
    """The teacher's folder: among all teachers, unless the seed has one of its own, as a copy without links does."""
    own = run.folder / TEACHER
    if run.ranks.on_first(lambda: own.is_dir() and not own.is_symlink()):
        return own
    return Path(run.config.runs) / "teachers" / run.teacher


def _load_teacher(run: Run, network: nn.Module, place: Path) -> bool:
    """Load the teacher if it is complete; return whether it is."""
    settings = run.settings(TEACHER, None)
    state = run.ranks.on_first(lambda: checkpoint.load(place) if is_complete(place, settings) else None)
    if state is None:
        return False
    load(network, state, place)
    return state["step"] == run.job(TEACHER, None, 1.0).total  # not if only the previous checkpoint could be read


def _link(link: Path, place: Path) -> None:
    """Make the seed's link to its teacher."""
    target = os.path.relpath(place, link.parent)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and os.readlink(link) != target:  # to a teacher that is no longer there
            link.unlink()
        with suppress(FileExistsError):  # another process has made it a moment ago
            link.symlink_to(target)
    except OSError as error:
        raise ExperimentError(
            f"The link {link} cannot be made ({error.strerror}): choose a file system with links by runs=FOLDER."
        ) from error
