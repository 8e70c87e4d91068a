"""The three splits of a data set, and how a part of labelled images is held out."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ExperimentError
from .in_memory import Images
from .streamed import Folder


@dataclass(frozen=True)
class Splits:
    """A data set: `train` trains, `holdout`, a part of the training images, decides, and `test` is only reported."""

    train: Images | Folder
    holdout: Images | Folder
    test: Images | Folder
    classes: int
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    description: str  # one line that says which data it was

    def to(self, device: torch.device | str) -> "Splits":
        """Return the same splits, giving batches on `device`."""
        return replace(self, train=self.train.to(device), holdout=self.holdout.to(device), test=self.test.to(device))

    def fingerprint(self) -> str:
        """Return a hash of the images and labels; for pictures on disk, of the files' names and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.holdout, self.test):
            digest.update(part.labels.cpu().numpy().tobytes())
            if isinstance(part, Images):
                digest.update(part.images.cpu().contiguous().numpy().data)
            else:  # reading all files would take hours
                digest.update(b"\n".join(file.rsplit(b"/", 1)[-1] for file in part.files.tolist()))
        return digest.hexdigest()[:16]


def hold_out(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ascending indices of the images that are kept, and of those that are held out.

    Of each class its share is held out: at least one image, but never all.
    """
    if not 0 < share < 1:
        raise ExperimentError(f"data.holdout is {share}: choose a share between 0 and 1, for instance 0.1.")
    held: list[Tensor] = []
    for members in torch.argsort(labels, stable=True).split(torch.bincount(labels).tolist()):
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[torch.randperm(len(members), generator=generator)[: max(0, count)]])
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[torch.cat(held)] = True
    if not is_held.any():
        raise ExperimentError("No class has two training images, so none can be held out: add images.")
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()
