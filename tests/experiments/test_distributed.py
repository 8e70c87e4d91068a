"""Two processes train one network: the same weights in both, and one process's curve where batches may be divided."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from conftest import composed
from loops import Quiet, network, signalled, small_job, without_seconds
from rich.console import Console
from torch import Tensor, nn

from experiments import checkpoint, start
from experiments.config import ExperimentError
from experiments.data import Images, load
from experiments.distributed import ALONE, Ranks, join
from experiments.run import Run
from experiments.signals import Interrupted
from experiments.training import Job, train

ROOT = Path(__file__).parents[2]
Ranked = tuple[Path, list[dict[str, Any]]]  # the folder in which two processes ran; what each found

# -- what each of the two processes does --------------------------------------------------------------------------


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


def grown(own: Ranks, *settings: str) -> dict[str, Tensor]:
    """The weights of a student that this rank has filled."""
    config = composed(*settings)
    run = Run(config, load(config.data), torch.device("cpu"), Console(quiet=True), own)
    teacher, student = run.make_network(None), run.make_network("wider")
    start.fill("net2net", teacher, student, config, run.images)
    return student.state_dict()


def main(folder: Path) -> None:
    """What torchrun starts; each process leaves rank<k>.pt."""
    torch.set_num_threads(1)
    own = join()

    def job(name: str) -> Job:
        return replace(small_job(folder / name), ranks=own)

    found = {
        "grown": {"stopped": "", "rows": [], "network": grown(own, *sys.argv[2:])},
        "plain": outcome(plain(), job("plain")),
        "norm": outcome(network(), job("norm")),
        "stopped": outcome(network(), job("stopped"), signalled(signal.SIGTERM, 5 if own.rank == 1 else 0)),
        "resumed": outcome(network(), job("stopped")),
        "unreadable": outcome(network(), unreadable(job("unreadable"))),
        "readable": outcome(network(), job("unreadable")),
    }
    torch.save(found, folder / f"rank{own.rank}.pt")


# -- and what comes of it -----------------------------------------------------------------------------------------


def torchrun(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What two processes say, in a folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "default",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launch, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """The folder in which two processes ran, and what each found."""
    folder = tmp_path_factory.mktemp("ranked")
    done = torchrun(__file__, str(folder), *torture.SETTINGS, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.system
@pytest.mark.parametrize("name", ["grown", "plain", "norm", "stopped", "resumed", "unreadable", "readable"])
def test_all_ranks_end_with_the_same_weights(ranked, name):
    one, other = (found[name] for found in ranked[1])
    assert one["stopped"] == other["stopped"]
    assert without_seconds(one["rows"]) == without_seconds(other["rows"])
    for key, value in one["network"].items():
        # While a run is under way, running statistics are each rank's own.
        assert torch.equal(value, other["network"][key]) or (one["stopped"] and "running" in key), key


@pytest.mark.system
def test_without_batch_norm_the_curve_is_that_of_one_process(ranked, tmp_path):
    net = plain()
    rows = train(net, small_job(tmp_path / "alone"), Quiet())
    found = ranked[1][0]["plain"]
    assert len(found["rows"]) == len(rows)
    for row, expected in zip(without_seconds(found["rows"]), without_seconds(rows), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    for name, value in net.state_dict().items():
        assert torch.allclose(found["network"][name], value, rtol=1e-4, atol=1e-6)
    # It would be seen: other batches of the same images give another curve.
    other = small_job(tmp_path / "other")
    other.config.seed = 1
    assert train(plain(), other, Quiet())[-1]["train_loss"] != pytest.approx(rows[-1]["train_loss"], rel=1e-4)


@pytest.mark.system
def test_with_batch_norm_it_is_another(ranked, tmp_path):
    rows = train(network(), small_job(tmp_path / "alone"), Quiet())
    found = ranked[1][0]["norm"]["rows"]
    assert found[0]["test_loss"] == pytest.approx(rows[0]["test_loss"])  # before the first step there is no difference
    assert found[-1]["test_loss"] != pytest.approx(rows[-1]["test_loss"], rel=1e-4)


@pytest.mark.system
def test_a_signal_to_one_rank_stops_all_at_one_step_and_they_continue(ranked):
    folder, found = ranked
    assert {each["stopped"]["stopped"] for each in found} == {"Interrupted arm stopped at step 5 of 12"}
    for rank in range(2):
        whole, resumed = found[rank]["norm"], found[rank]["resumed"]
        assert without_seconds(resumed["rows"]) == without_seconds(whole["rows"])
        assert all(torch.equal(resumed["network"][key], value) for key, value in whole["network"].items())
    assert checkpoint.load(folder / "stopped")["step"] == 12


@pytest.mark.system
def test_what_one_rank_cannot_read_is_said_by_all_and_what_was_learned_is_saved(ranked):
    _, found = ranked
    assert {each["unreadable"]["stopped"] for each in found} == {"ExperimentError The image 6 cannot be read."}
    for rank in range(2):  # it went on from the sixth step, with the meter's sums of before
        assert without_seconds(found[rank]["readable"]["rows"]) == without_seconds(found[rank]["norm"]["rows"])


@pytest.mark.system
def test_an_experiment_of_two_processes(tmp_path):
    settings = "runs=runs arms=[net2net,random_init] schedule.epochs=6it schedule.evaluate=3it"
    done = torchrun(str(ROOT / "train.py"), *torture.SETTINGS, *settings.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figure    runs/quickstart/figure.png") == 1
    assert "Warning" not in done.stderr
    seed = tmp_path / "runs" / "quickstart" / "seed0"
    assert sorted(path.name for path in seed.iterdir()) == ["net2net", "random_init", "teacher"]
    for arm in ("net2net", "random_init", "teacher"):
        manifest = json.loads((seed / arm / "manifest.json").read_text())
        assert manifest["complete"] and manifest["settings"]["ranks"] == 2
        with (seed / arm / "curve.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["0", "3", "6"]
    step0 = json.loads((seed / "net2net" / "manifest.json").read_text())["step0"]
    assert step0["agree"] == step0["of"]
    teacher = json.loads((seed / "teacher" / "manifest.json").read_text())
    assert teacher["settings"]["ranks"] == 2


@pytest.mark.system
def test_torchrun_ends_with_our_sentence(tmp_path):
    done = torchrun(str(ROOT / "train.py"), "experiment=quickstart", "seeed=1", folder=tmp_path)
    assert done.returncode == 1
    _, cause = done.stderr.split("Root Cause")
    assert "(did you mean 'seed'?)" in cause and "To enable traceback" not in cause


@pytest.mark.slow
def test_of_a_wrong_command_one_rank_speaks(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        command = [sys.executable, str(ROOT / "train.py"), "experiment=quickstart", "seeed=1"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("(did you mean 'seed'?)") == lines


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as MPI or Slurm may set it for another purpose
    assert join() is ALONE
    assert ALONE.sum(1, 2.5) == [1, 2.5] and ALONE.maximum(3, 0) == [3, 0]
    assert ALONE.wrap(net := network(), torch.device("cpu")) is net


def test_ranks_share_a_batch_evenly_or_not_at_all():
    assert [Ranks(rank, 4).share(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ExperimentError, match=r"which 3 processes cannot share: choose a multiple of 3"):
        Ranks(0, 3).share(8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
