"""What all splits share: the order of an epoch, and the normalisation of pixels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import ExperimentError
from ..randomness import generator

WHOLE = slice(None)  # the share of a batch that a process takes which trains alone


def complete_batches(images: int, batch_size: int) -> int:
    """Return how many complete batches an epoch has; raise ExperimentError if there is none."""
    if batch_size > images:
        raise ExperimentError(
            f"schedule.batch_size is {batch_size}, but the training split has only {images} images:"
            f" lower it to {images} or less."
        )
    return images // batch_size


def epoch_order(images: int, batch_size: int, epoch: int, seed: int) -> Tensor:
    """Draw which images make which complete batch of an epoch: int64 (batches, batch_size), on the CPU.

    The order depends on the arguments alone. So all arms of a seed see the same order, and a resumed run continues in
    it.
    """
    batches = complete_batches(images, batch_size)
    order = torch.randperm(images, generator=generator(seed, "order", epoch))
    return order[: batches * batch_size].view(batches, batch_size)


def ordered_batches(images: int, batch_size: int, rank: int, ranks: int) -> list[range]:
    """Cut the images, in order, into batches for evaluation; each of several ranks gets every `ranks`-th batch."""
    starts = range(rank * batch_size, images, ranks * batch_size)
    return [range(start, min(start + batch_size, images)) for start in starts]


def normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that maps uint8 NCHW on `device` to float32 (pixel / 255 - mean) / std, for each channel."""
    centre = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)
    return lambda pixels: pixels.to(torch.float32).sub_(centre).mul_(scale)
