"""What two processes of torchrun do in test_distributed.py: torchrun ... ranked.py FOLDER; each leaves rank<k>.pt."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import composed
from loops import Quiet, network, small_job
from rich.console import Console
from torch import Tensor, nn

from experiments import arms
from experiments import distributed as ranks
from experiments.config import ExperimentError
from experiments.data import Images, load
from experiments.run import Run
from experiments.signals import Interrupted
from experiments.training import Job, train


def plain() -> nn.Module:
    """No batch norm, no dropout: a batch may be divided."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def outcome(net: nn.Module, job: Job, follower: Quiet | None = None) -> dict[str, Any]:
    """The curve and the weights of a run; where it stopped, if it did."""
    try:
        rows, stopped = train(net, job, follower or Quiet()), ""
    except (Interrupted, ExperimentError) as error:
        rows, stopped = [], f"{type(error).__name__} {error}"
    return {"rows": rows, "stopped": stopped, "network": {k: v.clone() for k, v in net.state_dict().items()}}


class Signalled(Quiet):
    """Rank 1 is asked to stop in its fifth step."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def advance(self, step: int, loss: float) -> None:
        super().advance(step, loss)
        if step == 5 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def unreadable(job: Job) -> Job:
    """On rank 1 the seventh batch cannot be read."""

    class Unreadable(Images):
        def batches(self, *arguments: Any, **named: Any):
            for number, batch in enumerate(super().batches(*arguments, **named)):
                if job.ranks.rank == 1 and named["epoch"] == 2 and number == 0:
                    raise ExperimentError("The image 6 cannot be read.")
                yield batch

    train = Unreadable(**vars(job.splits.train))
    return replace(job, splits=replace(job.splits, train=train))


def grown(own: ranks.Ranks, *settings: str) -> dict[str, Tensor]:
    """The weights of a student that this rank has filled."""
    config = composed(*settings)
    run = Run(config, load(config.data), torch.device("cpu"), Console(quiet=True), own)
    teacher, student = run.make_network(None), run.make_network("wider")
    arms.fill("net2net", teacher, student, config, run.images)
    return student.state_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    own = ranks.join()

    def job(name: str) -> Job:
        return replace(small_job(folder / name), ranks=own)

    found = {
        "grown": {"stopped": "", "rows": [], "network": grown(own, *sys.argv[2:])},
        "plain": outcome(plain(), job("plain")),
        "norm": outcome(network(), job("norm")),
        "stopped": outcome(network(), job("stopped"), Signalled(own.rank)),
        "resumed": outcome(network(), job("stopped")),
        "unreadable": outcome(network(), unreadable(job("unreadable"))),
        "readable": outcome(network(), job("unreadable")),
        "sum": own.sum(1.5, own.rank),
        "most": own.maximum(own.rank, 3),
        "first": own.on_first(lambda: own.rank),
        "in_turn": own.first_then_others(lambda: own.rank),
    }
    torch.save(found, folder / f"rank{own.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
