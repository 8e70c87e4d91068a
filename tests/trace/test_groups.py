"""Whole groups of a grouped convolution in fewer, larger ones, whatever their numbers."""

from dataclasses import replace

import pytest
import torch.nn.functional as F
from networks import Net, assert_same, change, grouped, images, state, unchanged
from torch import nn

from net2net import TransferError, equivalence, replay, transfer
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


def test_one_grouped_convolution_behind_another() -> None:
    def make(groups: int, n: int, inner: int) -> Net:
        parts = {"stem": conv1(3, n), "a": conv1(n, inner, groups), "b": conv1(inner, n, groups), "fc": nn.Linear(n, 5)}
        return look_trained(Net(parts, lambda net, x: net.fc(F.silu(net.b(net.a(net.stem(x).relu()))).mean((2, 3)))))

    def conv1(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 1, groups=groups)

    teacher, student = make(3, 6, 12), make(2, 8, 18)
    transfer(teacher, student, images())
    assert_same(teacher, student, images())


@KINDS
def test_groups_that_are_not_packed_as_the_record_says_are_noticed(transposed: bool) -> None:
    teacher, student = pair(*PACKED["three in two"], transposed)
    record = transfer(teacher, student, images())
    apart = change(record, lambda origin: replace(origin, merged=(3, 1)) if origin.merged != (1, 1) else origin)
    replay(apart, teacher, student)
    assert equivalence(teacher, student, images()).max_relative > 1e-3


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 9, 5)], ids=["too few are read", "too few are given"])
def test_groups_that_do_not_fit_are_refused(shape: Shape) -> None:
    teacher, student = pair((3, 2, 3), shape)
    before = state(student)
    with pytest.raises(TransferError):
        transfer(teacher, student, images())
    assert unchanged(student, before)


def test_the_gradient_of_a_packing_is_the_teachers() -> None:
    teacher, student = pair((3, 2, 3), (2, 4, 6))  # two and one: the third group twice as wide
    record, x = transfer(teacher, student, images()), images()
    for model in (teacher, student):
        model(x).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    for name, parameter in student.named_parameters():
        known = ~predicted[name].isnan()
        assert known.any()
        assert (predicted[name] - parameter.grad)[known].abs().max() < 1e-12 * max(parameter.grad.abs().max(), 1)
