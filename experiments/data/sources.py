"""What each name of a data set means."""

import difflib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import Data, ExperimentError
from ..randomness import generator
from .cache import decoded
from .cifar import cifar10
from .image_folder import find_tree
from .in_memory import Images, statistics
from .splits import Splits, divide
from .streamed import Folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # as every published ImageNet model
IMAGENET_STD = (0.229, 0.224, 0.225)


def load(config: Data, seed_split: int = 0) -> Splits:
    """The data set that `config` names, divided, on the CPU.

    `config.holdout` of the training images are held out, the same for every run of a data set, unless
    `seed_split` asks for another division. Raises ExperimentError if the data is not there or not sound.
    """
    sources = {"digits": _digits, "cifar10": _cifar10, "image_folder": _image_folder, "imagenet": _imagenet}
    if config.name not in sources:
        nearest = difflib.get_close_matches(config.name, sources, n=1, cutoff=0.0)[0]
        raise ExperimentError(
            f"data.name={config.name} is unknown: did you mean {nearest}? There are {', '.join(sources)}."
        )
    return sources[config.name](config, seed_split)


def _digits(config: Data, seed_split: int) -> Splits:
    from sklearn.datasets import load_digits

    _require_size(config, 8)
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).long()
    train, test = divide(labels, 0.2, generator("digits", "test"))
    description = f"scikit-learn digits, {len(train):,} train / {len(test):,} test"
    return _in_memory(config, seed_split, images[train], labels[train], images[test], labels[test], description)


def _cifar10(config: Data, seed_split: int) -> Splits:
    _require_size(config, 32)
    parts = cifar10(Path(config.root or Path(config.cache, "cifar10")))
    (train, train_labels), (test, test_labels) = (
        (torch.from_numpy(images), torch.tensor(labels)) for images, labels in (parts["train"], parts["test"])
    )
    return _in_memory(config, seed_split, train, train_labels, test, test_labels, "CIFAR-10 (official archive)")


def _image_folder(config: Data, seed_split: int) -> Splits:
    found = find_tree(config.root, config.name, ("test", "val"))
    root = str(config.root)
    pixels = decoded(found, root, config.size, config.cache)
    train, test = torch.from_numpy(pixels["train"]), torch.from_numpy(pixels["test"])
    train_labels, test_labels = torch.tensor(found.train.labels), torch.tensor(found.test.labels)
    description = f"image folder {_name(root)}, {len(train):,} train / {len(test):,} test"
    return _in_memory(config, seed_split, train, train_labels, test, test_labels, description)


def _imagenet(config: Data, seed_split: int) -> Splits:
    found = find_tree(config.root, config.name, ("val",))
    files = np.array([os.fsencode(file) for file in found.train.files])
    labels = torch.tensor(found.train.labels)
    kept, held = divide(labels, config.holdout, generator("holdout", seed_split))

    def folder(files: np.ndarray, labels: Tensor) -> Folder:
        return Folder(files, labels, IMAGENET_MEAN, IMAGENET_STD, config.size, config.workers, config.flip)

    return Splits(
        train=folder(files[kept.numpy()], labels[kept]),
        holdout=folder(files[held.numpy()], labels[held]),
        test=folder(np.array([os.fsencode(file) for file in found.test.files]), torch.tensor(found.test.labels)),
        classes=len(found.classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        description=f"ImageNet tree {_name(str(config.root))}, {len(found.classes):,} classes,"
        f" {len(files):,} train / {len(found.test.files):,} test",
    )


def _in_memory(
    config: Data,
    seed_split: int,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    description: str,
) -> Splits:
    kept, held = divide(train_labels, config.holdout, generator("holdout", seed_split))
    kept_images = train[kept]
    mean, std = statistics(kept_images)

    def images(pixels: Tensor, labels: Tensor) -> Images:
        return Images(pixels, labels, mean, std, config.pad, config.flip)

    return Splits(
        train=images(kept_images, train_labels[kept]),
        holdout=images(train[held], train_labels[held]),
        test=images(test, test_labels),
        classes=int(train_labels.max()) + 1,
        mean=mean,
        std=std,
        description=description,
    )


def _require_size(config: Data, size: int) -> None:
    if config.size != size:
        raise ExperimentError(f"data={config.name} has images of {size} pixels: set data.size={size}.")


def _name(root: str) -> str:
    return Path(root).resolve().name
