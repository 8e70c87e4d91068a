"""The classification data sets of torchvision, by the names of their classes."""

import inspect
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from ..config import Data, ExperimentError
from ..files import hold, writable
from .image_folder import ANOTHER_CACHE, crop_centre, refuse_too_many, to_eight_bits

PATIENCE = 20.0  # seconds without an answer after which the network counts as absent
NAMES = sorted(name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name)))
SPLITS = (("trainval", "train"), ("test", "val"))  # what data sets call their parts; the first that there is
FAULTS = (OSError, RuntimeError, ValueError, TypeError, ImportError, HTTPException)

Labelled = tuple[Tensor, Tensor]  # uint8 images NCHW and their int64 labels


def read_parts(config: Data) -> list[Labelled]:
    """Return the training and the test part of a data set, or all of it as one part if it has none.

    It is downloaded with data.download=true. Raises ExperimentError if it is missing, or gives no classes of images.
    """
    folder = Path(config.root or Path(config.cache, config.name))
    try:
        parts = _open(config, folder)
    except FAULTS as error:
        if not config.download:
            raise ExperimentError(
                f"torchvision cannot read {config.name} in {folder} ({_one_line(error)}): put the data set there, or"
                " add data.download=true. Arguments of the class are written +data.options.NAME=VALUE."
            ) from error
        parts = _download(config, folder)
    return [_decode(part, config) for part in parts]


def _open(config: Data, folder: Path, **download: bool) -> list[Any]:
    """Construct both parts, by `train` or by `split`, or the whole."""
    make = getattr(datasets, config.name)
    accepted = _list_arguments(make) - config.options.keys()
    given = {name: value for name, value in {"root": str(folder), **download}.items() if name in accepted}
    given |= config.options
    if "train" in accepted:
        return [make(**given, train=True), make(**given, train=False)]
    if "split" not in accepted:
        return [make(**given)]
    parts: list[Any] = []
    for preferred, other in SPLITS:
        try:
            parts.append(make(**given, split=preferred))
        except ValueError:  # there is no such split
            parts.append(make(**given, split=other))
    return parts


def _list_arguments(make: type) -> set[str]:
    """The arguments of a constructor, with those that it hands on to the class above."""
    found: set[str] = set()
    for one in make.__mro__:
        parameters = inspect.signature(one.__init__).parameters
        found |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _download(config: Data, folder: Path) -> list[Any]:
    """Download a data set beside its place, move it there when it is complete, and construct its parts."""
    with hold(writable(folder, ANOTHER_CACHE), lambda owner: None):
        with suppress(*FAULTS):
            return _open(config, folder)  # another process was faster
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch, patience():
                _open(config, Path(scratch), download=True)
                for entry in Path(scratch).iterdir():
                    os.rename(entry, folder / entry.name)
            return _open(config, folder)
        except FAULTS as error:
            raise ExperimentError(
                f"torchvision cannot download {config.name} ({_one_line(error)}): put the data set into {folder}."
            ) from error


@contextmanager
def patience() -> Iterator[None]:
    """Give up on a network that does not answer for PATIENCE seconds while the block runs."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _decode(part: Any, config: Data) -> Labelled:
    """Decode all images of a part; they are grey if the first one is."""
    image, target = part[0]
    if not isinstance(image, Image.Image) or not _is_number(target):
        raise ExperimentError(
            f"torchvision's {config.name} gives {type(image).__name__} and {type(target).__name__} where an image and"
            " the number of its class are needed: choose a data set for classification."
        )
    channels, mode = (1, "L") if image.mode in ("1", "L") else (3, "RGB")
    refuse_too_many(config.name, len(part), channels * config.size**2)
    pixels = np.empty((len(part), config.size, config.size, channels), dtype=np.uint8)
    labels = torch.empty(len(part), dtype=torch.int64)
    for index in range(len(part)):
        image, target = part[index]
        square = crop_centre(to_eight_bits(image).convert(mode), config.size, config.size)
        pixels[index] = np.asarray(square).reshape(pixels.shape[1:])
        labels[index] = int(target)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def _is_number(target: object) -> bool:
    return np.ndim(target) == 0 and not isinstance(target, str)  # type: ignore[arg-type]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
