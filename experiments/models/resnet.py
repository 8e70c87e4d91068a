"""A residual network for CIFAR (He et al. 2016, section 4.2), which shares nothing with Inception."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions added to the input, or to its 1x1 projection where the shape changes.

    `inner` is the number of channels between the two convolutions.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map N x inputs x H x W to N x outputs x H/stride x W/stride."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 channels times `width`; its depth is 6 * blocks + 2.

    `inner` multiplies the channels inside the blocks alone.
    """

    def __init__(
        self, classes: int, channels: int = 3, blocks: int = 3, width: float = 1.0, inner: float = 1.0
    ) -> None:
        super().__init__()
        widths = [max(1, round(width * c)) for c in (16, 32, 64)]
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for stage, outputs in enumerate(widths):
            layers = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(Block(inputs, max(1, round(inner * outputs)), outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x channels x H x W images to N x classes logits."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))
