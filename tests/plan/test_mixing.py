"""Streams that a layer norm begins: mixtures of channels where neither copies nor means serve."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import BAR, assert_same, change, error, refused, state
from networks import Net, images
from torch import Tensor, nn

from net2net import Origin, Transfer, random_pad, transfer
from net2net.fill.isometry import find_isometries
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def merging(width: int, merged: int, affine: bool = True) -> Net:
    """Two positions become one: a norm over both, and a layer."""
    parts = {"norm": nn.LayerNorm(2 * width, elementwise_affine=affine)}
    return Net(
        parts | {"layer": nn.Linear(2 * width, merged, bias=False)},
        lambda net, x: net.layer(net.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1))),
    )


def block(width: int, hidden: int) -> Net:
    """A residual branch before whose layers a norm stands; with 0 hidden units one layer reads the stream and adds."""
    if not hidden:
        parts = {"norm": nn.LayerNorm(width), "middle": nn.Linear(width, width)}
        return Net(parts, lambda net, x: x + net.middle(net.norm(x)))
    parts = {"norm": nn.LayerNorm(width), "up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}
    return Net(parts, lambda net, x: x + net.down(nn.functional.gelu(net.up(net.norm(x)))))


def begin(net: Net, x: Tensor) -> Tensor:
    return net.begin(net.patches(x).mT)


def stream(
    width: int,
    hidden: tuple[int, ...] = (8, 8),
    merged: int = 10,
    affine: bool = True,
    more: int = 0,
    first: Callable[[Net, Tensor], Tensor] = begin,
) -> Net:
    """Swin in small: patches, the norm that begins the first stream, blocks, the merging of two positions into another
    stream, a block on that, another merging. `first` begins the stream, of `more` units than it is wide."""
    parts = {
        "patches": nn.Conv1d(3, width + more, 2, 2),
        "begin": nn.LayerNorm(width),
        "blocks": nn.Sequential(*(block(width, units) for units in hidden)),
        "merge": merging(width, merged, affine),
        "block": block(merged, 5),
        "again": merging(merged, 7),
        "head": nn.Linear(7, 4),
        "scale": nn.Parameter(torch.rand(width)),
        "other": nn.Conv1d(3, width, 2, 2),
        "norm": nn.LayerNorm(width),
    }
    unused = {begin: ("scale", "other", "norm")}.get(first, ())
    parts = {name: part for name, part in parts.items() if name not in unused}
    return look_trained(
        Net(parts, lambda net, x: net.head(net.again(net.block(net.merge(net.blocks(first(net, x))))).relu().mean(1)))
    )


def signals() -> Tensor:
    return images(5, 3, 16)


@pytest.mark.parametrize(("width", "wider"), [(6, 9), (12, 16), (12, 15), (9, 21), (8, 16)])
@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
def test_a_stream_that_a_norm_begins_grows_to_widths_that_are_no_multiple(width: int, wider: int, split: str) -> None:
    teacher, student = stream(width), stream(wider, hidden=(11, 11), merged=13)
    record = transfer(teacher, student, signals(), split=split)
    assert_same(teacher, student, signals())
    assert bool(record.origins["patches.weight"].mixed) == (wider % width > 0)
    assert len(record.origins["merge.layer.weight"].mixed) == 1 + (wider % width > 0)
    assert student.begin.eps == pytest.approx(teacher.begin.eps * (width / wider if wider % width else 1))


def test_a_layer_that_reads_the_stream_and_adds_to_it_and_norms_without_weights_and_new_blocks_on_it() -> None:
    teacher, student = stream(6, (8, 0), affine=False), stream(9, (8, 0, 8), affine=False)
    record = transfer(teacher, student, signals())
    assert_same(teacher, student, signals())
    assert [one.dim for one in record.origins["blocks.1.middle.weight"].mixed] == [0, 1]
    assert record.origins["blocks.2.down.weight"].fill == "zero"


def test_in_float32_the_two_agree_to_its_rounding() -> None:
    teacher, student = stream(12).float(), stream(16).float()
    transfer(teacher, student, signals().float())
    assert_same(teacher, student, signals().float(), bar=1e-4)


def spoil_mixture(record: Transfer, lost: str) -> Transfer:
    """The record with every mixture of one kind taken for another."""
    other = {"before": "stream", "behind": "stream", "stream": "before", "first": "other", "bias": "other"}[lost]

    def spoil(origin: Origin) -> Origin:
        mixed = tuple(replace(one, how=other) if one.how == lost else one for one in origin.mixed)
        return replace(origin, mixed=mixed) if mixed != origin.mixed else origin

    return change(record, spoil)


@pytest.mark.parametrize("lost", ["before", "behind", "stream", "first", "bias"])
def test_without_any_of_its_parts_it_differs(lost: str) -> None:
    teacher, student = stream(6), stream(9)
    record = transfer(teacher, student, signals())
    assert error(spoil_mixture(record, lost), teacher, student, signals()) > 1e-3


def write_half(net: Net, x: Tensor) -> Tensor:
    """One layer makes the stream and something else."""
    first, second = net.patches(x).mT.split([net.begin.normalized_shape[0], 4], -1)
    return net.begin(first) + second.mean(-1, keepdim=True).relu()


UNMIXED = "mean over all units"
# name -> (how the stream begins, units that its layer makes besides, the student's width, the reason)
IMPASSABLE = {
    "an activation on it": (lambda net, x: begin(net, x).relu(), 0, 9, UNMIXED),
    "a product on it": (lambda net, x: net.scale * begin(net, x), 0, 9, UNMIXED),
    "two norms make it": (lambda net, x: begin(net, x) + net.norm(net.other(x).mT), 0, 9, UNMIXED),
    "a layer makes it and more": (write_half, 4, 9, UNMIXED),
    "no mixture has this width": (begin, 0, 7, r"6 channels, .* 7"),
}


@pytest.mark.parametrize("name", IMPASSABLE)
def test_what_no_mixture_passes_is_refused_before_anything_is_written(name: str) -> None:
    first, more, wider, message = IMPASSABLE[name]
    teacher, student = (stream(width, more=more, first=first) for width in (6, wider))
    with refused(message, student):
        transfer(teacher, student, signals())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    teacher, student = stream(6), stream(9)
    teacher.begin.weight.data[1] = value
    with refused(r"begin\.weight of the teacher is not finite", student):
        transfer(teacher, student, signals())


def test_gradients_of_mixtures_are_not_claimed_to_be_known() -> None:
    teacher, student, x = stream(6), stream(9), signals()
    record = transfer(teacher, student, x)
    for network in (teacher, student):
        network(x).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    assert bool(predicted["patches.weight"].isnan().all())
    assert torch.allclose(predicted["head.weight"], student.head.weight.grad, rtol=1e-10, atol=1e-10)


def test_random_pad_keeps_the_corner() -> None:
    teacher, student = stream(6), stream(9)
    fresh = state(student)
    random_pad(teacher, student, signals())
    assert torch.equal(student.patches.weight[:6], teacher.patches.weight)
    assert torch.equal(student.patches.weight[6:], fresh["patches.weight"][6:])
    assert torch.equal(student.begin.weight[:6], teacher.begin.weight)


@pytest.mark.parametrize("weight", [torch.ones(12), 1 + 0.01 * torch.arange(12), torch.linspace(-2, 3, 12)])
def test_frames_are_isometries_that_the_new_weights_undo(weight: Tensor) -> None:
    stream, before, new = find_isometries(tuple(weight.tolist()), 16)
    one = torch.eye(12)
    for left, right in (
        (stream.T @ stream, one),
        (before.T @ before, one),
        (stream.sum(1), torch.full((16,), (12 / 16) ** 0.5)),
        (before.sum(0) - before.sum(0).mean(), torch.zeros(12)),
        (new[:, None] * before, stream * weight),
    ):
        assert float((left - right).abs().max()) < 10 * BAR
    assert all(
        torch.equal(a, b)
        for a, b in zip(find_isometries(tuple(weight.tolist()), 16), (stream, before, new), strict=True)
    )
