"""The precision in which networks run: autocast around a call does not count, and what a network casts to does."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import change_axes, drop_shares, refused, shift_index, state, unchanged
from networks import Net, chain, images, mlp, rows
from torch import Tensor, nn

from net2net import Axis, deepen, equivalence, random_pad, replay, transfer, widen
from net2net.equivalence import assert_equivalent
from net2net.network import Inputs
from net2net.testing import look_trained


def autocast(**options: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, **options)


def cast_inside() -> Net:
    """Two layers in bfloat16, by autocast in the network's own forward pass, which keeps the weights that it casts."""
    inside = autocast(cache_enabled=True)

    def how(net: Net, x: Tensor) -> Tensor:
        with inside:
            return net.b(net.a(x).relu()).float()

    return Net({"a": nn.Linear(3, 8), "b": nn.Linear(8, 2)}, how)


@pytest.mark.parametrize("make", [lambda: mlp(3, 8, 2), cast_inside])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_that_change_inside_an_autocast_block_are_seen(make: Callable[[], nn.Module], mode: str) -> None:
    a, b, x = make(), make(), rows()
    b.load_state_dict(a.state_dict())
    with autocast():
        b(x)  # autocast keeps the weights of b
        assert equivalence(a, b, x, mode=mode).max_relative == 0
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.mul_(2)
        inside = equivalence(a, b, x, mode=mode)
    assert inside.max_relative > 0.5
    assert inside == equivalence(a, b, x, mode=mode)


def filled(how: Callable) -> Callable[[], nn.Module]:
    """A student that `how` fills, given its teacher and images."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        teacher, student = look_trained(chain(3, 4), seed=1), look_trained(chain(8, 9, new=1), seed=2)
        how(teacher, student, images(16, 3, 6, 8))
        return student

    return make


def grown(how: Callable) -> Callable[[], nn.Module]:
    """What `how` makes of a trained network and its inputs."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return how(look_trained(mlp(3, 8, 8, 2)), rows())

    return make


GROWTHS = {
    "transfer": filled(lambda t, s, x: transfer(t, s, x, split="uneven", noise=0.1)),
    "transfer, calibrated": filled(lambda t, s, x: transfer(t, s, x, calibrate=x)),
    "random_pad": filled(random_pad),
    "replay": filled(lambda t, s, x: replay(transfer(t, deepcopy(s), x), t, s)),
    "widen": grown(lambda model, x: widen(model, x, 1.5, split="uneven")),
    "deepen": grown(lambda model, x: deepen(model, x, ["0", "2"])),
    "deepen, dense": grown(lambda model, x: deepen(model, x, "0", depth="dense")),  # rotates weights as it fills
}


@pytest.mark.parametrize("name", GROWTHS)
def test_growth_inside_an_autocast_block_is_that_outside(name: str) -> None:
    outside = GROWTHS[name]()
    with autocast(), autocast(enabled=False), autocast():
        inside = GROWTHS[name]()
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert unchanged(inside, state(outside))


def test_the_callers_autocast_reads_the_weights_that_growth_wrote() -> None:
    teacher, student, x = look_trained(mlp(3, 8, 2)), mlp(3, 12, 2), rows()
    with autocast():
        student(x), teacher(x)
        transfer(teacher, student, x)
        assert torch.allclose(student(x), teacher(x), atol=0.05, rtol=0.05)
        student(x).sum().backward()  # a weight that was cast without gradients would get none
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


def positions_of(how: Callable, dtype: torch.dtype = torch.float32) -> Callable[[int], Net]:
    """A block on (rows, 5 positions, 6), by its hidden width; `how` makes a new hidden activation of the old."""

    def make(width: int) -> Net:
        parts: dict = {"e": nn.Linear(6, 12), "n": nn.LayerNorm(12)}
        parts |= {"a": nn.Linear(12, width), "b": nn.Linear(width, 12)}
        parts |= {"g": nn.Parameter(torch.ones(12)), "o": nn.Linear(12, 5)}
        return look_trained(Net(parts, how).to(dtype), seed=width)

    return make


def autocast_inside(net: Net, x: Tensor) -> Tensor:
    with autocast(cache_enabled=False):
        x = net.e(x)
        return net.o(x + net.b(F.gelu(net.a(net.n(x))))).float()


def cast_layers(net: Net, x: Tensor) -> Tensor:
    def apply(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()

    x = net.e(x)
    return net.o(x + apply(net.b, F.gelu(apply(net.a, net.n(x)))))


def norm_in_single(net: Net, x: Tensor) -> Tensor:
    x = net.e(x)
    h = F.gelu(net.a(net.n(x))).float()
    h = net.b((h * 1.1).to(x.dtype)).float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    return net.o(x + net.g * h.to(x.dtype))


def weights_in_half(net: Net, x: Tensor) -> Tensor:
    def apply(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.float(), layer.bias.float())

    x = apply(net.e, x)
    return apply(net.o, x + apply(net.b, F.gelu(apply(net.a, x))))


CASTS = {
    "autocast in the forward pass": positions_of(autocast_inside),
    "layers that cast to bfloat16": positions_of(cast_layers),
    "a norm in float32 among float64": positions_of(norm_in_single, torch.double),
    "weights in bfloat16, computed with in float32": positions_of(weights_in_half, torch.bfloat16),
}


def double_last_share(axis: Axis) -> Axis:
    """The axis, with its last copy taking twice its share."""
    if not (axis.reads and axis.copies):
        return axis
    return replace(axis, share=torch.cat([axis.share[:-1], 2 * axis.share[-1:]]))


@pytest.mark.parametrize("name", CASTS)
def test_the_tolerance_is_that_of_the_arithmetic_that_ran(name: str) -> None:
    torch.manual_seed(0)
    teacher, student = CASTS[name](16), CASTS[name](40)
    x = torch.randn(4, 5, 6).to(torch.double if "float64" in name else torch.float32)
    record = transfer(teacher, student, x, split="equal")
    inputs, output = Inputs.of(x), teacher(x)
    assert_equivalent(teacher, student, inputs, output, ())
    in_few_bits = "bfloat16" in name or "autocast" in name  # one wrong share of sixty may pass for rounding there
    for spoil in (drop_shares, shift_index, *([] if in_few_bits else [double_last_share])):
        replay(change_axes(record, spoil), teacher, student)
        with refused("does not compute its teacher's function"):
            assert_equivalent(teacher, student, inputs, output, ())


def test_a_network_that_amplifies_rounding_to_everything_is_refused() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        x = net.b(net.a(x).tanh()).sigmoid()
        for _ in range(100):
            x = 3.99 * x * (1 - x)
        return x

    make = positions_of(how, torch.double)
    with refused("more than 1.5e-08"):
        transfer(make(16), make(40), torch.randn(4, 5, 12).double())
