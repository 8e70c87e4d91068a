"""Stages: the teacher and each arm. A stage whose product exists is skipped; one made otherwise is refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, progress
from . import run_log as ledger
from . import wandb_log as mirror
from .config import STARTS_FROM_TEACHER, TEACHER, ExperimentError, flatten
from .machine import describe
from .run import Run
from .training import Job, train


def is_complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the stage in `folder` has been finished with these settings.

    Raises ExperimentError, showing the difference, if the folder holds a run, finished or not, with others.
    """
    manifest = ledger.read_manifest(folder)
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
            "Delete that folder to run it anew, or write elsewhere with runs=FOLDER."
        )
    return bool(manifest["complete"])


def carry_out(
    run: Run,
    job: Job,
    arm: str,
    student: str | None,
    network: nn.Module,
    facts: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> None:
    """Train one stage and write its manifest: first as incomplete, so that a folder always says what it holds.

    `facts` are added to the manifest; `optimizer` is the state that the optimizer starts with. Only for who holds the
    folder's lock; of several ranks, rank 0 writes.
    """
    state = run.ranks.first(lambda: checkpoint.resume(job.folder))
    if optimizer is not None and "network" not in state:
        state |= {"network": network.state_dict(), "optimizer": optimizer}
    if run.ranks.rank > 0:
        train(network, job, _Nobody(), state)
        return
    began = ledger.read_manifest(job.folder)
    manifest: dict[str, Any] = {
        "experiment": run.config.name,
        "arm": arm,
        "student": student,
        "seed": run.config.seed,
        "settings": run.settings(arm, student),
        "config": asdict((run.later or run).config),  # what its command composes
        "data": run.splits.description,
        **asdict(run.choice.arithmetic),
        "choice": run.choice.why,
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_flops": run.costs[student][0],
        "train_flops_per_image": job.flops,
        "teacher": TEACHER if arm in STARTS_FROM_TEACHER else None,
        "complete": False,
    }
    provenance = ledger.provenance() | {"device": str(run.device), "hardware": describe(run.device)}
    manifest |= provenance | (facts or {})
    manifest["processes"] = ledger.processes(began, provenance, state["step"])
    if began is not None:  # an interrupted run: what was measured before its first step still holds
        manifest |= {key: began[key] for key in ("growth", "step0", "before", "grown_from") if key in began}
    ledger.write_manifest(job.folder, manifest)
    with (
        progress.follow(run.console, job.name, job.total, state["step"], run.config.schedule.batch_size) as follower,
        mirror.mirror(run.config, job.name, manifest, run.console) as log,
    ):
        train(network, job, _Both(follower, log), state)
    if arm != TEACHER:  # whose weights others need
        checkpoint.drop_previous(job.folder)
    manifest["processes"][-1]["to"] = job.total
    manifest |= {"complete": True, "curve_sha256": ledger.checksum(job.folder / "curve.csv")}
    ledger.write_manifest(job.folder, manifest)


class _Nobody:
    """Is told and says nothing."""

    def advance(self, step: int, loss: float) -> None:
        pass

    def row(self, row: Mapping[str, float]) -> None:
        pass


@dataclass(frozen=True)
class _Both:
    """The terminal and the mirror are told of the same rows."""

    follower: progress.Follower
    log: mirror.Log

    def advance(self, step: int, loss: float) -> None:
        self.follower.advance(step, loss)

    def row(self, row: Mapping[str, float]) -> None:
        self.follower.row(row)
        self.log(row)
