"""New layers on the way of units: pairs of units pass activations that are not idempotent, gates are held open."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Net, conv, randomise, without
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from net2net import TransferError, equivalence, load_record, random_pad, replay, save_record, transfer

BAR = 1e-12


pytestmark = pytest.mark.usefixtures("float64")


def images() -> Tensor:
    return torch.randn(3, 3, 7, 6)


def around(extra: Callable[[], nn.Module] | None, width: int = 4, reads: int = 4) -> Net:
    """`extra` between a convolution and a linear layer, without an activation before it: it meets either sign."""
    parts = {"a": conv(3, width, bias=True), "extra": extra() if extra else nn.Identity(), "fc": nn.Linear(reads, 5)}
    return randomise(Net(parts, lambda net, x: net.fc(net.extra(net.a(x)).mean((2, 3)))), 3)


def expansion(width: int, hidden: int, after: int, gate: bool = True) -> nn.Sequential:
    """An inverted residual block without its sum: expand, filter, gate, project."""
    return nn.Sequential(
        *(conv(width, hidden, 1), nn.BatchNorm2d(hidden), nn.SiLU()),
        *(conv(hidden, hidden, groups=hidden), nn.BatchNorm2d(hidden), nn.SiLU()),
        SqueezeExcitation(hidden, 2, activation=nn.SiLU) if gate else nn.Identity(),
        *(conv(hidden, after, 1), nn.BatchNorm2d(after)),
    )


ACTIVATIONS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(),
    "logsigmoid": nn.LogSigmoid(),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.3),
}
NEW = {
    **{
        name: (lambda activation=activation: nn.Sequential(conv(4, 8, 1), activation), 4, 8)
        for name, activation in ACTIVATIONS.items()
    },
    "in place": (lambda: nn.Sequential(conv(4, 8, bias=True), nn.BatchNorm2d(8), nn.SiLU(inplace=True)), 4, 8),
    "more units than pairs": (lambda: nn.Sequential(conv(4, 23), nn.GELU()), 4, 23),
    "behind wider": (lambda: nn.Sequential(conv(9, 11), nn.GELU()), 9, 11),
    "and back": (lambda: nn.Sequential(conv(4, 8), nn.GELU(), conv(8, 4)), 4, 4),
    "and on": (lambda: nn.Sequential(conv(4, 8), nn.GELU(), conv(8, 17), nn.SiLU(), conv(17, 6)), 4, 6),
    "between equal widths": (lambda: nn.Sequential(conv(9, 9, 1), nn.GELU(), conv(9, 9, 1)), 9, 9),
    "twice, with filters": (lambda: expansion(4, 16, 4, gate=False), 4, 4),
    "twice, with filters and a gate": (lambda: expansion(4, 21, 9), 4, 9),
    "twice, wider": (lambda: expansion(7, 21, 10), 7, 10),
}


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@pytest.mark.parametrize("name", NEW)
def test_pairs_of_units_pass(name: str, split: str) -> None:
    extra, width, reads = NEW[name]
    teacher, student = around(None), around(extra, width, reads)
    transfer(teacher, student, images(), split=split)
    assert equivalence(teacher, student, images()).max_relative < BAR


@pytest.mark.parametrize("name", NEW)
def test_without_their_signs_they_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, width, reads = NEW[name]
    monkeypatch.setattr("net2net.plan.tensors.signs", lambda p, *_: torch.ones(len(p)))
    with pytest.raises(TransferError):
        transfer(around(None), around(extra, width, reads), images())


@pytest.mark.parametrize("name", ["leaky relu", "twice, with filters and a gate"])
def test_without_what_undoes_slopes_and_gates_they_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, width, reads = NEW[name]
    monkeypatch.setattr("net2net.plan.tensors.slope_correction", lambda *_: 1.0)
    with pytest.raises(TransferError):
        transfer(around(None), around(extra, width, reads), images())


def test_a_gate_that_is_not_silent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, lambda origin: origin.how == "silent")
    with pytest.raises(TransferError):
        transfer(around(None), around(lambda: expansion(4, 16, 4)), images())


@pytest.mark.parametrize(
    ("extra", "reads"),
    [
        (lambda: nn.Sequential(conv(4, 7), nn.GELU()), 7),
        (lambda: expansion(4, 15, 4), 4),
        (lambda: nn.Sequential(conv(4, 8), nn.Tanh()), 8),
        (lambda: nn.Sequential(conv(4, 8), nn.Mish()), 8),
        (lambda: nn.Sequential(conv(4, 8), nn.ReLU6()), 8),
        (lambda: nn.Sequential(conv(4, 16), nn.GELU(), nn.GELU()), 16),
        (lambda: nn.Sequential(conv(4, 8), nn.GELU(), nn.MaxPool2d(1)), 8),
    ],
    ids=["no room for pairs", "no room for fours", "tanh", "mish", "relu6", "no filter between two", "a maximum"],
)
def test_what_pairs_cannot_pass_is_refused(extra: Callable[[], nn.Module], reads: int) -> None:
    with pytest.raises(TransferError, match="is not idempotent"):
        transfer(around(None), around(extra, reads=reads), images())


def test_a_new_gate_on_a_layer_of_both() -> None:
    """A squeeze-excitation that the teacher lacks: a half of every unit, which the next layer reads doubly."""

    def make(width: int, gate: bool) -> Net:
        parts = {"a": conv(3, width, bias=True), "gate": SqueezeExcitation(width, 2) if gate else nn.Identity()}
        parts["b"] = conv(width, 5)
        return randomise(Net(parts, lambda net, x: net.b(net.gate(F.relu(net.a(x))))), 3)

    teacher, student = make(4, False), make(7, True)
    record = transfer(teacher, student, images())
    assert equivalence(teacher, student, images()).max_relative < BAR
    assert record.origins["b.weight"].factor == 2.0
    assert record.origins["gate.fc2.weight"].how == "silent"


def test_every_unit_of_a_pair_learns() -> None:
    """None is dead: each is produced and read with weights other than zero, those of surplus units too."""
    student = around(NEW["more units than pairs"][0], 4, 23)
    transfer(around(None), student, images())
    student(images()).square().sum().backward()
    gradient = student.extra[0].weight.grad
    assert gradient is not None
    assert bool((gradient.flatten(1).abs().amax(1) > 1e-6).all())


def test_the_record_is_replayed_and_random_pad_takes_the_same_networks(tmp_path: Path) -> None:
    extra, width, reads = NEW["twice, with filters and a gate"]
    teacher, student, again = around(None), around(extra, width, reads), around(extra, width, reads)
    record = transfer(teacher, student, images())
    save_record(record, tmp_path / "record.json")
    replay(load_record(tmp_path / "record.json"), teacher, again)
    assert equivalence(teacher, again, images()).max_relative < BAR
    padded = around(extra, width, reads)
    random_pad(teacher, padded, images())
    assert torch.equal(padded.a.weight, teacher.a.weight)


def test_the_gradient_of_what_reads_pairs_is_not_claimed() -> None:
    extra, width, reads = NEW["gelu"]
    teacher, student, x = around(None), around(extra, width, reads), images()
    record = transfer(teacher, student, x)
    for model in (teacher, student):
        model(x).square().sum().backward()
    theirs = {name: p.grad for name, p in teacher.named_parameters() if p.grad is not None}
    predicted = record.gradients(theirs)
    assert predicted["fc.weight"].isnan().all()
    for name in ("a.weight", "a.bias", "fc.bias"):
        assert (predicted[name] - student.get_parameter(name).grad).abs().max() < 1e-12
