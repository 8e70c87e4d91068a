"""The registry of arms, and what the rivals do to their student and to the loss."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CPU, read_rows, run_of
from rich.console import Console
from torch import nn

from experiments import arms, experiment, start
from experiments.analysis.curves import load
from experiments.arms import ARMS, Arm
from experiments.config import Config, ExperimentError, check
from experiments.loss import label_loss, make_loss
from experiments.machine import Arithmetic
from experiments.optimizers import make_optimizer
from experiments.training import train_step

Make = Callable[..., Config]


def test_every_file_of_the_folder_is_an_arm_of_that_name() -> None:
    files = {path.stem for path in Path(arms.__file__).parent.glob("*.py")} - {"__init__", "arm"}
    assert set(ARMS) == files
    assert all(ARMS[name].name == name for name in files)


@pytest.mark.parametrize("facts", [lambda arm: arm.place, lambda arm: arm.look[0], lambda arm: arm.look[1:]])
def test_arms_differ_in_their_place_and_can_be_told_apart_with_and_without_colour(facts: Callable) -> None:
    assert len({facts(arm) for arm in ARMS.values()}) == len(ARMS)


def test_the_template_of_an_arm_has_a_place_and_a_look_that_are_free() -> None:
    page = (Path(arms.__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (template,) = re.findall(r"```python\n(\"\"\"random_pad, .*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(template, names)
    arm = names["ARM"]
    assert arm.place not in {other.place for other in ARMS.values()}
    assert arm.look[0] not in {other.look[0] for other in ARMS.values()}
    assert arm.look[1:] not in {other.look[1:] for other in ARMS.values()}


@pytest.mark.slow
def test_an_arm_that_is_added_to_the_registry_runs_and_its_teacher_is_counted(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry is enough: settings, training, report and figure know the arm."""
    added = Arm(
        name="halved_pad",
        place=99,
        summary="random_pad, halved",
        look=("#000000", "-", "*"),
        rate=0.5,
        start=lambda start: (start.random_pad(), start.shrink_towards_fresh(0.5))[0],
        needs_teacher=True,
    )
    monkeypatch.setitem(ARMS, "halved_pad", added)
    config = tiny("arms=[halved_pad,random_init]")
    figure = experiment.run_experiment(config, Console(quiet=True))
    assert figure is not None and figure.stat().st_size > 10_000
    runs = load(figure.parent).runs.droplevel(["experiment", "case", "seed"])
    own, teacher = runs["flops"]["halved_pad"], runs["flops"]["teacher"]
    assert teacher > 0 and runs["total_flops"]["halved_pad"] == own + teacher
    assert runs["total_flops"]["random_init"] == own == runs["flops"]["random_init"]
    manifest = json.loads((figure.parent / "seed0/halved_pad/manifest.json").read_text())
    assert (manifest["teacher"], manifest["settings"]["rate"]) == ("teacher", 0.5)


def test_a_name_that_is_no_arm_is_refused_with_the_arms_that_there_are(tiny: Make) -> None:
    with pytest.raises(ExperimentError, match=r"no 'distiled' \(did you mean 'distilled'\?\).*shrink_pad_perturb"):
        check(tiny("arms=[distiled]"))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shrink_pad_perturb_lies_between_random_pad_and_the_fresh_student(tiny: Make, share: float) -> None:
    config = tiny(f"growth.shrink={share}")
    run = run_of(config)
    teacher, fresh = run.make_network(None), run.make_network("wider")
    padded, mixed = run.make_network("wider"), run.make_network("wider")
    start.fill("random_pad", teacher, padded, config, run.images)
    start.fill("shrink_pad_perturb", teacher, mixed, config, run.images)
    differs = 0
    for name, value in mixed.named_parameters():
        pad, drawn = padded.get_parameter(name), fresh.get_parameter(name)
        expected = share * pad + (1 - share) * drawn if value.dim() > 1 else pad
        torch.testing.assert_close(value, expected)
        differs += not torch.equal(pad, drawn)
    assert differs


def test_the_recipe_starts_as_its_teacher_with_units_that_are_no_copies(tiny: Make) -> None:
    config = tiny("arms=[net2net,net2net_recipe]")
    run = run_of(config)
    teacher, images = run.make_network(None).eval(), run.images(16)
    students = {name: run.make_network("wider") for name in ("net2net", "net2net_recipe")}
    copies = {}
    for name, student in students.items():
        start.fill(name, teacher, student, config, run.images)
        with torch.no_grad():
            torch.testing.assert_close(student.eval()(images), teacher(images), rtol=1e-4, atol=1e-5)
        rows = next(p for p in student.parameters() if p.dim() == 4).flatten(1)
        copies[name] = len(rows) - len(rows.unique(dim=0))
    assert copies["net2net"] > 0
    assert copies["net2net_recipe"] == 0


def test_distilled_learns_the_teachers_outputs_on_the_same_images(tiny: Make) -> None:
    """The loss is Hinton's, written out; the share 0 leaves the labels alone, and the teacher is not trained."""
    config = tiny("growth.guide_share=0.25", "growth.guide_temperature=3", "schedule.label_smoothing=0.1")
    run = run_of(config)
    teacher = run.make_network(None)
    logits, images, labels = torch.randn(4, 10), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    guided = make_loss(config, teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    wanted = F.softmax(teacher.eval()(images) / 3, 1)
    distance = (wanted * (wanted.log() - F.log_softmax(logits / 3, 1))).sum(1).mean() * 9
    of_labels = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(guided(logits, labels, images), 0.75 * of_labels + 0.25 * distance)
    torch.testing.assert_close(make_loss(config)(logits, labels, images), of_labels)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.slow
def test_distilled_starts_as_random_init_and_pays_for_each_pass_of_its_teacher(tiny: Make) -> None:
    config = tiny("arms=[distilled,random_init]", "rates.distilled=1")
    figure = experiment.run_experiment(config, Console(quiet=True))
    assert figure is not None
    curves = {arm: read_rows(figure.parent / "seed0" / arm) for arm in ("distilled", "random_init")}
    assert curves["distilled"][0]["test_loss"] == curves["random_init"][0]["test_loss"]
    assert curves["distilled"][-1]["test_loss"] != curves["random_init"][-1]["test_loss"]
    run = run_of(config)
    images = int(curves["distilled"][-1]["examples"])
    assert int(curves["distilled"][-1]["flops"]) == images * (run.costs["wider"][1] + run.costs[None][0])
    assert int(curves["random_init"][-1]["flops"]) == images * run.costs["wider"][1]


def test_biases_have_a_rate_of_their_own_and_what_is_frozen_is_not_trained(tiny: Make) -> None:
    config = tiny("schedule.optimizer=sgd", "schedule.momentum=0", "schedule.bias_rate=64")
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    network[0].weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizer = make_optimizer(network, config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["rate"]
    train_step(network, optimizer, torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]), CPU, Arithmetic())
    for name, parameter in network.named_parameters():
        rate = 6.4 if name.endswith("bias") else 0.1
        if name == "0.weight":
            assert parameter.grad is None and torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, before[name] - rate * parameter.grad)


def test_label_smoothing_spreads_a_share_of_each_label() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    spread = F.one_hot(labels, 4) * 0.8 + 0.2 / 4
    expected = -(spread * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(label_loss(logits, labels, torch.empty(0), smoothing=0.2), expected)


def test_curves_of_an_arm_that_is_not_registered_are_still_read(finished, tmp_path):
    """An arm of another branch, or one that was renamed."""
    folder = tmp_path / "quickstart/seed0"
    shutil.copytree(finished, folder)
    (folder / "random_pad").rename(folder / "renamed")
    runs = load(folder.parent).runs.droplevel(["experiment", "case", "seed"])
    assert runs["total_flops"]["renamed"] == runs["flops"]["renamed"] + runs["flops"]["teacher"]
    assert runs["total_flops"]["random_init"] == runs["flops"]["random_init"]
