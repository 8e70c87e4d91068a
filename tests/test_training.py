"""The training loop and what it stands on: optimizer, schedule, FLOPs, the lines on the terminal."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from loops import CPU, Quiet, network, same, without_seconds
from rich.console import Console
from torch import Tensor, nn

from experiments import checkpoint, flops, progress, training
from experiments import machine as device
from experiments.config import ExperimentError, Schedule
from experiments.optimizers import make_optimizer, rate_at
from experiments.randomness import derive_seed, seed_layers
from experiments.run_log import parse_curve
from experiments.signals import Interrupted
from experiments.training import Job, evaluate, train


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during a step (the first is 1)."""
    done, learn = 0, training.learn

    def learn_and_stop(*arguments: object) -> tuple[Tensor, Tensor]:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "learn", learn_and_stop)


def test_the_curve_has_a_row_at_step_0_and_at_every_evaluation(job: Job) -> None:
    net = network()
    before = evaluate(net, job.splits.test.ordered(8))
    rows = train(net, job, Quiet())
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert [row["epoch"] for row in rows] == pytest.approx([0, 4 / 3, 8 / 3, 4])
    assert [row["examples"] for row in rows] == [0, 32, 64, 96]
    assert [row["flops"] for row in rows] == [0, 3200, 6400, 9600]
    assert "train_loss" not in rows[0] and all("train_loss" in row for row in rows[1:])
    assert (rows[0]["test_loss"], rows[0]["test_accuracy"]) == pytest.approx(before)
    assert (rows[-1]["test_loss"], rows[-1]["test_accuracy"]) == pytest.approx(
        evaluate(net, job.splits.test.ordered(8))
    )
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    written = parse_curve((job.folder / "curve.csv").read_bytes(), "curve")
    assert [point["step"] for point in written] == [0, 4, 8, 12]
    assert math.isnan(written[0]["train_loss"])


def test_the_last_evaluation_is_at_the_last_step_even_if_it_is_not_due(job: Job) -> None:
    rows = train(network(), replace(job, epochs="6it"), Quiet())
    assert [row["step"] for row in rows] == [0, 4, 6]


@pytest.mark.parametrize("step", [1, 4, 5, 11, 12])
def test_an_interrupted_run_goes_on_bit_for_bit(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted, match=f"arm stopped at step {step} of 12"):
            train(network(), job, Quiet())
    resumed, follower = network(), Quiet()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()  # all has to come from the checkpoint
    again = train(resumed, job, follower)
    assert follower.steps == list(range(step + 1, 13))
    assert without_seconds(again) == without_seconds(rows)
    assert same(resumed, whole)
    states = [checkpoint.load(folder)["optimizer"]["state"] for folder in (job.folder, tmp_path / "whole")]
    for key, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(states[1][key][name])) for name in state)


@pytest.mark.parametrize(("killed", "saved"), [(3, 0), (4, 3), (6, 4), (7, 6), (12, 9)])
def test_a_killed_run_goes_on_from_its_last_epoch_or_evaluation(
    job: Job, tmp_path: Path, killed: int, saved: int
) -> None:
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())

    class KilledError(Exception):
        """As if the machine went away."""

    class Dies(Quiet):
        def advance(self, step: int, loss: float) -> None:
            if step == killed:
                raise KilledError

    with pytest.raises(KilledError):
        train(network(), job, Dies())
    resumed, follower = network(), Quiet()
    assert without_seconds(train(resumed, job, follower)) == without_seconds(rows)
    assert follower.steps[0] == saved + 1
    assert same(resumed, whole)


def test_a_run_killed_between_checkpoint_and_curve_writes_the_whole_curve(job: Job) -> None:
    train(network(), job, Quiet())
    curve = (job.folder / "curve.csv").read_bytes()
    (job.folder / "curve.csv").write_bytes(b"".join(curve.splitlines(keepends=True)[:-1]))
    follower = Quiet()
    train(network(), job, follower)
    assert follower.steps == []
    assert (job.folder / "curve.csv").read_bytes() == curve


def test_after_ctrl_c_its_handler_is_as_before(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_at(2, monkeypatch)
    with pytest.raises(Interrupted):
        train(network(), job, Quiet())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(job: Job) -> None:
    class Twice(Quiet):
        def advance(self, step: int, loss: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(network(), job, Twice())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, learn = 0, training.learn

    def diverges(*arguments: object) -> tuple[Tensor, Tensor]:
        nonlocal done
        done += 1
        logits, loss = learn(*arguments)  # type: ignore[arg-type]
        return logits, loss * (float("inf") if done == 7 else 1)

    monkeypatch.setattr(training, "learn", diverges)
    with pytest.raises(ExperimentError, match="The loss is not finite at step 7; the last good checkpoint is kept"):
        train(network(), job, Quiet())
    state = checkpoint.load(job.folder)
    assert state["step"] == 6
    network().load_state_dict(state["network"])


def test_the_step_is_named_when_losses_are_looked_at_in_batches() -> None:
    meter = training._Meter(torch.device("meta"))
    meter.device = torch.device("cpu", 0)  # so that its sums are real
    meter.take()
    meter.device = torch.device("meta")  # no CPU: it waits
    for step in range(49):
        loss = torch.tensor(float("nan") if step >= 20 else 1.0)
        meter.add(step, loss, torch.zeros(2, 3), torch.zeros(2).long())
    with pytest.raises(ExperimentError, match="at step 21;"):
        meter.check()


def test_a_rate_that_is_too_high_never_leaves_a_broken_checkpoint(job: Job) -> None:
    with pytest.raises(ExperimentError, match=r"(The loss|A weight) is not finite at step \d+; .* lower schedule\.lr"):
        train(network(), replace(job, rate=1e38), Quiet())
    for value in checkpoint.load(job.folder)["network"].values():
        assert bool(value.isfinite().all())


def test_weights_that_are_not_finite_are_not_saved(job: Job) -> None:
    net = network()
    rows = train(net, replace(job, epochs="4it"), Quiet())
    with torch.no_grad():
        net[0].weight[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(ExperimentError, match="A weight is not finite at step 5"):
        training._save(net, make_optimizer(net, job.config.schedule), job, 5, rows, 0.0, {})
    assert checkpoint.load(job.folder)["step"] == 4


def test_evaluation_is_in_eval_mode_over_all_images(job: Job) -> None:
    net = network()
    loss, accuracy = evaluate(net, job.splits.test.ordered(3))  # 10 images: the last batch is small
    net.eval()
    ((everything, labels),) = job.splits.test.ordered(100)
    logits = net(everything)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_evaluation_is_in_float32_whatever_training_is_in(job: Job) -> None:
    expected = train(network(), replace(job, epochs="1it"), Quiet())
    rows = train(
        network(),
        replace(job, folder=job.folder / "b", arithmetic=device.Arithmetic("bfloat16"), epochs="1it"),
        Quiet(),
    )
    assert without_seconds(rows)[0] == without_seconds(expected)[0]
    assert rows[1]["train_loss"] != expected[1]["train_loss"]


def test_training_in_bfloat16_keeps_float32_weights(job: Job) -> None:
    net = network()
    train(net, replace(job, arithmetic=device.Arithmetic("bfloat16"), epochs="4it"), Quiet())
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_compiled_step_trains_the_same_weights_under_their_own_names(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    real = torch.compile

    def without_generating_code(net: nn.Module) -> nn.Module:
        compiled.append(net)
        return real(net, backend="eager")  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", without_generating_code)
    plain, other = network(), network()
    train(plain, replace(job, folder=job.folder / "plain"), Quiet())
    assert not compiled
    train(other, replace(job, arithmetic=device.Arithmetic(compile=True)), Quiet())
    assert compiled == [other]
    assert checkpoint.load(job.folder)["network"].keys() == plain.state_dict().keys()
    for one, two in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_layers_draw_from_the_seed_of_the_step() -> None:
    drawn = []
    for parts in ((0, "dropout", 1), (0, "dropout", 2), (0, "dropout", 1)):
        seed_layers(CPU, *parts)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(derive_seed(0, "dropout", 1))
    assert torch.equal(torch.rand(4), drawn[0])


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_the_rate_of_a_step_is_that_of_the_schedule(job: Job, monkeypatch: pytest.MonkeyPatch, decay: str) -> None:
    job.config.schedule.decay = decay
    used: list[set[float]] = []
    learn = training.learn

    def spy(net: nn.Module, optimizer: torch.optim.Optimizer, *rest: object) -> tuple[Tensor, Tensor]:
        used.append({group["lr"] for group in optimizer.param_groups})
        return learn(net, optimizer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "learn", spy)
    train(network(), job, Quiet())
    assert used == [{0.01 * rate_at(step, 12, 2, decay)} for step in range(12)]


def test_warm_up_then_linear_to_zero() -> None:
    rates = [rate_at(step, 10, 3, "linear") for step in range(10)]
    assert rates[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert rates[3:] == pytest.approx([1 - k / 7 for k in range(7)])  # the step after the last would have 0
    assert rate_at(0, 10, 0, "linear") == 1


def test_warm_up_then_constant() -> None:
    assert [rate_at(step, 10, 1, "constant") for step in (0, 1, 9)] == [0.5, 1, 1]


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert [rate_at(step, 2, 3, "linear") for step in range(2)] == [0.25, 0.5]


def test_weight_decay_spares_biases_and_batch_norm() -> None:
    net = network()
    for name in ("rmsprop", "sgd"):
        optimizer = make_optimizer(net, Schedule(optimizer=name, weight_decay=0.1))
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert decayed == {id(net[0].weight), id(net[5].weight)}  # type: ignore[index]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


def test_an_optimizer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ExperimentError, match="'adam' is unknown: it is rmsprop or sgd"):
        make_optimizer(network(), Schedule(optimizer="adam"))


def test_flops_are_two_a_multiplication_and_three_times_that_in_training() -> None:
    # A 3x3 convolution from 2 to 4 channels on 6x6 pixels, padded; then 144 to 5.
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    convolution, linear = 2 * 4 * 2 * 3 * 3 * 6 * 6, 2 * 144 * 5
    forward, both = flops.count(net, 2, 6)
    assert forward == convolution + linear
    # Backward: the gradient of the weights everywhere, that of the input everywhere but at the first layer.
    assert both == 2 * convolution + 3 * linear


def test_counting_changes_nothing() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flops.count(net, 1, 6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.device == CPU for p in net.parameters())


def test_images_that_a_network_cannot_read_are_refused() -> None:
    with pytest.raises(ExperimentError, match="The network cannot read images of 2 pixels: "):
        flops.count(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten()), 1, 2)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device("auto") == CPU
    with pytest.raises(ExperimentError, match="torch finds no GPU: use device=cpu"):
        device.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ExperimentError, match="device=cuda:1 was asked for, but"):
        device.pick_device("cuda:1")


ROW = {"step": 0, "holdout_accuracy": 0.1, "test_accuracy": 0.125}


def shown(terminal: bool, follow: Callable[[progress.Follower], None], first: int = 0) -> str:
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
    with progress.follow(console, "net2net", 100, first, 32) as follower:
        follow(follower)
    return text.getvalue()


def test_a_line_an_evaluation_where_there_is_no_terminal() -> None:
    def follow(follower: progress.Follower) -> None:
        follower.row(ROW)
        for step in range(50):
            follower.advance(step + 1, 2.0)
        follower.row(ROW | {"step": 50, "train_loss": 1.5})

    first, second = shown(False, follow).splitlines()
    assert first == f"{'net2net':<22} step      0/100  holdout 10.00%  test 12.50%"
    assert second.startswith(f"{'net2net':<22} step     50/100  loss 1.500  holdout 10.00%  test 12.50%  ")
    assert second.endswith(" left") and " images/s " in second
    assert "\x1b" not in first + second


def test_a_resumed_run_counts_only_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)

    def follow(follower: progress.Follower) -> None:
        nonlocal now
        follower.row(ROW | {"step": 50})
        now += 10
        follower.row(ROW | {"step": 60, "train_loss": 1.0})

    first, second = shown(False, follow, first=50).splitlines()
    assert "left" not in first
    assert second.endswith("  32 images/s  40 s left")


def test_a_bar_on_a_terminal() -> None:
    def follow(follower: progress.Follower) -> None:
        follower.row(ROW)
        follower.advance(1, float("nan"))  # not looked at yet
        follower.advance(100, 2.345)

    text = shown(True, follow)
    assert "net2net" in text and "loss 2.345  test 12.50%  " in text and "images/s" in text
    assert "nan" not in text


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h")])
def test_durations_are_in_the_unit_that_a_person_would_use(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
