"""New layers on the way of units: pairs of units pass activations that are not idempotent, gates are held open."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import BAR, assert_same, change, change_axes, error, refused
from networks import Net, conv, images
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from net2net import Transfer, random_pad, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def around(extra: Callable[[], nn.Module] | None, width: int = 4, reads: int = 4) -> Net:
    """`extra` between a convolution and a linear layer, without an activation before it: it meets either sign."""
    parts = {"a": conv(3, width, bias=True), "extra": extra() if extra else nn.Identity(), "fc": nn.Linear(reads, 5)}
    return look_trained(Net(parts, lambda net, x: net.fc(net.extra(net.a(x)).mean((2, 3)))), seed=3)


def expansion(width: int, hidden: int, after: int, gate: bool = True) -> nn.Sequential:
    """An inverted residual block without its sum: expand, filter, gate, project."""
    return nn.Sequential(
        *(conv(width, hidden, 1), nn.BatchNorm2d(hidden), nn.SiLU()),
        *(conv(hidden, hidden, groups=hidden), nn.BatchNorm2d(hidden), nn.SiLU()),
        SqueezeExcitation(hidden, 2, activation=nn.SiLU) if gate else nn.Identity(),
        *(conv(hidden, after, 1), nn.BatchNorm2d(after)),
    )


def widened(activation: nn.Module) -> tuple[Callable[[], nn.Module], int, int]:
    return lambda: nn.Sequential(conv(4, 8, 1), activation), 4, 8


# name -> (what is new, the width before it, the width behind it)
NEW = {
    "silu": widened(nn.SiLU()),
    "gelu": widened(nn.GELU()),
    "gelu by tanh": widened(nn.GELU(approximate="tanh")),
    "hardswish": widened(nn.Hardswish()),
    "softplus": widened(nn.Softplus()),
    "logsigmoid": widened(nn.LogSigmoid()),
    "relu": widened(nn.ReLU()),
    "leaky relu": widened(nn.LeakyReLU(0.3)),
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


def drop_signs(record: Transfer) -> Transfer:
    """Every unit of a pair has the teacher's sign: in the rows that produce it, and in the shares that read it."""
    record = change_axes(record, lambda axis: replace(axis, share=axis.share.abs()) if axis.signed else axis)
    return change(record, lambda o: replace(o, rows=None if o.rows is None else o.rows.abs()) if o.axes else o)


@pytest.mark.parametrize("name", NEW)
def test_pairs_of_units_pass_and_without_their_signs_they_do_not(name: str) -> None:
    extra, width, reads = NEW[name]
    teacher, student = around(None), around(extra, width, reads)
    for split in ("equal", "uneven", "paired"):
        record = transfer(teacher, student, images(), split=split)
        assert_same(teacher, student, images())
    assert error(drop_signs(record), teacher, student) > 1e-6


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("leaky relu", lambda o: replace(o, factor=1.0) if o.factor != 1 else o),
        ("twice, with filters and a gate", lambda o: replace(o, factor=1.0) if o.factor != 1 else o),
        ("twice, with filters and a gate", lambda o: replace(o, fill="one") if o.how == "silent" else o),
    ],
    ids=["a slope", "a gate", "a gate that is not silent"],
)
def test_a_slope_or_a_gate_that_is_not_undone_is_noticed(name: str, spoil: Callable) -> None:
    extra, width, reads = NEW[name]
    teacher, student = around(None), around(extra, width, reads)
    assert error(change(transfer(teacher, student, images()), spoil), teacher, student) > 1e-3


IMPASSABLE = {
    "no room for pairs": (lambda: nn.Sequential(conv(4, 7), nn.GELU()), 7),
    "no room for fours": (lambda: expansion(4, 15, 4), 4),
    "tanh": (lambda: nn.Sequential(conv(4, 8), nn.Tanh()), 8),
    "mish": (lambda: nn.Sequential(conv(4, 8), nn.Mish()), 8),
    "relu6": (lambda: nn.Sequential(conv(4, 8), nn.ReLU6()), 8),
    "no filter between two": (lambda: nn.Sequential(conv(4, 16), nn.GELU(), nn.GELU()), 16),
    "a maximum": (lambda: nn.Sequential(conv(4, 8), nn.GELU(), nn.MaxPool2d(1)), 8),
}


@pytest.mark.parametrize(("extra", "reads"), IMPASSABLE.values(), ids=IMPASSABLE)
def test_what_pairs_cannot_pass_is_refused(extra: Callable[[], nn.Module], reads: int) -> None:
    with refused("not idempotent"):
        transfer(around(None), around(extra, reads=reads), images())


def test_a_new_gate_on_a_layer_of_both() -> None:
    """A squeeze-excitation that the teacher lacks: a half of every unit, which the next layer reads doubly."""
    teacher, student = around(nn.ReLU), around(lambda: nn.Sequential(nn.ReLU(), SqueezeExcitation(7, 2)), 7, 7)
    record = transfer(teacher, student, images())
    assert_same(teacher, student, images())
    assert record.origins["fc.weight"].factor == 2.0
    assert record.origins["extra.1.fc2.weight"].how == "silent"


def test_every_unit_of_a_pair_learns() -> None:
    """None is dead: each is produced and read with weights other than zero, those of surplus units too."""
    student = around(*NEW["more units than pairs"])
    transfer(around(None), student, images())
    student(images()).square().sum().backward()
    gradient = student.extra[0].weight.grad
    assert gradient is not None
    assert bool((gradient.flatten(1).abs().amax(1) > 1e-6).all())


def test_random_pad_takes_the_same_networks() -> None:
    teacher, padded = around(None), around(*NEW["twice, with filters and a gate"])
    random_pad(teacher, padded, images())
    assert torch.equal(padded.a.weight, teacher.a.weight)


def test_the_gradient_of_what_reads_pairs_is_not_claimed() -> None:
    teacher, student, x = around(None), around(*NEW["gelu"]), images()
    record = transfer(teacher, student, x)
    for model in (teacher, student):
        model(x).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    assert predicted["fc.weight"].isnan().all()
    for name in ("a.weight", "a.bias", "fc.bias"):
        gradient: Tensor = student.get_parameter(name).grad
        assert (predicted[name] - gradient).abs().max() < BAR
