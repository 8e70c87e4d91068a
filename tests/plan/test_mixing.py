"""Streams that a layer norm begins: mixtures of channels where neither copies nor means serve."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import net2net
from net2net.fill import fill as filling
from net2net.fill import isometry
from net2net.fill.isometry import find_isometries

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    """A residual branch before whose layers a norm stands."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Merging(nn.Module):
    """Two positions become one: a norm over both, and a layer."""

    def __init__(self, width: int, merged: int, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width, elementwise_affine=affine)
        self.layer = nn.Linear(2 * width, merged, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1)))


class Stream(nn.Module):
    """Swin in small: patches, the norm that begins the first stream, blocks, the merging of two positions into another
    stream, a block on that, another merging."""

    def __init__(self, width: int, hidden: int = 8, merged: int = 10, affine: bool = True, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv1d(3, width, 2, 2)
        self.begin = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(blocks)))
        self.merge, self.block, self.again = Merging(width, merged, affine), Block(merged, 5), Merging(merged, 7)
        self.head = nn.Linear(7, 4)

    def begun(self, x: Tensor) -> Tensor:
        return self.begin(self.patches(x).mT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.begun(x))
        return self.head(self.again(self.block(self.merge(x))).relu().mean(1))


def trained(network: nn.Module) -> nn.Module:
    """Its norms' weights and biases are no longer ones and zeros."""
    for name, parameter in network.named_parameters():
        if "norm" in name or "begin" in name:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter)
    return network.eval()


class Short(Block):
    """One layer reads the stream and adds to it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.middle(self.norm(x))

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        del self.up, self.down
        self.middle = nn.Linear(width, width)


IMAGES = (5, 3, 16)


@pytest.mark.parametrize(("width", "wider"), [(6, 9), (12, 16), (12, 15), (9, 21), (8, 16)])
@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
def test_a_stream_that_a_norm_begins_grows_to_widths_that_are_no_multiple(width: int, wider: int, split: str) -> None:
    teacher, student = trained(Stream(width)), Stream(wider, hidden=11, merged=13).eval()
    record = net2net.transfer(teacher, student, torch.randn(IMAGES), split=split)
    assert record.measured is not None and record.measured.max_relative < 1e-12
    assert net2net.equivalence(teacher, student, torch.randn(IMAGES)).max_relative < 1e-12
    assert bool(record.origins["patches.weight"].mixed) == (wider % width > 0)
    assert len(record.origins["merge.layer.weight"].mixed) == 1 + (wider % width > 0)
    assert student.begin.eps == pytest.approx(teacher.begin.eps * (width / wider if wider % width else 1))


def test_norms_without_weights_behind_it_and_new_blocks_on_it() -> None:
    teacher, student = trained(Stream(6, affine=False)), Stream(9, affine=False, blocks=3).eval()
    record = net2net.transfer(teacher, student, torch.randn(IMAGES))
    assert record.measured is not None and record.measured.max_relative < 1e-12
    assert record.origins["blocks.2.down.weight"].fill == "zero"


def test_a_layer_that_reads_the_stream_and_adds_to_it() -> None:
    networks = [Stream(width) for width in (6, 9)]
    for network, width in zip(networks, (6, 9), strict=True):
        network.blocks.append(Short(width, 1))
    record = net2net.transfer(trained(networks[0]), networks[1].eval(), torch.randn(IMAGES))
    assert record.measured is not None and record.measured.max_relative < 1e-12
    assert [one.dim for one in record.origins["blocks.2.middle.weight"].mixed] == [0, 1]


class Half(Stream):
    """One layer makes the stream and something else."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.patches = nn.Conv1d(3, width + 4, 2, 2)

    def begun(self, x: Tensor) -> Tensor:
        first, second = self.patches(x).mT.split([self.begin.normalized_shape[0], 4], -1)
        return self.begin(first) + second.mean(-1, keepdim=True).relu()


def test_in_float32_the_two_agree_to_its_rounding() -> None:
    teacher, student = trained(Stream(12)).float(), Stream(16).float().eval()
    net2net.transfer(teacher, student, torch.randn(IMAGES).float())
    assert net2net.equivalence(teacher, student, torch.randn(IMAGES).float()).max_relative < 1e-4


@pytest.mark.parametrize("lost", ["weights", "mean before", "isometry", "bias"])
def test_without_any_of_its_parts_it_is_refused(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor, wider: int) -> tuple[Tensor, Tensor, Tensor]:
        stream, before, first = find_isometries(weight, wider)
        if lost == "weights":
            return stream, before, torch.ones_like(first)
        if lost == "isometry":
            return stream + 0.01 * torch.randn_like(stream), before, first
        return stream, before, first

    def changed(mixed: isometry.Mixed, theirs: dict[str, Tensor]) -> Tensor:
        made = matrix(mixed, theirs)
        if lost == "mean before" and mixed.how == "before":
            return find_isometries(theirs[str(mixed.begins)], len(made))[1]
        return torch.zeros_like(made) if lost == "bias" and mixed.how == "bias" else made

    matrix: Callable = filling.mixing_matrix
    monkeypatch.setattr(isometry, "find_isometries", broken)
    monkeypatch.setattr(filling, "mixing_matrix", changed)
    with pytest.raises(net2net.TransferError, match="does not compute its teacher's function"):
        net2net.transfer(trained(Stream(6)), Stream(9).eval(), torch.randn(IMAGES))


class Bent(Stream):
    """An activation on the stream."""

    def begun(self, x: Tensor) -> Tensor:
        return super().begun(x).relu()


class Taken(Stream):
    """A product on the stream."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.rand(width))

    def begun(self, x: Tensor) -> Tensor:
        return self.scale * super().begun(x)


class Twice(Stream):
    """Two norms make the stream together."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.more, self.norm = nn.Conv1d(3, width, 2, 2), nn.LayerNorm(width)

    def begun(self, x: Tensor) -> Tensor:
        return super().begun(x) + self.norm(self.more(x).mT)


@pytest.mark.parametrize("kind", [Bent, Taken, Twice, Half])
def test_what_no_mixture_passes_is_refused_before_anything_is_written(kind: type[Stream]) -> None:
    teacher, student = trained(kind(6)), kind(9).eval()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(net2net.TransferError, match="takes the mean over all units"):
        net2net.transfer(teacher, student, torch.randn(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_width_for_which_no_mixture_is_found_is_refused_before_anything_is_written() -> None:
    teacher, student = trained(Stream(6)), Stream(7).eval()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(net2net.TransferError, match=r"begins a stream of 6 channels, .* write them as 7"):
        net2net.transfer(teacher, student, torch.randn(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_weights_that_are_no_numbers_are_refused() -> None:
    teacher = trained(Stream(6))
    teacher.begin.weight.data[1] = float("inf")
    with pytest.raises(net2net.TransferError):
        net2net.transfer(teacher, Stream(9).eval(), torch.randn(IMAGES))


def test_the_record_of_mixtures_is_saved_and_replayed(tmp_path) -> None:
    teacher, student, again = trained(Stream(6)), Stream(9).eval(), Stream(9).eval()
    record = net2net.transfer(teacher, student, torch.randn(IMAGES))
    net2net.save_record(record, tmp_path / "record.json")
    net2net.replay(net2net.load_record(tmp_path / "record.json"), teacher, again)
    for (name, one), other in zip(student.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_gradients_of_mixtures_are_not_claimed_to_be_known() -> None:
    teacher, student = trained(Stream(6)), Stream(9).eval()
    images = torch.randn(IMAGES)
    record = net2net.transfer(teacher, student, images)
    for network in (teacher, student):
        network(images).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    assert bool(predicted["patches.weight"].isnan().all())
    assert torch.allclose(predicted["head.weight"], student.head.weight.grad, rtol=1e-10, atol=1e-10)


def test_random_pad_keeps_the_corner() -> None:
    teacher, student = trained(Stream(6)), Stream(9).eval()
    fresh = copy.deepcopy(student)
    net2net.random_pad(teacher, student, torch.randn(IMAGES))
    assert torch.equal(student.patches.weight[:6], teacher.patches.weight)
    assert torch.equal(student.patches.weight[6:], fresh.patches.weight[6:])
    assert torch.equal(student.begin.weight[:6], teacher.begin.weight)


@pytest.mark.parametrize("weight", [torch.ones(12), 1 + 0.01 * torch.arange(12), torch.linspace(-2, 3, 12)])
def test_frames_are_what_they_say(weight: Tensor) -> None:
    stream, before, new = find_isometries(weight, 16)
    one = torch.eye(12)
    for left, right in (
        (stream.T @ stream, one),
        (before.T @ before, one),
        (stream.sum(1), torch.full((16,), (12 / 16) ** 0.5)),
        (before.sum(0) - before.sum(0).mean(), torch.zeros(12)),
        (new[:, None] * before, stream * weight),
    ):
        assert float((left - right).abs().max()) < 1e-11
    assert all(torch.equal(a, b) for a, b in zip(find_isometries(weight, 16), (stream, before, new), strict=True))
