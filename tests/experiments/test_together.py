"""Several processes at one experiment: none writes where another does, and who reads sees whole files. All are real."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torture
from conftest import TINY

from experiments import command, files
from experiments.analysis import figures as figure

pytestmark = pytest.mark.system
LONG = [*torture.SETTINGS, "arms=[random_init]", "target=random_init", "schedule.epochs=1000ep"]


def wait_for(path: Path, text: str) -> None:
    for _ in range(6000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{path} never says {text!r}")


def test_the_second_run_says_who_writes_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arm = tmp_path / "runs/quickstart/seed0/random_init"

    def inodes() -> dict[str, int]:
        return {name: (arm / name).stat().st_ino for name in ("manifest.json", ".lock")}

    first = torture.start(LONG, tmp_path, tmp_path / "log")
    try:
        wait_for(tmp_path / "log", "random_init            step")
        before = inodes()
        assert command.main(LONG) == 1
        said = capsys.readouterr().err
        assert f"random_init is being written by process {first.pid} on " in said and said.count("Error") == 1
        # In a sweep the other arms go on; this one is left to whom it belongs.
        assert command.main(["-m", *LONG, "seed=0"]) == 0
        out, err = capsys.readouterr()
        assert "random_init            skipped: runs/quickstart/seed0/random_init is being written by" in out
        assert err == "" and "figure    " not in out
        assert first.is_alive() and inodes() == before
    finally:
        os.kill(first.pid or 0, signal.SIGKILL)
        first.join()
    with files.hold(arm):  # which died with its owner
        pass


def test_jobs_that_end_at_once_draw_one_whole_figure(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parents[1], tmp_path / "runs", symlinks=True)
    experiment = tmp_path / "runs/quickstart"
    (experiment / "figure.png").unlink()
    manifest = json.loads((experiment / "seed0/net2net/manifest.json").read_text())
    jobs = {
        f"{number} {arm}": torture.start([*TINY, f"arms={arm}"], tmp_path, tmp_path / f"{number} {arm}")
        for arm in ("net2net", "random_init")
        for number in range(2)
    }
    for job in jobs.values():
        job.join()
        assert job.exitcode == 0
    drawn = (experiment / "figure.png").read_bytes()
    assert drawn == figure.draw_runs(experiment).read_bytes()
    assert not list(tmp_path.rglob(".*"))
    assert json.loads((experiment / "seed0/net2net/manifest.json").read_text()) == manifest
