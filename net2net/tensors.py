"""A network's tensors by name; parametrised and grouped weights."""

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from .errors import TransferError
from .network import in_mode


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; a weight that a parametrisation computes stands for what it is made of."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module, weight in parametrised(model):
        prefix = f"{name}.parametrizations.{weight}.".lstrip(".")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        tensors[f"{name}.{weight}".lstrip(".")] = computed(module, weight)
    return tensors


def computed(module: nn.Module, weight: str) -> Tensor:
    """A parametrised weight as in eval mode: in training a spectral norm changes its buffers whenever it is read."""
    with in_mode(module.parametrizations[weight], training=False):  # type: ignore[index]
        return getattr(module, weight).detach()


def parametrised(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Every module with a parametrised weight: its name, itself, the name of the weight."""
    return [
        (name, module, weight)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for weight in module.parametrizations  # type: ignore[union-attr]
    ]


def refuse_spectral_norm(module: nn.Module, weight: str, name: str) -> None:
    """Raise TransferError if the parametrised weight, which `name` is the name of and which grows, has one."""
    if any(isinstance(part, _SpectralNorm) for part in module.parametrizations[weight]):  # type: ignore[index, union-attr]
        raise TransferError(
            f"{name} has a spectral norm, which divides by the largest singular value: that of copies is another one."
        )


def merge_groups(weight: Tensor, groups: int, times: int, between: float = 0.0) -> Tensor:
    """The weight of the same convolution with `times` of its `groups` as one: `between` them stand zeros."""
    if times == 1:
        return weight
    rows, inside = weight.shape[:2]
    made = weight.new_full((rows, inside * times, *weight.shape[2:]), between)
    for row in range(rows):
        start = row // (rows // groups) % times * inside
        made[row, start : start + inside] = weight[row]
    return made
