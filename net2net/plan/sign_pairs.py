"""New layers before SiLU, GELU and their like: two units, x and -x, carry one unit through the activation.

An activation that is not idempotent lets no single unit through. Where f(x) - f(-x) = slope * x for every x (SiLU,
GELU, hard swish, softplus, ReLU, leaky ReLU), two units do: a new layer of twice the width produces a unit and its
negative, and the layer that reads them takes the difference. Behind a second activation it takes four. A gate
(squeeze-excite) whose last layer gives zeros is one number for all inputs, which the next layer undoes.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from ..errors import TransferError
from ..trace.activations import Bends
from ..trace.facts import Layer, LayerKind


def find_sign_pairs(layers: Iterable[Layer], passing: Collection[str], idle: Collection[str]) -> dict[str, Bends]:
    """Find the activations that units of new layers `passing` meet in pairs; what `idle` layers read is ignored."""
    found: dict[str, Bends] = {}
    for layer in layers:
        if layer.kind not in (LayerKind.MIX, LayerKind.OUTPUT) or layer.name in idle:
            continue
        whole = all(carrier in passing for carrier, _ in layer.passage.bends) and layer.norms_since <= set(passing)
        met = layer.passage.bends if layer.passage.bends and whole else ()
        for source in layer.sources & set(passing):
            mine = met if met and met[0][0] == source else ()
            if found.setdefault(source, mine) != mine:
                raise TransferError(
                    f"The units of the new layer {source} are read both before an activation and behind it."
                )
    found = {source: met for source, met in found.items() if met}
    if not found:
        raise TransferError("No new layer passes units on through an activation that pairs of them could pass.")
    return found


def signs(patterns: Tensor, activation: int | None = None) -> Tensor:
    """Return every unit's sign (from a bit for each activation) before one activation, or the product over all."""
    if activation is not None:
        return 1.0 - 2.0 * (patterns >> activation & 1).double()
    product = torch.ones(len(patterns), dtype=torch.double)
    for k in range(int(patterns.max()).bit_length()):
        product = product * signs(patterns, k)
    return product
