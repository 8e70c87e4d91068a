"""Where a run computes, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from .config import ExperimentError


def pick_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:1 ...) stands for; ExperimentError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that matrix products run in: bfloat16 where the hardware multiplies it, else float32, unless named.

    Weights, batch-norm statistics and the optimizer are float32 in any case (autocast).
    """
    if name == "auto":
        name = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if name not in ("float32", "bfloat16"):
        raise ExperimentError(f"The precision {name!r} is unknown: use auto, float32 or bfloat16.")
    return getattr(torch, name)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Matrix products in `precision` while the block runs."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def describe(device: torch.device) -> str:
    """The hardware in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
