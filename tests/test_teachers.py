"""One teacher for all arms and experiments that start from the same, trained once. The processes are real."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from rich.console import Console

from experiments import checkpoint, locks, teachers, training
from experiments import experiment as compare
from experiments.analysis.curves import find_targets
from experiments.analysis.curves import load as load_results
from experiments.config import ARMS, Config, ExperimentError, check
from experiments.data import load
from experiments.run import Run
from experiments.run_log import parse_curve
from scripts import verify

Make = Callable[..., Config]
SMALL = [*torture.SETTINGS[1:], "schedule.epochs=8it", "schedule.evaluate=4it", "growth.calibrate=0"]


@pytest.fixture
def small(composed: Make, tmp_path: Path) -> Make:
    """A smaller experiment than the smallest; eight steps a stage."""
    return lambda *settings: composed(torture.SETTINGS[0], *SMALL, f"runs={tmp_path}/runs", *settings)


def compare_as(config: Config, log: Path) -> None:
    """Run an experiment in this process."""
    torch.set_num_threads(1)
    with open(log, "w") as text:
        compare.compare(config, Console(file=text))


def trained_teacher(runs: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = (runs / "teachers").iterdir()
    return folder, json.loads((folder / "manifest.json").read_text())


def test_twenty_arms_at_once_train_it_once_and_wait(small: Make, tmp_path: Path) -> None:
    processes = {}
    for experiment in ("one", "two", "three", "four"):
        for arm in ARMS:
            config = small(f"arms={arm}", f"target={arm}")
            config.experiment = experiment
            log = tmp_path / f"{experiment}-{arm}.txt"
            processes[log] = torture.context.Process(target=compare_as, args=(config, log))
    with locks.hold(tmp_path / "runs/teachers" / run_of(config).teacher):  # or the first may end before others come
        for process in processes.values():
            process.start()
        while sum(log.exists() and "waits for process" in log.read_text() for log in processes) < 2:
            assert any(process.is_alive() for process in processes.values())
            time.sleep(0.1)
    for process in processes.values():
        process.join()
    assert {process.exitcode for process in processes.values()} == {0}
    folder, manifest = trained_teacher(tmp_path / "runs")
    assert manifest["complete"] and [(p["from"], p["to"]) for p in manifest["processes"]] == [(0, 8)]
    logs = {log.stem: log.read_text() for log in processes}
    need = {name for name in logs if "random_init" not in name}
    trained = [name for name, text in logs.items() if "teacher                step" in text]
    assert len(trained) == 1 and len(need) == 12
    waited = [name for name, text in logs.items() if "waits for process" in text]
    assert len(waited) >= 2 and set(waited) <= need
    for name in waited:
        assert logs[name].count("waits for process") == 1
    for name in need:
        seed = tmp_path / "runs" / name.partition("-")[0] / "seed0"
        assert os.readlink(seed / "teacher") == f"../../teachers/{folder.name}"
        manifest = json.loads((seed / name.partition("-")[2] / "manifest.json").read_text())
        assert manifest["complete"] and manifest["settings"]["teacher"] == folder.name
    assert not list((tmp_path / "runs").rglob(".*"))


def test_who_waits_goes_on_where_a_killed_trainer_was(small: Make, tmp_path: Path) -> None:
    # Long enough that the teacher is not done before it is killed, however late the kill comes.
    settings = ("arms=random_pad", "target=random_pad", "schedule.epochs=8it", "schedule.teacher_epochs=200it")
    compare.compare(small(*settings, f"runs={tmp_path}/whole"), Console(quiet=True))
    logs = [tmp_path / f"{number}.txt" for number in range(3)]
    processes = []
    for number, log in enumerate(logs):
        config = small(*settings, "checkpoint_seconds=0")
        config.experiment = f"experiment{number}"
        processes.append(torture.context.Process(target=compare_as, args=(config, log)))
        processes[-1].start()
    killed: list[int] = []
    while len(killed) < 2:
        assert sum(process.is_alive() for process in processes) > 2 - len(killed), "a teacher was done too early"
        time.sleep(0.01)
        for number, log in enumerate(logs):
            text = log.read_text() if log.exists() else ""
            reached = "teacher                step      4/200" in text or (
                killed and "teacher                step" in text
            )
            if number not in killed and reached and processes[number].is_alive():
                os.kill(processes[number].pid or 0, signal.SIGKILL)
                killed.append(number)
                break
    for process in processes:
        process.join()
    assert sorted(process.exitcode or 0 for process in processes) == [-9, -9, 0]
    folder, manifest = trained_teacher(tmp_path / "runs")
    worked = [(process["from"], process["to"]) for process in manifest["processes"]]
    assert worked[0][0] == 0 and worked[-1][1] == 200 and len(worked) > 1
    assert [to for _, to in worked[:-1]] == [start for start, _ in worked[1:]]
    whole, _ = trained_teacher(tmp_path / "whole")
    assert whole.name == folder.name
    assert torture.equal(checkpoint.load(folder)["network"], checkpoint.load(whole)["network"])


def test_another_experiment_uses_it(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare.compare(small("arms=random_pad", "target=random_pad"), Console(quiet=True))
    monkeypatch.setattr(compare, "_announce", lambda *_: None)  # which measures the speed of some steps
    other = small("arms=random_pad", "target=random_init", "students.wider.width=0.6")
    other.experiment = "other"
    learn, learned = training.learn, []

    def counted(*arguments: Any) -> Any:
        learned.append(arguments)
        return learn(*arguments)

    monkeypatch.setattr(training, "learn", counted)
    compare.compare(other, Console(quiet=True))
    assert len(learned) == 8  # of the arm
    (tmp_path / "runs").rename(tmp_path / "moved")  # the links are relative
    other.runs = f"{tmp_path}/moved"
    compare.compare(other, Console(quiet=True))
    assert len(learned) == 8
    # Figure and table follow the experiment's own configuration, not that of the teacher's first user.
    manifests = load_results(tmp_path / "moved/other").runs["manifest"]
    assert manifests.xs("teacher", level="arm").iloc[0]["experiment"] == "quickstart"
    assert find_targets(manifests) == {("other", ""): "random_init"}


@pytest.mark.parametrize(
    "setting",
    [
        *("seed=1", "teacher.width=0.3", "schedule.lr=0.02", "schedule.teacher_epochs=9it", "precision=bfloat16"),
        *("data.pad=0", "+model.inner=1.5", "schedule.batch_size=16"),
    ],
)
def test_what_determines_it_gives_it_another_name(small: Make, setting: str) -> None:
    assert run_of(small()).teacher != run_of(small(setting)).teacher


@pytest.mark.parametrize(
    "setting",
    [
        *("students.wider.width=0.7", "arms=[random_init]", "rates.net2net=1", "growth.noise=0.1", "target=random_pad"),
        *("checkpoint_seconds=1", "data.workers=3", "logger=none", "schedule.teacher_epochs=8it"),
    ],
)
def test_what_does_not_determine_it_leaves_its_name(small: Make, setting: str) -> None:
    assert run_of(small()).teacher == run_of(small(setting)).teacher


def run_of(config: Config) -> Run:
    return Run(config, load(config.data), torch.device("cpu"), Console(quiet=True))


def test_other_images_are_another_teachers(small: Make) -> None:
    run = run_of(small())
    other = run_of(small())
    other.splits.train.images[0, 0, 0, 0] ^= 1
    assert run.teacher != other.teacher


def test_the_arms_of_another_teacher_are_refused(small: Make, tmp_path: Path) -> None:
    compare.compare(small("arms=random_pad", "target=random_pad"), Console(quiet=True))
    seed = tmp_path / "runs/quickstart/seed0"
    other = small("arms=random_pad", "target=random_pad", "teacher.width=0.3")
    with pytest.raises(
        ExperimentError, match=r"seed0/teacher holds a run made with other settings:\n  network.width: "
    ):
        compare.compare(other, Console(quiet=True))
    (seed / "teacher").unlink()
    with pytest.raises(
        ExperimentError, match=r"seed0/random_pad holds a run made with other .*:\n  teacher: \w+ there,"
    ):
        compare.compare(other, Console(quiet=True))


@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_one_is_not_taken_for_trained(small: Make, tmp_path: Path, last: bool, capsys: Any) -> None:
    config = small("arms=random_pad", "target=random_pad")
    compare.compare(config, Console(quiet=True))
    folder, manifest = trained_teacher(tmp_path / "runs")
    whole = checkpoint.load(folder)["network"]
    if not last:
        shutil.copy(folder / "checkpoint.previous.pt", folder / "kept")
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[1000] ^= 1
    (folder / "checkpoint.pt").write_bytes(content)
    if last:  # the reserve is of the last step, too: the evaluation alone was missing
        state = checkpoint.load(folder)
        checkpoint.save(tmp_path / "new", state | {"network": whole, "step": 8})
        shutil.copy(tmp_path / "new/checkpoint.pt", folder / "checkpoint.previous.pt")
    run, network = run_of(config), run_of(config).fresh(None)
    capsys.readouterr()
    teachers.obtain(run, network)
    assert "checkpoint.pt cannot be read (its checksum is wrong); going on from checkpoint.previous.pt" in (
        capsys.readouterr().err
    )
    assert torture.equal(dict(network.state_dict()), dict(whole))
    after = trained_teacher(tmp_path / "runs")[1]
    assert after["complete"] and after["curve_sha256"]
    worked = [(process["from"], process["to"]) for process in after["processes"]]
    assert worked == ([(0, 8)] if last else [(0, 4), (4, 8)])
    assert last or checkpoint.load(folder)["step"] == 8
    assert manifest["settings"] == after["settings"]


def test_a_copy_without_links_is_used(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("arms=random_pad", "target=random_pad")
    compare.compare(config, Console(quiet=True))
    shutil.copytree(tmp_path / "runs/quickstart", tmp_path / "copy/quickstart")
    shutil.rmtree(tmp_path / "copy/quickstart/seed0/random_pad")
    config.runs = f"{tmp_path}/copy"
    monkeypatch.setattr(teachers, "carry_out", lambda *_: pytest.fail("trained again"))
    compare.compare(config, Console(quiet=True))
    assert not (tmp_path / "copy/teachers").exists()


def test_a_link_to_what_is_gone_is_made_anew(small: Make, tmp_path: Path) -> None:
    config = small("arms=random_pad", "target=random_pad")
    seed = tmp_path / "runs/quickstart/seed0"
    seed.mkdir(parents=True)
    (seed / "teacher").symlink_to("../../teachers/gone")
    compare.compare(config, Console(quiet=True))
    assert os.readlink(seed / "teacher") == f"../../teachers/{run_of(config).teacher}"


def test_no_lock_is_left(small: Make, tmp_path: Path) -> None:
    compare.compare(small(), Console(quiet=True))
    assert not list(tmp_path.rglob(".*")) and not locks._open
    for stage in ("teacher", "net2net"):  # as of a process that was killed behind its last word
        (tmp_path / "runs/quickstart/seed0" / stage / locks.NAME).touch()
    compare.compare(small(), Console(quiet=True))
    assert not list(tmp_path.rglob(".*"))


def test_a_teacher_that_is_grown_itself(small: Make, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    config = small("arms=net2net", "+first.width=0.125", "schedule.first_epochs=4it", "schedule.teacher_epochs=8it")
    compare_as(config, log)
    run = run_of(config)
    assert run.earlier is not None
    places = {
        name: tmp_path / "runs/teachers" / one.teacher for name, one in (("first", run.earlier), ("teacher", run))
    }
    assert {path.name for path in (tmp_path / "runs/teachers").iterdir()} == {path.name for path in places.values()}
    curves = {name: parse_curve((path / "curve.csv").read_bytes(), path) for name, path in places.items()}
    manifests = {name: json.loads((path / "manifest.json").read_text()) for name, path in places.items()}
    end, start = curves["first"][-1], curves["teacher"][0]
    assert end["step"] == 4 and start["step"] == 0 and curves["teacher"][-1]["step"] == 8
    assert start["test_accuracy"] == end["test_accuracy"] and start["holdout_loss"] == pytest.approx(
        end["holdout_loss"]
    )
    # What the first network has cost is part of what the teacher has: once, and of each kind.
    assert start["flops"] == end["flops"] > 0 and start["examples"] == end["examples"] > 0
    assert start["seconds"] == pytest.approx(end["seconds"])
    own = manifests["teacher"]["train_flops_per_image"] * 8 * config.schedule.batch_size
    assert curves["teacher"][-1]["flops"] == pytest.approx(end["flops"] + own, rel=1e-5)
    (row,) = load_results(tmp_path / "runs/quickstart").runs.xs("net2net", level="arm").itertuples()
    assert row.total_flops == pytest.approx(row.flops + end["flops"] + own, rel=1e-5)
    assert manifests["teacher"]["settings"]["first"] == places["first"].name
    assert manifests["teacher"]["settings"]["rate"] == config.rates["net2net"]
    origin = manifests["teacher"]["grown_from"]
    assert origin["settings"] == manifests["first"]["settings"]
    assert (
        origin["curve_sha256"] == manifests["first"]["curve_sha256"]
        and len(verify.list_commits(manifests["teacher"])) == 1
    )
    assert manifests["first"]["config"] == manifests["teacher"]["config"]  # what the command composes
    said = log.read_text()
    assert said.count("\nfirst                  step") == 2 and "\nfirst  " in said.partition("arms ")[0]
    # The first network is trained once: what starts from it anew finds it there.
    shutil.rmtree(places["teacher"])
    shutil.rmtree(tmp_path / "runs/quickstart")
    compare_as(config, log)
    assert "first                  step" not in log.read_text() and "teacher                step" in log.read_text()


def test_a_grown_teacher_can_start_with_the_state_of_the_optimizer(small: Make, tmp_path: Path) -> None:
    folders = {}
    for state in ("dropped", "carried"):
        config = small(
            "arms=net2net", "+first.width=0.125", f"growth.optimizer_state={state}", f"runs={tmp_path}/{state}"
        )
        compare_as(config, tmp_path / f"{state}.txt")
        folders[state] = tmp_path / state / "teachers" / run_of(config).teacher
    ends = {state: checkpoint.load(folder)["rows"] for state, folder in folders.items()}
    assert ends["dropped"][0]["test_loss"] == ends["carried"][0]["test_loss"]
    assert ends["dropped"][-1]["train_loss"] != ends["carried"][-1]["train_loss"]


def test_a_teacher_that_cannot_be_grown_is_refused_before_anything_is_trained(small: Make, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"cannot grow from `first` .* is smaller"):
        compare_as(small("arms=net2net", "+first.width=1.0"), tmp_path / "log.txt")
    assert not (tmp_path / "runs/teachers").exists()
    config = small("arms=net2net", "+first.width=0.125")
    del config.rates["net2net"]
    config.arms = ["random_init"]
    with pytest.raises(ExperimentError, match=r"set it"):
        check(config)


def test_without_a_first_network_a_teacher_is_who_it_was(small: Make) -> None:
    settings = run_of(small("arms=net2net")).settings("teacher", None)
    assert not {"first", "rate", "growth"} & settings.keys() and "first_epochs" not in settings["schedule"]


@pytest.mark.parametrize("at", [3, 6])  # steps, of which the first network has four
def test_a_grown_teacher_is_the_same_after_an_interruption(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    settings = ("arms=net2net", "+first.width=0.125", "schedule.first_epochs=4it", "schedule.teacher_epochs=4it")
    whole = small(*settings, f"runs={tmp_path}/whole")
    compare_as(whole, tmp_path / "whole.txt")
    config = small(*settings, "checkpoint_seconds=0")
    made = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made > at:
            raise KeyboardInterrupt
        return learn(*arguments)

    learn = training.learn
    with monkeypatch.context() as patched:
        patched.setattr(training, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_as(config, tmp_path / "log.txt")
    compare_as(config, tmp_path / "log.txt")
    ends = [checkpoint.load(Path(one.runs) / "teachers" / run_of(one).teacher) for one in (whole, config)]
    assert torture.equal(ends[0]["network"], ends[1]["network"])
    assert [row["flops"] for row in ends[0]["rows"]] == [row["flops"] for row in ends[1]["rows"]]
    manifest = json.loads((tmp_path / "runs/teachers" / run_of(config).teacher / "manifest.json").read_text())
    assert [len(one["processes"]) for one in (manifest["grown_from"], manifest)] == ([2, 1] if at == 3 else [1, 2])


def test_what_a_grown_teacher_depends_on(small: Make) -> None:
    base = ("arms=net2net", "+first.width=0.125")
    teacher = run_of(small(*base)).teacher
    changes = (
        "first.width=0.2",
        "schedule.first_epochs=4it",
        "rates.net2net=3",
        "growth.noise=0.1",
        "growth.warmup=2it",
    )
    others = [run_of(small(*base, change)).teacher for change in changes]
    assert len({teacher, *others}) == 1 + len(others)
    for change in ("rates.random_init=3", "students.wider.width=0.6"):
        assert run_of(small(*base, change)).teacher == teacher


def test_a_length_without_a_network_is_refused(small: Make) -> None:
    with pytest.raises(ExperimentError, match=r"first_epochs is set, but no `first` network"):
        check(small("schedule.first_epochs=4it"))
