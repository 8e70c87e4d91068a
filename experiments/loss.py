"""What training minimises: the cross entropy of the labels, and for a guided student the distance from its teacher."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits (N x classes), labels (N) and images


def make_loss(config: Config, guide: nn.Module | None = None) -> Loss:
    """Return the loss of a stage; with `guide` it also asks for the outputs of this network, which stays as it is."""
    of_labels = partial(label_loss, smoothing=config.schedule.label_smoothing)
    if guide is None:
        return of_labels
    share, temperature = config.growth.guide_share, config.growth.guide_temperature
    return partial(_guided_loss, guide.eval(), share, temperature, of_labels)


def label_loss(logits: Tensor, labels: Tensor, images: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of a batch; `smoothing` spreads that share of each label over all classes."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def _guided_loss(
    guide: nn.Module, share: float, temperature: float, of_labels: Loss, logits: Tensor, labels: Tensor, images: Tensor
) -> Tensor:
    """Mix the loss of the labels with the divergence from the guide's outputs (Hinton et al. 2015, section 2)."""
    with torch.no_grad():
        wanted = F.log_softmax(guide(images).float() / temperature, 1)
    got = F.log_softmax(logits / temperature, 1)
    distance = F.kl_div(got, wanted, log_target=True, reduction="batchmean") * temperature**2
    return (1 - share) * of_labels(logits, labels, images) + share * distance
