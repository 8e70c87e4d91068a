"""A network's tensors by name; parametrised and grouped weights."""

import ctypes

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from .errors import TransferError
from .network import in_mode


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, with weights that parametrisations compute in place of their parts."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module, weight in parametrised(model):
        prefix = f"{name}.parametrizations.{weight}.".lstrip(".")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        tensors[f"{name}.{weight}".lstrip(".")] = computed(module, weight)
    return tensors


def computed(module: nn.Module, weight: str) -> Tensor:
    """Return a parametrised weight as in eval mode: in training a spectral norm changes its buffers when it is read."""
    with in_mode(module.parametrizations[weight], training=False):  # type: ignore[index]
        return getattr(module, weight).detach()


def view_bytes(tensor: Tensor) -> ctypes.Array:
    """Return the bytes of a contiguous tensor on the CPU without a copy; they live as long as the tensor."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def parametrised(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return, for every parametrised weight, the name of its module, the module, and the name of the weight."""
    found = [(name, module) for name, module in model.named_modules() if parametrize.is_parametrized(module)]
    return [(name, module, weight) for name, module in found for weight in module.parametrizations]  # type: ignore


def refuse_spectral_norm(module: nn.Module, weight: str, name: str) -> None:
    """Raise TransferError if the parametrised weight `name`, which grows, has a spectral norm."""
    if any(isinstance(part, _SpectralNorm) for part in module.parametrizations[weight]):  # type: ignore[index, union-attr]
        raise TransferError(
            f"{name} has a spectral norm, which divides by the largest singular value, and copies change that: remove "
            "the norm (torch.nn.utils.parametrize.remove_parametrizations) before the network grows."
        )


def merge_groups(weight: Tensor, groups: int, times: int, between: float = 0.0) -> Tensor:
    """Return a convolution's weight (units, units read in each group, kernel) in which `times` groups become one."""
    # `between` are the weights with which the units of one old group read those of another.
    if times == 1:
        return weight
    rows, inside = weight.shape[:2]
    merged = weight.new_full((rows, inside * times, *weight.shape[2:]), between)
    for row in range(rows):
        start = row // (rows // groups) % times * inside
        merged[row, start : start + inside] = weight[row]
    return merged


def find_eps(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    """Return the module and the attribute at a place of `Record.eps`: that attribute, or the `eps` of that module."""
    path, _, name = place.rpartition(".")
    parent = model.get_submodule(path)
    return (parent, name) if isinstance(getattr(parent, name, None), float) else (model.get_submodule(place), "eps")
