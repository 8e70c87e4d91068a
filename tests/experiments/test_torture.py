"""A run that is killed becomes what it would have been. The processes are real, and so is SIGKILL."""

import copy
import itertools
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from loops import Quiet, interrupt, network, same, small_job, without_seconds

from experiments import checkpoint, files, training
from experiments.run_log import parse_curve
from experiments.training import Job, train


@pytest.mark.system
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    found = torture.torture(tmp_path, kills=20, seed=int.from_bytes(os.urandom(4), "big"))
    assert found.wrong == [] and found.kills == 20
    assert found.inside_write >= 3 and found.right >= 1


def test_a_single_bit_would_be_noticed(finished):
    expected = torture.product(finished)
    assert torture.equal(expected, torture.product(finished))
    changed = copy.deepcopy(expected)
    next(iter(changed["net2net network"].values())).view(torch.int32).flatten()[0] ^= 1
    changed["teacher optimizer"]["state"][0]["square_avg"].view(torch.int32).flatten()[-1] ^= 1
    changed["teacher curve"][-1][-1] += "0"
    different = [key for key in expected if not torture.equal(expected[key], changed[key])]
    assert different == ["teacher curve", "teacher optimizer", "net2net network"]


def shorter_job(folder: Path) -> Job:
    """Five steps, evaluations before, after the fourth and at the end."""
    return replace(small_job(folder), epochs="5it")


def die_at(call: int, folder: Path) -> None:
    """Train in `folder`, and be killed when a file there is opened or renamed for the so many-th time."""
    torch.set_num_threads(1)
    calls = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and str(folder) in str(arguments[0]) and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with files.hold(folder):
        job = shorter_job(folder)
        train(network(), replace(job, config=replace(job.config, checkpoint_seconds=0.0)), Quiet())


@pytest.mark.system
def test_killed_at_any_call_to_the_file_system_it_goes_on_bit_for_bit(tmp_path):
    whole = network()
    rows = train(whole, shorter_job(tmp_path / "whole"), Quiet())
    folders = [tmp_path / f"arm{number:02}" for number in range(1, 41)]
    started = [torture.context.Process(target=die_at, args=(n, folder)) for n, folder in enumerate(folders, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    # Five steps and three evaluations, each with a checkpoint, and three curves: opened and renamed; the checkpoints
    # but the first are also renamed to be kept.
    opened, renamed = 5 + 3 + 3, (5 + 3 + 3) + (5 + 3 - 1)
    ends = [process.exitcode for process in started]
    calls = ends.index(0)
    assert ends == [-signal.SIGKILL] * calls + [0] * (len(ends) - calls) and calls >= opened + renamed
    assert sum(len(list(folder.glob(".*.partial"))) for folder in folders) == renamed  # files that were never in place
    for folder in folders:
        if (folder / "curve.csv").exists():  # what anybody may read in the meantime
            parse_curve((folder / "curve.csv").read_bytes(), "curve")
        if checkpoint.exists(folder):
            checkpoint.load(folder)
        with files.hold(folder):
            resumed = network()
            assert without_seconds(train(resumed, shorter_job(folder), Quiet())) == without_seconds(rows), folder
        assert same(resumed, whole), folder
        assert not list(folder.glob(".*"))
        states = [checkpoint.load(place)["optimizer"] for place in (folder, tmp_path / "whole")]
        assert torture.equal(*states), folder


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_the_clock_alone_says_when_a_minute_is_over(tmp_path, monkeypatch, seconds):
    """A step takes 2 s, an evaluation 4 s: with a checkpoint every 5 s that is one every third step, or sooner."""
    now, saved = 0.0, []

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    interrupt(monkeypatch, "train_step", range(1000), partial(spend, 2))
    interrupt(monkeypatch, "evaluate_splits", range(1000), partial(spend, 4))
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append((state["step"], now)))
    job = small_job(tmp_path)
    schedule = replace(job.config.schedule, batch_size=2, evaluate="7it", epochs="13ep")  # an epoch is 14 steps
    train(network(), replace(job, config=replace(job.config, checkpoint_seconds=seconds, schedule=schedule)), Quiet())
    steps = [step for step, _ in saved]
    if seconds == 0:
        assert set(steps) == set(range(14 * 4 + 1))
        return
    # Every third; and before an evaluation that would end too late, as well as after it, which counts from there.
    assert steps[:10] == [0, 3, 6, 7, 7, 10, 13, 14, 14, 17]
    assert all(later - sooner <= 6 for (_, sooner), (_, later) in itertools.pairwise(saved))
