"""Floating-point operations, counted by torch operation by operation (a multiplication and an addition are two)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count(network: nn.Module, channels: int, size: int) -> tuple[int, int]:
    """FLOPs an image: of a forward pass, and of a training step (forward and backward).

    Counts convolutions and matrix products; nothing is computed (meta device).
    """
    model = copy.deepcopy(network).to("meta").train()
    images = torch.empty(2, channels, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as both:
        model(images).sum().backward()
    return forward.get_total_flops() // 2, both.get_total_flops() // 2
