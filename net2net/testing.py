"""Networks to test growth on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def look_trained(model: nn.Module, images: Tensor | None = None, seed: int = 0) -> nn.Module:
    """Make a fresh network look trained, in place, and return it in eval mode.

    A fresh network hides mistakes: a growth that forgets a bias of zero, or a scale of one, goes unnoticed. Afterwards
    no bias, affine parameter, layer scale, class token or head is a constant. Batch norms hold disturbed statistics: of
    the `images`, so that the signal survives a deep network, or those they had. The same seed gives the same network.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = _draw(torch.randn, parameter, generator)
        if parameter.numel() == max(parameter.shape, default=1):
            positive = bool((parameter > 0).all())  # it may have to stay so, as a variance or a logarithm's base must
            parameter *= 0.5 + _draw(torch.rand, parameter, generator)
            parameter += 0.3 * (noise.abs() if positive else noise)
        elif not parameter.any():  # a matrix of zeros would hide all that precedes it
            parameter += noise / parameter[0].numel() ** 0.5
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_var is not None]
    for norm in norms:
        _disturb_statistics(norm, generator)
    model.eval()
    if images is not None:
        hooks = [norm.register_forward_pre_hook(lambda n, x: _measure(n, x[0], generator)) for norm in norms]
        model(images)
        for hook in hooks:
            hook.remove()
    return model


def _measure(norm: nn.Module, values: Tensor, generator: torch.Generator) -> None:
    """Set the norm's statistics to those of the values (N, C, ...), disturbed."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    values = values.transpose(0, 1).flatten(1)
    norm.running_mean.copy_(values.mean(1))
    # A channel that is silent on these images may not be silent on the next.
    norm.running_var.copy_(values.var(1).lerp(values.var(1).mean(), 0.5))
    _disturb_statistics(norm, generator)


def _disturb_statistics(norm: _BatchNorm, generator: torch.Generator) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = norm.running_mean, norm.running_var
    mean += 0.3 * var.sqrt() * _draw(torch.randn, mean, generator)
    var *= 0.5 + _draw(torch.rand, var, generator)


def _draw(distribution: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    return distribution(like.shape, generator=generator, dtype=like.dtype).to(like.device)
