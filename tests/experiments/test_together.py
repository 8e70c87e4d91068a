"""Several processes at one experiment: none writes where another does, and who reads sees whole files. All are real."""

import csv
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

from experiments import command, files, run_log
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


def write_much(folder: Path, times: int) -> None:
    """A curve that grows, and a manifest of its length, again and again."""
    for number in range(times):
        rows = [{column: 1.5 * step for column in run_log.COLUMNS} for step in range(1, 2 + number % 50)]
        run_log.write_curve(folder, rows)
        run_log.write_manifest(folder, {"settings": {"rows": len(rows)}, "complete": False, "text": "x" * 5000})


def test_who_reads_while_another_writes_sees_whole_files(tmp_path: Path) -> None:
    writers = [torture.context.Process(target=write_much, args=(tmp_path, 150)) for _ in range(2)]
    for writer in writers:
        writer.start()
    lengths, read = set(), 0
    while any(writer.is_alive() for writer in writers) or not read:
        if not (tmp_path / "manifest.json").exists():
            continue
        text = (tmp_path / "curve.csv").read_text()
        assert text.endswith("\n")
        table = list(csv.reader(text.splitlines()))
        assert {len(row) for row in table} == {len(run_log.COLUMNS)}
        assert [row[0] for row in table[1:]] == [f"{1.5 * step:.6g}" for step in range(1, len(table))]
        run_log.parse_curve(text.encode(), "curve")
        manifest = run_log.read_manifest(tmp_path / "manifest.json")
        assert manifest is not None and len(manifest["text"]) == 5000
        lengths.add(len(table))
        read += 1
    assert read > 100 and len(lengths) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "manifest.json"]


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
