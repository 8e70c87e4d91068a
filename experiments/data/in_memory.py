"""Images that fit in memory: uint8 on the device, augmented a batch at a time (as cifar10-airbench does)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..randomness import generator
from .batching import EVERYTHING, epoch_order, normaliser


@dataclass(frozen=True)
class Images:
    """A split in memory: uint8 images NCHW and their int64 labels, on one device."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    pad: int = 0  # what `batches` uses when it is not told
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Images":
        """The same split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(
        self,
        batch_size: int,
        epoch: int,
        seed: int,
        augment: bool = True,
        start: int = 0,
        pad: int | None = None,
        flip: bool | None = None,
        share: slice = EVERYTHING,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The complete batches of an epoch from batch `start` on: float32 normalised NCHW, int64 labels.

        Stateless: a batch depends on (seed, epoch, its number) and not on the batches before it, so a run
        that starts at `start` sees what the uninterrupted run saw. With `augment`, each image is shifted by
        up to `pad` pixels and, with `flip`, mirrored half of the time. `share` is the part of each batch that is
        wanted; it is what it would be in the whole. Raises ExperimentError at the call if the split is smaller than a
        batch.
        """
        order = epoch_order(len(self), batch_size, epoch, seed)
        pad = self.pad if pad is None else pad
        flip = self.flip if flip is None else flip
        return self._batches(order, epoch, seed, start, pad if augment else 0, flip and augment, share)

    def _batches(
        self, order: Tensor, epoch: int, seed: int, start: int, pad: int, flip: bool, share: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        normalise = normaliser(self.mean, self.std, device)
        # The mean colour: see crop_and_flip.
        fill = (torch.tensor(self.mean, device=device) * 255).round().to(torch.uint8)
        order = order.to(device)
        for number in range(start, len(order)):
            chosen = order[number][share]
            images = self.images.index_select(0, chosen)  # whole rows: four times as fast as indexing
            if pad or flip:
                draw = generator(seed, "augment", epoch, number)
                shifts = torch.randint(0, 2 * pad + 1, (2, len(order[number])), generator=draw)
                mirrored = torch.randint(0, 2, (1, len(order[number])), generator=draw) * flip
                rows, columns, mirror = torch.cat([shifts, mirrored])[:, share].to(device, non_blocking=True)
                images = crop_and_flip(images, rows, columns, mirror.bool(), pad, fill)
            yield normalise(images), self.labels[chosen]

    def ordered(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order: float32 normalised NCHW, int64 labels; the last batch may be small.

        Of several ranks each gets every so many-th batch, beginning with its own.
        """
        normalise = normaliser(self.mean, self.std, self.images.device)
        for first in range(rank * batch_size, len(self), ranks * batch_size):
            chosen = slice(first, first + batch_size)
            yield normalise(self.images[chosen]), self.labels[chosen]


def crop_and_flip(images: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor, pad: int, fill: Tensor) -> Tensor:
    """Pads uint8 images NCHW on each side, cuts the window of the old size at (rows, columns), mirrors it.

    `rows`, `columns` (int64, 0 .. 2 * pad) and `mirror` (bool) have one entry an image; `fill` (uint8) one a
    channel. Padding with the mean colour makes it zero after normalisation (to half a grey level), as is the
    zero padding of the convolutions behind it; black would be a strong edge that no image has.
    """
    count, channels, height, width = images.shape
    padded = fill.view(1, -1, 1, 1).expand(count, -1, height + 2 * pad, width + 2 * pad).clone()
    padded[:, :, pad : pad + height, pad : pad + width] = images
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    rows = rows[:, None] + down
    columns = columns[:, None] + torch.where(mirror[:, None], across.flip(0), across)
    # One flat gather over the pixels of each image, still in uint8: twice as fast as indexing four axes.
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, -1)
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images NCHW, in 0..1, exact.

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
