"""The device of a run, the arithmetic of its training steps, and what happens when its memory runs out."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import ExperimentError

CPUINFO = Path("/proc/cpuinfo")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # options of glibc's mallopt, as malloc.h numbers them


def pick_device(name: str) -> torch.device:
    """Return the device of a name (auto, cpu, cuda, cuda:1 ...); ExperimentError if it is unknown or not there.

    `auto` is a GPU if there is one. Each process that torchrun starts on a machine gets a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ExperimentError(f"The device {name!r} is unknown: use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("device=cuda was asked for, but torch finds no GPU: use device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ExperimentError(f"There is no device {name}: this machine has {torch.cuda.device_count()} GPUs, from 0.")
    return device


@dataclass(frozen=True)
class Arithmetic:
    """How a training step computes. Weights, batch norm statistics and the optimizer's state are always float32."""

    precision: str = "float32"  # of products: float32, tf32 (10 bits of mantissa, NVIDIA GPUs), bfloat16 (autocast)
    layout: str = "channels_last"  # of images and weights in memory: channels_last, contiguous
    compile: bool = False  # whether torch.compile makes the step

    def __str__(self) -> str:
        return f"{self.precision} {self.layout}{' compiled' * self.compile}"

    @property
    def memory_format(self) -> torch.memory_format:
        """Torch's name of the layout."""
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    @contextmanager
    def step(self) -> Iterator[None]:
        """Allow TF32 in the block if that is the precision. The block holds the backward pass, too."""
        _allow_tf32(self.precision == "tf32")
        try:
            yield
        finally:
            _allow_tf32(False)

    def forward(self, device: torch.device) -> AbstractContextManager:
        """Return a context in which the forward pass computes its products in bfloat16, if that is the precision."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()


def choose_arithmetic(device: torch.device, precision: str, layout: str, compile: bool) -> Arithmetic:
    """Return the arithmetic of a run, with `auto` decided by the hardware, so that all runs on it compute alike.

    The precision is bfloat16 where the device multiplies it, else float32; the layout is contiguous with float32, else
    channels_last. Raises ExperimentError for TF32 where there is none.
    """
    if precision == "auto":
        precision = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if precision == "tf32" and not _is_ampere(device):
        raise ExperimentError(f"precision=tf32 was asked for, but {describe(device)} has none: use precision=float32.")
    if layout == "auto":
        layout = "contiguous" if precision == "float32" else "channels_last"
    return Arithmetic(precision, layout, compile)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself: AVX512-BF16, AMX, or a GPU of compute capability 8.0."""
    if device.type == "cuda":
        return _is_ampere(device)
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _is_ampere(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 8.0 or newer."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in convolutions and matrix products."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


_allow_tf32(False)  # torch allows it in convolutions: equal functions would then differ in the third digit


def describe(device: torch.device) -> str:
    """Return the name of the hardware, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, for the rest of the process; elsewhere nothing happens.

    By itself glibc returns large blocks to the kernel, which clears their pages for the next batch. Without this a
    training step of ResNet-8 on 128 images is 5 to 15 % slower; evaluation in batches of 128 is 2 to 9 % slower.
    """
    with suppress(OSError, TypeError, AttributeError):  # no C library of that kind; TypeError is that of Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)  # take large blocks from the heap, too
        mallopt(_TRIM_THRESHOLD, -1)  # never shrink the heap


@contextmanager
def explain_lack_of_memory() -> Iterator[None]:
    """Turn every way in which memory runs out in the block into an ExperimentError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (
            isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(sign in text for sign in ("DefaultCPUAllocator", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))
            or ("DataLoader worker" in text and "Killed" in text)  # the kernel kills a worker when memory is short
        ):
            raise
        first = text.strip().partition("\n")[0] or type(error).__name__
        raise ExperimentError(
            f"The memory is not enough ({first}). The last checkpoint is kept: free some memory or take a larger "
            "machine, and the same command continues. To need less, use fewer data.workers, or a smaller "
            "schedule.batch_size or growth.calibrate; these two make another run, which needs a tag=NAME."
        ) from error
