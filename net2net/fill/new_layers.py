"""Fill layers that the teacher lacks, and measure the statistics of new batch norms (paper, section 3.4)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import TransferError
from ..network import Example, Inputs, run
from ..record import Fill, Origin, Record
from .gather import rotate, scale_rows, shares

Tensors = Mapping[str, Tensor]


def fill_new(
    target: Tensor, origin: Origin, tensors: Tensors, draws: torch.Generator | None = None, split: str = "equal"
) -> None:
    """Fill a tensor that the teacher lacks, in place. `tensors` are the student's, with the statistics of its norms."""
    if origin.fill == Fill.ZERO:
        target.zero_()
    elif origin.fill == Fill.ONE:
        target.fill_(origin.factor)
    elif origin.fill == Fill.MEAN:
        target.copy_(tensors[origin.of[0]])
    elif origin.fill == Fill.DEVIATION:
        target.copy_((tensors[origin.of[0]].double() + origin.of[1]).sqrt())
    elif origin.fill == Fill.TAP:
        target.zero_()[_centre(target)] = 1.0
        target.copy_(scale_rows(target, origin, target))
    elif origin.fill == Fill.PASS:
        # 1 at the centre tap where the unit read is the unit produced. Units that the teacher lacks are read with 0.
        (reading,) = (dim for dim, axis in origin.axes.items() if axis.reads)
        produced, read = origin.axes[1 - reading].index, origin.axes[reading]
        rows = read.index.reshape(read.groups, -1).repeat_interleave(len(produced) // read.groups, 0)
        passes = (produced[:, None] == rows) & (rows >= 0)
        weight = torch.zeros_like(target)
        weight[_centre(target)] = (passes if reading == 1 else passes.T).to(weight)
        weight = weight * shares(read, weight, (reading, 1 - reading), draws, split) * origin.factor
        weight = scale_rows(weight, origin, weight)
        target.copy_(weight if origin.turn is None else rotate(weight, 1 - reading, origin.turn))


def _centre(weight: Tensor) -> tuple[int | slice, ...]:
    """Return the index of the centre taps of a weight."""
    return (slice(None), slice(None), *(taps // 2 for taps in weight.shape[2:]))


@torch.no_grad()
def calibrate(
    student: nn.Module, record: Record, norms: Mapping[str, bool], batches: Tensor | dict[str, Any] | Iterable[Example]
) -> None:
    """Measure the statistics of new batch norms on one or several `batches`, averaged over them (section 3.4).

    `norms` says for each whether it passes its units through. Such a norm undoes its own normalisation: its weight is
    sqrt(var + eps) and its bias the mean. That is exact in eval mode. In train mode it is only as exact as the measured
    statistics are those of the batch.
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
    momentum = {norm: norm.momentum for norm in passes_on}

    def begin(norm: nn.Module, _: tuple) -> None:
        norm.training = True

    def end(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        norm.training = False
        return inputs[0] if passes_on[norm] else output

    try:
        with ExitStack() as hooks:
            for norm in passes_on:
                norm.momentum = None  # type: ignore[assignment]
                norm.reset_running_stats()  # type: ignore[operator]
                hooks.enter_context(norm.register_forward_pre_hook(begin))
                hooks.enter_context(norm.register_forward_hook(end))
            yield
    finally:
        for norm, value in momentum.items():
            norm.momentum = value
            norm.num_batches_tracked.zero_()  # type: ignore[operator]
