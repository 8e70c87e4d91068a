"""A network without shortcuts: the "plain" net for CIFAR of He et al. 2016, section 4.2."""

import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A 3x3 convolution with batch norm and ReLU: what the paper inserts as an identity (section 3.4)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x inputs x H x W to N x outputs x H/stride x W/stride."""
        return F.relu(self.bn(self.conv(x)))


class Plain(nn.Module):
    """Three stages of `layers` layers with 16, 32 and 64 channels times `width`; its depth is 3 * layers + 2."""

    def __init__(self, classes: int, channels: int = 3, layers: int = 6, width: float = 1.0) -> None:
        super().__init__()
        widths = [max(1, round(width * c)) for c in (16, 32, 64)]
        self.first = Layer(channels, widths[0])
        stages = []
        for inputs, outputs in zip([widths[0], *widths], widths, strict=False):
            stride = 1 if not stages else 2
            rest = [Layer(outputs, outputs) for _ in range(layers - 1)]
            stages.append(nn.Sequential(Layer(inputs, outputs, stride), *rest))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x channels x H x W images to N x classes logits."""
        return self.fc(self.stages(self.first(x)).mean((2, 3)))
