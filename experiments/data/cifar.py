"""The official CIFAR-10 archive, through torchvision: found, or downloaded and checked."""

import os
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import ExperimentError
from ..files import writable
from .cache import ELSEWHERE

PATIENCE = 20.0  # seconds without an answer before the network counts as absent


def cifar10(folder: Path) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    """Images uint8 (N, 3, 32, 32) and labels under "train" and "test"; downloaded into `folder` if not there.

    Raises ExperimentError if the files do not have their official checksums, or cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    files = folder / CIFAR10.base_folder
    if not files.is_dir():
        _fetch(folder)
    parts: dict[str, tuple[NDArray[np.uint8], list[int]]] = {}
    for name in ("train", "test"):
        try:
            part = CIFAR10(folder, train=name == "train")
        except RuntimeError as error:
            raise ExperimentError(
                f"{files} is incomplete or damaged: delete it, and it is downloaded again."
            ) from error
        parts[name] = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), part.targets
    return parts


def _fetch(folder: Path) -> None:
    """Leaves the unpacked archive in `folder`, whole or not at all; an archive that lies there is used."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive = writable(folder, ELSEWHERE) / CIFAR10.filename
    if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
        raise ExperimentError(f"{archive} is not the official archive (its checksum differs): delete it.")
    patience = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        try:
            socket.setdefaulttimeout(PATIENCE)
            if archive.exists():
                extract_archive(str(archive), part)
            else:
                CIFAR10(part, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            raise ExperimentError(
                f"CIFAR-10 is not in {folder} and cannot be downloaded from {CIFAR10.url} ({error}): copy"
                f" {CIFAR10.filename} there, or use a copy as images with data=image_folder data.root=FOLDER."
            ) from error
        finally:
            socket.setdefaulttimeout(patience)
        try:
            os.rename(Path(part, CIFAR10.base_folder), folder / CIFAR10.base_folder)
        except OSError:  # another job was first
            if not (folder / CIFAR10.base_folder).is_dir():
                raise
