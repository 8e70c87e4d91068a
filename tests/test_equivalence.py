"""The measure itself: the largest difference, in both modes, and nothing that could hide one."""

import math
from dataclasses import dataclass

import pytest
import torch
from checks import modes, refused, state, unchanged
from networks import Net, chain
from torch import Tensor, nn

from net2net import Equivalence, equivalence, transfer
from net2net.equivalence import compare
from net2net.testing import look_trained


def fixed(value) -> Net:
    """A network whose output is `value`, whatever it reads."""
    return Net({}, lambda net, x: value)


INPUT = torch.zeros(2, 3)


def test_the_largest_difference_is_reported_and_nothing_cancels() -> None:
    """Faults 3 and 19: a sum of signed differences is zero here."""
    theirs, mine = torch.tensor([[1.0, -4.0], [0.0, 2.0]]), torch.tensor([[2.0, -5.0], [1.0, 1.0]])
    measured = equivalence(fixed(theirs), fixed(mine), INPUT)
    assert (theirs - mine).sum() == 0
    assert measured == Equivalence(max_abs=1.0, max_relative=0.25, agree=1, examples=2, mode="eval")
    assert str(measured) == "max_abs 1.00e+00, max_relative 2.50e-01, agree 1 of 2 (top-1, eval mode)"


def test_each_position_of_a_sequence_counts() -> None:
    theirs = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
    mine = theirs.clone()
    mine[0, 2] = torch.tensor([4.0, 3.0])
    assert (compare(theirs, mine).agree, compare(theirs, mine).examples) == (2, 3)


def test_the_difference_is_relative_to_the_teacher() -> None:
    small, large = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    assert equivalence(fixed(small), fixed(large), INPUT).max_relative == 2.0
    assert equivalence(fixed(large), fixed(small), INPUT).max_relative == pytest.approx(2 / 3)
    assert equivalence(fixed(0 * small), fixed(small), INPUT).max_relative == 1.0  # nothing to be relative to


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_finite_is_no_small_difference(bad: float, at: int) -> None:
    value = torch.ones(1, 3)
    broken = value.clone()
    broken[0, at] = bad
    for pair in ((value, broken), (broken, value), (broken, broken)):
        measured = equivalence(*map(fixed, pair), INPUT)
        assert math.isnan(measured.max_relative) and measured.agree == 0
        assert not measured.max_relative <= 1e9


def test_a_detector_that_finds_nothing_in_an_image_is_refused_before_any_work() -> None:
    def make(width: int) -> Net:
        parts = {"a": nn.Linear(3, width), "b": nn.Linear(width, 4)}
        return Net(parts, lambda net, x: [y[y[:, 0] > 0] for y in net.b(net.a(x).relu()).split(1)])

    teacher, student = make(5).double(), make(8).double()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():  # then it finds something in half of the images
        teacher.b.bias[0] -= teacher.b(teacher.a(x).relu())[:, 0].median()
    found = [bool(len(y)) for y in teacher(x)]
    assert any(found) and not all(found)
    with refused("An output of the network is empty, so there is nothing to compare: give inputs", student):
        transfer(teacher, student, x)
    x = x[torch.tensor(found)]
    transfer(teacher, student, x)
    assert equivalence(teacher, student, x).max_relative < 1e-12


def test_what_computes_an_empty_part_is_not_free() -> None:
    def make(width: int) -> Net:
        parts = {"a": nn.Linear(3, width), "b": nn.Linear(width, 4)}
        return Net(parts, lambda net, x: (net.b(net.a(x)), net.a(x)[x[:, 0] > 6].sum(1)))

    teacher, student = make(5).double(), make(8).double()
    with refused("An output of the network is empty", student):
        transfer(teacher, student, torch.zeros(4, 3).double())


def test_the_worst_output_of_several_counts() -> None:
    @dataclass
    class Outputs:
        logits: Tensor
        others: dict

    a = torch.ones(2, 2)
    outputs = Outputs(a, {"aux": (100 * a, [a, 3])}), Outputs(a, {"aux": (100 * a, [a + 0.5, 3])})
    assert equivalence(*map(fixed, outputs), INPUT).max_relative == 0.5
    assert equivalence(fixed((a, a * 1e6)), fixed((a + 0.5, a * 1e6)), INPUT).max_relative == 0.5


def test_whole_numbers_scalars_and_complex_numbers_are_compared_exactly() -> None:
    large = torch.tensor([[2**24, 0]])
    assert equivalence(fixed(large), fixed(large + 1), INPUT).max_abs == 1
    scalar = equivalence(fixed(torch.tensor(2.0)), fixed(torch.tensor(1.0)), INPUT)
    assert (scalar.max_relative, scalar.examples) == (0.5, 0)
    a, b = torch.tensor([[1 + 1j]]), torch.tensor([[1 + 2j]])
    assert equivalence(fixed(a), fixed(b), INPUT).max_abs == 1
    half = torch.full((1, 1), 60000.0, dtype=torch.float16)
    assert equivalence(fixed(half), fixed(-half), INPUT).max_abs == 120000  # beyond what float16 holds


@pytest.mark.parametrize(
    ("theirs", "mine", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), r"differ in shape: .* \[\(2, 3\)\], the student's \[\(2, 1\)\]"),
        (torch.zeros(2), (torch.zeros(2), torch.zeros(1)), r"the student's \[\(2,\), \(1,\)\]"),
        (None, None, "returns a NoneType, in which no tensors are found: choose some by outputs"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "empty, so there is nothing to compare"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(theirs, mine, message: str) -> None:
    with refused(message):
        equivalence(fixed(theirs), fixed(mine), INPUT)


def test_the_mode_is_the_one_asked_for() -> None:
    network, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.running_mean.fill_(3.0)
    x = torch.randn(8, 2)
    assert equivalence(network, other, x, mode="train").max_relative == 0
    assert equivalence(network, other, x).max_relative > 0.1
    assert equivalence(network, other, x, mode="train").mode == "train"
    with refused("mode 'test' is unknown: it is 'eval' or 'train'"):
        equivalence(network, other, x, mode="test")


@pytest.mark.parametrize(("shape", "rows"), [((3, 64, 64, 64), 1), ((3, 512, 512), 2)], ids=["maps", "sequences"])
def test_a_transfer_is_checked_on_few_rows_of_a_large_example(shape: tuple[int, ...], rows: int) -> None:
    """The inputs drawn like it have 2**16 numbers or so: one row of large maps, two of sequences."""
    seen = []

    def show(net: Net, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return net.last(net.first(x.flatten(2).mean(2)).relu())

    teacher, student = (Net({"first": nn.Linear(shape[1], n), "last": nn.Linear(n, 2)}, show) for n in (4, 7))
    transfer(teacher, student, torch.randn(shape))
    assert (rows, *shape[1:]) in seen
    assert not {x[0] for x in seen} - {rows, shape[0]}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_networks_inputs_and_random_state_are_left_as_they_were(mode: str) -> None:
    def noisy() -> Net:
        inner = look_trained(chain(3))
        return Net({"inner": inner}, lambda net, x: net.inner(torch.dropout(x.mul_(2), 0.5, net.training)))

    teacher, student = noisy(), noisy()
    student.load_state_dict(teacher.state_dict())
    teacher.train(), teacher.inner.norm0.eval(), student.eval()
    was = modes(teacher, student)
    before, x, random = state(teacher), torch.randn(4, 3, 6, 8), torch.get_rng_state()
    copy = x.clone()
    assert equivalence(teacher, student, x, mode=mode).max_relative == 0  # the same draws for both
    assert unchanged(teacher, before) and unchanged(student, before) and modes(teacher, student) == was
    assert torch.equal(x, copy) and torch.equal(random, torch.get_rng_state())


def test_a_network_that_fails_is_named_with_what_it_was_given() -> None:
    with refused(r"forward pass of Linear on inputs \(2, 3\) fails"):
        equivalence(nn.Linear(4, 2), nn.Linear(4, 2), INPUT)
