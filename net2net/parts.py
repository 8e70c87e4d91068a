"""What a network is made of besides the numbers in its tensors: the modules' classes and settings, names and ties."""

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

COMMON = frozenset(vars(nn.Module()))  # what every module keeps


def is_plain(value: object) -> bool:
    """Tell whether JSON can hold a value: a number, a text, None, or lists, tuples and dicts of these."""
    if type(value) in (list, tuple, torch.Size):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def settings(holder: object) -> dict[str, Any]:
    """Return the plain values that a module, or another object, keeps as attributes."""
    return {key: value for key, value in vars(holder).items() if key not in COMMON and is_plain(value)}


def functions(module: nn.Module) -> dict[str, str]:
    """Return the names of the functions that a module keeps as attributes."""
    return {k: f.__name__ for k, f in vars(module).items() if isinstance(f, FunctionType | BuiltinFunctionType)}


def tensor_names(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """List all parameters, buffers and tensors that are attributes: name, first name of the same tensor, tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path, module in model.named_modules():
        held = ((key, value) for key, value in vars(module).items() if isinstance(value, Tensor))
        named += [(f"{path}.{key}".lstrip("."), value) for key, value in held]
    for name, tensor in named:
        yield name, first.setdefault(id(tensor), name), tensor
