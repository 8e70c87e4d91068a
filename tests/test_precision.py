"""The precision in which networks run: an autocast block around a call counts for nothing."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from checks import state, unchanged
from networks import Net, chain, images, mlp, rows
from torch import Tensor, nn

from net2net import deepen, equivalence, random_pad, replay, transfer, widen
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
