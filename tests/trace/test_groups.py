"""Whole groups of a grouped convolution in fewer, larger ones, whatever their numbers."""

from dataclasses import replace

import pytest
import torch
from checks import assert_same, change, error, refused
from networks import Net, grouped, images
from torch import nn

from net2net import transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")
Shape = tuple[int, int, int]  # groups, units that one reads, units that one gives
KINDS = pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])


def pair(teacher: Shape, student: Shape, transposed: bool = False) -> tuple[Net, Net]:
    return look_trained(grouped(*teacher, transposed)), look_trained(grouped(*student, transposed))


PACKED = {
    "three in two": ((3, 2, 3), (2, 4, 6)),
    "three in two with room left": ((3, 2, 3), (2, 5, 9)),
    "eleven in six": ((11, 2, 1), (6, 4, 3)),
    "five in two": ((5, 1, 2), (2, 3, 7)),
    "seven in six, one of which is copied": ((7, 2, 2), (6, 5, 4)),
    "four in two": ((4, 2, 2), (2, 5, 4)),
    "three in one": ((3, 2, 2), (1, 8, 7)),
}


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@KINDS
@pytest.mark.parametrize("name", PACKED)
def test_groups_in_fewer_larger_ones_are_exact(name: str, transposed: bool, split: str) -> None:
    teacher, student = pair(*PACKED[name], transposed)
    transfer(teacher, student, images(), split=split)
    assert_same(teacher, student, images())


def row(width: int, outputs: tuple[int, ...], groups: tuple[int, ...], last: nn.Module | None = None) -> Net:
    """`width` channels, then grouped convolutions to these outputs, SiLU behind each, and a norm in groups."""
    widths = [width, *outputs]
    layers = [nn.Conv2d(3, width, 1), nn.ReLU()]
    for k, g in enumerate(groups):
        layers += [nn.Conv2d(widths[k], widths[k + 1], 1, groups=g), nn.SiLU()]
    body = nn.Sequential(*layers, last or nn.Identity())
    return look_trained(
        Net({"body": body, "fc": nn.Linear(widths[-1], 5)}, lambda net, x: net.fc(net.body(x).mean((2, 3))))
    )


# Groups that coincide are one group, and a smaller group lies inside a larger one, whichever is drawn first.
BEHIND = {
    "packed together": (lambda: row(6, (12, 6), (3, 3)), lambda: row(8, (18, 8), (2, 2))),
    "more of them together": (lambda: row(6, (12, 6), (3, 3)), lambda: row(21, (35, 21), (7, 7))),
    "smaller behind larger": (lambda: row(8, (8, 8), (2, 4)), lambda: row(24, (24, 24), (4, 8))),
    "larger behind smaller": (lambda: row(8, (8, 8), (4, 2)), lambda: row(30, (30, 30), (10, 5))),
    "a norm over two of them": (
        lambda: row(8, (8,), (4,), nn.GroupNorm(2, 8)),
        lambda: row(16, (16,), (8,), nn.GroupNorm(4, 16)),
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_one_grouped_layer_behind_another_takes_its_groups_along(name: str) -> None:
    teacher, student = (make() for make in BEHIND[name])
    for seed in range(4):
        transfer(teacher, student, images(), generator=torch.Generator().manual_seed(seed))
        assert_same(teacher, student, images())


@KINDS
def test_groups_that_are_not_packed_as_the_record_says_are_noticed(transposed: bool) -> None:
    teacher, student = pair(*PACKED["three in two"], transposed)
    record = transfer(teacher, student, images())
    apart = change(record, lambda origin: replace(origin, merged=(3, 1)) if origin.merged != (1, 1) else origin)
    assert error(apart, teacher, student) > 1e-3


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 9, 5)], ids=["too few are read", "too few are given"])
def test_groups_that_do_not_fit_are_refused(shape: Shape) -> None:
    teacher, student = pair((3, 2, 3), shape)
    with refused(None, student):
        transfer(teacher, student, images())
