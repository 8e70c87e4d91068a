"""Every experiment's pair agrees to 1e-12 relative in float64, on statistics disturbed; torchvision's: test_zoo.py."""

import math
from dataclasses import replace

import pytest
from checks import BAR, assert_same, change, change_axes, drop_shares, error, refill
from networks import images
from torch import nn

from experiments.models import build
from net2net import equivalence, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def inception(**changes: float) -> nn.Module:
    return build({"name": "inception", "slim": 0.07} | changes, 10, 3)


def resnet(**changes: float) -> nn.Module:
    return build({"name": "resnet"} | changes, 10, 3)


EXPERIMENTS = {
    "wider_inception": (lambda: inception(width=math.sqrt(0.3)), lambda: inception()),
    "deeper_inception": (lambda: inception(), lambda: inception(extra_pairs=2)),
    "design_space_wider": (lambda: inception(), lambda: inception(width=math.sqrt(2))),
    "design_space_deeper": (lambda: inception(slim=0.04), lambda: inception(slim=0.04, pairs_on_top=4)),
    "quickstart": (lambda: inception(stem=8, width=math.sqrt(0.3)), lambda: inception(stem=8)),
    "wider_and_deeper": (lambda: inception(), lambda: inception(width=1.7, extra_pairs=1, pairs_on_top=1)),
    "resnet_wider": (lambda: resnet(), lambda: resnet(width=2.3)),
    "resnet_deeper": (lambda: resnet(), lambda: resnet(blocks=5, inner=1.5)),
}
QUICK = ("quickstart", "deeper_inception")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS]
)
def test_a_student_of_every_experiment_computes_its_teachers_function(name: str) -> None:
    side = 8 if name == "quickstart" else 20
    x = images(8, 3, side, side + 4)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS[name])
    outputs = teacher(x)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs.abs().max(), "a dead network proves nothing"
    for split in ("equal", "uneven"):
        transfer(teacher, student, x[:2], split=split)
        measured = equivalence(teacher, student, images(3, 3, side, side + 4))
        assert measured.max_relative <= BAR and measured.agree == 3


def test_widening_is_exact_in_train_mode() -> None:
    x = images(16, 3, 16, 16)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS["quickstart"])
    transfer(teacher, student, x[:2], split="uneven")
    assert_same(teacher, student, x, ("train",), bar=1e-11)


# what is spoilt -> (the pair, how its record is spoilt)
SPOILT = {
    "shares of a residual network": ("resnet_wider", lambda record: change_axes(record, drop_shares)),
    "shares of an inception network": ("wider_inception", lambda record: change_axes(record, drop_shares)),
    "the variance of a new norm": ("deeper_inception", lambda record: refill(record, "deviation", "zero")),
    "the mean of a new norm": ("deeper_inception", lambda record: refill(record, "mean", "zero")),
    "the centre of a new layer": ("deeper_inception", lambda record: refill(record, "pass", "zero")),
    "silence of a new branch": (
        "resnet_deeper",
        lambda record: change(record, lambda origin: replace(origin, fill="one") if origin.how == "silent" else origin),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILT)
def test_without_one_step_the_student_differs(what: str) -> None:
    name, spoil = SPOILT[what]
    x = images(8, 3, 32, 32)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS[name])
    assert not error(spoil(transfer(teacher, student, x, split="equal")), teacher, student, x) < 1e-3
