"""Images that do not fit in memory: files, decoded and augmented by worker processes."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import ExperimentError
from ..randomness import derive_seed
from .batching import EVERYTHING, epoch_order, normaliser
from .image_folder import centre, picture
from .parts import RandomPart

if TYPE_CHECKING:
    from PIL import Image

Decode = Callable[[str, int], "Image.Image"]  # a file and its index -> a square picture, RGB
Task = tuple[Decode, Sequence[int]]  # how to decode, and the indices of a batch


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
    pool: "_Pool" = field(default_factory=lambda: _Pool(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Folder":
        """The same split, giving batches on `device`."""
        return replace(self, device=torch.device(device), pool=_Pool())

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

        Stateless: an image depends on (seed, epoch, its index) alone. With `augment`, a random part of each
        picture is resized (8 % to 100 % of the area) and, with `flip`, mirrored half of the time; `pad`
        belongs to images in memory and is ignored. `share` is the part of each batch that is wanted. Raises
        ExperimentError at the call if the split is smaller than a batch, and on the way if a picture cannot be read.
        """
        order = epoch_order(len(self), batch_size, epoch, seed)[start:, share]
        flip = self.flip if flip is None else flip
        decode = _Augmented(RandomPart(self.size, flip), seed, epoch) if augment else _Centred(self.size)
        return self._stream(order.tolist(), decode, self.pool)

    def ordered(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order: float32 normalised NCHW, int64 labels; the last batch may be small.

        The shorter side becomes 256/224 of the size, and the centre is cut out, as is usual for ImageNet.
        Of several ranks each gets every so many-th batch, beginning with its own.
        """
        everything = range(len(self))
        batches = [
            everything[first : first + batch_size] for first in range(rank * batch_size, len(self), ranks * batch_size)
        ]
        # Seldom and short: processes that wait between two evaluations would only hold memory.
        return self._stream(batches, _Centred(self.size), _Pool())

    def _stream(
        self, batches: Sequence[Sequence[int]], decode: Decode, pool: "_Pool"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        normalise = normaliser(self.mean, self.std, self.device)
        decoded = pool.decoded(self.files, [(decode, chosen) for chosen in batches], self.workers, self.device)
        for chosen, pixels in zip(batches, decoded, strict=True):
            if isinstance(pixels, ExperimentError):
                raise pixels
            labels = self.labels[list(chosen)].to(self.device, non_blocking=True)
            # NHWC as decoded: a view as NCHW is what torch calls channels_last.
            yield normalise(pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)), labels


class _Pool:
    """The decoding processes of a split. They live as long as it does, so that no epoch waits until they are there."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []  # the loader reads it anew whenever an epoch begins
        self.loader: DataLoader[Any] | None = None
        self.busy = False

    def decoded(
        self, files: NDArray[np.bytes_], tasks: Sequence[Task], workers: int, device: torch.device
    ) -> Iterator[Tensor | ExperimentError]:
        """The pictures of each task, uint8 NHWC. A stream that begins within another has processes of its own."""
        if self.busy:
            yield from _Pool().decoded(files, tasks, workers, device)
            return
        self.busy = True
        self.tasks[:] = tasks
        try:
            self.loader = self.loader or DataLoader(
                _Pictures(files),
                batch_size=None,  # an entry of the sampler is a whole batch
                sampler=self.tasks,
                num_workers=workers,
                worker_init_fn=_ignore_preemption,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                generator=torch.Generator(),  # or every epoch would draw from the global stream
            )
            yield from self.loader
        finally:
            self.busy = False


@dataclass(frozen=True)
class _Pictures(Dataset[Any]):
    files: NDArray[np.bytes_]

    def __getitem__(self, task: Task) -> Tensor | ExperimentError:
        decode, chosen = task
        pixels: NDArray[np.uint8] | None = None
        try:
            for place, index in enumerate(chosen):
                image = decode(os.fsdecode(self.files[index]), index)
                if pixels is None:
                    pixels = np.empty((len(chosen), image.height, image.width, 3), dtype=np.uint8)
                pixels[place] = np.asarray(image)
        except ExperimentError as error:  # raised in a worker, its message would become a traceback
            return error
        return torch.from_numpy(pixels)


@dataclass(frozen=True)
class _Centred:
    size: int

    def __call__(self, file: str, index: int) -> "Image.Image":
        return centre(picture(file), self.size * 256 // 224, self.size)


@dataclass(frozen=True)
class _Augmented:
    part: RandomPart
    seed: int
    epoch: int

    def __call__(self, file: str, index: int) -> "Image.Image":
        return self.part(file, derive_seed(self.seed, "augment", self.epoch, index))


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
