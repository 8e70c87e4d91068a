"""The data sets by name, and how each is divided into three splits."""

import hashlib
import importlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from ..config import Data, ExperimentError, nearest
from ..files import writable
from ..randomness import generator
from .from_torchvision import FAULTS, NAMES, Labelled, patience, read_parts
from .image_folder import ANOTHER_CACHE, Pictures, decode_all, find_pictures
from .in_memory import Images, mean_and_std
from .streamed import Folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # those of every published ImageNet model
IMAGENET_STD = (0.229, 0.224, 0.225)


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

    def thin(self, train: int, others: int) -> "Splits":
        """Return at most so many training images, and of each other split, evenly spaced: every class is among them."""
        chosen = {}
        for name, count in {"train": train, "holdout": others, "test": others}.items():
            part = getattr(self, name)
            chosen[name] = part.take(torch.linspace(0, len(part) - 1, min(count, len(part))).round().long())
        return replace(self, **chosen, description=f"{self.description}, at most {train} / {others} of them")

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


def load(config: Data, seed_split: int = 0) -> Splits:
    """Load a data set and divide it; the splits are on the CPU.

    `seed_split` draws the images that are held out. All runs of a data set hold out the same ones unless it differs.
    Raises ExperimentError if the data set is unknown, missing or damaged.
    """
    sources = {"digits": _digits, "cifar10": _cifar10, "image_folder": _image_folder, "imagenet": _imagenet}
    if config.name in NAMES:
        return _torchvision(config, seed_split)
    if config.name == "torchvision":
        raise ExperimentError("data=torchvision needs the name of one of its classes, as in data.name=SVHN.")
    if config.name not in sources:
        names = [name for name in NAMES if name != "ImageFolder"]  # our image_folder says more of what is wrong
        closest = nearest(config.name, [*sources, *names])
        raise ExperimentError(
            f"data.name={config.name} is unknown{closest}: there are {', '.join(sources)}, and the classes of"
            " torchvision.datasets."
        )
    size = {"digits": 8, "cifar10": 32}.get(config.name, config.size)
    if config.size != size:
        raise ExperimentError(f"data={config.name} has images of {size} pixels: set data.size={size}.")
    return sources[config.name](config, seed_split)


def _digits(config: Data, seed_split: int) -> Splits:
    """Load scikit-learn's digits; a fixed fifth of each class is the test split."""
    # scikit-learn takes seconds to import, and no other data set needs it.
    pixels, targets = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).long()
    train, test = hold_out(labels, 0.2, generator("digits", "test"))
    description = f"scikit-learn digits, {len(train):,} train / {len(test):,} test"
    return _in_memory(config, seed_split, (images[train], labels[train]), (images[test], labels[test]), description)


def _cifar10(config: Data, seed_split: int) -> Splits:
    """Load the official CIFAR-10 archive from data.root, or download it."""
    folder = Path(config.root or Path(config.cache, "cifar10"))
    unpacked = folder / CIFAR10.base_folder
    if not unpacked.is_dir():
        _fetch_cifar10(folder)
    try:
        parts = [CIFAR10(folder, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ExperimentError(f"{unpacked} is incomplete or damaged: delete it, and it is downloaded again.") from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return _in_memory(config, seed_split, train, test, "CIFAR-10 (official archive)")


def _fetch_cifar10(folder: Path) -> None:
    """Unpack the archive that lies in `folder`, or download it; on failure nothing is left there."""
    archive = writable(folder, ANOTHER_CACHE) / CIFAR10.filename
    if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
        raise ExperimentError(f"{archive} is not the official archive (its checksum differs): delete it.")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        try:
            with patience():
                if archive.exists():
                    extract_archive(str(archive), scratch)
                else:
                    CIFAR10(scratch, download=True)
        except FAULTS as error:
            raise ExperimentError(
                f"CIFAR-10 is not in {folder} and cannot be downloaded from {CIFAR10.url} ({error}): copy"
                f" {CIFAR10.filename} there, or use a copy as images with data=image_folder data.root=FOLDER."
            ) from error
        try:
            os.rename(Path(scratch, CIFAR10.base_folder), folder / CIFAR10.base_folder)
        except OSError:
            if not (folder / CIFAR10.base_folder).is_dir():  # otherwise another job was faster
                raise


def _torchvision(config: Data, seed_split: int) -> Splits:
    """Load a data set of torchvision; if it has no test part, a fixed fifth of each class is one."""
    parts = read_parts(config)
    if len(parts) == 1:
        images, labels = parts[0]
        parts = [(images[part], labels[part]) for part in hold_out(labels, 0.2, generator(config.name, "test"))]
    train, test = parts
    description = f"torchvision's {config.name}, {len(train[1]):,} train / {len(test[1]):,} test"
    return _in_memory(config, seed_split, train, test, description)


def _image_folder(config: Data, seed_split: int) -> Splits:
    """Decode a folder of pictures into memory."""
    pictures = find_pictures(config.root, config.name, ("test", "val"))
    root = str(config.root)
    pixels = decode_all(*pictures, root, config.size, config.cache)
    train, test = (
        (torch.from_numpy(pixels[name]), torch.tensor(part.targets))
        for name, part in zip(("train", "test"), pictures, strict=True)
    )
    description = f"image folder {Path(root).resolve().name}, {len(train[1]):,} train / {len(test[1]):,} test"
    return _in_memory(config, seed_split, train, test, description)


def _imagenet(config: Data, seed_split: int) -> Splits:
    """Stream a folder of pictures from disk."""
    train, test = find_pictures(config.root, config.name, ("val",))
    kept, held = hold_out(torch.tensor(train.targets), config.holdout, generator("holdout", seed_split))

    def folder(pictures: Pictures, chosen: Iterable[int]) -> Folder:
        files = np.array([os.fsencode(pictures.samples[index][0]) for index in chosen])
        labels = torch.tensor([pictures.targets[index] for index in chosen])
        return Folder(files, labels, IMAGENET_MEAN, IMAGENET_STD, config.size, config.workers, config.flip)

    return Splits(
        train=folder(train, kept.tolist()),
        holdout=folder(train, held.tolist()),
        test=folder(test, range(len(test))),
        classes=len(train.classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        description=f"ImageNet tree {Path(str(config.root)).resolve().name}, {len(train.classes):,} classes,"
        f" {len(train):,} train / {len(test):,} test",
    )


def _in_memory(config: Data, seed_split: int, train: Labelled, test: Labelled, description: str) -> Splits:
    """Hold out a part of the training images; their remainder gives the mean and deviation of all splits."""
    images, labels = train
    kept, held = hold_out(labels, config.holdout, generator("holdout", seed_split))
    kept_images = images[kept]
    mean, std = mean_and_std(kept_images)

    def split(images: Tensor, labels: Tensor) -> Images:
        return Images(images, labels, mean, std, config.pad, config.flip)

    return Splits(
        train=split(kept_images, labels[kept]),
        holdout=split(images[held], labels[held]),
        test=split(*test),
        classes=int(max(labels.max(), test[1].max())) + 1,
        mean=mean,
        std=std,
        description=description,
    )


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
