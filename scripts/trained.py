"""Networks that have seen no data and yet hold no constant: nothing that a growth forgets goes unnoticed."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def look_trained(model: nn.Module, images: Tensor | None = None, seed: int = 0) -> nn.Module:
    """Give every part a say in the output, as training does; return the network in eval mode.

    Afterwards no bias, affine parameter, layer scale, class token or head is a constant. Batch norms hold the
    statistics of `images`, disturbed, each as the images reach it through those before, so that the signal survives
    a deep network; where no image reaches them, those that they held, disturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        _disturb(parameter, generator)
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_var is not None]
    for norm in norms:
        _disturb_statistics(norm, generator)

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        values = inputs[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        # A channel that is silent on these images may not be on the next.
        norm.running_var.copy_(values.var(1).lerp(values.var(1).mean(), 0.5))
        _disturb_statistics(norm, generator)

    model.eval()
    if images is not None:
        hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
        model(images)
        for hook in hooks:
            hook.remove()
    return model


def _disturb(parameter: Tensor, generator: torch.Generator) -> None:
    """Vectors leave their constant; a matrix of zeros, which would hide all before it, becomes a random one."""
    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if parameter.numel() == max(parameter.shape, default=1):
        positive = bool((parameter > 0).all())  # and may have to stay so: a variance, the base of a logarithm
        parameter *= 0.5 + torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter += 0.3 * (noise.abs() if positive else noise)
    elif not parameter.any():
        parameter += noise / parameter[0].numel() ** 0.5


def _disturb_statistics(norm: _BatchNorm, generator: torch.Generator) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = norm.running_mean, norm.running_var
    mean += 0.3 * var.sqrt() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
    var *= 0.5 + torch.rand(var.shape, generator=generator, dtype=var.dtype)
