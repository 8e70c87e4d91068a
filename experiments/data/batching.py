"""What every split shares: the order of an epoch, and pixels as the network sees them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import ExperimentError
from ..randomness import generator

EVERYTHING = slice(None)  # the share that one process alone takes of a batch


def complete_batches(images: int, batch_size: int) -> int:
    """How many batches an epoch of so many training images has; ExperimentError if not even one."""
    if batch_size > images:
        raise ExperimentError(
            f"schedule.batch_size is {batch_size}, but the training split has only {images} images:"
            f" lower it to {images} or less."
        )
    return images // batch_size


def epoch_order(images: int, batch_size: int, epoch: int, seed: int) -> Tensor:
    """Which images make which batch: int64 (batches, batch_size) on the CPU, every index at most once.

    Depends on the arguments alone, so every arm of a seed sees the same order, and a resumed run goes on
    in it. The last, incomplete batch is dropped. Raises ExperimentError if not even one batch is complete.
    """
    batches = complete_batches(images, batch_size)
    order = torch.randperm(images, generator=generator(seed, "order", epoch))
    return order[: batches * batch_size].view(batches, batch_size)


def normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from uint8 NCHW on `device` to float32 (pixel / 255 - mean) / std, a channel at a time."""
    centre = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)
    return lambda pixels: pixels.to(torch.float32).sub_(centre).mul_(scale)
