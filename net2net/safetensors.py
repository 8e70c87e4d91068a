"""Write and read safetensors files: eight bytes with the length of the header, the header in JSON, then the numbers."""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import TransferError
from .network import map_tensors
from .tensors import view_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # as the files of a checkpoint are called
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], make: Callable[[str], Tensor] | None = None) -> None:
    """Write tensors to a new file; on return they are on the disk.

    If they are on the meta device, `make` gives the values of each, so that one of them is in memory at a time.
    """
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
        for name, tensor in tensors.items():
            data = (make(name) if make else tensor).detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(view_bytes(data))
        file.flush()
        os.fsync(file.fileno())


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def map(self) -> Tensor:
        """Return the tensor without reading it: its numbers come into memory where they are used."""
        first = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=self.dtype)
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), self.stop - first, access=mmap.ACCESS_COPY, offset=first)
        numbers = torch.frombuffer(data, dtype=torch.uint8, offset=self.start - first)
        aligned = numbers if self.start % self.dtype.itemsize == 0 else numbers.clone()
        return aligned.view(self.dtype).reshape(self.shape)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors in files by name, mapped into memory only while they are used."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].map()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def rename(self, names: Mapping[str, str]) -> "TensorFiles":
        """Return the same tensors by other names; `names` are from new to old."""
        return TensorFiles({new: self.places[old] for new, old in names.items()})


class FromFiles(TorchFunctionMode):
    """While it is on, each operation on parameters on the meta device gets their values from files."""

    def __init__(self, networks: Sequence[tuple[nn.Module, TensorFiles]]) -> None:
        super().__init__()
        self.values: dict[int, Callable[[], Tensor]] = {}
        self.networks = networks  # so that no other tensor gets the same id
        for network, files in networks:
            for name, tensor in network.named_parameters():
                self.values[id(tensor)] = lambda place=files.places[name], to=tensor.dtype: place.map().to(to)
            for name, tensor in network.named_buffers():
                if name in files:
                    tensor.copy_(files[name])

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*map_tensors(args, self._value), **map_tensors(kwargs or {}, self._value))

    def _value(self, tensor: Tensor) -> Tensor:
        return self.values[id(tensor)]() if id(tensor) in self.values else tensor


def divide(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, list[str]]:
    """Divide tensors among files as large as the teacher's, or put them into one if the teacher has one."""
    if not (folder / INDEX).is_file():
        return {SINGLE: [*tensors]}
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    groups: list[list[str]] = [[]]
    room = largest
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= tensor.nbytes
    return {f"model-{k + 1:05}-of-{len(groups):05}.safetensors": names for k, names in enumerate(groups)}


def open_files(paths: Iterable[Path]) -> TensorFiles:
    """Return the tensors of several files."""
    return TensorFiles({name: place for path in paths for name, place in read_header(path).items()})


def read_header(path: Path) -> dict[str, Place]:
    """Return where each tensor of a file lies."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            base, size = file.tell(), os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, stop = (base + offset for offset in entry["data_offsets"])
            places[name] = Place(path, dtype, shape, start, stop)
            if stop - start != torch.empty(shape, dtype=dtype, device="meta").nbytes or start < base or stop > size:
                raise ValueError(f"it ends before the numbers of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError) as error:
        raise TransferError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    return places


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, on the CPU."""
    return {name: place.map().clone() for name, place in read_header(path).items()}
