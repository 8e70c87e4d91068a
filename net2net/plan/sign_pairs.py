"""What units meet on their way through new layers: activations, which pairs of units pass, and gates, held open.

An activation that is not idempotent lets no single unit through. Where f(x) - f(-x) = slope * x for every x (SiLU,
GELU, hard swish, softplus, ReLU, leaky ReLU), two do: a new layer of twice the width gives a unit and its
negative, and what reads them takes the difference. Behind a second activation it takes four.
A gate (squeeze-excite) whose last layer gives zeros is one number for all inputs, which the next layer undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import TransferError

if TYPE_CHECKING:
    from ..trace.graph import Layer

Bends = tuple[tuple[str, float], ...]  # of each activation the layer before it, and the slope


@dataclass(frozen=True)
class Passage:
    """What units have met since a layer produced them.

    `bends` are the activations with f(x) - f(-x) = slope * x, each with the layer before it that can turn a
    unit's sign. `gates` are the numbers that they are multiplied by if certain layers give zeros. `carrier` is the last
    layer with a weight for each unit since the last activation; `rest` is what the units are if the layer that produced
    them gives zeros, None if that is not known.
    """

    bends: Bends = ()
    gates: tuple[tuple[str, float], ...] = ()
    carrier: str | None = None
    rest: float | None = None

    def bent(self, function: Callable[[Tensor], Tensor]) -> Passage:
        """The passage behind an activation; one that no pair of units passes begins anew."""
        half = torch.linspace(0.25, 12.0, 8, dtype=torch.double)
        at = torch.cat([half, -half, torch.tensor([self.rest or 0.0], dtype=torch.double)])
        try:
            result = function(at)
            if result.dtype != torch.double:  # a comparison, or another precision
                return NOTHING
            positive, negative, rest = result.split([len(half), len(half), 1])
        except (RuntimeError, TypeError, ValueError):  # it takes no such numbers
            return NOTHING
        known = None if self.rest is None else float(rest)
        slope = float((positive - negative)[0] / half[0])
        if self.carrier is None or slope == 0 or not torch.allclose(positive - negative, slope * half, 1e-13, 0.0):
            return Passage(rest=known)
        return replace(self, bends=(*self.bends, (self.carrier, slope)), carrier=None, rest=known)

    def scaled(self, factor: float) -> Passage:
        """The passage behind a multiplication by a number."""
        return replace(self, rest=None if self.rest is None else self.rest * factor)


NOTHING = Passage()


def gated(operands: Sequence[tuple[Passage, frozenset[str]]]) -> Passage:
    """The passage of the product of two activations, each with the layers that it comes from: if one would be a number
    other than zero without its last layer, it is a gate of the other."""
    gates = [k for k, (past, sources) in enumerate(operands) if past.rest and len(sources) == 1]
    if len(operands) != 2 or len(gates) != 1:
        return NOTHING
    (gate,) = gates
    (past, sources), (passing, _) = operands[gate], operands[1 - gate]
    assert past.rest is not None
    return replace(passing, gates=(*passing.gates, (*sources, past.rest)), rest=None)


def bends(layers: Iterable[Layer], passing: Collection[str], idle: Collection[str]) -> dict[str, Bends]:
    """The activations behind each of the layers `passing`, which hand their units on, up to those that read them; what
    the layers `idle` read, they read with zeros.

    Raises TransferError if there are none, or if units would be read both before an activation and behind it.
    """
    found: dict[str, Bends] = {}
    for layer in layers:
        if layer.kind not in ("mix", "output") or layer.name in idle:
            continue
        whole = all(carrier in passing for carrier, _ in layer.past.bends) and layer.via <= set(passing)
        met = layer.past.bends if layer.past.bends and whole else ()
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
