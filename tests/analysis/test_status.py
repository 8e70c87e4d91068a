"""The status of runs: what is done, running, waiting, failed or stopped, told from their files alone."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from torture import context

from experiments import files, sweep
from experiments.run_log import COLUMNS, write_curve
from scripts import collect, status

CURVES = Path(__file__).parents[2] / "results/curves"


def begin(folder: Path, epoch: float | None = None, **changes: object) -> None:
    """A run of four epochs, 10 steps each, that was evaluated after `epoch` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"complete": False, "settings": {"schedule": {"epochs": "4ep"}}} | changes
    (folder / "manifest.json").write_text(json.dumps(record))
    if epoch is not None:
        start = dict.fromkeys(COLUMNS, 0.0)
        write_curve(folder, [start, start | {"step": round(10 * epoch), "epoch": epoch, "test_accuracy": 0.512}])


def look(folder: Path) -> status.Stage:
    """The stage of a run's folder."""
    return status.read_stage(folder / "curve.csv", folder / "manifest.json")


def lock(folder: Path, host: str) -> None:
    """The lock that a process of this host, which has ended, has left in the folder."""
    (folder / files.LOCK).write_text(f"process {2**22 + 1} on {host} since 2026-01-01 00:00:00")  # a number too high


def plan(experiment: Path, owner: str, seeds: str, arms: list[str]) -> None:
    """The plan of a sweep that `owner` runs."""
    experiment.mkdir(parents=True, exist_ok=True)
    (experiment / sweep.PLAN).write_text(json.dumps({seed: dict.fromkeys(arms, owner) for seed in seeds}))


def test_a_finished_run(tmp_path):
    begin(tmp_path, 4, complete=True)
    (tmp_path / sweep.FAILURE).write_text("of before")
    assert look(tmp_path) == status.Stage("done", accuracy=0.512)


def test_a_run_whose_owner_lives_is_running_and_says_how_long_it_will_be(tmp_path):
    begin(tmp_path, 3, processes=[{"from": 10}])
    with files.hold(tmp_path):
        now = time.time()
        os.utime(tmp_path / "manifest.json", (now - 100, now - 100))  # 20 steps in 100 seconds
        os.utime(tmp_path / "curve.csv", (now, now))
        stage = look(tmp_path)
        assert (stage.state, stage.epoch, stage.accuracy) == ("running", "3/4ep", 0.512)
        assert stage.left == pytest.approx(50, abs=2)
        assert str(stage).startswith("3/4ep 51.20 ") and str(stage).endswith(" s")
    assert look(tmp_path).state == "stopped"


def test_a_run_that_was_killed_is_stopped(tmp_path):
    begin(tmp_path, 1.5)
    lock(tmp_path, socket.gethostname())
    assert str(look(tmp_path)) == "stopped 1.5/4ep 51.20"


def test_a_run_on_another_machine_runs_as_long_as_it_writes(tmp_path):
    begin(tmp_path, 1)
    lock(tmp_path, "another-machine")
    assert look(tmp_path).state == "running"
    before = time.time() - status.QUIET - 5
    for path in tmp_path.iterdir():
        os.utime(path, (before, before))
    assert look(tmp_path).state == "stopped"
    os.utime(tmp_path / "curve.csv")
    assert look(tmp_path).state == "running"


def test_the_failed_run_says_its_last_line_until_it_runs_again(tmp_path):
    begin(tmp_path, 2)
    (tmp_path / sweep.FAILURE).write_text("quickstart seed0 net2net: Two lines:\nthe last.\n")
    assert look(tmp_path) == status.Stage("failed", "2/4ep", 0.512, failure="the last.")
    with files.hold(tmp_path):
        assert look(tmp_path).state == "running"


def test_what_is_half_there_is_no_error(tmp_path):
    assert look(tmp_path) == status.Stage("stopped")
    for manifest in ("", "[]", "{", '{"settings": {}}'):
        (tmp_path / "manifest.json").write_text(manifest)
        (tmp_path / "curve.csv").write_text(",".join(COLUMNS) + "\n")
        assert look(tmp_path).state == "stopped"


def test_the_table_of_arms_by_seeds(tmp_path, capsys):
    experiment = tmp_path / "quickstart"
    begin(experiment / "seed0/net2net", 4, complete=True)
    begin(experiment / "seed0/random_init", 1)
    (experiment / "seed1/net2net").mkdir(parents=True)
    (experiment / "seed1/net2net" / sweep.FAILURE).write_text("quickstart seed1 net2net: The images [are] gone.")
    plan(experiment, files.name_owner(), "01", ["net2net", "random_init"])
    begin(tmp_path / "sweep/case/seed3/net2net", 4, complete=True)
    assert status.main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["quickstart:", "1", "done,", "2", "waiting,", "1", "failed"] in lines
    assert ["arm", "seed", "0", "seed", "1"] in lines
    assert ["net2net", "51.20", "failed"] in lines
    assert ["random_init", "waiting", "1/4ep", "51.20", "waiting"] in lines
    assert ["failed", "quickstart", "seed1", "net2net:", "The", "images", "[are]", "gone."] in lines
    assert ["sweep/case:", "1", "done"] in lines


@pytest.mark.parametrize(
    ("owner", "state"),
    [
        (f"process {os.getpid()} on {socket.gethostname()}", "waiting"),
        (f"process {2**22 + 1} on {socket.gethostname()}", "stopped"),  # a number too high: it was interrupted
        ("process 1 on another-machine", "waiting"),  # nobody here knows
        ("Slurm job 7", "waiting"),
        ("Slurm job 8", "stopped"),
    ],
)
def test_what_is_left_of_a_sweep_waits_while_the_sweep_goes_on(tmp_path, monkeypatch, owner, state):
    queue = tmp_path / "bin/squeue"
    queue.parent.mkdir()
    queue.write_text(
        '#!/bin/sh\ncase "$*" in *"-j 7") echo 7_0 ;; *) echo "Invalid job id specified" >&2; exit 1 ;; esac\n'
    )
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{queue.parent}:{os.environ['PATH']}")
    plan(tmp_path / "quickstart", owner, "0", ["net2net", "random_pad", "random_init"])
    begin(tmp_path / "quickstart/seed0/teacher", 1)
    begin(tmp_path / "quickstart/seed0/net2net", 1)  # it was preempted, or killed
    begin(tmp_path / "quickstart/seed0/random_pad", 4, complete=True)
    states = {arm: stages[0].state for arm, stages in status.read_stages(tmp_path / "quickstart").items()}
    assert states == {"teacher": state, "net2net": state, "random_pad": "done", "random_init": state}
    with files.hold(tmp_path / "quickstart/seed0/net2net"):
        assert status.read_stages(tmp_path / "quickstart")["net2net"][0].state == "running"


def test_many_seeds_are_counted(tmp_path, capsys):
    for seed in range(40):
        begin(tmp_path / f"quickstart/seed{seed}/net2net", 4, complete=seed % 2 == 0)
    assert status.main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["arm", "mean", *status.STATES, "left"] in lines
    assert ["net2net", "51.20", "20", "20"] in lines


@pytest.mark.slow
def test_the_status_of_real_runs_changes_nothing(finished, capsys):
    runs = finished.parents[1]
    before = {path: path.lstat().st_mtime_ns for path in runs.rglob("*")}
    assert status.main([f"runs={runs}"]) == 0  # as train.py has it; the name alone serves, too
    assert "quickstart: 6 done" in capsys.readouterr().out
    assert before == {path: path.lstat().st_mtime_ns for path in runs.rglob("*")}


def test_no_runs(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 1
    assert "There are no runs in" in capsys.readouterr().err


def write_runs(runs: Path) -> None:
    """Write the committed runs of an experiment as train.py writes them, one after another."""
    for manifest in sorted(CURVES.glob("tune_ladder/**/*.json")):
        folder, record = runs / manifest.relative_to(CURVES).with_suffix(""), json.loads(manifest.read_text())
        lines = manifest.with_suffix(".csv").read_text().splitlines(keepends=True)
        files.write(folder / "manifest.json", json.dumps(record | {"complete": False, "curve_sha256": None}).encode())
        for rows in [*range(2, len(lines), 6), len(lines)]:
            files.write(folder / "curve.csv", "".join(lines[:rows]).encode(), flush=False)
        files.write(folder / "manifest.json", json.dumps(record).encode(), flush=False)


@pytest.mark.system
def test_collecting_while_runs_go_on(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    writer = context.Process(target=write_runs, args=(runs,))
    writer.start()
    times, going = 0, True
    while going:
        going = writer.is_alive()  # once more after its end
        assert collect.main(["--runs", str(runs), "--results", str(results)]) == 0
        times += 1
    assert writer.exitcode == 0 and times > 1
    assert capsys.readouterr().out.endswith(" collected, 0 skipped, 0 refused\n")
    for committed in CURVES.glob("tune_ladder/**/*.csv"):
        assert (results / "curves" / committed.relative_to(CURVES)).read_bytes() == committed.read_bytes()
