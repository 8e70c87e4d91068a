"""Layer scales on a stream whose width is no multiple of the old one: new units hold means of products."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import BAR, assert_same, change, error, grow, refused, trained
from networks import Net
from torch import Tensor, nn
from torchvision.ops import Permute

from net2net import load_record, random_pad, replay, save_record, transfer, widen

pytestmark = pytest.mark.usefixtures("float64")
Block = Callable[[nn.Module, Tensor], Tensor]


def tokens() -> Tensor:
    return torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))


def scaled(blocks: list[nn.Module], width: int, how: Block) -> nn.Module:
    """A table and positions, blocks on their stream, a norm and a layer."""
    parts = {"table": nn.Embedding(7, width), "places": nn.Parameter(torch.randn(1, 5, width))}
    parts |= {"blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(width), "out": nn.Linear(width, 4)}

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.table(x) + net.places
        for block in net.blocks:
            x = how(block, x)
        return net.out(net.norm(x))

    return Net(parts, forward)


def block(width: int, scales: int = 1) -> nn.Module:
    parts = {"norm": nn.LayerNorm(width), "inner": nn.Linear(width, 9), "last": nn.Linear(9, width)}
    return Net(parts | {f"scale{k}": nn.Parameter(torch.randn(width)) for k in range(scales)}, lambda net, x: x)


def branch(net: nn.Module, x: Tensor) -> Tensor:
    return net.last(net.inner(net.norm(x)).relu())


def pre_norm(width: int) -> nn.Module:
    return scaled([block(width), block(width)], width, lambda net, x: x + net.scale0 * branch(net, x))


def called_again(width: int) -> nn.Module:
    return scaled([block(width)] * 2, width, lambda net, x: x + branch(net, x).mul_(net.scale0))


def scaled_twice(width: int) -> nn.Module:
    def how(net: nn.Module, x: Tensor) -> Tensor:
        return x + (net.scale0 * branch(net, x) + net.scale2) * 0.5 * net.scale1

    return scaled([block(width, 3), block(width, 3)], width, how)


def a_scaled_sum(width: int) -> nn.Module:
    """The scale multiplies a table and positions, too."""
    scale = Net({"scale0": nn.Parameter(torch.randn(width))}, lambda net, x: x)
    return scaled([scale], width, lambda net, x: net.scale0 * x)


def a_scale_that_no_norm_sees(width: int) -> nn.Module:
    def how(net: nn.Module, x: Tensor) -> Tensor:
        return x + net.last((net.norm(x) @ net.inner.weight.T + (net.scale0 * x) @ net.inner.weight.T).relu())

    return scaled([block(width)], width, how)


class Images(nn.Module):
    """Channels in the middle, with scales of shape (channels, 1, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.conv, self.out = (
            nn.Conv2d(3, width, 2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Linear(width, 4),
        )
        self.norm = nn.Sequential(Permute([0, 2, 3, 1]), nn.LayerNorm(width), Permute([0, 3, 1, 2]))
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(self.norm(x + self.scale * self.conv(self.norm(x).tanh())).mean((2, 3)))


NETWORKS = [pre_norm, called_again, scaled_twice, a_scaled_sum, a_scale_that_no_norm_sees]


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("width", [9, 7, 12])
def test_a_stream_with_layer_scales_grows_to_any_width(make: Callable, width: int) -> None:
    teacher, student = make(6), make(width)
    record = grow(teacher, student, tokens(), ("eval", "train"))
    means = [name for name, origin in record.origins.items() if origin.scaled]
    assert bool(means) == (width != 12 and make is not a_scale_that_no_norm_sees)
    if not means:
        return
    scales = [name for name in means if name.partition("scale")[2] in ("0", "1")]
    assert scales and all(bool((student.get_parameter(name)[6:] == 1).all()) for name in scales)
    for name in means:  # negative controls
        spoilt = change(record, lambda o, name=name: replace(o, scaled=()) if o is record.origins[name] else o)
        assert error(spoilt, teacher, student, tokens()) > 1e-4, name
    assert error(record, teacher, student, tokens()) <= BAR


def test_channels_of_images_that_a_scale_multiplies() -> None:
    images = torch.randn(6, 3, 5, 4)
    grow(Images(6), Images(8), images)
    model = trained(Images(6))[0]
    assert_same(model, widen(model, images[:2], {"enter": 1.5}), images)


def test_scales_of_zero_and_of_a_thousandth() -> None:
    teacher, student = trained(pre_norm(6), pre_norm(8))
    with torch.no_grad():
        teacher.blocks[0].scale0.zero_()
        teacher.blocks[1].scale0.copy_(torch.tensor([1e-5, -1e-5, 1e-3, -1e-3, 0.0, 0.0]))
    transfer(teacher, student, tokens()[:2])
    assert_same(teacher, student, tokens())


def test_the_record_is_saved_and_replayed_and_random_pad_knows_no_means(tmp_path) -> None:
    teacher, student, again = trained(pre_norm(6), pre_norm(8), pre_norm(8))
    save_record(transfer(teacher, student, tokens()[:2]), tmp_path / "growth.json")
    replay(load_record(tmp_path / "growth.json"), teacher, again)
    assert_same(student, again, tokens())
    own = again.blocks[0].scale0[6:].clone()
    random_pad(teacher, again, tokens()[:2])
    assert torch.equal(again.blocks[0].scale0[6:], own)


def test_a_unit_cannot_be_the_mean_with_a_scale_and_without() -> None:
    def make(width: int, again: bool = False) -> nn.Module:
        blocks = [block(width)] * 2 if again else [block(width), block(width)]
        return scaled(blocks, width, lambda net, x: net.scale0 * x + branch(net, x))

    for again in (False, True):
        grow(make(6, again), make(12, again), tokens())
        teacher, student = trained(make(6, again), make(9, again))
        with refused(r"take the mean of its units without a scale and times blocks\.\d\.scale0", student):
            transfer(teacher, student, tokens()[:2])


WAYS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Tensor], str]] = {
    "once": (lambda net, z, _: z * net.g, ""),
    "two scales": (lambda net, z, _: z * net.g * net.h, ""),
    "the same twice, added": (lambda net, z, _: z * net.g + z * net.g, ""),
    "one scale twice": (lambda net, z, _: z * net.g * net.g, "times g times g"),
    "beside itself": (lambda net, z, _: z * net.g + z, "without a scale and times g"),
    "with each of two": (lambda net, z, _: z * net.g + z * net.h, "times g and times h"),
    "stacked": (lambda net, z, _: torch.stack([z * net.g, z]).mean(0), "without a scale and times g"),
    "called again": (lambda net, z, y: z * net.g + net.b(y.sin()) * net.h, "times g and times h"),
    "with the stream": (lambda net, z, y: (z + net.stream) * net.g, "without a scale and times g"),
}


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_the_way_to_a_norm_is_known_even_if_the_example_is_silent_on_it(name: str, silent: bool) -> None:
    """An example of zeros shows no difference, so the check on the example cannot find a wrong mean."""
    way, why = WAYS[name]

    def how(net: Net, x: Tensor, y: Tensor) -> Tensor:
        net.stream = net.e(x)
        return net.o(net.n(net.stream + way(net, net.b(y), y)))

    layers = {"e": nn.Linear(5, 8), "b": nn.Linear(5, 8, bias=False), "n": nn.LayerNorm(8), "o": nn.Linear(8, 3)}
    scales = "gh" if name in ("two scales", "with each of two", "called again") else "g"
    model = trained(Net(layers | {scale: nn.Parameter(torch.rand(8)) for scale in scales}, how))[0]
    example = torch.randn(3, 5), torch.zeros(3, 5) if silent else torch.randn(3, 5)
    if why:
        with refused(why):
            widen(model, example, {"e": 11})
    else:
        wider = widen(model, example, {"e": 11})
        assert_same(model, wider, (torch.randn(9, 5), torch.randn(9, 5)))
