"""Images that fit in memory: uint8 on the device, augmented a batch at a time (as cifar10-airbench does)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..randomness import generator
from .batching import WHOLE, epoch_order, normaliser, ordered_batches


@dataclass(frozen=True)
class Images:
    """A split in memory: uint8 images NCHW and their int64 labels, on one device."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    pad: int = 0  # training images are shifted by up to so many pixels
    flip: bool = False  # each training image is mirrored in every other epoch

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Images":
        """Return the images with these indices."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def to(self, device: torch.device | str) -> "Images":
        """Return the same split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(
        self, batch_size: int, epoch: int, seed: int, augment: bool = True, start: int = 0, share: slice = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the complete batches of an epoch: images, float32 normalised NCHW, and their labels.

        A batch depends on the seed, the epoch and its number, not on the batches before it: a run that resumes at
        batch `start` sees what the uninterrupted run saw, and `share` is a part of the whole batch. Raises
        ExperimentError if the split is smaller than a batch.
        """
        pad, flip = (self.pad, self.flip) if augment else (0, False)
        device = self.images.device
        order = epoch_order(len(self), batch_size, epoch, seed).to(device)
        # Alternating flip (Jordan 2024, section 3.6): two successive epochs never show an image the same way round.
        first = torch.randint(0, 2, (len(self),), generator=generator(seed, "flip"))
        mirrored = ((first + epoch) % 2 * flip).bool().to(device)
        normalise = normaliser(self.mean, self.std, device)
        # The mean colour: see crop_and_flip.
        fill = (torch.tensor(self.mean, device=device) * 255).round().to(torch.uint8)
        for number in range(start, len(order)):
            chosen = order[number][share]
            images = self.images.index_select(0, chosen)  # four times as fast as indexing
            if pad or flip:
                draw = generator(seed, "augment", epoch, number)
                shifts = torch.randint(0, 2 * pad + 1, (2, batch_size), generator=draw)
                rows, columns = shifts[:, share].to(device, non_blocking=True)
                images = crop_and_flip(images, rows, columns, mirrored[chosen], pad, fill)
            yield normalise(images), self.labels[chosen]

    def ordered(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all images in order, or over this rank's share of the batches; the last batch may be small."""
        normalise = normaliser(self.mean, self.std, self.images.device)
        for batch in ordered_batches(len(self), batch_size, rank, ranks):
            chosen = slice(batch.start, batch.stop)
            yield normalise(self.images[chosen]), self.labels[chosen]


def crop_and_flip(images: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor, pad: int, fill: Tensor) -> Tensor:
    """Pad uint8 images NCHW on each side, cut out windows that begin at `rows` and `columns`, and mirror some of them.

    Padding with the mean colour becomes zero after normalisation (to half a grey level), like the zero padding of the
    convolutions. Black would be a strong edge that no image has.
    """
    count, channels, height, width = images.shape
    padded = fill.view(1, -1, 1, 1).expand(count, -1, height + 2 * pad, width + 2 * pad).clone()
    padded[:, :, pad : pad + height, pad : pad + width] = images
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    rows = rows[:, None] + down
    columns = columns[:, None] + torch.where(mirror[:, None], across.flip(0), across)
    # One gather over the flat pixels of each image, still in uint8: twice as fast as indexing four axes.
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, -1)
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation of each channel of uint8 images NCHW, in 0..1.

    A channel of one colour gets the deviation of one grey level, so that it can be divided by.
    """
    grey = torch.arange(256, dtype=torch.float64) / 255
    means: list[float] = []
    stds: list[float] = []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten().cpu(), minlength=256).double() / channel.numel()
        mean = (share * grey).sum()
        means.append(mean.item())
        stds.append(max((share * (grey - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)
