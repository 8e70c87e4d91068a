"""How copies of a unit share its outgoing weights, and what tells them apart in training: shares, pairs, noise."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import BAR, assert_same, change_axes, drop_shares, error, grow, shift_index, trained
from networks import chain, conv, grouped, images, residual, tied
from torch import Tensor, nn
from torch.optim import SGD, Adam, RMSprop

from net2net import Axis, Transfer, equivalence, replay, transfer, widen
from net2net.fill.gather import share_out

pytestmark = pytest.mark.usefixtures("float64")
TOLD_APART = ("uneven", "paired")
OPTIMIZERS = {
    "SGD": lambda p: SGD(p, 1e-3, momentum=0.9),
    "RMSprop": lambda p: RMSprop(p, 1e-3),
    "Adam": lambda p: Adam(p, 1e-3),
}


def grown(split: str, **options) -> tuple[nn.Module, nn.Module, Transfer]:
    """The same teacher and the same student in every call, grown."""
    torch.manual_seed(0)
    teacher, student = trained(chain(4, 5), chain(10, 11))
    return teacher, student, transfer(teacher, student, images(), split=split, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps on a loss that weighs all outputs, in eval mode: batch norm's statistics stay what they are."""
    for _ in range(steps):
        optimizer.zero_grad()
        y = model.eval()(images())
        (y * torch.randn_like(y) + y.square() / 2).sum().backward()
        optimizer.step()


def first_copies(axis: Axis) -> Tensor:
    """For every entry the first copy of the same unit."""
    return torch.tensor([int(((axis.index == i) & axis.first).nonzero()) for i in axis.index])


def apart(record: Transfer, student: nn.Module, name: str) -> Tensor:
    """How far the incoming weights of every later copy are from those of the first."""
    axis, weight = record.origins[name].axes[0], student.get_parameter(name).detach()
    return (weight - weight[first_copies(axis)]).flatten(1).abs().amax(1)[~axis.first]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equal_copies_get_equal_gradients_and_never_part(kind: str) -> None:
    _, student, record = grown("equal")
    optimizer, start = OPTIMIZERS[kind](student.parameters()), student.conv0.weight.detach().clone()
    train(student, optimizer, 5)
    for name in ("conv0.weight", "conv1.weight", "norm0.bias"):
        gradient, firsts = student.get_parameter(name).grad, first_copies(record.origins[name].axes[0])
        assert (gradient - gradient[firsts]).abs().max() <= 1e-9 * gradient.abs().max()
    for name in ("conv0.weight", "conv1.weight"):
        assert apart(record, student, name).max() < 1e-9
    assert not torch.allclose(start, student.conv0.weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("split", TOLD_APART)
def test_copies_that_are_told_apart_part_at_once(split: str, kind: str) -> None:
    teacher, student, record = grown(split)
    assert_same(teacher, student, images())
    assert not apart(record, student, "conv0.weight").any()
    train(student, OPTIMIZERS[kind](student.parameters()), 3)  # a first step of Adam is made of signs alone
    for name in ("conv0.weight", "conv1.weight"):
        assert apart(record, student, name).min() > 1e-6


@pytest.mark.parametrize("split", TOLD_APART)
def test_copies_in_groups_part_too(split: str) -> None:
    def make(n: int) -> nn.Module:
        return nn.Sequential(conv(3, n), nn.ReLU(), conv(n, n, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(48 * n, 5))

    teacher, student = make(6), make(16)
    record = grow(teacher, student, split=split)
    train(student, SGD(student.parameters(), lr=0.05), 1)
    assert apart(record, student, "0.weight").min() > 1e-6


def test_fresh_units_are_the_constructors_and_nothing_reads_them_at_first() -> None:
    torch.manual_seed(0)
    teacher, student = trained(chain(4, 5), chain(10, 11))
    drawn = copy.deepcopy(student)
    record = transfer(teacher, student, images(), split="fresh")
    for mode in ("eval", "train"):
        assert_same(getattr(teacher, mode)(), getattr(student, mode)(), images())
    assert torch.equal(student.conv0.weight[4:], drawn.conv0.weight[4:])
    assert torch.equal(student.norm0.running_var[4:], drawn.norm0.running_var[4:])
    assert not student.conv1.weight[:5, 4:].any() and torch.equal(student.conv1.weight[5:], drawn.conv1.weight[5:])
    wrong = change_axes(record, lambda axis: replace(axis, index=axis.index.roll(1)) if axis.reads else axis)
    assert error(wrong, teacher, student) > 1e-3  # negative control: what reads a new unit is not zero
    replay(record, teacher, student)
    train(student, SGD(student.parameters(), 0.01), 2)  # the first step moves what reads the new units
    assert (student.conv0.weight[4:] - drawn.conv0.weight[4:]).flatten(1).abs().amax(1).min() > 1e-6


def test_fresh_units_behind_fresh_units_of_a_group_of_their_own() -> None:
    def make(n: int) -> nn.Module:
        return nn.Sequential(conv(3, n), conv(n, n, groups=n), nn.ReLU(), nn.Flatten(), nn.Linear(48 * n, 5))

    teacher, student = trained(make(4), make(10))
    transfer(teacher, student, images(), split="fresh")
    assert_same(teacher, student, images())
    grown = widen(teacher, images(), {"0": 10}, split="fresh")
    assert_same(teacher, grown, images())
    assert not grown[4].weight.unflatten(1, (10, 48))[:, 4:].any()


def test_shares_are_positive_sum_to_one_and_differ_from_reader_to_reader() -> None:
    teacher, student, record = grown("uneven")
    rows, index = (record.origins["conv1.weight"].axes[dim].index for dim in (0, 1))
    share = student.conv1.weight.detach() / teacher.conv1.weight.detach()[rows][:, index]
    total = torch.zeros(len(rows), 4, 3, 3).index_add_(1, index, share)
    assert torch.allclose(total, torch.ones_like(total)) and (share > 0).all()
    assert torch.equal(student.conv0.weight[:4], teacher.conv0.weight)  # fault 8: originals are not rescaled
    twice = [k for k in range(10) if (index == index[k]).sum() > 1]
    assert share[:, twice, 0, 0].std(0).min() > 1e-3


@pytest.mark.parametrize("split", TOLD_APART)
def test_large_codes_of_new_layers_take_no_memory(split: str) -> None:
    far = 10**13  # a new layer's codes number all entries of a network
    index = torch.tensor([far, 3, far, -1])
    axis = Axis(index, torch.tensor([True, True, False, False]), True, torch.tensor([0.5, 1.0, 0.5, 0.0]).double())
    taken = share_out(axis, torch.ones(5, 4), (1, 0), torch.Generator().manual_seed(0), split, torch.ones(1))
    assert torch.allclose(taken[:, 0] + taken[:, 2], torch.ones(5)) and torch.equal(taken[:, 1], torch.ones(5))
    assert (taken[:, 0] - taken[:, 2]).abs().min() > 0


def test_noise_in_pairs_that_does_not_cancel_is_noticed() -> None:
    """The noise of a pair cancels by the shares: with others something of it is left."""
    teacher, student, record = grown("paired")
    wrong = change_axes(record, lambda axis: replace(axis, share=axis.share.roll(1)) if axis.reads else axis)
    assert error(wrong, teacher, student) > 1e-3


WIDER = {
    "chain": (lambda n: chain(n, n + 1, n), 3, 8),
    "residual": (residual, 4, 9),
    "tied weights": (tied, 3, 8),
    "groups": (lambda n: grouped(2, n, n), 3, 7),
}


@pytest.mark.parametrize("spoil", [drop_shares, shift_index])
@pytest.mark.parametrize("name", WIDER)
def test_a_record_with_wrong_shares_or_indices_is_noticed(name: str, spoil: Callable[[Axis], Axis]) -> None:
    make, narrow, wide = WIDER[name]
    teacher, student = make(narrow), make(wide)
    record = grow(teacher, student)
    assert error(change_axes(record, spoil), teacher, student) > 1e-4


@pytest.mark.parametrize("role", ["running_mean", "running_var", "weight", "bias"])
def test_a_copy_with_batch_norm_of_its_own_is_noticed(role: str) -> None:
    """Faults 1, 6 and 13: of several new channels only the last one, or the wrong one, has its statistics."""
    teacher, student, record = grown("equal")
    origin = record.origins[f"norm1.{role}"]
    index = origin.axes[0].index.clone()
    assert torch.equal(student.state_dict()[f"norm1.{role}"], teacher.state_dict()[f"norm1.{role}"][index])
    index[-1] = (index[-1] + 1) % 5
    moved = replace(origin, axes={0: replace(origin.axes[0], index=index)})
    assert error(replace(record, origins=record.origins | {f"norm1.{role}": moved}), teacher, student) > 1e-6


def test_noise_is_on_the_incoming_weights_of_later_copies_alone() -> None:
    """Faults 5, 15 and 17: noise on the originals, the same for both twins, one number a filter, on both sides."""
    (teacher, quiet, _), (_, noisy, record) = grown("equal"), grown("equal", noise=0.1)
    assert record.noise == 0.1 and record.measured is not None and record.measured.max_relative <= BAR
    assert equivalence(teacher, quiet, images()).max_relative <= BAR
    assert equivalence(teacher, noisy, images()).max_relative > 1e-3
    changed = {name: noisy.state_dict()[name] != tensor for name, tensor in quiet.state_dict().items()}
    assert {name for name, where in changed.items() if where.any()} == {"conv0.weight", "conv1.weight"}
    for name in ("conv0.weight", "conv1.weight"):
        first = record.origins[name].axes[0].first
        assert not changed[name][first].any() and changed[name][~first].all()
    difference = (noisy.conv0.weight - quiet.conv0.weight)[4:].flatten(1)
    assert difference.std(1).min() > 0 and len(torch.unique(difference)) == difference.numel()
    assert 0.05 < difference.std() / quiet.conv0.weight.std() < 0.15
