"""Small networks for the tests, and statistics that are not those of a fresh network."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from net2net import Origin
from net2net.fill import gather as filling


def randomise(model: nn.Module, seed: int = 0, images: Tensor | None = None) -> nn.Module:
    """Give every batch norm random running statistics and affine parameters; return the network in eval mode.

    With `images` the statistics are those of the images, disturbed, so that the signal survives a deep network.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    with torch.no_grad():
        if images is not None:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            model.train()(images)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm in norms:
            if norm.running_mean is not None and norm.running_var is not None:
                size = norm.running_mean.shape
                norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(size, generator=generator)
                norm.running_var *= 0.5 + torch.rand(size, generator=generator)
            if norm.affine:
                norm.weight *= 0.5 + torch.rand(norm.weight.shape, generator=generator)
                norm.bias += 0.3 * torch.randn(norm.bias.shape, generator=generator)
    return model.eval()


class Net(nn.Module):
    """The parts by name, and `how` they make an output of the inputs: `how(parts, *inputs)`."""

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter], how: Callable) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = how

    def forward(self, *inputs: Tensor):
        return self.how(self, *inputs)


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


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every tensor is what it was, bit for bit."""
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def without(monkeypatch, left_out: Callable[[Origin], bool]) -> None:
    """A negative control: tensors of new layers whose origin is `left_out` keep the student's own values."""
    fill_new = filling.fill_new
    monkeypatch.setattr(filling, "fill_new", lambda t, origin, *rest: left_out(origin) or fill_new(t, origin, *rest))
