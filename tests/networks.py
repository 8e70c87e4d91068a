"""Small networks for the tests."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def images(*shape: int) -> Tensor:
    """Random numbers of that shape; by default four images that are not square."""
    return torch.randn(*(shape or (4, 3, 6, 8)))


def rows() -> Tensor:
    """Six rows of three numbers."""
    return images(6, 3)


def positions() -> Tensor:
    """Two rows of five positions of three numbers."""
    return images(2, 5, 3)


class Net(nn.Module):
    """The parts by name, and `how` they make an output of the inputs: `how(parts, *inputs)`."""

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter], how: Callable) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = how

    def forward(self, *inputs: Tensor, **named: Tensor):
        return self.how(self, *inputs, **named)


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    """A convolution that keeps the size, without bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **{"bias": False} | options)


def chain(*widths: int, new: int = 0) -> Net:
    """Convolution, batch norm, ReLU for every width, flattened into a linear layer; `new` layers more after each."""
    parts, inputs = {}, 3
    for k, width in enumerate(widths):
        for j in range(1 + new):
            name = f"{k}" if j == 0 else f"{k}_{j}"
            parts[f"conv{name}"], parts[f"norm{name}"] = conv(inputs, width), nn.BatchNorm2d(width)
            inputs = width
    layers = [name.removeprefix("conv") for name in parts if name.startswith("conv")]

    def how(net: Net, x: Tensor) -> Tensor:
        for name in layers:
            x = F.relu(getattr(net, f"norm{name}")(getattr(net, f"conv{name}")(x)))
        return net.fc(F.adaptive_max_pool2d(x, (2, 3)).flatten(1))

    return Net({**parts, "fc": nn.Linear(6 * inputs, 5)}, how)


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


def inserted(make: Callable[[], nn.Module] | None, reads: int = 4) -> Net:
    """A network with `make()` behind a convolution and its ReLU, or with nothing there, and a layer that reads it."""
    return Net(
        {"a": conv(3, 4), "extra": make() if make else nn.Identity(), "fc": nn.Linear(reads, 3)},
        lambda net, x: net.fc(net.extra(F.relu(net.a(x))).mean((2, 3))),
    )


def residual(n: int) -> Net:
    """A stream with a depthwise separable branch, and a squeeze-and-excitation gate."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.n0(net.stem(x)))
        x = x + net.n2(net.point(F.relu6(net.n1(net.depth(net.up(x))))))
        gate = torch.sigmoid(net.open(F.silu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return net.fc((x * gate).mean((2, 3)))

    inner = 2 * n + 1
    parts = {"stem": conv(3, n), "up": conv(n, inner, 1), "depth": conv(inner, inner, groups=inner)}
    parts |= {"point": conv(inner, n, 1), "squeeze": nn.Conv2d(n, n // 2, 1), "open": nn.Conv2d(n // 2, n, 1)}
    norms = {f"n{k}": nn.BatchNorm2d(width) for k, width in enumerate((n, inner, n))}
    return Net(parts | norms | {"fc": nn.Linear(n, 5)}, how)


def trunk(n: int, extra: bool, branches: int) -> Net:
    """Residual branches; `extra` stands on the trunk before the sums, so it must be an identity and not silent."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.extra(F.relu(net.stem(x))))
        for branch in net.branches:
            x = x + torch.tanh(branch(x))
        return net.fc(x.flatten(1))

    new = nn.Sequential(conv(n, n), nn.BatchNorm2d(n)) if extra else nn.Identity()
    branched = nn.ModuleList(conv(n, n) for _ in range(branches))
    return Net({"stem": conv(3, n), "extra": new, "branches": branched, "fc": nn.Linear(48 * n, 4)}, how)


def tied(n: int) -> Net:
    """Two layers in the middle with one weight and two biases."""
    net = Net(
        {"a": nn.Linear(3, n), "b": nn.Linear(n, n), "c": nn.Linear(n, n), "fc": nn.Linear(n, 4)},
        lambda net, x: net.fc(torch.tanh(net.c(torch.tanh(net.b(torch.tanh(net.a(x.mean((2, 3))))))))),
    )
    net.c.weight = net.b.weight
    return net


def grouped(groups: int, inside: int, outside: int, transposed: bool = False) -> Net:
    """A grouped convolution between two layers that are not: `inside` units in each group in, `outside` out."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    read, given = groups * inside, groups * outside
    parts = {
        "stem": nn.Conv2d(3, read, 3),
        "norm": nn.BatchNorm2d(read),
        "grouped": kind(read, given, 3, groups=groups),
    }
    return Net(
        {**parts, "fc": nn.Linear(given, 5)},
        lambda net, x: net.fc(F.silu(net.grouped(F.relu(net.norm(net.stem(x))))).mean((2, 3))),
    )


def attention(heads: int, width: int = 8, stream: int = 8, hidden: int = 12) -> Net:
    """A transformer block on (rows, 5 positions, 3): heads of `width` in all on a stream with layer norms."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x) + net.place
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in net.qkv(net.n1(x)).chunk(3, -1))
        x = x + net.gamma * net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return net.head((x + net.down(F.gelu(net.up(net.n2(x))))).mean(1))

    parts = {"embed": nn.Linear(3, stream), "n1": nn.LayerNorm(stream), "qkv": nn.Linear(stream, 3 * width)}
    parts |= {"out": nn.Linear(width, stream), "n2": nn.LayerNorm(stream), "up": nn.Linear(stream, hidden)}
    parts |= {"down": nn.Linear(hidden, stream), "head": nn.Linear(stream, 4)}
    parameters = {"place": (1, 5, stream), "gamma": (stream,)}
    return Net(parts | {name: nn.Parameter(torch.randn(shape)) for name, shape in parameters.items()}, how)
