"""The experiment is fair: arms differ by their first weights and their rate, and by nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import run_of, same
from rich.console import Console
from torch import Tensor, nn

import net2net
from experiments import checkpoint, experiment, stage, start, training
from experiments.config import Config, ExperimentError
from experiments.run_log import parse_curve

STUDENT_ARMS = ("net2net", "random_pad", "random_init", "random_init_low_lr")


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The rows of the curve in an arm's folder."""
    return parse_curve((folder / "curve.csv").read_bytes(), folder)


def trace(monkeypatch: pytest.MonkeyPatch, config: Config) -> dict[str, dict[str, Any]]:
    """Run an experiment; return of each stage its first weights, and every batch and rate that it is trained with."""
    found: dict[str, dict[str, Any]] = {}
    train, learn = training.train, training.train_step

    def spy_train(network: nn.Module, job: training.Job, *rest: Any) -> Any:
        weights = copy.deepcopy(network.state_dict())
        found[job.name] = {"weights": weights, "batches": [], "rates": [], "total": job.total}
        return train(network, job, *rest)

    def spy_learn(network: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, *rest: Any) -> Any:
        *_, current = found.values()
        current["batches"].append((images.clone(), labels.clone()))
        current["rates"].append(optimizer.param_groups[0]["lr"])
        return learn(network, optimizer, images, labels, *rest)

    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)  # whose trial takes steps, too
    monkeypatch.setattr(training, "train_step", spy_learn)
    monkeypatch.setattr(stage, "train", spy_train)
    experiment.run_experiment(config, Console(quiet=True))
    return found


def test_arms_share_everything_but_weights_and_rate(tiny, tmp_path, monkeypatch):
    config = tiny("schedule.epochs=3it", "schedule.evaluate=3it", "schedule.warmup=1it")
    traced = trace(monkeypatch, config)
    assert set(traced) == {"teacher", "teacher_continued", *STUDENT_ARMS}
    reference = traced["random_init"]
    for name, found in traced.items():
        assert found["total"] == len(found["batches"]) == 3
        for (images, labels), (their_images, their_labels) in zip(found["batches"], reference["batches"], strict=True):
            assert torch.equal(images, their_images) and torch.equal(labels, their_labels), name
        scale = 1 if name in ("teacher", "random_init") else 0.1
        assert found["rates"] == pytest.approx([scale * rate for rate in reference["rates"]]), name
    assert reference["rates"] == pytest.approx([0.005, 0.01, 0.005])  # one step of warm-up, then linear to zero

    fresh, low = reference["weights"], traced["random_init_low_lr"]["weights"]
    drawn = start.make_network(config, "wider", 10, 1).state_dict()
    assert all(torch.equal(fresh[key], low[key]) and torch.equal(fresh[key], drawn[key]) for key in drawn)
    padded, grown = traced["random_pad"]["weights"], traced["net2net"]["weights"]
    weight = "stages.1.0.conv.weight"
    teacher = traced["teacher_continued"]["weights"][weight]
    rows = len(teacher)
    assert not torch.equal(fresh[weight], grown[weight])
    # What random_pad pads with is what random_init starts from: rows of new units are its rows.
    assert torch.equal(padded[weight][rows:], fresh[weight][rows:])
    assert not torch.equal(padded[weight], fresh[weight])
    # The continued teacher starts at the teacher's last weights.
    trained = checkpoint.load(tmp_path / "runs/quickstart/seed0/teacher")["network"]
    assert all(torch.equal(trained[key], value) for key, value in traced["teacher_continued"]["weights"].items())


def test_step_0_of_a_finished_run(finished):
    first = {arm: read_curve(finished / arm)[0] for arm in ("teacher_continued", *STUDENT_ARMS)}
    last = read_curve(finished / "teacher")[-1]
    for column in ("test_accuracy", "holdout_accuracy"):
        assert first["net2net"][column] == first["teacher_continued"][column] == last[column]
    assert first["net2net"]["test_loss"] == pytest.approx(last["test_loss"], rel=1e-4)
    assert first["random_init"]["test_loss"] != pytest.approx(last["test_loss"], rel=1e-3)
    step0 = json.loads((finished / "net2net/manifest.json").read_text())["step0"]
    assert step0["agree"] == step0["of"] == step0["float32"]["of"] == 359 and step0["max_relative_error"] < 1e-5


def test_the_certificate_of_an_arm_says_what_it_started_from(finished):
    manifests = {arm: json.loads((finished / arm / "manifest.json").read_text()) for arm in ("net2net", "random_pad")}
    grown, padded = (manifest["certificate"] for manifest in manifests.values())
    assert grown["teacher"] == padded["teacher"] and grown["student"] != padded["student"]
    assert grown["operator"] == "wider" and padded["operator"] == "random_pad"
    assert grown["settings"] == {"split": "equal"} | manifests["net2net"]["settings"]["growth"]
    assert all(difference["max_relative"] < 1e-5 for difference in grown["difference"].values())
    assert padded["difference"]["eval"]["max_relative"] > 1e-2
    for arm in manifests:
        record = net2net.load_record(finished / arm / "growth.json")
        assert str(record) == manifests[arm]["growth"]["record"]


def test_the_curves_of_all_arms_are_the_golden_ones(finished):
    """Twenty steps of each arm. The tolerance is for processors that sum in another order."""
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    assert set(golden) == {"teacher", "teacher_continued", *STUDENT_ARMS}
    for arm, expected in golden.items():
        for row, one in zip(read_curve(finished / arm), expected, strict=True):
            assert {key: row[key] for key in one} == pytest.approx(one, rel=1e-3), arm


def test_networks_of_a_seed_are_drawn_alike_and_seeds_differ(tiny):
    one, other = tiny(), tiny("seed=1")
    assert same(start.make_network(one, "wider", 10, 1), start.make_network(one, "wider", 10, 1))
    assert not same(start.make_network(one, "wider", 10, 1), start.make_network(other, "wider", 10, 1))
    state = torch.random.get_rng_state()
    start.make_network(one, None, 10, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_pad_of_a_deeper_student_keeps_the_teachers_layers(tiny):
    config = tiny()
    config.teacher, config.students = {"width": 0.2}, {"deeper": {"width": 0.2, "layers": 2}}
    run = run_of(config)
    teacher, student, drawn = run.make_network(None), run.make_network("deeper"), run.make_network("deeper")
    start.fill("random_pad", teacher, student, config, run.images)
    theirs, fresh = teacher.state_dict(), drawn.state_dict()
    for key, value in student.state_dict().items():
        assert torch.equal(value, theirs.get(key, fresh[key])), key
    assert len(student.state_dict()) > len(theirs)


def test_a_student_smaller_than_its_teacher_is_refused_before_training(tiny, monkeypatch):
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("a step was trained"))
    with pytest.raises(ExperimentError, match=r"first\.conv\.weight has 4 units, the teacher's 32"):
        experiment.run_experiment(tiny("arms=[random_pad]", "teacher.width=2"), Console(quiet=True))


def test_a_runs_folder_that_cannot_be_written_is_refused_before_the_images_are_loaded(tiny, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setattr(experiment, "load", lambda config: pytest.fail("loaded"))
    with pytest.raises(ExperimentError, match=r"The folder .*runs cannot be written \(.*\): choose another"):
        experiment.run_experiment(tiny(), Console(quiet=True))
