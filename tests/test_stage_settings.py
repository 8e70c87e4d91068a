"""What concerns the teacher alone, or its heirs alone, and the optimizer's state that goes along."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments import arms, checkpoint, teachers
from experiments.config import TEACHER, Config
from experiments.data import load
from experiments.run import Run, trained_with
from experiments.training import _batches

Tiny = Callable[..., Config]
Main = Callable[..., int]
SHORT = ("schedule.epochs=6it", "schedule.evaluate=2it", "schedule.teacher_epochs=8it")


def run_of(config: Config) -> Run:
    return Run(config, load(config.data), torch.device("cpu"), Console())


def curve(folder: Path, arm: str) -> list[dict[str, str]]:
    """The rows of an arm, without the time that they took."""
    with (folder / arm / "curve.csv").open() as file:
        return [
            {key: value for key, value in row.items() if key not in ("seconds", "flops")}
            for row in csv.DictReader(file)
        ]


def test_the_teachers_schedule_is_its_own(tiny: Tiny) -> None:
    run = run_of(tiny("schedule.teacher_decay=constant", "schedule.teacher_epochs=8it", "growth.warmup=3it"))
    schedules = {
        arm: trained_with(run.config, arm).schedule for arm in (TEACHER, "net2net", "random_init", "teacher_continued")
    }
    assert {arm: (one.decay, one.epochs, one.warmup) for arm, one in schedules.items()} == {
        TEACHER: ("constant", "8it", "0it"),
        "net2net": ("linear", "30it", "3it"),
        "random_init": ("linear", "30it", "0it"),
        "teacher_continued": ("linear", "30it", "3it"),
    }
    plain = run_of(tiny("schedule.warmup=2it"))
    assert {trained_with(plain.config, arm).schedule.warmup for arm in (TEACHER, "net2net", "random_init")} == {"2it"}


def test_a_stage_depends_on_what_it_is_trained_with_and_on_nothing_else(tiny: Tiny) -> None:
    plain = run_of(tiny())
    changes: dict[str, set[str]] = {
        "schedule.teacher_decay=constant": {TEACHER, "net2net", "teacher_continued"},
        "schedule.teacher_augment=false": {TEACHER, "net2net", "teacher_continued"},
        "schedule.teacher_epochs=8it": {TEACHER, "net2net", "teacher_continued"},
        "growth.warmup=3it": {"net2net", "teacher_continued"},
        "growth.optimizer_state=carried": {"net2net", "teacher_continued"},
        "growth.split=paired": {"net2net"},
        "schedule.lr=0.02": {TEACHER, "net2net", "teacher_continued", "random_init"},
    }
    for change, changed in changes.items():
        other = run_of(tiny(change))
        for arm, student in (
            (TEACHER, None),
            ("net2net", "wider"),
            ("random_init", "wider"),
            ("teacher_continued", None),
        ):
            assert (plain.settings(arm, student) != other.settings(arm, student)) == (arm in changed), (change, arm)
        assert (plain.teacher != other.teacher) == (TEACHER in changed)


def test_the_rate_of_a_teacher_that_does_not_anneal_is_still_there_when_it_is_handed_over(
    train_py: Main, tmp_path: Path
) -> None:
    rates: dict[str, dict[str, float]] = {}
    for decay in ("constant", "linear"):
        runs = tmp_path / decay
        assert train_py(*SHORT, f"runs={runs}", f"schedule.teacher_decay={decay}", "arms=[net2net]") == 0
        folder = runs / "quickstart/seed0"
        rates[decay] = {
            name: checkpoint.load(folder / name)["optimizer"]["param_groups"][0]["lr"] for name in (TEACHER, "net2net")
        }
    assert rates["constant"][TEACHER] == pytest.approx(0.01)
    assert rates["linear"][TEACHER] == pytest.approx(0.01 / 8)
    assert rates["constant"]["net2net"] == rates["linear"]["net2net"] == pytest.approx(0.1 * 0.01 / 6)


def test_a_teacher_without_augmentation_sees_the_images_as_they_are(tiny: Tiny) -> None:
    run = run_of(tiny("schedule.teacher_augment=false"))
    as_they_are = next(
        run.splits.train.batches(32, epoch=0, seed=0, augment=False, pad=run.config.data.pad, flip=run.config.data.flip)
    )[0]
    seen = {
        name: next(_batches(run.job(name, student, 1.0), 0))[0]
        for name, student in ((TEACHER, None), ("random_init", "wider"), ("teacher_continued", None))
    }
    assert torch.equal(seen[TEACHER], as_they_are)
    assert not torch.equal(seen["random_init"], as_they_are)
    assert torch.equal(seen["random_init"], seen["teacher_continued"])


@pytest.fixture(scope="module")
def carried_and_dropped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seeds of a student that is exactly its teacher, with the optimizer's state carried and dropped."""
    from conftest import TINY, composed

    from experiments.experiment import compare

    folders: dict[str, Path] = {}
    for state in ("carried", "dropped"):
        runs = tmp_path_factory.mktemp(state)
        words = (
            *TINY,
            *SHORT,
            f"growth.optimizer_state={state}",
            "students.wider.width=0.5477",
            "arms=[net2net,teacher_continued]",
        )
        compare(composed(*words, f"runs={runs}"), Console(quiet=True))
        folders[state] = runs / "quickstart/seed0"
    return folders


def test_a_student_of_its_teachers_size_is_trained_as_the_teacher_trained_on(
    carried_and_dropped: dict[str, Path],
) -> None:
    for folder in carried_and_dropped.values():
        assert curve(folder, "net2net") == curve(folder, "teacher_continued")
    assert curve(carried_and_dropped["carried"], "net2net") != curve(carried_and_dropped["dropped"], "net2net")


def test_carried_state_is_the_teachers_for_what_came_from_it_and_new_layers_have_none(tiny: Tiny) -> None:
    config = tiny(*SHORT, "growth.optimizer_state=carried", "growth.split=equal", "+students.wider.extra_pairs=1")
    run = run_of(config)
    teacher, student = run.fresh(None), run.fresh("wider")
    teachers.obtain(run, teacher)
    record = arms.fill("net2net", teacher, student, config, run.images)
    state = teachers.optimizer_state(run)
    carried = arms.carried(record, teacher, student, state, config)
    new = arms.make_optimizer(student, config.schedule)
    new.load_state_dict(carried)
    old = arms.make_optimizer(teacher, config.schedule)
    old.load_state_dict(state)
    names = dict(teacher.named_parameters())
    without = []
    for name, parameter in student.named_parameters():
        if parameter not in new.state:
            without.append(name)
    assert without and all(name not in names for name in without)
    # The first copies of incoming weights have the very moments of the weights they are.
    first, source = student.get_parameter("stem.0.0.weight"), names["stem.0.0.weight"]
    units = source.shape[0]
    assert torch.equal(new.state[first]["square_avg"][:units], old.state[source]["square_avg"])
    assert bool(old.state[source]["square_avg"].any())


def test_an_arm_that_diverges_does_not_stop_the_others(
    train_py: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SHORT, "arms=[random_init,teacher_continued]", "rates.random_init=1e30")
    assert train_py(*words) == 1
    assert "random_init: " in (error := capsys.readouterr().err) and "not finite at step" in error
    folder = tmp_path / "runs/quickstart/seed0"
    assert _manifest(folder / "teacher_continued")["complete"]
    assert not _manifest(folder / "random_init")["complete"]
    assert (tmp_path / "runs/quickstart/figure.png").is_file()


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
