"""Where a run computes, and in which arithmetic."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import LAYOUTS, ExperimentError


def pick_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:1 ...) stands for; ExperimentError if it is not there.

    Of the processes that torchrun starts on a machine, each has its own GPU.
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
        raise ExperimentError("device=cuda was asked for, but torch finds no GPU: use device=cpu scale=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ExperimentError(
            f"device={name} was asked for, but there are {torch.cuda.device_count()} GPUs, from 0 on."
        )
    return device


@dataclass(frozen=True)
class Arithmetic:
    """How a training step computes. Weights, batch-norm statistics and the optimizer are float32 in any case."""

    precision: str = "float32"  # of products: float32; tf32 (an NVIDIA GPU's 10-bit mantissa); bfloat16 (autocast)
    layout: str = "channels_last"  # of images and weights in memory
    compile: bool = False  # whether torch.compile makes the step

    def __str__(self) -> str:
        return f"{self.precision} {self.layout}{' compiled' * self.compile}"

    @property
    def memory_format(self) -> torch.memory_format:
        """What torch calls the layout."""
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step, its backward pass included, may round to TF32 if that is the precision, and only then."""
        if self.precision != "tf32":
            yield
            return
        _allow_tf32(True)
        try:
            yield
        finally:
            _allow_tf32(False)

    def forward(self, device: torch.device) -> AbstractContextManager:
        """The forward pass computes its products in bfloat16, if that is the precision."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()


def candidates(device: torch.device, precision: str, layout: str, compile: bool) -> list[Arithmetic]:
    """What may be chosen, the most precise first: all that the hardware computes itself, or what the names ask for."""
    precisions = ["float32"]
    if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0):
        precisions.append("tf32")
    if _multiplies_bfloat16(device):
        precisions.append("bfloat16")
    if precision == "tf32" and precision not in precisions:
        raise ExperimentError(f"precision=tf32 was asked for, but {describe(device)} has none: use precision=float32.")
    return [
        Arithmetic(one, other, compile)
        for one in (precisions if precision == "auto" else [precision])
        for other in (LAYOUTS if layout == "auto" else [layout])
    ]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


_allow_tf32(False)  # torch allows it in convolutions: equal functions would then differ in the third digit


def describe(device: torch.device) -> str:
    """The hardware in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"
