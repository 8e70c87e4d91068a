"""Full disks and memories, images that vanish, clocks that jump: nothing done is lost, and no curve is wrong."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from loops import pictures

from experiments import checkpoint, command, training
from experiments.config import ExperimentError
from experiments.machine import explain_lack_of_memory
from experiments.run_log import parse_curve

ARM = "runs/quickstart/seed0/random_init"
ALONE = (*torture.SETTINGS, "arms=random_init", "target=random_init", "schedule.epochs=12it", "schedule.evaluate=4it")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the command line is used in."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr, which has to be all that is there."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    """A disk of 16 MB, mounted at `here`/runs; skipped where none can be."""
    (here / "runs").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", here / "runs"], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield here / "runs"
    finally:
        subprocess.run(["umount", "-l", here / "runs"], check=True)


BOTH = [*torture.SETTINGS, "schedule.epochs=12it", "schedule.evaluate=4it"]


def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seed of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    process = torture.start(settings, folder, folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "runs/quickstart/seed0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of teacher and student with all the room it needs."""
    return undisturbed(BOTH, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a teacher."""
    return undisturbed(list(ALONE), tmp_path_factory) / "random_init"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures on disk."""
    root = tmp_path_factory.mktemp("pictures") / "tree"
    pictures(root)
    return root


def streaming(tree: Path, workers: int) -> list[str]:
    settings = [*ALONE, "data=imagenet", f"data.root={tree}", "data.size=16", f"data.workers={workers}"]
    return [*settings, "data.holdout=0.1", "schedule.batch_size=8", "checkpoint_seconds=1000"]


@pytest.fixture(scope="module")
def streamed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on these pictures."""
    return undisturbed(streaming(tree, 0), tmp_path_factory) / "random_init"


@pytest.mark.system
@pytest.mark.parametrize(("room", "kept"), [(0.02, []), (0.5, [0]), (1.5, [12, 0]), (2.5, [12, 4]), (3.5, [12, 8])])
def test_on_a_full_disk_nothing_is_lost_and_with_room_the_same_command_goes_on(
    disk: Path, whole: Path, capsys: pytest.CaptureFixture[str], room: float, kept: list[int]
) -> None:
    """With room for so many checkpoints of the student, of which a run needs three, and its teacher's less than one."""
    size = (whole / "net2net/checkpoint.pt").stat().st_size
    free = os.statvfs(disk)
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_frsize - int(room * size))
    assert command.main(BOTH) == 1
    said = errors(capsys)
    assert "cannot be written (No space left on device): make room" in said
    steps = []
    for folder in (*disk.glob("teachers/*"), disk / "quickstart/seed0/net2net"):
        if checkpoint.exists(folder):
            steps.append(checkpoint.load(folder)["step"])
        if (folder / "curve.csv").exists():
            parse_curve((folder / "curve.csv").read_bytes(), "curve")
    assert steps == kept
    assert not list(disk.rglob("*.partial"))
    assert capsys.readouterr().err == ""  # no checkpoint was damaged
    (disk / "ballast").unlink()
    assert command.main(BOTH) == 0
    assert torture.equal(torture.product(disk / "quickstart/seed0"), torture.product(whole))


def the_allocator_fails() -> None:
    torch.empty(1 << 50)


def python_fails() -> None:
    bytearray(1 << 60)


def the_gpu_fails() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.10 GiB\nmore")


def a_worker_is_killed() -> None:
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.slow
@pytest.mark.parametrize("fail", [the_allocator_fails, python_fails, the_gpu_fails, a_worker_is_killed])
def test_without_memory_the_last_checkpoint_stays_and_advice_is_given(
    here: Path, alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    learn, done = training.train_step, 0

    def fails(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 6:
            fail()
        return learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", fails)
        assert command.main([*ALONE]) == 1
    said = errors(capsys)
    assert (
        "The memory is not enough (" in said and "the same command continues" in said and "schedule.batch_size" in said
    )
    assert checkpoint.load(here / ARM)["step"] == 4
    assert command.main([*ALONE]) == 0
    same_arm(here / ARM, alone)


def same_arm(one: Path, other: Path) -> None:
    """The same curve but for the seconds, weights and optimizer."""
    a, b = (
        [
            [line.split(",")[:3] + line.split(",")[4:] for line in (arm / "curve.csv").read_text().splitlines()],
            checkpoint.load(arm)["network"],
            checkpoint.load(arm)["optimizer"],
        ]
        for arm in (one, other)
    )
    assert torture.equal(a, b)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory"), KeyError("x")):
        with pytest.raises(type(error)) as raised, explain_lack_of_memory():
            raise error
        assert raised.value is error and not isinstance(error, ExperimentError)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "workers"), [("train_step", 0), ("evaluate_splits", 0), ("train_step", 2)])
def test_when_the_images_vanish_what_was_learned_stays(
    here: Path,
    tree: Path,
    streamed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    where: str,
) -> None:
    settings, elsewhere = streaming(tree, workers), tree.with_name("elsewhere")
    real, done = getattr(training, where), 0

    def vanish(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == (6 if where == "train_step" else 2):  # the second evaluation is after four steps
            tree.rename(elsewhere)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, where, vanish)
        assert command.main(settings) == 1
    assert "cannot be read (" in errors(capsys)
    step = checkpoint.load(here / ARM)["step"]
    if where == "evaluate_splits":
        assert step == 4
    elif workers:
        assert 6 <= step < 12  # what they had read by then was still learned from
    else:
        assert step == 6
    assert command.main(settings) == 1
    assert f"data.root={tree} is not a folder" in errors(capsys)
    elsewhere.rename(tree)
    assert command.main(settings) == 0
    same_arm(here / ARM, streamed)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
        assert command.main([*ALONE]) == 0
    same_arm(here / ARM, alone)
    seconds = [float(line.split(",")[3]) for line in (here / ARM / "curve.csv").read_text().splitlines()[1:]]
    assert seconds == sorted(seconds) and 0 <= seconds[-1] < 60
