"""One teacher for all arms and experiments that start from the same one, trained once. The processes are real."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torture
from conftest import composed
from loops import run_of, wait_for
from rich.console import Console

from experiments import checkpoint, experiment, files, stage, training
from experiments.analysis.curves import find_targets
from experiments.analysis.curves import load as load_results
from experiments.config import Config, ExperimentError

Make = Callable[..., Config]
SMALL = [*torture.SETTINGS[1:], "schedule.epochs=8it", "schedule.evaluate=4it", "growth.calibrate=0"]
ONE_ARM = ("arms=random_pad", "target=random_pad")


@pytest.fixture
def small(tmp_path: Path) -> Make:
    """A smaller experiment than the smallest; eight steps a stage."""
    return lambda *settings: composed(torture.SETTINGS[0], *SMALL, f"runs={tmp_path}/runs", *settings)


def compare(config: Config, log: Path | None = None) -> None:
    """Run an experiment in this process."""
    torch.set_num_threads(1)
    with open(log or os.devnull, "w") as text:
        experiment.run_experiment(config, Console(file=text))


def trained_teacher(runs: Path) -> tuple[Path, dict[str, Any]]:
    """The only teacher in a folder, and its manifest."""
    (folder,) = (runs / "teachers").iterdir()
    return folder, json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Counts the training steps but for those that measure the speed for the announcement."""
    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(training, "train_step", MagicMock(wraps=training.train_step))
    return training.train_step


@pytest.mark.system
def test_who_finds_it_in_training_waits_and_continues_where_a_killed_trainer_was(small, tmp_path):
    # Long enough that the teacher is not done before it is killed, however late the kill comes.
    settings = (*ONE_ARM, "schedule.teacher_epochs=200it")
    compare(small(*settings, f"runs={tmp_path}/whole"))
    processes = []
    for number, said in enumerate(("step      4/200", "waits for process")):
        config, log = small(*settings, "checkpoint_seconds=0"), tmp_path / f"{number}.txt"
        config.experiment = f"experiment{number}"
        processes.append(torture.context.Process(target=compare, args=(config, log)))
        processes[-1].start()
        wait_for(log, f"teacher                {said}")
    trainer, waiter = processes
    os.kill(trainer.pid or 0, signal.SIGKILL)
    waiter.join()
    assert waiter.exitcode == 0
    assert log.read_text().count(f"waits for process {trainer.pid} on {socket.gethostname()}, which trains it") == 1
    folder, manifest = trained_teacher(tmp_path / "runs")
    first, second = [(process["from"], process["to"]) for process in manifest["processes"]]
    assert first[0] == 0 and first[1] == second[0] and second[1] == 200
    whole, _ = trained_teacher(tmp_path / "whole")
    assert whole.name == folder.name
    assert torture.equal(checkpoint.load(folder)["network"], checkpoint.load(whole)["network"])
    assert not list((tmp_path / "runs").rglob(".*"))


def test_another_experiment_uses_it_also_after_a_move(small, tmp_path, train_step):
    compare(small(*ONE_ARM))
    other = small("arms=random_pad", "target=random_init", "students.wider.width=0.6")
    other.experiment = "other"
    compare(other)
    assert train_step.call_count == 8 + 8 + 8  # the teacher and two arms
    (tmp_path / "runs").rename(tmp_path / "moved")  # the links are relative
    other.runs = f"{tmp_path}/moved"
    compare(other)
    assert train_step.call_count == 24
    # Figure and table follow the experiment's own configuration, not that of the teacher's first user.
    manifests = load_results(tmp_path / "moved/other").runs["manifest"]
    assert manifests.xs("teacher", level="arm").iloc[0]["experiment"] == "quickstart"
    assert find_targets(manifests) == {("other", ""): "random_init"}


def test_the_arms_of_another_teacher_are_refused(small, tmp_path):
    compare(small(*ONE_ARM))
    other = small(*ONE_ARM, "teacher.width=0.3")
    with pytest.raises(ExperimentError, match=r"seed0/teacher holds a run made with other .*:\n  network.width: "):
        compare(other)
    (tmp_path / "runs/quickstart/seed0/teacher").unlink()
    with pytest.raises(ExperimentError, match=r"seed0/random_pad holds a run made .*:\n  teacher: \w+ there,"):
        compare(other)


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_one_is_not_taken_for_trained(small, tmp_path, last, capsys):
    config = small(*ONE_ARM)
    compare(config)
    folder, manifest = trained_teacher(tmp_path / "runs")
    whole = checkpoint.load(folder)["network"]
    (folder / "checkpoint.pt").write_bytes(b"")
    if last:  # the reserve is of the last step, too: only the evaluation was missing
        checkpoint.save(tmp_path / "new", checkpoint.load(folder) | {"network": whole, "step": 8})
        shutil.copy(tmp_path / "new/checkpoint.pt", folder / "checkpoint.previous.pt")
    run = run_of(config)
    network = run.make_network(None)
    capsys.readouterr()
    stage.obtain_teacher(run, network)
    said = "checkpoint.pt cannot be read (its checksum is wrong); continuing from checkpoint.previous.pt"
    assert said in capsys.readouterr().err
    assert torture.equal(dict(network.state_dict()), dict(whole))
    after = trained_teacher(tmp_path / "runs")[1]
    assert after["complete"] and after["curve_sha256"] and manifest["settings"] == after["settings"]
    worked = [(process["from"], process["to"]) for process in after["processes"]]
    assert worked == ([(0, 8)] if last else [(0, 4), (4, 8)])
    assert last or checkpoint.load(folder)["step"] == 8


@pytest.mark.slow
def test_a_copy_without_links_is_used_and_a_link_to_what_is_gone_is_made_anew(small, tmp_path, train_step):
    config = small(*ONE_ARM)
    seed = tmp_path / "runs/quickstart/seed0"
    seed.mkdir(parents=True)
    (seed / "teacher").symlink_to("../../teachers/gone")
    compare(config)
    assert os.readlink(seed / "teacher") == f"../../teachers/{run_of(config).teacher}"
    shutil.copytree(tmp_path / "runs/quickstart", tmp_path / "copy/quickstart")
    shutil.rmtree(tmp_path / "copy/quickstart/seed0/random_pad")
    config.runs = f"{tmp_path}/copy"
    compare(config)
    assert train_step.call_count == 8 + 8 + 8
    assert not (tmp_path / "copy/teachers").exists()


def test_no_lock_is_left(small, tmp_path):
    compare(small())
    assert not list(tmp_path.rglob(".*"))
    for name in ("teacher", "net2net"):  # as of a process that was killed after its last word
        (tmp_path / "runs/quickstart/seed0" / name / files.LOCK).touch()
    compare(small())
    assert not list(tmp_path.rglob(".*"))
