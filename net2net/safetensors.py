"""Write and read safetensors files: eight bytes with the length of the header, the header in JSON, then the numbers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import TransferError
from .tensors import view_bytes

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a new file; on return they are on the disk."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise TransferError(f"{name} is of {tensor.dtype}, {tensor.layout}, which safetensors has no name for.")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(view_bytes(data))
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, on the CPU."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            base = file.tell()
            for name, entry in header.items():
                if name != "__metadata__":
                    tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                    file.seek(base + entry["data_offsets"][0])
                    if file.readinto(view_bytes(tensors[name])) != tensors[name].nbytes:
                        raise ValueError(f"it ends before the numbers of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise TransferError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    return tensors
