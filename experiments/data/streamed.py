"""Images that do not fit in memory: picture files, decoded and augmented by worker processes."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from ..config import ExperimentError
from ..randomness import derive_seed
from .batching import WHOLE, epoch_order, normaliser, ordered_batches
from .image_folder import crop_centre, read_picture

AREA, RATIO = [0.08, 1.0], [3 / 4, 4 / 3]  # the share of a picture that a random crop takes; its width by its height
SPARE = 2  # a picture may be decoded smaller if the crop keeps so many times the pixels that are asked for

Decode = Callable[[str, int], Image.Image]  # a file and its index -> a square picture, RGB
Task = tuple[Decode, Sequence[int]]  # how to decode, and the indices of a batch


@dataclass(frozen=True)
class Folder:
    """A split on disk: picture files and their int64 labels; batches come out on `device`."""

    files: NDArray[np.bytes_]  # one buffer, where every worker would copy a list of strings
    labels: Tensor
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    size: int  # side of the images, pixels
    workers: int  # decoding processes
    flip: bool = True  # half of the training images are mirrored
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pool: "_Pool" = field(default_factory=lambda: _Pool(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Folder":
        """Return the pictures with these indices."""
        return replace(self, files=self.files[chosen.numpy()], labels=self.labels[chosen], pool=_Pool())

    def to(self, device: torch.device | str) -> "Folder":
        """Return the same split, giving batches on `device`."""
        return replace(self, device=torch.device(device), pool=_Pool())

    def batches(
        self, batch_size: int, epoch: int, seed: int, augment: bool = True, start: int = 0, share: slice = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the complete batches of an epoch: see Images.batches.

        With `augment`, an image is a random crop of its picture (Szegedy et al. 2015, section 6), which depends on the
        seed, the epoch and the picture's index alone. Raises ExperimentError also while iterating, if a picture cannot
        be read.
        """
        order = epoch_order(len(self), batch_size, epoch, seed)[start:, share]
        crop, centre = partial(_decode_crop, self.size, self.flip, seed, epoch), partial(_decode_centre, self.size)
        return self._stream(order.tolist(), crop if augment else centre, self.pool)

    def ordered(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all images in order, or over this rank's share of the batches; the last batch may be small.

        As usual for ImageNet, the shorter side becomes 256/224 of the size, and the centre is cut out.
        """
        batches = ordered_batches(len(self), batch_size, rank, ranks)
        # A pool of its own: workers that wait from one evaluation to the next would only hold memory.
        return self._stream(batches, partial(_decode_centre, self.size), _Pool())

    def _stream(
        self, batches: Sequence[Sequence[int]], decode: Decode, pool: "_Pool"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batches in the pool; move them to the device and normalise them there."""
        normalise = normaliser(self.mean, self.std, self.device)
        decoded = pool.decode(self.files, [(decode, chosen) for chosen in batches], self.workers, self.device)
        for chosen, pixels in zip(batches, decoded, strict=True):
            if isinstance(pixels, ExperimentError):
                raise pixels
            labels = self.labels[list(chosen)].to(self.device, non_blocking=True)
            # Pixels are stored N x H x W x C. Seen as N x C x H x W, they are in torch's channels_last layout.
            yield normalise(pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)), labels


def _decode_centre(size: int, file: str, index: int) -> Image.Image:
    """Decode the centre of a picture."""
    return crop_centre(read_picture(file), size * 256 // 224, size)


def _decode_crop(size: int, flip: bool, seed: int, epoch: int, file: str, index: int) -> Image.Image:
    """Decode a random crop of a picture."""
    return random_crop(file, size, flip, derive_seed(seed, "augment", epoch, index))


def random_crop(file: str, size: int, flip: bool, seed: int) -> Image.Image:
    """Decode a random part of a picture, resized to a square; with `flip`, half of them are mirrored.

    The part is drawn as torchvision's RandomResizedCrop draws it, which takes a quarter more time. A JPEG of whose
    pixels a large part is asked for is decoded at 1/2, 1/4 or 1/8 of its size, as long as the part keeps `SPARE` times
    the pixels of the square. On photographs this changes the grey levels by 2 % at most (root mean square) and halves
    the time.
    """
    full, box = (0, 0), [0, 0, 0, 0]

    def prepare(opened: Image.Image) -> None:
        nonlocal full, box
        full, box = opened.size, RandomResizedCrop.get_params(opened, AREA, RATIO)  # pyright: ignore[reportArgumentType]
        times = min(box[2:]) // (SPARE * size)
        if times > 1:
            opened.draft(None, (full[0] // times, full[1] // times))  # pyright: ignore[reportArgumentType]

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mirror = torch.rand(1).item() < 0.5 and flip
        image = read_picture(file, prepare)
    top, left, height, width = box
    across, down = (now / once for now, once in zip(image.size, full, strict=True))
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, (left * across, top * down, right, bottom))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


class _Pool:
    """The decoding processes of a split. They live as long as the split, so that no epoch waits for their start.

    With new processes for every epoch, epochs of 1,000 pictures take 1.4 times as long, those of 9,000 1.05 times.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []  # the loader reads the list anew when an epoch begins
        self.loader: DataLoader[Any] | None = None
        self.busy = False

    def decode(
        self, files: NDArray[np.bytes_], tasks: Sequence[Task], workers: int, device: torch.device
    ) -> Iterator[Tensor | ExperimentError]:
        """Decode the pictures of each task, uint8 NHWC; an inner stream within another gets processes of its own."""
        if self.busy:
            yield from _Pool().decode(files, tasks, workers, device)
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
                generator=torch.Generator(),  # otherwise every epoch would draw from the global stream
            )
            yield from self.loader
        finally:
            self.busy = False


@dataclass(frozen=True)
class _Pictures(Dataset[Any]):
    """Picture files; an item is a whole batch, uint8 NHWC, or the error that ended it."""

    files: NDArray[np.bytes_]

    def __getitem__(self, task: Task) -> Tensor | ExperimentError:
        decode, chosen = task
        try:
            pictures = [np.asarray(decode(os.fsdecode(self.files[index]), index)) for index in chosen]
        except ExperimentError as error:  # raised in a worker, its message would become a traceback
            return error
        return torch.from_numpy(np.stack(pictures))


def _ignore_preemption(_worker: int) -> None:
    """Make a worker ignore the signals that Slurm sends to all processes of a job.

    A worker that inherited its parent's handler would requeue the job a second time, and one that died would take the
    parent's last checkpoint with it.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after the imports above, so before multiprocessing's own handler, which would wait for ever
def _end_workers() -> None:
    """Kill the workers of an unfinished epoch: they ignore the signal by which multiprocessing ends them."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report their end as a failure
    for child in children:
        child.kill()
