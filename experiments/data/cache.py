"""Decoded pictures, kept: a tree is decoded once, and again only when a file of it or the size changes."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ..config import ExperimentError
from ..files import writable
from .image_folder import Tree, centre, picture

ELSEWHERE = "set data.cache, or the variable NET2NET_CACHE, to a folder that can"
_log = logging.getLogger(__name__)


def decoded(tree: Tree, root: str, size: int, cache: str) -> dict[str, NDArray[np.uint8]]:
    """The pictures of `tree` as uint8 (N, 3, size, size) under "train" and "test", decoded once.

    Each is resized to a shorter side of `size` and cropped in its centre; one of that size stays as it is.
    A cache file that cannot be read is made again. Raises ExperimentError if a picture cannot be read.
    """
    parts = {"train": tree.train.files, "test": tree.test.files}
    _require_memory(sum(map(len, parts.values())) * 3 * size * size, root)
    file = Path(cache) / f"{Path(root).resolve().name}-{size}px-{_fingerprint(parts, root, size)}.npz"
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in parts}
        if all(arrays[name].shape == (len(files), 3, size, size) for name, files in parts.items()):
            return arrays
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever a damaged archive makes its reader raise
        _log.warning("%s is damaged (%s) and is made again", file, error)
    writable(Path(cache), ELSEWHERE)
    _log.info("Decoding %d pictures of %s into %s, once", sum(map(len, parts.values())), root, file)
    arrays = {name: _decode(files, size) for name, files in parts.items()}
    _store(file, arrays)
    return arrays


def _fingerprint(parts: dict[str, list[str]], root: str, size: int) -> str:
    digest = blake2b(repr(size).encode(), digest_size=8)
    for name, files in parts.items():
        for path in files:
            status = os.stat(path)
            entry = (name, os.path.relpath(path, root), status.st_size, status.st_mtime_ns)
            digest.update(repr(entry).encode())
    return digest.hexdigest()


def _require_memory(needed: int, root: str) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * needed > memory:  # twice: the arrays, and their division into splits
        raise ExperimentError(
            f"{root} would take {2 * needed / 2**30:.1f} GiB in memory and this machine has"
            f" {memory / 2**30:.1f} GiB: lower data.size, or stream it with data=imagenet."
        )


def _decode(files: list[str], size: int) -> NDArray[np.uint8]:
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    chunk = 64  # pictures a task: handing over single small pictures costs more than decoding them

    def decode(first: int) -> None:
        for index, file in enumerate(files[first : first + chunk], first):
            pixels[index] = np.asarray(centre(picture(file), size, size)).transpose(2, 0, 1)

    # Threads suffice: Pillow lets go of the interpreter while it decodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(0, len(files), chunk)):  # the first failure cancels the rest
            pass
    return pixels


def _store(file: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    part = file.with_name(f".{file.stem}-{uuid4().hex}.part")  # readable by others, unlike tempfile's
    try:
        with part.open("wb") as stream:
            np.savez(stream, train=arrays["train"], test=arrays["test"])
        os.replace(part, file)
    except OSError as error:
        raise ExperimentError(
            f"{file} cannot be written ({error.strerror}): make room, or set data.cache to another folder."
        ) from error
    finally:
        part.unlink(missing_ok=True)
