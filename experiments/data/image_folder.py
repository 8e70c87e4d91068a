"""A tree of pictures on disk, ROOT/train/CLASS/picture.jpg: what lies in it, and one picture of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ExperimentError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Part:
    """One half of a tree: the files, and the number of each file's class, class after class."""

    files: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Tree:
    """A tree: its training and test pictures, and the names of the classes, sorted."""

    train: Part
    test: Part
    classes: list[str]


def find_tree(root: str | None, data: str, tests: tuple[str, ...]) -> Tree:
    """Lists the pictures of ROOT/train and of the first of ROOT/`tests` that exists.

    `data` is the name under which the user chose the tree, for the messages. Names that start with a dot are
    left out. Raises ExperimentError if a folder is missing or empty, or if the classes of the halves differ.
    """
    halves = f"train/ and {' or '.join(f'{test}/' for test in tests)}"
    if root is None:
        raise ExperimentError(f"data.root is not set: data={data} needs data.root=FOLDER with {halves} in it.")
    if not os.path.isdir(root):
        raise ExperimentError(f"data.root={root} is not a folder: set it to a folder with {halves} in it.")
    folders = [Path(root, test) for test in tests if Path(root, test).is_dir()]
    if not folders or not Path(root, "train").is_dir():
        inside = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
        raise ExperimentError(f"data.root={root} needs {halves}, each with a folder per class, but holds {inside}.")
    train_classes, test_classes = _classes(Path(root, "train")), _classes(folders[0])
    if train_classes != test_classes:
        lone = sorted(set(train_classes) ^ set(test_classes))
        where = "; ".join(
            f"{name} is only in {'train' if name in train_classes else folders[0].name}/" for name in lone[:3]
        )
        raise ExperimentError(
            f"The class folders of {root}/train and {folders[0]} differ ({where}): make them the same."
        )
    return Tree(_part(Path(root, "train"), train_classes), _part(folders[0], train_classes), train_classes)


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ExperimentError(f"{folder} has no class folders: put the pictures of each class in {folder}/CLASS/.")
    return names


def _part(folder: Path, classes: list[str]) -> Part:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found: list[str] = []
        for directory, subfolders, names in os.walk(folder / name, followlinks=True):
            subfolders[:] = [subfolder for subfolder in subfolders if subfolder[0] != "."]
            found += [
                os.path.join(directory, file) for file in names if file[0] != "." and file.lower().endswith(SUFFIXES)
            ]
        if not found:
            raise ExperimentError(
                f"The class folder {folder / name} has no images ({', '.join(SUFFIXES)}): add some, or remove"
                f" this class from every part."
            )
        files += sorted(found)
        labels += [label] * len(found)
    return Part(files, labels)


def picture(file: str, before: Callable[["Image.Image"], object] | None = None) -> "Image.Image":
    """The decoded picture in `file`, RGB. Raises ExperimentError if it cannot be read to its end.

    `before` is called with the opened picture, whose size is known, before it is decoded.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            if before is not None:
                before(opened)
            if opened.mode == "RGB":  # convert would copy it
                opened.load()
                return opened
            return opened.convert("RGB")
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise ExperimentError(f"The image {file} cannot be read ({error}): replace it, or delete it.") from error


def centre(image: "Image.Image", side: int, size: int) -> "Image.Image":
    """The central square of `size` pixels, cut after the shorter side was made `side` pixels long.

    The same pixels as torchvision's Resize(side) and CenterCrop(size); a picture of that size stays as it is.
    """
    from PIL import Image

    short = min(image.size)
    if short != side:
        width, height = (int(side * length / short) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if image.size == (size, size):
        return image
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))
