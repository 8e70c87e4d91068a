"""Floating-point operations of a network, counted by torch (a multiplication and an addition are two)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .config import ExperimentError


def count(network: nn.Module, channels: int, size: int) -> tuple[int, int]:
    """Return the FLOPs per image (C x size x size) of a forward pass and of a training step (forward and backward).

    Convolutions and matrix products count. They are counted on the CPU: batch norms are five times slower on meta.
    Raises ExperimentError if the network cannot read such images.
    """
    model = copy.deepcopy(network).to("cpu").train()
    images = torch.zeros(2, channels, size, size)
    try:
        with FlopCounterMode(display=False) as forward:
            model(images)
        with FlopCounterMode(display=False) as both:
            model(images).sum().backward()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"The network cannot read images of {size} pixels: {reason}") from error
    return forward.get_total_flops() // 2, both.get_total_flops() // 2
