"""Which settings determine which stage: what the teacher alone has, what its heirs have, what names it."""

import json

import pytest
import torch
from conftest import TINY, composed
from loops import read_rows, run_of
from rich.console import Console

from experiments import experiment, stage, start
from experiments.config import TEACHER, ExperimentError, check
from experiments.experiment import run_experiment
from experiments.run import stage_config
from experiments.training import make_batches, set_rate

SHORT = ("schedule.epochs=6it", "schedule.evaluate=2it", "schedule.teacher_epochs=8it")


def test_a_tag_makes_a_folder_of_its_own(tiny, tmp_path):
    config = tiny("tag=other", "case=null")
    assert config.name.endswith("-other") and run_of(config).experiment.name.endswith("-other")
    with pytest.raises(ExperimentError, match=r"tag=a/b cannot end a folder's name"):
        check(tiny("tag=a/b"))


def test_the_teachers_schedule_is_its_own(tiny):
    config = tiny("schedule.teacher_decay=constant", "schedule.teacher_epochs=8it", "growth.warmup=3it")
    names = (TEACHER, "net2net", "random_init", "teacher_continued")
    schedules = {arm: stage_config(config, arm).schedule for arm in names}
    length = config.schedule.epochs
    assert {arm: (one.decay, one.epochs, one.warmup) for arm, one in schedules.items()} == {
        TEACHER: ("constant", "8it", "0it"),
        "net2net": ("linear", length, "3it"),
        "random_init": ("linear", length, "0it"),
        "teacher_continued": ("linear", length, "3it"),
    }
    plain = tiny("schedule.warmup=2it")
    assert {stage_config(plain, arm).schedule.warmup for arm in (TEACHER, "net2net", "random_init")} == {"2it"}


HEIRS = {TEACHER, "net2net", "teacher_continued"}
CHANGES: dict[str, set[str]] = {  # a setting -> the stages that it changes
    "schedule.teacher_decay=constant": HEIRS,
    "schedule.teacher_augment=false": HEIRS,
    "schedule.teacher_epochs=8it": HEIRS,
    "growth.warmup=3it": HEIRS - {TEACHER},
    "growth.optimizer_state=carried": HEIRS - {TEACHER},
    "growth.split=paired": {"net2net"},
    "rates.net2net=0.5": {"net2net"},
    "students.wider.width=0.9": {"net2net", "random_init"},
    **{key: HEIRS | {"random_init"} for key in ("schedule.lr=0.02", "seed=1", "precision=bfloat16", "data.pad=0")},
    **{key: HEIRS | {"random_init"} for key in ("model.layers=2", "schedule.batch_size=16")},
    "teacher.width=0.3": HEIRS,
    **{key: set() for key in ("arms=[net2net]", "target=random_pad", "data.workers=2", "checkpoint_seconds=1")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_depends_on_what_it_is_trained_with_and_on_nothing_else(tiny, change):
    plain, other = run_of(tiny()), run_of(tiny(change))
    stages = ((TEACHER, None), ("net2net", "wider"), ("random_init", "wider"), ("teacher_continued", None))
    for arm, student in stages:
        assert (plain.settings(arm, student) != other.settings(arm, student)) == (arm in CHANGES[change]), arm
    assert (plain.teacher != other.teacher) == (TEACHER in CHANGES[change])


def test_other_images_are_another_teachers(tiny):
    run, other = run_of(tiny()), run_of(tiny())
    other.splits.train.images[0, 0, 0, 0] ^= 1
    assert run.teacher != other.teacher


def test_a_teacher_without_augmentation_sees_the_images_as_they_are(tiny):
    run = run_of(tiny("schedule.teacher_augment=false"))
    plain = next(run.splits.train.batches(32, epoch=0, seed=0, augment=False))[0]
    stages = ((TEACHER, None), ("random_init", "wider"), ("teacher_continued", None))
    teacher, student, continued = (next(make_batches(run.job(*stage, 1.0), 0))[0] for stage in stages)
    assert torch.equal(teacher, plain) and not torch.equal(student, plain)
    assert torch.equal(student, continued)


# -- the optimizer's state ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_of_its_teachers_size_is_trained_as_the_teacher_trained_longer(tmp_path):
    found = {}
    for state in ("carried", "dropped"):
        words = (*SHORT, f"growth.optimizer_state={state}", "students.wider.width=0.15", f"runs={tmp_path}/{state}")
        run_experiment(composed(*TINY, *words, "arms=[net2net,teacher_continued]"), Console(quiet=True))
        folder = tmp_path / state / "quickstart/seed0"
        found[state] = read_rows(folder / "net2net")
        assert found[state] == read_rows(folder / "teacher_continued")
    assert found["carried"] != found["dropped"]


@pytest.mark.slow
def test_carried_state_is_the_teachers_for_what_came_from_it_and_new_layers_have_none(tiny):
    config = tiny(*SHORT, "growth.optimizer_state=carried", "students.wider.width=0.15", "+students.wider.layers=2")
    run = run_of(config)
    teacher, student = run.make_network(None), run.make_network("wider")
    stage.obtain_teacher(run, teacher)
    transfer = start.fill("net2net", teacher, student, config, run.images)
    state = stage.teacher_optimizer_state(run)
    carried = start.carry_optimizer_state(transfer, teacher, student, state, config)
    new, old = (start.make_optimizer(network, config.schedule) for network in (student, teacher))
    new.load_state_dict(carried)
    old.load_state_dict(state)
    names = dict(teacher.named_parameters())
    without = [name for name, parameter in student.named_parameters() if parameter not in new.state]
    assert without and all(name not in names for name in without)
    # Units that have no copies have the very moments of the teacher.
    first, source = student.get_parameter("first.conv.weight"), names["first.conv.weight"]
    assert torch.equal(new.state[first]["square_avg"][: source.shape[0]], old.state[source]["square_avg"])
    assert bool(old.state[source]["square_avg"].any())


@pytest.mark.slow
def test_an_arm_that_diverges_does_not_stop_the_others(train_py, tmp_path, capsys):
    assert train_py(*SHORT, "arms=[random_init,teacher_continued]", "rates.random_init=1e30") == 1
    assert "random_init: " in (error := capsys.readouterr().err) and "not finite at step" in error
    folder = tmp_path / "runs/quickstart/seed0"
    for arm, complete in (("teacher_continued", True), ("random_init", False)):
        assert json.loads((folder / arm / "manifest.json").read_text())["complete"] is complete
    assert (tmp_path / "runs/quickstart/figure.png").is_file()


def test_a_warm_up_and_the_time_between_evaluations_may_be_shares_of_the_training(tiny):
    config = tiny("schedule.warmup=25%", "schedule.evaluate=50%", "schedule.teacher_epochs=40it")
    run = run_of(config)
    for name, total in (("random_init", 20), ("teacher", 40)):
        job = run.job(name, None, 1.0)
        optimizer = start.make_optimizer(run.make_network(None), job.config.schedule)
        rates = []
        for step in range(total):
            set_rate(optimizer, job, step)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates.index(max(rates)) == total // 4
        assert job.every == total // 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.warmup=150%", r"schedule\.warmup is 150%: a share of the training is at most 100%\."),
        ("schedule.bias_rate=inf", r"schedule\.bias_rate is inf: it has to be finite\."),
    ],
)
def test_values_that_no_run_can_have_are_refused(tiny, setting, message):
    with pytest.raises(ExperimentError, match=message):
        check(tiny(setting))


def test_evaluations_may_be_a_smaller_share_than_a_step_of_an_epoch(tiny):
    config = tiny("schedule.evaluate=1%", "schedule.epochs=200it", "arms=[random_init]")
    assert run_of(config).job("random_init", "wider", 1.0).every == 2
    experiment._make_networks(run_of(config))  # refuses nothing


def test_any_arm_that_starts_from_the_teacher_is_tried_before_the_teacher_is_trained(tiny, monkeypatch):
    monkeypatch.setattr(experiment, "obtain_teacher", lambda *_: pytest.fail("a teacher was trained"))
    with pytest.raises(ExperimentError, match="The student is smaller than its teacher"):
        run_experiment(tiny("arms=[shrink_pad_perturb]", "teacher.width=1.0"), Console(quiet=True))


def test_a_length_cannot_be_a_share(tiny):
    with pytest.raises(ExperimentError, match=r"schedule.epochs is 50%: .* is a share: write 5ep or 500it"):
        check(tiny("schedule.epochs=50%"))


def test_an_experiment_may_take_one_thread(tiny):
    torch.set_num_threads(2)
    try:
        run_experiment(tiny("threads=1", "arms=[random_init]", "schedule.epochs=2it"), Console(quiet=True))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    with pytest.raises(ExperimentError, match="threads is 0: it has to be 1 or more"):
        check(tiny("threads=0"))
