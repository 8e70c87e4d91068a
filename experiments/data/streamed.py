"""Images that do not fit in memory: files, decoded and augmented by worker processes."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.config import ExperimentError
from experiments.data.batching import epoch_order, normaliser
from experiments.data.tree import centre, picture
from experiments.randomness import derive_seed

Decode = Callable[[str, int], Tensor]  # a file and its index -> uint8 (3, size, size)


@dataclass(frozen=True)
class Folder:
    """A split on disk: picture files and their int64 labels; batches come out on `device`."""

    files: NDArray[np.bytes_]  # one buffer: a list of strings would be copied into every worker, count by count
    labels: Tensor
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    size: int
    workers: int
    flip: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Folder":
        """The same split, giving batches on `device`."""
        return replace(self, device=torch.device(device))

    def batches(
        self,
        batch_size: int,
        epoch: int,
        seed: int,
        augment: bool = True,
        start: int = 0,
        pad: int | None = None,
        flip: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The complete batches of an epoch from batch `start` on: float32 normalised NCHW, int64 labels.

        Stateless: an image depends on (seed, epoch, its index) alone. With `augment`, a random part of each
        picture is resized (8 % to 100 % of the area) and, with `flip`, mirrored half of the time; `pad`
        belongs to images in memory and is ignored. Raises ExperimentError at the call if the split is smaller
        than a batch, and on the way if a picture cannot be read.
        """
        order = epoch_order(len(self), batch_size, epoch, seed)[start:]
        flip = self.flip if flip is None else flip
        decode = _Augmented(_random_part(self.size, flip), seed, epoch) if augment else _Centred(self.size)
        return self._stream(order.tolist(), decode)

    def ordered(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order: float32 normalised NCHW, int64 labels; the last batch may be small.

        The shorter side becomes 256/224 of the size, and the centre is cut out, as is usual for ImageNet.
        """
        everything = range(len(self))
        batches = [everything[first : first + batch_size] for first in range(0, len(self), batch_size)]
        return self._stream(batches, _Centred(self.size))

    def _stream(self, batches: Sequence[Sequence[int]], decode: Decode) -> Iterator[tuple[Tensor, Tensor]]:
        normalise = normaliser(self.mean, self.std, self.device)
        loader: DataLoader[Any] = DataLoader(
            _Pictures(self.files, decode),
            batch_size=None,  # an index of the sampler is a whole batch
            sampler=batches,
            num_workers=self.workers,
            worker_init_fn=_ignore_preemption,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or every epoch would draw from the global stream
        )
        for chosen, pixels in zip(batches, loader, strict=True):
            if isinstance(pixels, ExperimentError):
                raise pixels
            labels = self.labels[list(chosen)].to(self.device, non_blocking=True)
            yield normalise(pixels.to(self.device, non_blocking=True)), labels


@dataclass(frozen=True)
class _Pictures(Dataset[Any]):
    files: NDArray[np.bytes_]
    decode: Decode

    def __getitem__(self, index: Sequence[int]) -> Tensor | ExperimentError:
        try:
            return torch.stack([self.decode(os.fsdecode(self.files[one]), one) for one in index])
        except ExperimentError as error:  # raised in a worker, its message would become a traceback
            return error


@dataclass(frozen=True)
class _Centred:
    size: int

    def __call__(self, file: str, index: int) -> Tensor:
        return _pixels(centre(picture(file), self.size * 256 // 224, self.size))


@dataclass(frozen=True)
class _Augmented:
    change: Callable[[Any], Any]
    seed: int
    epoch: int

    def __call__(self, file: str, index: int) -> Tensor:
        with torch.random.fork_rng(devices=()):  # torchvision draws from the global stream
            torch.default_generator.manual_seed(derive_seed(self.seed, "augment", self.epoch, index))
            return _pixels(self.change(picture(file)))


def _random_part(size: int, flip: bool) -> Callable[[Any], Any]:
    from torchvision.transforms import v2  # in the parent, once: a worker lives for one epoch

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _ignore_preemption(_worker: int) -> None:
    # Slurm signals every process of a job. A worker that inherits the handler of its parent would requeue the
    # job a second time, and one that dies of the signal takes the parent's last checkpoint with it.
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after the imports above, and so before multiprocessing's own, which would wait for ever
def _end_workers() -> None:
    """Ends the workers of an epoch that was not finished, as multiprocessing does by the signal they ignore."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler takes their end for a failure
    for child in children:
        child.kill()
