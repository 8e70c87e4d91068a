"""Factors: plain numbers in front of units, and parameters with one entry for each unit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..facts import Call, Labels, Layer, LayerKind
from ..graph import Trace
from ..units import spread
from .registry import factor_in, first_labels, names, rule

LINEAR = names("mul div neg to float double half bfloat16 dropout detach clone contiguous identity")
HOMOGENEOUS = names("relu leaky_relu abs")  # f(kx) = k f(x) for k > 0
SUMS = names("add sub where masked_fill")
ROLES = {"mul": "factor", "add": "shift", "sub": "shift"}  # of a parameter with one entry for each unit


def gain_of_result(trace: Trace, call: Call, operands: Sequence[Labels], dtypes: Sequence[torch.dtype]) -> float:
    """Return the number in front of an elementwise result of `operands`, the first of which are activations."""
    # Where nothing that reads the result can undo the number, the trace notes it: both networks need the same there.
    first = operands[0].gain
    if call.plain in LINEAR and len(operands) == 1:
        absorbed = operands[0].result_of in trace.seen_as.scale_absorbed
        return first if absorbed else first * factor_in(trace, call)
    if call.plain == "mul":
        return math.prod(labels.gain for labels in operands)
    if call.plain in HOMOGENEOUS and len(operands) == 1 and first > 0:
        return first
    # A mask has no size.
    gains = {labels.gain for labels, dtype in zip(operands, dtypes, strict=False) if dtype != torch.bool}
    alone = len(operands) == len(dtypes) == len(call.tensors)
    numbers = [x for x in call.args if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if gains != {1.0} and not (call.plain in ("add", "sub") and len(gains) == 1 and alone and not numbers):
        scaled = [labels for labels in operands if labels.gain != 1.0]
        units = torch.cat([torch.unique(trace.units.drop_repeats(labels.units)) for labels in scaled])
        key = trace.units.key(f"number before {call.plain}", call.module)
        trace.fixed_gains[key] = (tuple(labels.gain for labels in scaled), units, str(call))
    # A sum keeps the number beside what is added: softmax asks for it.
    return gains.pop() if call.plain in SUMS and len(gains) == 1 else 1.0


def record_scale(trace: Trace, call: Call, parameter: Tensor, labels: Labels) -> set[str]:
    """Record a parameter with one entry for each unit, such as layer scale; return its name, if it is one."""
    name, role = trace.parameters.name_of(parameter), ROLES.get(call.plain)
    if name is None or role is None:
        return set()
    trace.add(Layer(LayerKind.SCALE, name, {role: name}, None, labels.sources, labels.norms_since))
    return {name}


@rule("prelu")
def prelu(trace: Trace, call: Call) -> None:
    """Learned slopes: one for all units, or one for each unit along axis 1."""
    x, weight = call.args[0], call.arg(1, "weight")
    labels, slopes = first_labels(trace, call), trace.labels(weight)
    units = labels.units
    if slopes is not None:
        units = trace.units.combine(units, spread(slopes.units, 1 if x.dim() > 1 else 0, x.shape), call)
    name = trace.parameters.name_of(weight)
    if name is not None:
        trace.add(Layer(LayerKind.SCALE, name, {"slope": name}, None, labels.sources, labels.norms_since))
    trace.label(call.out, Labels.of(units, labels, norms=[name] if name else (), after_norm=labels.after_norm))
