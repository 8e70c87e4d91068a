"""Memory: what is freed is kept for the next batch, and what to do when it is not enough."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from .config import ExperimentError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # their numbers in glibc's malloc.h


def keep_freed() -> None:
    """Have glibc keep the memory that is freed, from here to the end of the process; elsewhere nothing happens.

    It returns what is large to the kernel at once, which clears every page of it anew for the next batch: in
    evaluation, whose batches are large, that took as long as the network.
    """
    with suppress(OSError, TypeError, AttributeError):  # no C library of that kind: TypeError is Windows'
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)  # large blocks, too, from the heap
        mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn the ways in which memory runs out while the block runs into an ExperimentError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExperimentError(
            f"The memory is not enough ({first}). The last checkpoint is kept: free some, or take a larger machine, and"
            " the same command goes on from it. Less is needed with fewer data.workers, or with a smaller "
            "schedule.batch_size or growth.calibrate, which make another run: give it another folder with runs=FOLDER."
        ) from error


def _is_shortage(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in text
        or "CUDA out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or ("DataLoader worker" in text and "Killed" in text)  # what the kernel does when the machine has no more
    )
