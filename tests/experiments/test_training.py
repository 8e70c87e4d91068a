"""The training loop and what it stands on: optimizer, schedule, FLOPs, device, the lines on the terminal."""

import itertools
import math
import signal
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torture
from loops import CPU, Quiet, network, same, without_seconds
from rich.console import Console
from torch import Tensor, nn

from experiments import checkpoint, flops, machine, progress, training
from experiments.config import DivergedError, ExperimentError, Schedule
from experiments.distributed import ALONE
from experiments.evaluation import evaluate
from experiments.machine import Arithmetic, choose_arithmetic
from experiments.optimizers import make_optimizer, rate_at
from experiments.randomness import seed_layers
from experiments.run_log import parse_curve
from experiments.training import set_rate, train

# -- the loop -----------------------------------------------------------------------------------------------------


def test_the_curve_has_a_row_at_step_0_and_at_every_evaluation(job):
    net = network()
    before = evaluate(net, job.splits.test.ordered(8))
    rows = train(net, job, Quiet())
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert [row["epoch"] for row in rows] == pytest.approx([0, 4 / 3, 8 / 3, 4])
    assert [row["examples"] for row in rows] == [0, 32, 64, 96]
    assert [row["flops"] for row in rows] == [0, 3200, 6400, 9600]
    assert "train_loss" not in rows[0] and all("train_loss" in row for row in rows[1:])
    after = evaluate(net, job.splits.test.ordered(8))
    for row, measured in ((rows[0], before), (rows[-1], after)):
        assert (row["test_loss"], row["test_accuracy"]) == pytest.approx(measured)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    written = parse_curve((job.folder / "curve.csv").read_bytes(), "curve")
    assert [point["step"] for point in written] == [0, 4, 8, 12] and math.isnan(written[0]["train_loss"])
    rows = train(network(), replace(job, epochs="6it", folder=job.folder / "6"), Quiet())
    assert [row["step"] for row in rows] == [0, 4, 6]  # the last step is evaluated even if it is not due


@pytest.mark.parametrize(("killed", "saved"), [(3, 0), (4, 0), (6, 4), (12, 8)])
def test_a_killed_run_continues_bit_for_bit_from_its_last_evaluation(job, tmp_path, killed, saved):
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())

    with pytest.raises(ConnectionError):  # as if the machine went away
        train(network(), job, Quiet(killed, MagicMock(side_effect=ConnectionError)))
    resumed, follower = network(), Quiet()
    for parameter in resumed.parameters():
        parameter.data.zero_()  # everything has to come from the checkpoint
    assert without_seconds(train(resumed, job, follower)) == without_seconds(rows)
    assert follower.steps == list(range(saved + 1, 13))
    assert same(resumed, whole)
    assert torture.equal(*(checkpoint.load(folder)["optimizer"] for folder in (job.folder, tmp_path / "whole")))


def test_a_run_killed_between_checkpoint_and_curve_writes_the_whole_curve(job):
    train(network(), job, Quiet())
    curve = (job.folder / "curve.csv").read_bytes()
    (job.folder / "curve.csv").write_bytes(b"".join(curve.splitlines(keepends=True)[:-1]))
    follower = Quiet()
    train(network(), job, follower)
    assert follower.steps == []
    assert (job.folder / "curve.csv").read_bytes() == curve


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(job, monkeypatch):
    real, steps = training.train_step, itertools.count(1)

    def diverge(*arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = real(*arguments)
        return logits, loss * (math.inf if next(steps) == 7 else 1)

    monkeypatch.setattr(training, "train_step", diverge)
    with pytest.raises(DivergedError, match="The loss is not finite at step 7; the last good checkpoint is kept"):
        train(network(), job, Quiet())
    assert checkpoint.load(job.folder)["step"] == 4


def test_the_step_is_named_when_losses_are_looked_at_in_batches():
    meter = training._Meter(CPU, None, ALONE)
    meter.device = torch.device("meta")  # not the CPU: it waits
    for step in range(49):
        loss = torch.tensor(float("nan") if step >= 20 else 1.0)
        meter.add(step, loss, torch.zeros(2, 3), torch.zeros(2).long())
    with pytest.raises(DivergedError, match="at step 21;"):
        meter.check()


def test_a_checkpoint_of_another_network_is_refused(job):
    train(network(), job, Quiet())
    with pytest.raises(ExperimentError, match=f"is another network's: delete {job.folder} to run this stage anew"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), job, Quiet())


def test_a_rate_that_is_too_high_never_leaves_a_broken_checkpoint(job):
    with pytest.raises(DivergedError, match=r"(The loss|A weight) is not finite at step \d+; .* lower schedule\.lr"):
        train(network(), replace(job, rate=1e38), Quiet())
    assert all(bool(value.isfinite().all()) for value in checkpoint.load(job.folder)["network"].values())


def test_weights_that_are_not_finite_are_not_saved(job):
    net = network()
    with pytest.raises(DivergedError, match="A weight is not finite at step 8"):
        train(net, job, Quiet(8, lambda: net[0].weight.data[0].fill_(math.nan)))
    assert checkpoint.load(job.folder)["step"] == 4


def test_evaluation_is_in_eval_mode_over_all_images(job):
    net = network()
    loss, accuracy = evaluate(net, job.splits.test.ordered(3))  # 10 images: the last batch is small
    net.eval()
    ((everything, labels),) = job.splits.test.ordered(100)
    logits = net(everything)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_in_bfloat16_evaluation_and_weights_are_still_float32(job):
    expected = train(network(), replace(job, epochs="1it"), Quiet())
    net = network()
    other = replace(job, folder=job.folder / "b", arithmetic=Arithmetic("bfloat16"), epochs="1it")
    rows = train(net, other, Quiet())
    assert without_seconds(rows)[0] == without_seconds(expected)[0]
    assert rows[1]["train_loss"] != expected[1]["train_loss"]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_step_trains_the_same_weights_under_their_own_names(job, monkeypatch):
    compile_without_code = MagicMock(side_effect=partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compile_without_code)
    plain, other = network(), network()
    train(plain, replace(job, folder=job.folder / "plain"), Quiet())
    compile_without_code.assert_not_called()
    train(other, replace(job, arithmetic=Arithmetic(compile=True)), Quiet())
    compile_without_code.assert_called_once_with(other)
    assert checkpoint.load(job.folder)["network"].keys() == plain.state_dict().keys()
    for one, two in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_a_second_ctrl_c_stops_at_once_and_the_handler_is_restored(job):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(network(), job, Quiet(1, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]))
    assert signal.getsignal(signal.SIGINT) is before


def test_layers_draw_from_the_seed_of_the_step():
    drawn = []
    for parts in ((0, "dropout", 1), (0, "dropout", 2), (0, "dropout", 1)):
        seed_layers(CPU, *parts)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


# -- the optimizer and its schedule -------------------------------------------------------------------------------


def test_the_rate_of_a_step_is_that_of_the_schedule(job):
    optimizer = make_optimizer(network(), job.config.schedule)
    for decay, falling in (("linear", 10), ("constant", 0), ("25%", 3), ("1ep", 3), ("5it", 5), ("9ep", 10)):
        job.config.schedule.decay = decay
        for step in range(12):
            set_rate(optimizer, job, step)
            assert {group["lr"] for group in optimizer.param_groups} == {0.01 * rate_at(step, 12, 2, falling)}


def test_the_rate_of_every_evaluation_is_shown_to_the_follower(job, monkeypatch):
    shown = []
    follower = Quiet()
    monkeypatch.setattr(follower, "row", lambda row: shown.append(row.get("learning_rate")))
    train(network(), job, follower)
    warmup, falling = 2, 10
    assert shown == [None, *(pytest.approx(0.01 * rate_at(step - 1, 12, warmup, falling)) for step in (4, 8, 12))]


def test_the_rate_warms_up_and_then_falls_to_zero_or_stays():
    rates = [rate_at(step, 10, 3, 7) for step in range(10)]
    assert rates[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert rates[3:] == pytest.approx([1 - k / 7 for k in range(7)])  # the step after the last would have 0
    assert rate_at(0, 10, 0, 10) == 1
    assert [rate_at(step, 10, 1, 0) for step in (0, 1, 9)] == [0.5, 1, 1]
    assert [rate_at(step, 10, 0, 4) for step in (0, 6, 7, 9)] == [1, 1, 0.75, 0.25]
    assert [rate_at(step, 2, 3, 0) for step in range(2)] == [0.25, 0.5]  # a warm-up longer than the run


def test_weight_decay_spares_biases_and_batch_norm():
    net = network()
    for name in ("rmsprop", "sgd"):
        optimizer = make_optimizer(net, Schedule(optimizer=name, weight_decay=0.1))
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert decayed == {id(net[0].weight), id(net[5].weight)}  # type: ignore[index]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
    adam = make_optimizer(network(), Schedule(optimizer="AdamW", lr=0.1, weight_decay=0.2))
    assert type(adam) is torch.optim.AdamW and [group["weight_decay"] for group in adam.param_groups] == [0.2, 0.0, 0.0]
    with pytest.raises(ExperimentError, match=r"Muon does not take this network: .* 2D"):
        make_optimizer(network(), Schedule(optimizer="Muon"))
    for typed, meant in (("adam", "Adam"), ("Adamw", "AdamW"), ("SGd", "sgd"), ("rmsprp", "rmsprop")):
        with pytest.raises(ExperimentError, match=rf"there is no '{typed}' \(did you mean '{meant}'\?\)"):
            make_optimizer(net, Schedule(optimizer=typed))


# -- FLOPs, device and arithmetic ---------------------------------------------------------------------------------


def test_flops_are_two_a_multiplication_and_counting_changes_nothing():
    # A 3x3 convolution from 2 to 4 channels on 6x6 pixels, padded; then 144 to 5.
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    convolution, linear = 2 * 4 * 2 * 3 * 3 * 6 * 6, 2 * 144 * 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    forward, both = flops.count(net, 2, 6)
    assert forward == convolution + linear
    # Backward: the gradient of the weights everywhere, that of the input everywhere but at the first layer.
    assert both == 2 * convolution + 3 * linear
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.device == CPU for p in net.parameters())
    with pytest.raises(ExperimentError, match="The network cannot read images of 2 pixels: "):
        flops.count(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten()), 1, 2)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == CPU
    with pytest.raises(ExperimentError, match="torch finds no GPU: use device=cpu"):
        machine.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ExperimentError, match="There is no device cuda:1: this machine has 1 GPUs"):
        machine.pick_device("cuda:1")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse avx2", "float32 contiguous"), ("avx512_bf16", "bfloat16 channels_last")],
)
def test_the_arithmetic_follows_the_processor_unless_it_is_forced(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags: {flags}\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert str(choose_arithmetic(CPU, "auto", "auto", False)) == expected
    assert str(choose_arithmetic(CPU, "float32", "channels_last", False)) == "float32 channels_last"
    assert str(choose_arithmetic(CPU, "bfloat16", "auto", True)) == "bfloat16 channels_last compiled"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_the_arithmetic_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", "12")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = torch.device("cuda")
    assert choose_arithmetic(gpu, "auto", "auto", False).precision == expected
    if expected == "float32":
        with pytest.raises(ExperimentError, match="precision=tf32 was asked for, but a GPU has none"):
            choose_arithmetic(gpu, "tf32", "auto", False)


def test_tf32_is_allowed_within_a_step_alone():
    def is_allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    for precision in ("float32", "tf32"):
        with Arithmetic(precision).step():
            assert is_allowed() == (precision == "tf32",) * 2
        assert is_allowed() == (False, False)


# -- the terminal -------------------------------------------------------------------------------------------------

ROW = {"step": 0, "holdout_accuracy": 0.1, "test_accuracy": 0.125}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_an_evaluation_or_a_bar_on_a_terminal(terminal):
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
    length = progress.Length(steps=100, every=50, batch_size=32, evaluation=10.0)
    with progress.Follower(console, "net2net", length, 0) as follower:
        follower.row(ROW)
        follower.advance(1, float("nan"))  # not looked at yet
        for step in range(2, 51):
            follower.advance(step, 2.345)
        if not terminal:
            follower.row(ROW | {"step": 50, "train_loss": 1.5})
    said = text.getvalue()
    assert " images/s" in said and "nan" not in said and ("\x1b" in said) == terminal
    if terminal:
        assert "loss 2.345  test 12.50%  " in said
    else:
        one, two = said.splitlines()
        assert one == f"{'net2net':<22} step      0/100  holdout 10.00%  test 12.50%"
        assert two.startswith(f"{'net2net':<22} step     50/100  loss 1.500  holdout 10.00%  test 12.50%  ")


def test_the_bar_moves_while_an_evaluation_goes_on_and_says_so():
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    length = progress.Length(steps=100, every=40, batch_size=32, evaluation=10.0)  # at 0, 40, 80 and 100
    with progress.Follower(console, "net2net", length, 0) as follower:
        places = []
        for step in (0, 40, 80, 100):
            if step:
                follower.advance(step, 2.0)
            for share in (0.0, 0.5, 1.0):
                follower.evaluate(share)
                places.append(follower.task.completed)
        assert places == [0, 5, 10, 50, 55, 60, 100, 105, 110, 130, 135, 140]
        assert follower.task.total == 140
    assert "evaluates on holdout and test images: 100%" in text.getvalue()


def test_an_evaluation_tells_how_far_it_is(job, monkeypatch):
    shares: list[float] = []
    follower = Quiet()
    monkeypatch.setattr(follower, "evaluate", shares.append)
    rows = train(network(), job, follower)
    assert shares.count(0.0) == shares.count(1.0) == len(rows)
    assert len(set(shares)) > 2 and max(shares) == 1.0
