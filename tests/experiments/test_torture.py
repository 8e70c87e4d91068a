"""A run that is killed becomes what it would have been. The processes are real, and so is SIGKILL."""

import copy
import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from loops import Quiet, network, same, small_job, without_seconds

from experiments import checkpoint, files, training
from experiments.run_log import parse_curve
from experiments.training import Job, train


@pytest.mark.system
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    found = torture.torture(tmp_path, kills=20, seed=int.from_bytes(os.urandom(4), "big"))
    assert found.wrong == [] and found.kills == 20
    assert found.inside_write >= 3 and found.right >= 1


@pytest.mark.system
def test_a_single_bit_would_be_noticed(tmp_path: Path) -> None:
    torture.start(torture.SETTINGS, tmp_path, tmp_path / "log").join()
    expected = torture.product(tmp_path / "runs/quickstart/seed0")
    assert torture.equal(expected, torture.product(tmp_path / "runs/quickstart/seed0"))
    changed = copy.deepcopy(expected)
    changed["net2net network"]["fc.weight"].view(torch.int32)[0, 0] ^= 1
    changed["teacher optimizer"]["state"][0]["square_avg"].view(torch.int32).flatten()[-1] ^= 1
    changed["teacher curve"][-1][-1] += "0"
    different = [key for key in expected if not torture.equal(expected[key], changed[key])]
    assert different == ["teacher curve", "teacher optimizer", "net2net network"]


def shorter_job(folder: Path) -> Job:
    """Five steps, evaluations before, after the fourth and at the end."""
    return replace(small_job(folder), epochs="5it")


def die_at(call: int, folder: Path) -> None:
    """Train in `folder`, and be killed at one call to the file system; with 0, count the calls."""
    torch.set_num_threads(1)
    made = 0

    def deadly(real: Any) -> Any:
        def then(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return then

    files.os = type("os", (), {**vars(os), "fsync": deadly(os.fsync), "replace": deadly(os.replace)})  # type: ignore
    files.open = deadly(open)  # type: ignore[attr-defined]
    with files.hold(folder):
        job = shorter_job(folder)
        train(network(), replace(job, config=replace(job.config, checkpoint_seconds=0.0)), Quiet())
    (folder.parent / "calls").write_text(str(made))


@pytest.mark.system
def test_killed_at_any_call_to_the_file_system_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = network()
    rows = train(whole, shorter_job(tmp_path / "whole"), Quiet())
    counted = torture.context.Process(target=die_at, args=(0, tmp_path / "counted"))
    counted.start()
    counted.join()
    calls = int((tmp_path / "calls").read_text())
    # Five steps and three evaluations, each with a checkpoint, and three curves: opened, synced and renamed; the
    # checkpoints but the first are also renamed to be kept.
    assert calls == (5 + 3 + 3) * 3 + (5 + 3 - 1)
    started = [torture.context.Process(target=die_at, args=(n, tmp_path / f"arm{n}")) for n in range(1, calls + 1)]
    for process in started:
        process.start()
    halves = 0
    for number, process in enumerate(started, 1):
        process.join()
        assert process.exitcode == -signal.SIGKILL
        folder = tmp_path / f"arm{number}"
        halves += len(list(folder.glob("*.partial")))
        if (folder / "curve.csv").exists():  # what anybody may read in the meantime
            parse_curve((folder / "curve.csv").read_bytes(), "curve")
        if checkpoint.exists(folder):
            checkpoint.load(folder)
        with files.hold(folder):
            resumed = network()
            assert without_seconds(train(resumed, shorter_job(folder), Quiet())) == without_seconds(rows), number
        assert same(resumed, whole), number
        assert not list(folder.glob(".*"))
        states = [checkpoint.load(place)["optimizer"] for place in (folder, tmp_path / "whole")]
        assert torture.equal(*states), number
    assert halves == calls - 11  # in each of the eleven writes one died before its file was there


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_the_clock_alone_says_when_a_minute_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A step takes 2 s, an evaluation 4 s: with a checkpoint every 5 s that is one every third step, or sooner."""
    now, saved = 0.0, []
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    learn, evaluate, save = training.train_step, training.evaluate_splits, checkpoint.save

    def slow(take: float, real: Any) -> Any:
        def then(*arguments: Any) -> Any:
            nonlocal now
            now += take
            return real(*arguments)

        return then

    def note(folder: Path, state: Any) -> None:
        saved.append((state["step"], now, len(state["rows"])))
        save(folder, state)

    monkeypatch.setattr(training, "train_step", slow(2, learn))
    monkeypatch.setattr(training, "evaluate_splits", slow(4, evaluate))
    monkeypatch.setattr(training.checkpoint, "save", note)
    job = small_job(tmp_path)
    schedule = replace(job.config.schedule, batch_size=2, evaluate="7it", epochs="13ep")  # an epoch is 14 steps
    train(network(), replace(job, config=replace(job.config, checkpoint_seconds=seconds, schedule=schedule)), Quiet())
    steps = [step for step, _, _ in saved]
    if seconds == 0:
        assert set(steps) == set(range(14 * 4 + 1))
        return
    # Every third; and before an evaluation that would end too late, as well as after it, which counts from there.
    assert steps[:10] == [0, 3, 6, 7, 7, 10, 13, 14, 14, 17]
    assert all(later - sooner <= 6 for (_, sooner, _), (_, later, _) in itertools.pairwise(saved))
