"""What units meet on their way through new layers: activations, which pairs of units pass, and gates, held open.

An activation that is not idempotent lets no single unit through. Where f(x) - f(-x) = slope * x for every x (SiLU,
GELU, hard swish, softplus, ReLU, leaky ReLU), two do: a new layer of twice the width gives a unit and its
negative, and what reads them takes the difference. Behind a second activation it takes four.
A gate (squeeze-excite) whose last layer gives zeros is one number for all inputs, which the next layer undoes.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from ..errors import TransferError
from ..trace.activations import Bends, Passage
from ..trace.facts import Layer


def bends(layers: Iterable[Layer], passing: Collection[str], idle: Collection[str]) -> dict[str, Bends]:
    """The activations behind each of the layers `passing`, which hand their units on, up to those that read them; what
    the layers `idle` read, they read with zeros.

    Raises TransferError if there are none, or if units would be read both before an activation and behind it.
    """
    found: dict[str, Bends] = {}
    for layer in layers:
        if layer.kind not in ("mix", "output") or layer.name in idle:
            continue
        whole = all(carrier in passing for carrier, _ in layer.passage.bends) and layer.norms_since <= set(passing)
        met = layer.passage.bends if layer.passage.bends and whole else ()
        for source in layer.sources & set(passing):
            mine = met if met and met[0][0] == source else ()
            if found.setdefault(source, mine) != mine:
                raise TransferError(
                    f"The units of the new layer {source} are read both before an activation and behind."
                )
    found = {source: met for source, met in found.items() if met}
    if not found:
        raise TransferError("No new layer passes units on through an activation that pairs of them could pass.")
    return found


def undone(past: Passage, bends: Bends, silent: Collection[str]) -> float:
    """By what a layer multiplies its weight so that what it reads through pairs and open gates counts as it was."""
    factor = 1.0
    for slope in [slope for _, slope in bends] + [rest for source, rest in past.gates if source in silent]:
        factor /= slope
    return factor


def signs(patterns: Tensor, bend: int | None = None) -> Tensor:
    """Of each unit the sign that it has before one of the activations behind its layer, or the product of all of them;
    `patterns` holds a bit for each activation."""
    if bend is not None:
        return 1.0 - 2.0 * (patterns >> bend & 1).double()
    product = torch.ones(len(patterns), dtype=torch.double)
    for k in range(int(patterns.max()).bit_length()):
        product = product * signs(patterns, k)
    return product
