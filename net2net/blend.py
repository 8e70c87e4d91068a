"""An activation that starts as the identity and learns how much of itself to be (after Network Morphism, 2016)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function


def _blend(x: Tensor, activated: Tensor, amount: Tensor) -> Tensor:
    """Return x + amount * (activated - x): the identity at 0, the activation at 1."""
    return x + amount * (activated - x)


blend = wrap_torch_function(lambda x, activated, amount: (x, activated, amount))(_blend)  # one function for the pass


class Blend(nn.Module):
    """`activation`, faded in: x + amount (activation(x) - x) with one learned `amount`, 0 at first.

    Wei et al., "Network Morphism" (ICML 2016), call it a P-activation. With it a new layer can be an identity before
    activations that are not idempotent (GELU, SiLU, tanh, sigmoid), where the paper's Net2DeeperNet cannot: `transfer`
    sets the amount of a new one to 0.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.amount = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The blend, elementwise: the shape of `x`."""
        activated = self.activation(x)
        if torch.jit.is_scripting():  # pyright: ignore (TorchScript compiles no wrapper, and this branch alone)
            return _blend(x, activated, self.amount)
        else:
            return blend(x, activated, self.amount)
