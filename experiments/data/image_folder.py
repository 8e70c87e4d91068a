"""Folders of pictures, ROOT/train/CLASS/picture.jpg: list them, read one, decode all of them once."""

import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from .. import files
from ..config import ExperimentError

ANOTHER_CACHE = "set data.cache, or the variable NET2NET_CACHE, to a folder that can"
_log = logging.getLogger(__name__)


class Pictures(ImageFolder):
    """The pictures of FOLDER/CLASS, at any depth, by class; names that start with a dot are left out."""

    def __init__(self, folder: Path) -> None:

        def is_picture(file: str) -> bool:
            return "/." not in file.removeprefix(str(folder)) and file.lower().endswith(IMG_EXTENSIONS)

        _refuse_circles(folder)
        try:
            super().__init__(folder, is_valid_file=is_picture)
        except (FileNotFoundError, ValueError) as error:
            raise ExperimentError(
                f"{str(error).strip()} Put the pictures of each class in {folder}/CLASS/ ({', '.join(IMG_EXTENSIONS)})."
            ) from None

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, sorted, and their numbers."""
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: number for number, name in enumerate(names)}


def _refuse_circles(folder: Path) -> None:
    """Raise ExperimentError if a link below the folder leads to a folder around it, which would be read for ever."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        for link in (Path(place, name) for name in folders if os.path.islink(Path(place, name))):
            if any(os.path.samefile(link, around) for around in link.parents):
                raise ExperimentError(f"The link {link} leads to a folder that contains it: delete it.")


def find_pictures(root: str | None, data: str, tests: tuple[str, ...]) -> tuple[Pictures, Pictures]:
    """List the pictures of ROOT/train, and of the first folder in `tests`; `data` names the data set, for messages."""
    parts = f"train/ and {' or '.join(f'{test}/' for test in tests)}"
    if root is None:
        raise ExperimentError(f"data.root is not set: data={data} needs data.root=FOLDER with {parts} in it.")
    if not os.path.isdir(root):
        raise ExperimentError(f"data.root={root} is not a folder: set it to a folder with {parts} in it.")
    folder = next((folder for name in tests if (folder := Path(root, name)).is_dir()), None)
    if folder is None or not Path(root, "train").is_dir():
        inside = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
        raise ExperimentError(f"data.root={root} needs {parts}, each with a folder per class, but holds {inside}.")
    train, test = Pictures(Path(root, "train")), Pictures(folder)
    if lone := sorted(set(train.classes) ^ set(test.classes)):
        where = "; ".join(
            f"{name} is only in {'train' if name in train.classes else folder.name}/" for name in lone[:3]
        )
        raise ExperimentError(f"The class folders of {train.root} and {folder} differ ({where}): make them the same.")
    return train, test


def read_picture(file: str, prepare: Callable[[Image.Image], object] | None = None) -> Image.Image:
    """Decode a picture as RGB; `prepare` gets the opened picture, whose size is known, before it is decoded."""
    try:
        with Image.open(file) as opened:
            if prepare is not None:
                prepare(opened)
            if opened.mode == "RGB":  # convert would copy it
                opened.load()
                return opened
            return to_eight_bits(opened).convert("RGB")
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ExperimentError(f"The image {file} cannot be read ({error}): replace it, or delete it.") from error


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of 16 bits a pixel with the upper 8; refuse numbers of which no scale is known."""
    if image.mode in ("I", "F"):  # convert would make everything above 255 white
        raise ValueError(f"what is white in Pillow's mode {image.mode} is not known: save it with 8 or 16 bits a pixel")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I;16") else image


def crop_centre(image: Image.Image, side: int, size: int) -> Image.Image:
    """Resize the shorter side to `side` pixels and cut out the central square of `size` pixels.

    The pixels are those of torchvision's Resize(side) and CenterCrop(size), which need a tenth more time to decode
    photographs, and a third more for images of 32 pixels.
    """
    short = min(image.size)
    if short != side:
        width, height = (int(side * length / short) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if image.size == (size, size):
        return image
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def decode_all(train: Pictures, test: Pictures, root: str, size: int, cache: str) -> dict[str, NDArray[np.uint8]]:
    """Decode pictures below `root` once, uint8 (N, 3, size, size) under "train" and "test"; keep them in `cache`.

    They are decoded again if one of the files or the size changes, or if the cache's file cannot be read.
    """
    parts = {"train": [file for file, _ in train.samples], "test": [file for file, _ in test.samples]}
    count = sum(map(len, parts.values()))
    refuse_too_many(root, count, 3 * size * size)
    file = Path(cache) / f"{Path(root).resolve().name}-{size}px-{_fingerprint(parts, root, size)}.npz"
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in parts}
        if all(arrays[name].shape == (len(pictures), 3, size, size) for name, pictures in parts.items()):
            return arrays
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive may raise anything
        _log.warning("%s is damaged (%s): decoding the pictures again", file, error)
    files.writable(Path(cache), ANOTHER_CACHE)
    _log.info("Decoding %d pictures of %s into %s, once", count, root, file)
    arrays = {name: _decode(pictures, size) for name, pictures in parts.items()}
    archive = io.BytesIO()
    np.savez(archive, train=arrays["train"], test=arrays["test"])
    files.write(file, archive.getbuffer(), flush=False)
    return arrays


def refuse_too_many(name: str, count: int, each: int) -> None:
    """Raise ExperimentError if the memory cannot hold so many pictures of `each` bytes."""
    needed = 2 * count * each  # as arrays, and as splits
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ExperimentError(
            f"{name} would take {needed / 2**30:.1f} GiB in memory and this machine has"
            f" {memory / 2**30:.1f} GiB: lower data.size, or stream it with data=imagenet."
        )


def _fingerprint(parts: dict[str, list[str]], root: str, size: int) -> str:
    """Hash the size, and every file's name, length and time of change."""
    digest = blake2b(repr(size).encode(), digest_size=8)
    for name, pictures in parts.items():
        for path in pictures:
            try:
                status = os.stat(path)
            except OSError as error:  # a link to nowhere
                raise ExperimentError(
                    f"The image {path} cannot be read ({error.strerror}): replace it, or delete it."
                ) from error
            entry = (name, os.path.relpath(path, root), status.st_size, status.st_mtime_ns)
            digest.update(repr(entry).encode())
    return digest.hexdigest()


def _decode(pictures: list[str], size: int) -> NDArray[np.uint8]:
    """Decode pictures into an array, on all cores: Pillow releases the interpreter while it decodes."""
    pixels = np.empty((len(pictures), 3, size, size), dtype=np.uint8)
    chunk = 64  # pictures a task: handing over single small pictures costs more than decoding them

    def decode(first: int) -> None:
        for index, file in enumerate(pictures[first : first + chunk], first):
            pixels[index] = np.asarray(crop_centre(read_picture(file), size, size)).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(0, len(pictures), chunk)):  # the first failure cancels the rest
            pass
    return pixels
