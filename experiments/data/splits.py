"""What `load` returns, and how labelled images are divided without disturbing their balance."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ExperimentError
from .in_memory import Images
from .streamed import Folder


@dataclass(frozen=True)
class Splits:
    """A data set, divided: `train` teaches, `holdout`, a part of it, chooses, `test` is reported."""

    train: Images | Folder
    holdout: Images | Folder
    test: Images | Folder
    classes: int
    mean: tuple[float, ...]  # of each channel, in 0..1; as many as the images have channels
    std: tuple[float, ...]
    description: str  # one line: what data it truly was

    def to(self, device: torch.device | str) -> "Splits":
        """The same splits, giving batches on `device`."""
        return replace(self, train=self.train.to(device), holdout=self.holdout.to(device), test=self.test.to(device))

    def fingerprint(self) -> str:
        """What tells this data from any other: a hash of the images and labels, or of the files' names and labels."""
        found = hashlib.sha256()
        for part in (self.train, self.holdout, self.test):
            found.update(part.labels.cpu().numpy().tobytes())
            if isinstance(part, Images):
                found.update(part.images.cpu().contiguous().numpy().data)
            else:  # that the files hold what they held is not read again: it would take hours
                found.update(b"\n".join(file.rsplit(b"/", 1)[-1] for file in part.files.tolist()))
        return found.hexdigest()[:16]


def divide(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ascending indices of the images kept and of those held: `share` of each class, at least one, never all.

    Raises ExperimentError if `share` is not between 0 and 1, or if no class has an image to spare.
    """
    if not 0 < share < 1:
        raise ExperimentError(f"data.holdout is {share}: choose a share between 0 and 1, for instance 0.1.")
    held: list[Tensor] = []
    of_class = torch.argsort(labels, stable=True).split(torch.bincount(labels).tolist())
    for members in of_class:
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[torch.randperm(len(members), generator=generator)[: max(0, count)]])
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[torch.cat(held)] = True
    if not is_held.any():
        raise ExperimentError("No class has two training images, so none can be held out: add images.")
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()
