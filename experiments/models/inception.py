"""The paper's Inception network (section 4.1): 3 convolutions, 11 modules, rectangular kernels.

The paper gives the shape of the network but no channel counts. Where it is silent, the widths are those of the
published Inception-BN (Ioffe and Szegedy 2015, figure 5). Questions O1 to O4 in docs/reproduction.md say why.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The modules by name, with the widths of their convolutions: the entry; the fork of one; the fork of a 3x3 pair;
# the convolution before the 5x5 pair, and that pair. 4f repeats 4d, because the paper has 11 modules.
MODULES = (
    ("3a", 128, 96, 96, 64, 96),
    ("3b", 128, 128, 96, 64, 96),
    ("3c", 192, 320, 160, 64, 96),
    ("4a", 160, 352, 96, 96, 128),
    ("4b", 192, 320, 128, 96, 128),
    ("4c", 256, 256, 160, 128, 160),
    ("4d", 288, 192, 192, 160, 192),
    ("4f", 288, 192, 192, 160, 192),
    ("4e", 320, 576, 192, 192, 256),
    ("5a", 352, 480, 320, 160, 224),
    ("5b", 384, 480, 320, 192, 224),
)
STEM = (64, 64, 192)


def conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU; the size of the image is divided by `stride`."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def pair(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """Return a vertical and a horizontal convolution, each with batch norm and ReLU."""
    return [conv(inputs, outputs, (size, 1)), conv(outputs, outputs, (1, size))]


class Module(nn.Module):
    """One convolution, then three forks of one, two and three convolutions, concatenated.

    `widths` are those of MODULES. `extra_pairs` more pairs follow every pair (paper, section 4.3), and `pairs_on_top`
    pairs follow the concatenation (section 4.4).
    """

    def __init__(self, inputs: int, widths: Sequence[int], extra_pairs: int, pairs_on_top: int) -> None:
        super().__init__()
        entry, one, two, reduce, three = widths
        self.outputs = one + two + three

        def pairs(start: int, width: int, size: int) -> list[nn.Module]:
            extra = [layer for _ in range(extra_pairs) for layer in pair(width, width, size)]
            return [*pair(start, width, size), *extra]

        self.entry = conv(inputs, entry, (1, 1))
        self.one = conv(entry, one, (1, 1))
        self.two = nn.Sequential(*pairs(entry, two, 3))
        self.three = nn.Sequential(conv(entry, reduce, (1, 1)), *pairs(reduce, three, 5))
        top = [layer for _ in range(pairs_on_top) for layer in pair(self.outputs, self.outputs, 3)]
        self.top = nn.Sequential(*top)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x inputs x H x W to N x outputs x H x W."""
        x = self.entry(x)
        return self.top(torch.cat([self.one(x), self.two(x), self.three(x)], 1))


class Inception(nn.Module):
    """The paper's network for square images.

    Args:
        classes: Outputs of the classifier.
        channels: Channels of the images.
        width: Multiplies the channels of every module, not of the stem (section 4.2: sqrt(0.3); 4.4: sqrt(2)).
        slim: Multiplies the channels of the whole network, for small machines.
        extra_pairs: Pairs of convolutions added after every pair (section 4.3).
        pairs_on_top: Pairs added after every module (section 4.4).
        stem: The side of the images in pixels, 224, 64, 32 or 8; the stem divides it by 8, 4, 2 or 1.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: float = 1.0,
        slim: float = 1.0,
        extra_pairs: int = 0,
        pairs_on_top: int = 0,
        stem: int = 32,
    ) -> None:
        super().__init__()
        if stem not in (224, 64, 32, 8):
            raise ValueError(f"stem={stem} is none of 224, 64, 32 and 8")
        first, second, third = (max(1, round(slim * c)) for c in STEM)
        self.stem = nn.Sequential(
            conv(channels, first, (7, 7), 2) if stem == 224 else conv(channels, first, (3, 3)),
            nn.MaxPool2d(3, 2, 1) if stem in (224, 64) else nn.Identity(),
            conv(first, second, (1, 1)),
            conv(second, third, (3, 3)),
            nn.Identity() if stem == 8 else nn.MaxPool2d(3, 2, 1),
        )
        modules, inputs = {}, third
        for name, *widths in MODULES:
            scaled = [max(1, round(width * slim * c)) for c in widths]
            modules[name] = Module(inputs, scaled, extra_pairs, pairs_on_top)
            inputs = modules[name].outputs
        self.blocks = nn.ModuleDict(modules)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def depth(self) -> tuple[int, int]:
        """Return how many convolutions are on the shortest and on the longest path from image to classifier."""

        def count(part: nn.Module) -> int:
            return sum(isinstance(layer, nn.Conv2d) for layer in part.modules())

        shortest = longest = count(self.stem)
        for block in self.blocks.values():
            assert isinstance(block, Module)
            forks = [count(block.one), count(block.two), count(block.three)]
            shortest += count(block.entry) + min(forks) + count(block.top)
            longest += count(block.entry) + max(forks) + count(block.top)
        return shortest, longest

    def forward(self, x: Tensor) -> Tensor:
        """Map N x channels x H x W images to N x classes logits."""
        x = self.stem(x)
        for name, block in self.blocks.items():
            if name in ("4a", "5a"):
                x = self.pool(x)
            x = block(x)
        return self.fc(x.mean((2, 3)))
