"""A refusal names its cause: without what it names, the same network grows."""

import random
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net2net import TransferError, equivalence, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")
WIDTH = 8


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Product(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x)


# What cannot grow, and the word of the message that names it beside the module's name.
CAUSES: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: nn.Softmax(-1),
    "log_softmax": lambda: nn.LogSoftmax(-1),
    "softmin": lambda: nn.Softmin(-1),
    "cumsum": lambda: Call(lambda x: x.cumsum(-1)),
    "cummax": lambda: Call(lambda x: x.cummax(-1).values),
    "logsumexp": lambda: Call(lambda x: x - x.logsumexp(-1, keepdim=True)),
    "sort": lambda: Call(lambda x: x.sort(-1).values),
    "topk": lambda: Call(lambda x: x * x.topk(2, -1).values[..., :1]),
    "prod": lambda: Call(lambda x: x + x.prod(-1, keepdim=True)),
    "mean": lambda: Call(lambda x: x * x.std(-1, keepdim=True)),  # which takes the mean first
    "norm": lambda: Call(lambda x: x / x.norm(3, -1, keepdim=True)),
    "diff": lambda: Call(lambda x: F.pad(x.diff(dim=-1), (0, 1))),
    "fft_fft": lambda: Call(lambda x: torch.fft.fft(x).real),
    "cdist": lambda: Call(lambda x: x * torch.cdist(x, x)[:, :1]),
    "histc": lambda: Call(lambda x: x * x.histc(4)[0]),
    "bilinear": lambda: Product(WIDTH, WIDTH, WIDTH),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "constant of its own width": lambda: Call(lambda x: x * torch.linspace(1, 2, WIDTH)),
    "number in its code": lambda: Call(lambda x: x.view(-1, WIDTH)),
    "0.0 is 8 units wide": lambda: Call(lambda x: x.view(-1, WIDTH // 2, 2).flatten(1)),
}
IN_CODE = ("number in its code", "0.0 is 8 units wide")  # the message names the layer of that width


def draw(seed: int, cause: nn.Module) -> nn.Sequential:
    """Return a small network that looks trained, with the cause in its middle."""
    torch.manual_seed(seed)
    choose = random.Random(seed).choice
    activations, norms = (nn.ReLU, nn.GELU, nn.Tanh, nn.Softplus), (nn.Identity, nn.BatchNorm1d)
    front = [nn.Linear(5, WIDTH), choose(activations)(), choose(norms)(WIDTH)]
    back = [choose(activations)(), nn.Linear(WIDTH, WIDTH), choose(activations)(), nn.Linear(WIDTH, 3)]
    return look_trained(nn.Sequential(nn.Sequential(*front), cause, nn.Sequential(*back)).eval())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("word", CAUSES)
def test_without_what_a_refusal_names_the_network_grows(word: str, seed: int) -> None:
    network, x = draw(seed, CAUSES[word]()), torch.randn(6, 5)
    with pytest.raises(TransferError) as refusal:
        widen(network, x, {"0.0": 2.0})
    assert re.search(rf"\b{re.escape(word)}", str(refusal.value)), refusal.value
    if word not in IN_CODE:
        assert re.search(r"\b1\b", str(refusal.value)), refusal.value
    network[1] = nn.Identity()
    wider = widen(network, x, {"0.0": 2.0})
    assert wider[0][0].out_features == 2 * WIDTH
    assert equivalence(network, wider, torch.randn(9, 5)).max_relative < 1e-12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.mix, self.back = nn.Linear(5, WIDTH), nn.MultiheadAttention(WIDTH, 4), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.back(x + self.mix(x, x, x)[0])


class Scaled(nn.Module):
    """A norm behind a scale that counts from one, or that is a view of a weight."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.front, self.weight, self.scale = nn.Linear(5, WIDTH), nn.Parameter(torch.ones(WIDTH)), scale
        self.norm, self.back = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.norm(self.front(x) * self.scale(self.weight)))


class Groups(nn.Module):
    """A group norm over two layers of which one alone grows."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.side = nn.Conv1d(5, WIDTH, 1), nn.Conv1d(5, WIDTH, 1)
        self.norm, self.back = nn.GroupNorm(4, 2 * WIDTH), nn.Conv1d(2 * WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None].expand(-1, -1, 3)
        return self.back(self.norm(torch.cat([self.front(x), self.side(x)], 1)))


class Along(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x, 2 * x], -1))


SENTENCES: dict[str, tuple[Callable[[], nn.Module], float, str]] = {
    "heads": (Attention, 1.25, "mix cannot grow to 10 units: .* among its 4 heads: take a multiple of them"),
    "an activation before a norm": (
        lambda: nn.Sequential(nn.Linear(5, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)),
        *(1.5, r"but gelu in 1 stands before 2\. A multiple of the width serves"),
    ),
    "a scale that counts from one": (lambda: Scaled(lambda w: 1 + w), 1.5, "mul in the network with weight stands"),
    "a view of a scale": (lambda: Scaled(lambda w: w[None]), 1.5, "mul in the network with weight stands before norm"),
    "positions": (
        lambda: Along(nn.Conv1d(5, WIDTH, 1), nn.GroupNorm(2, WIDTH), nn.Conv1d(WIDTH, 3, 1)),
        *(1.5, "but 1 takes several positions together, which have other means"),
    ),
    "groups": (Groups, 2.0, "let what sums, concatenations, groups and heads join there grow by one factor"),
}


@pytest.mark.parametrize("what", SENTENCES)
def test_a_refusal_says_the_reason_and_a_way_out(what: str) -> None:
    make, factor, sentence = SENTENCES[what]
    name = "0" if isinstance(make(), nn.Sequential) else "front"
    with pytest.raises(TransferError, match=sentence):
        widen(look_trained(make().eval()), torch.randn(6, 5), {name: factor})
