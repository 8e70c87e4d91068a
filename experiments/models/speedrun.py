"""A small plain network that learns CIFAR-10 fast, after the published description of airbench (Jordan 2024).

Source: K. Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, sections 3 and A.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2  # side of the patches that the first convolution whitens, in pixels
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Layer(nn.Module):
    """A 3x3 convolution, an optional 2x2 maximum, batch norm and an activation.

    The first units of the convolution start as copies of its inputs (Jordan 2024, section 3.1, "identity
    initialisation"), so that a deep network passes the image on from the start.
    """

    def __init__(self, inputs: int, outputs: int, activation: str, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.bn = nn.BatchNorm2d(outputs, momentum=0.4)  # the schedule is too short for the usual 0.1
        self.act = ACTIVATIONS[activation]()
        nn.init.dirac_(self.conv.weight.data[:inputs])

    def forward(self, x: Tensor) -> Tensor:
        """Map N x inputs x H x W to N x outputs x H x W, or H/2 x W/2 with `pool`."""
        return self.act(self.bn(self.pool(self.conv(x))))


class Group(nn.Module):
    """A convolution that halves the image, a second one, and `extra` further ones, each a residual branch or plain."""

    def __init__(self, inputs: int, outputs: int, activation: str, extra: int, residual: bool) -> None:
        super().__init__()
        self.first = Layer(inputs, outputs, activation, pool=True)
        self.second = Layer(outputs, outputs, activation)
        self.extra = nn.ModuleList(Layer(outputs, outputs, activation) for _ in range(extra))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map N x inputs x H x W to N x outputs x H/2 x W/2."""
        x = self.second(self.first(x))
        for layer in self.extra:
            x = x + layer(x) if self.residual else layer(x)
        return x


class SpeedRun(nn.Module):
    """A whitening 2x2 convolution, three groups of 3x3 convolutions, a maximum over the image, a linear classifier.

    Args:
        classes: Classes of the data set.
        channels: Channels of its images, which have 32 x 32 pixels.
        widths: Channels of the three groups.
        slim: Multiplies `widths`.
        activation: relu, or gelu as in Jordan. A new layer can be an identity behind relu alone (paper, section 3.4).
        extra: Convolutions of each group beyond the first two.
        residual: Whether an extra convolution is added to its input, or follows it.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        widths: Sequence[int] = (64, 256, 256),
        slim: float = 1.0,
        activation: str = "relu",
        extra: int = 0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: it has to be {' or '.join(ACTIVATIONS)}")
        self.whiten = nn.Conv2d(channels, 2 * channels * PATCH**2, PATCH)
        self.whiten.weight.requires_grad_(False)
        self.act = ACTIVATIONS[activation]()
        scaled = [max(1, round(width * slim)) for width in widths]
        inputs = [self.whiten.out_channels, *scaled]
        self.groups = nn.Sequential(
            *(Group(of, to, activation, extra, residual) for of, to in zip(inputs, scaled, strict=False))
        )
        self.pool = nn.MaxPool2d(3)
        self.fc = nn.Linear(scaled[-1], classes, bias=False)

    @torch.no_grad()
    def set_from_data(self, images: Tensor) -> None:
        """Set the first convolution so that its outputs over N x channels x H x W training images are white.

        Each eigenvector of the covariance of the patches makes two units, one for either sign, scaled to variance 1.
        """
        patches = F.unfold(images.double().cpu(), PATCH).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        rows = (vectors / (values + 5e-4).sqrt()).T.flip(0)
        rows = rows * torch.where(rows[:, :1] < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
        self.whiten.weight.copy_(torch.cat([rows, -rows]).view_as(self.whiten.weight))
        nn.init.zeros_(self.whiten.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Map N x channels x 32 x 32 images to N x classes logits."""
        x = self.groups(self.act(self.whiten(x)))
        return self.fc(self.pool(x).flatten(1)) / 9  # Jordan's factor: logits start small
