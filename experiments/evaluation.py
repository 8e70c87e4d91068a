"""Loss and accuracy of a network on images that it does not train on, and how two networks agree on them."""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import net2net

from .distributed import ALONE, Ranks

Batch = tuple[Tensor, Tensor]  # images (N x C x H x W), labels (N)
AGREEMENT_BATCH = 256  # images on which two networks are compared at once


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


def measure_agreement(teacher: nn.Module, student: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Return on how many images a student gives its teacher's class; in float64 and in float32."""
    pairs = {
        t: [copy.deepcopy(network).to(t) for network in (teacher, student)] for t in (torch.float64, torch.float32)
    }
    found = {t: {"agree": 0, "of": 0, "max_relative_error": 0.0} for t in pairs}
    for images, _ in batches:
        for dtype, pair in pairs.items():
            measured, total = net2net.equivalence(pair[0], pair[1], images.to(dtype)), found[dtype]
            total["agree"] += measured.agree
            total["of"] += measured.examples
            total["max_relative_error"] = max(total["max_relative_error"], measured.max_relative)
    return {**found[torch.float64], "float32": found[torch.float32]}
