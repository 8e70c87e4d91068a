"""Measure how much of a network's output is rounding, in the arithmetic that its forward pass runs in."""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .network import Inputs, tensors_in

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)
DRAWS = 4  # if an output is a single number, one draw may happen to show too little


class Disturbing(TorchFunctionMode):
    """While it is on, every number that is computed is off by one unit in the last place, up or down at random."""

    # This is Monte Carlo arithmetic (Parker, 1997). The sums of a wider network have another order, and so errors of
    # this size, whatever types the forward pass casts to.

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.coarsest = 0.0  # the precision of the coarsest numbers that were computed
        self._seed, self._generators = seed, {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(func, FunctionType) and not str(func.__module__).startswith("torch."):
            return out  # a function of the user's, which may keep what it returns
        operands = tensors_in([*args, *(kwargs or {}).values()])
        held = {_place(x) for x in operands}
        stored = [torch.finfo(x.dtype).eps for x in operands if isinstance(x, nn.Parameter) and x.dtype in DTYPES]
        for x in tensors_in(out) if held else ():  # no constants and, below, no views
            if x.dtype in DTYPES and _place(x) not in held | {None}:
                self.disturb(x, max(stored, default=0.0))  # a weight in few bits is rounded when it is filled
        return out

    def disturb(self, x: Tensor, least: float = 0.0) -> Tensor:
        """Move every number of `x`, in place, up or down by one unit in the last place, or `least` relative to it."""
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        eps = max(torch.finfo(x.dtype).eps, least)
        self.coarsest = max(self.coarsest, eps)
        drawn = torch.rand(x.shape, generator=self._generators[x.device], device=x.device, dtype=torch.float32)
        return x.mul_((drawn - 0.5).sign().to(x.dtype.to_real()) * eps + 1.0)


def _place(x: Tensor) -> int | None:
    """Return where the numbers of a tensor lie in memory; None for a sparse one."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else None


def disturbed_runs(run: Callable[[Inputs, Disturbing], Any], inputs: Inputs) -> Iterator[tuple[Any, float]]:
    """Yield what `run` gives if every last place is disturbed, and the coarsest precision in it."""
    for seed in range(DRAWS):
        disturbing = Disturbing(seed)
        near = inputs.map(lambda x: disturbing.disturb(x.clone()) if x.dtype in DTYPES else x)  # noqa: B023
        yield run(near, disturbing), disturbing.coarsest
