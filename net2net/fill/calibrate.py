"""Measure the statistics of new batch norms on data, and let an identity's batch norm undo what it does."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TransferError
from ..network import Example, Inputs, run
from ..record import Fill, Record
from .identity import fill_new


@torch.no_grad()
def calibrate(
    student: nn.Module, record: Record, norms: Mapping[str, bool], batches: Tensor | dict[str, Any] | Iterable[Example]
) -> None:
    """Measure the statistics of new batch norms on one or several `batches`, averaged over them (section 3.4).

    `norms` tells of each whether it passes its units through. Those that do undo their normalisation: scale
    sqrt(var + eps), shift mean. This is exact in eval mode, and in train mode as far as the statistics are the batch's.
    """
    passes_on = {student.get_submodule(name): passes for name, passes in norms.items()}
    for norm in passes_on:
        if not isinstance(norm, _BatchNorm):
            raise TransferError(f"The new batch norm in {type(norm).__name__} is no module: it cannot be calibrated.")
    if passes_on:
        with _measure(passes_on):
            for batch in [batches] if isinstance(batches, (Tensor, dict)) else batches:
                run(student, Inputs.of(cast(Example, batch)))
        tensors = dict(student.named_parameters()) | dict(student.named_buffers())
        for name, origin in record.origins.items():
            if origin.fill in (Fill.DEVIATION, Fill.MEAN):
                fill_new(tensors[name], origin, tensors)


@contextmanager
def _measure(passes_on: dict[nn.Module, bool]) -> Iterator[None]:
    """While the block runs, these batch norms, and no others, average the statistics of the batches."""
    # A norm that passes its units through hands on its input, so that the layers behind it see the teacher's values.
    hooks, momentum = [], {}

    def begin(norm: nn.Module, _: tuple) -> None:
        norm.training = True

    def end(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        norm.training = False
        return inputs[0] if passes_on[norm] else output

    for norm in passes_on:
        momentum[norm], norm.momentum = norm.momentum, None  # type: ignore[assignment]
        norm.reset_running_stats()  # type: ignore[operator]
        hooks += [norm.register_forward_pre_hook(begin), norm.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, value in momentum.items():
            norm.momentum = value
            norm.num_batches_tracked.zero_()  # type: ignore[operator]
