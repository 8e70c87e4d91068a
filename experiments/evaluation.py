"""Loss and accuracy of a network on images that it does not train on."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import ALONE, Ranks

Batch = tuple[Tensor, Tensor]  # images (N x C x H x W), labels (N)


def evaluate(
    network: nn.Module,
    batches: Iterator[Batch],
    layout: torch.memory_format = torch.channels_last,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy (0..1) of a network in eval mode over all batches of all ranks.

    It computes in float32 whatever the precision of training: bfloat16 rounds a teacher and its equal student unlike.
    """
    network.eval()
    loss, right, seen = ranks.sum(*ranks.on_all(partial(_sum_over, network, batches, layout)))
    return loss / seen, right / seen


@torch.no_grad()
def _sum_over(network: nn.Module, batches: Iterator[Batch], layout: torch.memory_format) -> tuple[float, int, int]:
    """Summed loss, correct images and all images of the batches."""
    loss = torch.zeros((), dtype=torch.float64)
    right = seen = 0
    for images, labels in batches:
        logits = network(images.contiguous(memory_format=layout))
        loss = loss + F.cross_entropy(logits, labels, reduction="sum").double().cpu()
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return loss.item(), right, seen
