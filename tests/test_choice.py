"""The choice of arithmetic: by measurement, once, and the same for all that is compared."""

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import choice, command
from experiments import machine as device
from experiments.choice import choose, fastest, measure
from experiments.config import Config, ExperimentError
from experiments.machine import Arithmetic, candidates
from experiments.models import build

CPU = torch.device("cpu")
FLOAT, HALF = Arithmetic("float32", "contiguous"), Arithmetic("bfloat16", "channels_last")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 6, 6), torch.arange(count) % 3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(experiment="any", runs=str(tmp_path / "runs"))


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: True)


def speeds(monkeypatch: pytest.MonkeyPatch, found: dict[Arithmetic, float]) -> list[nn.Module]:
    """Measuring gives these; what it was given."""
    measured: list[nn.Module] = []

    def fake(possible, network, images, config, device):
        measured.append(network)
        return {one: found.get(one, 1.0) for one in possible}

    monkeypatch.setattr(choice, "measure", fake)
    return measured


def test_candidates_are_what_the_hardware_has_and_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: False)
    assert [str(one) for one in candidates(CPU, "auto", "auto", False)] == [
        "float32 channels_last",
        "float32 contiguous",
    ]
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: True)
    assert len(candidates(CPU, "auto", "auto", False)) == 4
    assert candidates(CPU, "auto", "contiguous", True)[-1] == Arithmetic("bfloat16", "contiguous", True)
    assert candidates(CPU, "bfloat16", "contiguous", False) == [Arithmetic("bfloat16", "contiguous")]
    with pytest.raises(ExperimentError, match=r"precision=tf32 was asked for, but .* has none: use precision=float32"):
        candidates(CPU, "tf32", "auto", False)


def test_the_fastest_is_chosen_and_precision_given_up_for_a_reason_only() -> None:
    assert fastest({FLOAT: 100.0, HALF: 200.0}) == HALF
    assert fastest({FLOAT: 100.0, HALF: 104.0}) == FLOAT
    assert fastest({FLOAT: 100.0, HALF: 106.0}) == HALF


def test_each_candidate_trains_a_copy_in_its_arithmetic(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Arithmetic, list[bool]] = {}

    def learn(net, optimizer, images, labels, on, arithmetic):
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        seen.setdefault(arithmetic, []).append(channels_last)
        with torch.no_grad():
            net[0].weight.zero_()

    monkeypatch.setattr("experiments.training.learn", learn)
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    possible = [replace(FLOAT, compile=True), replace(HALF, compile=True)]
    found = measure(possible, net, batch, config, CPU)
    assert list(found) == possible and min(found.values()) > 0
    assert set(seen) == {FLOAT, HALF}  # compiling would take minutes
    assert (set(seen[FLOAT]), set(seen[HALF])) == ({False}, {True})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_twice_as_slow_is_not_timed_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {FLOAT: 0.4, HALF: 0.1, replace(FLOAT, layout="channels_last"): 0.15}  # as probed: no more than a few
    order = list(taken)
    calls: list[Arithmetic] = []

    def seconds(step: partial[object], on: torch.device) -> float:
        calls.append(step.args[-1])
        return taken[calls[-1]]

    monkeypatch.setattr(choice, "_seconds", seconds)
    assert measure(order, network(), batch, config, CPU) == {one: 8 / taken[one] for one in order}
    assert [calls.count(one) for one in order] == [2 + 2, 4, 4]
    calls.clear()
    monkeypatch.setattr(choice, "SECONDS", 0.0)
    measure(order, network(), batch, config, CPU)
    assert [calls.count(one) for one in order] == [2 + 2, 2, 2]  # a first step, and one that counts


@pytest.mark.parametrize(("seconds", "count"), [(0.096, 25), (1e-5, 128), (10.0, 8)])
def test_a_timed_step_takes_a_fraction_of_a_second(
    config: Config, monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    monkeypatch.setattr(choice, "_seconds", lambda step, on: seconds * len(step.args[3]) / 8)
    asked: list[int] = []
    found = measure([FLOAT], network(), lambda n: (asked.append(n), batch(n))[1], config, CPU)
    assert asked == [8, count]
    assert found == {FLOAT: pytest.approx(8 / seconds)}


def test_a_gpu_is_timed_on_the_batch_that_it_will_train_on() -> None:
    # On an H200 few images were fastest in float32, at less than what the whole batch then trained at.
    whole = choice._timed_images(256, torch.device("cuda"), lambda _: pytest.fail("not asked"))
    assert whole == 256 and choice._timed_images(256, CPU, lambda few: few * 0.1) == 8


@pytest.mark.usefixtures("bfloat16")
def test_a_choice_is_made_once_and_read_by_all_who_come_later(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = speeds(monkeypatch, {HALF: 9.0})
    first = choose(config, CPU, network, batch)
    assert first.arithmetic == HALF
    assert first.why["images_per_second"]["bfloat16 channels_last"] == 9.0
    assert first.why["hardware"] == device.describe(CPU)
    speeds(monkeypatch, {FLOAT: 9.0})  # another machine, where it would be otherwise
    config.seed, config.students, config.experiment = 7, {"other": {"width": 3}}, "another"
    assert choose(config, CPU, network, batch) == first
    assert len(measured) == 1
    config.teacher = {"width": 0.5}
    assert choose(config, CPU, network, batch).arithmetic == FLOAT


@pytest.mark.usefixtures("bfloat16")
def test_what_is_forced_is_not_measured(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = speeds(monkeypatch, {HALF: 9.0})
    config.precision, config.layout = "float32", "contiguous"
    found = choose(config, CPU, network, batch)
    assert (found.arithmetic, found.why) == (FLOAT, {"forced": True})
    assert not measured and not Path(config.runs).exists()
    config.layout = "auto"  # one is forced: the other is measured
    assert choose(config, CPU, network, batch).arithmetic.precision == "float32"
    assert measured


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("damage", ["{", "[]", '{"precision": "float32"}'])
def test_a_damaged_choice_is_named(config: Config, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    speeds(monkeypatch, {})
    choose(config, CPU, network, batch)
    (file,) = (Path(config.runs) / "choices").iterdir()
    file.write_text(damage)
    with pytest.raises(ExperimentError, match=r"choices/.*json, which says in which arithmetic .*: delete it, and"):
        choose(config, CPU, network, batch)


def at_once(runs: str, start, favourite: Arithmetic, results) -> None:
    """A job of a sweep, on a machine where this arithmetic is the fastest."""
    device._multiplies_bfloat16 = lambda _: True
    choice.measure = lambda possible, *_: {one: 9.0 if one == favourite else 1.0 for one in possible}
    start.wait()
    results.put(choose(Config(experiment="any", runs=runs), CPU, network, batch).arithmetic)


def test_jobs_that_start_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    jobs = [
        context.Process(target=at_once, args=(str(tmp_path), start, (FLOAT, HALF)[number % 2], results))
        for number in range(8)
    ]
    for job in jobs:
        job.start()
    start.set()
    found = {results.get(timeout=60) for _ in jobs}
    for job in jobs:
        job.join()
    assert len(found) == 1
    assert len(os.listdir(tmp_path / "choices")) == 1


def test_a_run_says_what_was_chosen_and_its_arms_agree(
    train_py: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: True)
    short = ["schedule.epochs=2it", "schedule.evaluate=2it", "precision=auto", "layout=auto"]
    assert train_py(*short, "arms=[random_init]") == 0
    manifest = json.loads(Path("runs/quickstart/seed0/random_init/manifest.json").read_text())
    chosen = Arithmetic(manifest["precision"], manifest["layout"])
    measured = manifest["choice"]["images_per_second"]
    assert len(measured) == 4 and min(measured.values()) > 0
    assert measured[str(chosen)] * choice.GAIN >= max(measured.values())
    assert f"{chosen}, scale=" in capsys.readouterr().out
    assert {key: manifest["settings"][key] for key in ("precision", "layout", "compile")} == {
        "precision": chosen.precision,
        "layout": chosen.layout,
        "compile": False,
    }
    monkeypatch.setattr(choice, "measure", lambda *_: pytest.fail("measured again"))
    assert train_py(*short, "arms=[random_init,random_init_low_lr]") == 0
    other = json.loads(Path("runs/quickstart/seed0/random_init_low_lr/manifest.json").read_text())
    assert other["choice"] == manifest["choice"]
    # Forced otherwise, what is there is refused, not mixed.
    layout = {"channels_last": "contiguous", "contiguous": "channels_last"}[chosen.layout]
    assert train_py(*short[:2], f"precision={chosen.precision}", f"layout={layout}", "arms=[random_init]") == 1
    assert f"layout: {chosen.layout} there, {layout} now" in capsys.readouterr().err


def test_tf32_is_allowed_within_a_step_alone() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    assert allowed() == (False, False)
    with pytest.raises(ZeroDivisionError), Arithmetic("tf32").step():
        assert allowed() == (True, True)
        raise ZeroDivisionError
    assert allowed() == (False, False)
    with Arithmetic("bfloat16").step():
        assert allowed() == (False, False)


def test_every_arithmetic_trains_the_papers_network() -> None:
    images = torch.randn(4, 3, 32, 32)
    found: dict[str, float] = {}
    for arithmetic in (FLOAT, replace(FLOAT, layout="channels_last"), HALF, replace(HALF, layout="contiguous")):
        torch.manual_seed(0)
        net = build({"name": "inception", "slim": 0.03, "stem": 32}, 10, 3).to(memory_format=arithmetic.memory_format)
        with arithmetic.step(), arithmetic.forward(CPU):
            found[str(arithmetic)] = float(
                net(images.contiguous(memory_format=arithmetic.memory_format)).square().mean().detach()
            )
    assert found["float32 contiguous"] == pytest.approx(found["float32 channels_last"], rel=1e-4)
    assert found["float32 contiguous"] == pytest.approx(found["bfloat16 channels_last"], rel=0.1)
    assert found["float32 contiguous"] != found["bfloat16 channels_last"]


def test_help_names_what_can_be_forced() -> None:
    assert {"precision", "layout", "compile"} <= set(command._keys())
