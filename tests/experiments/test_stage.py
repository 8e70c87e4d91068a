"""Stages: what is complete is skipped, what was interrupted continues, what was made otherwise is refused."""

import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from loops import read_rows

from experiments import files, run_log, training
from experiments.config import ExperimentError
from experiments.stage import is_complete


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
def test_a_finished_run_is_skipped(train_py, copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert train_py("target=random_pad", "data.workers=2") == 0  # these change no curve
    out = capsys.readouterr().out
    assert out.count("complete, skipped") == 6
    assert "to do" not in out
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_arm_that_is_missing_is_run_alone(train_py, copied, capsys):
    expected = read_rows(copied / "random_pad")
    shutil.rmtree(copied / "random_pad")
    assert train_py() == 0
    assert "to do     random_pad: about" in capsys.readouterr().out
    assert read_rows(copied / "random_pad") == expected


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("typed", "stage", "difference"),
    [
        ("schedule.batch_size=16", "teacher", "schedule.batch_size: 32 there, 16 now"),
        ("model.layers=2", "teacher", "network.layers: 1 there, 2 now"),
        ("rates.net2net=0.5", "net2net", "rate: 0.1 there, 0.5 now"),
    ],
)
def test_a_run_made_with_other_settings_is_refused_by_them(train_py, copied, capsys, typed, stage, difference):
    assert train_py(typed) == 1
    err = capsys.readouterr().err
    assert f"{stage} holds a run made with other settings" in err and f"\n  {difference}\n" in err
    assert "Add tag=NAME to run these settings in a folder of their own." in err


def test_one_job_at_a_time_draws_the_figure_of_all_curves(train_py, copied, monkeypatch):
    draw = MagicMock(side_effect=lambda folder: (folder / files.LOCK).read_text())
    monkeypatch.setattr("experiments.analysis.figures.draw_runs", draw)
    assert train_py() == 0
    draw.assert_called_once_with(Path("runs/quickstart"))


def test_what_is_not_a_run_is_refused(copied):
    folder = copied / "net2net"
    (folder / "manifest.json").unlink()
    with pytest.raises(ExperimentError, match=r"net2net holds a checkpoint but no manifest.*: delete the folder"):
        is_complete(folder, {})
    assert is_complete(copied / "absent", {}) is False


def test_a_stage_begun_is_not_complete(tmp_path):
    for complete in (False, True):
        run_log.write_manifest(tmp_path, {"settings": {"seed": 0}, "complete": complete})
        assert is_complete(tmp_path, {"seed": 0}) is complete
