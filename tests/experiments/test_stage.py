"""Stages: what is complete is skipped, what was interrupted continues, what was made otherwise is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import read_rows

from experiments import checkpoint, experiment, run_log, training
from experiments.config import ExperimentError
from experiments.stage import is_complete

Main = Callable[..., int]
# One arm that needs the teacher: two stages.
FAST = ("arms=[net2net]", "target=net2net", "schedule.epochs=8it", "schedule.evaluate=4it")
STAGES = ("teacher", "net2net")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run in tmp_path/runs, which is that of `train_py`."""
    shutil.copytree(finished.parents[1], tmp_path / "runs")
    return tmp_path / "runs/quickstart/seed0"


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a step is trained."""
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("a step was trained"))


@pytest.mark.usefixtures("untrained")
def test_a_finished_run_is_skipped(train_py: Main, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert train_py("target=random_pad", "data.workers=2") == 0  # these change no curve
    out = capsys.readouterr().out
    assert out.count("complete, skipped") == 6
    assert "to do" not in out
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_arm_that_is_missing_is_run_alone(train_py: Main, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = read_rows(copied / "random_pad")
    shutil.rmtree(copied / "random_pad")
    assert train_py() == 0
    assert "to do     random_pad: about" in capsys.readouterr().out
    assert read_rows(copied / "random_pad") == expected


OTHERS = {  # what is typed -> the difference that is named; of the teacher, and of an arm alone
    "teacher": {
        "schedule.batch_size=16": "schedule.batch_size: 32 there, 16 now",
        "teacher.width=0.6": "network.width: 0.5477 there, 0.6 now",
        "+model.extra_pairs=1": "network.extra_pairs: absent there, 1 now",
        "precision=bfloat16": "precision: float32 there, bfloat16 now",
        "data.pad=2": "data.pad: 1 there, 2 now",
    },
    "net2net": {
        "rates.net2net=0.5": "rate: 0.1 there, 0.5 now",
        "growth.split=equal": "growth.split: uneven there, equal now",
    },
}


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("stage", OTHERS)
def test_a_run_made_with_other_settings_is_refused_with_the_differences(
    train_py: Main, copied: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert train_py(*OTHERS[stage]) == 1
    err = capsys.readouterr().err
    assert f"{stage} holds a run made with other settings" in err
    assert all(f"\n  {difference}\n" in err for difference in OTHERS[stage].values())
    assert "Delete that folder to run it anew, or write elsewhere with runs=FOLDER." in err


@pytest.mark.slow
def test_an_interrupted_experiment_continues_to_the_same_curves(
    train_py: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_py(*FAST, "runs=whole") == 0
    step = training.train_step
    monkeypatch.setattr(experiment, "_measure_step", lambda *_: 0.0)
    done = 0

    def interrupted_step(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done in (3, 8 + 6):  # in the teacher, and in the student
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", interrupted_step)
    for _ in range(2):
        assert train_py(*FAST) == 130
        assert "Run the same command again to continue." in capsys.readouterr().err
    monkeypatch.setattr(training, "train_step", step)
    assert json.loads((tmp_path / "runs/quickstart/seed0/net2net/manifest.json").read_text())["complete"] is False
    assert train_py(*FAST) == 0
    for name in STAGES:
        whole, resumed = (tmp_path / runs / "quickstart/seed0" / name for runs in ("whole", "runs"))
        assert read_rows(whole) == read_rows(resumed)
        a, b = (checkpoint.load(folder)["network"] for folder in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)
        records = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, resumed)]
        assert records[0].get("step0") == records[1].get("step0")
        assert records[1]["complete"] is True


def test_what_is_not_a_run_is_refused(copied: Path) -> None:
    folder = copied / "net2net"
    (folder / "manifest.json").unlink()
    with pytest.raises(ExperimentError, match=r"net2net holds a checkpoint but no manifest.*: delete the folder"):
        is_complete(folder, {})
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ExperimentError, match="is no manifest"):
        is_complete(folder, {})
    assert is_complete(copied / "absent", {}) is False


def test_a_stage_begun_is_not_complete(tmp_path: Path) -> None:
    for complete in (False, True):
        run_log.write_manifest(tmp_path, {"settings": {"seed": 0}, "complete": complete})
        assert is_complete(tmp_path, {"seed": 0}) is complete
    with pytest.raises(ExperimentError, match="seed: 0 there, 1 now"):
        is_complete(tmp_path, {"seed": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("another", "is another network's: delete runs/quickstart/seed0/teacher"),
        (
            "flipped",
            "cannot be read (its checksum is wrong): delete runs/quickstart/seed0/teacher",
        ),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_refused_by_name(
    train_py: Main, copied: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str
) -> None:
    shutil.rmtree(copied / "net2net")  # so that the teacher is loaded
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        content = bytearray((copied / "teacher" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / "teacher" / name).write_bytes(content)
    if damage == "another":
        shutil.copy(copied / "random_init" / "checkpoint.pt", copied / "teacher" / "checkpoint.pt")
    assert train_py() == 1
    assert said in capsys.readouterr().err
