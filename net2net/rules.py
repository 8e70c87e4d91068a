"""What each torch function does to units: one short rule a family.

A rule reads the labels of a call's arguments and labels its result. A function without a rule pins the units it
meets: they keep their width, and an attempt to grow them is refused with the function's name.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .units import Call, Labels, Layer, Trace, along, spread, tensors_in

Rule = Callable[[Trace, Call], None]


def apply(trace: Trace, call: Call) -> None:
    """Label the result of `call`, if it has one that the pass follows."""
    outputs = tensors_in(call.out)
    met = [labels for x in tensors_in([*call.args, *call.kwargs.values()]) if (labels := trace.labels(x))]
    if met and call.name == "__setitem__":
        return _give_up(trace, call, f"{call.module or 'the network'} writes into a part of it")
    if not outputs or not met or call.name in _SILENT:
        return
    RULES.get(_plain(call.name), _unknown)(trace, call)


def _plain(name: str) -> str:
    """One name for a function, its method, its in-place form and its operator: `__iadd__` and `add_` are `add`."""
    name = name.strip("_")
    return _OPERATORS.get(name, name)


def _join(trace: Trace, operands: list[Labels]) -> tuple[frozenset[str], frozenset[str]]:
    return (
        frozenset().union(*(labels.sources for labels in operands)),
        frozenset().union(*(labels.via for labels in operands)),
    )


def _give_up(trace: Trace, call: Call, why: str) -> None:
    """Pin every unit that meets in `call` and follow none of them further."""
    met = [labels for x in tensors_in([*call.args, *call.kwargs.values()]) if (labels := trace.labels(x))]
    for labels in met:
        trace.pin(labels.units, why)
    for out in tensors_in(call.args[0] if call.name == "__setitem__" else call.out):
        trace.label(out, Labels(None, *_join(trace, met)))


def _unknown(trace: Trace, call: Call) -> None:
    _give_up(trace, call, f"{call.name} in {call.module or 'the network'} has no rule for units")


# -- one entry a unit ---------------------------------------------------------------------------------------------


def pointwise(trace: Trace, call: Call) -> None:
    """Every element on its own: the result carries its operands' units; units that meet are one unit."""
    operands = [x for x in (*call.args[:2], call.kwargs.get("other")) if isinstance(x, Tensor)]
    followed = [(x, labels) for x in operands if (labels := trace.labels(x)) is not None]
    constants = [x for x in operands if trace.labels(x) is None and x.numel() > 1]
    if len(followed) == 1 and not constants:
        (x, labels), out = followed[0], call.out
        if labels.units is None or x.shape == out.shape:
            trace.label(out, labels)
            return
    sources, via = _join(trace, [labels for _, labels in followed])
    known = [labels.units for _, labels in followed if labels.units is not None]
    if constants or len(known) < len(followed):
        what = "a constant of its own width" if constants else "values that are not followed"
        for units in known:
            trace.pin(units, f"{call.name} in {call.module or 'the network'} joins it to {what}")
    if not known or any(units.dim() > call.out.dim() for units in known):
        trace.label(call.out, Labels(None, sources, via))
        return
    a, *others = (units.broadcast_to(call.out.shape) for units in known)
    for b in others:
        a = _meet(trace, a, b)
    trace.label(call.out, Labels(a, sources, via))


def _meet(trace: Trace, a: Tensor, b: Tensor) -> Tensor:
    """Unite labels that meet; the result gets labels of its own, so that a branch can be told from its stream."""
    moving = tuple(slice(None) if sa or sb else slice(0, 1) for sa, sb in zip(a.stride(), b.stride(), strict=True))
    shape, a, b = a.shape, a[moving], b[moving]
    if torch.equal(a, b):
        return a.expand(shape)
    base = int(torch.maximum(a.max(), b.max())) + 1
    pairs, inverse = torch.unique(a * base + b, return_inverse=True)
    joined = trace.fresh(len(pairs))
    trace.unite(pairs // base, joined)
    trace.unite(pairs % base, joined)
    return joined[inverse].expand(shape)


def batch_norm(trace: Trace, call: Call) -> None:
    """Statistics and affine parameters have one entry a unit; the units go on as they are."""
    x = call.args[0]
    labels = trace.labels(x)
    assert labels is not None
    units = along(labels.units, 1)
    if labels.units is not None and units is None:
        return _give_up(trace, call, f"the batch norm {call.module} meets several units in one channel")
    roles = {
        "mean": call.arg(1, "running_mean"),
        "var": call.arg(2, "running_var"),
        "weight": call.arg(3, "weight"),
        "bias": call.arg(4, "bias"),
    }
    tensors = {role: name for role, tensor in roles.items() if (name := trace.name_of(tensor)) is not None}
    if units is not None:
        for name in tensors.values():
            trace.axis(name, 0, units)
    name = next(iter(tensors.values())).rpartition(".")[0] if tensors else call.module
    options = {"eps": call.arg(7, "eps", 1e-5)}
    trace.add(Layer("norm", name, tensors, units, labels.sources, labels.via, options))
    trace.label(call.out, Labels(labels.units, labels.sources, labels.via | {name}))


# -- layers that read units and produce new ones ----------------------------------------------------------------


def convolution(trace: Trace, call: Call) -> None:
    """The output axis is a row of new units, the input axis reads; a depthwise filter's output is its input unit."""
    x, weight = call.args[0], call.arg(1, "weight")
    _mix(trace, call, x, weight, x.dim() - weight.dim() + 1, groups=call.arg(6, "groups", 1))


def linear(trace: Trace, call: Call) -> None:
    """The output axis is a row of new units, the input axis reads."""
    _mix(trace, call, call.args[0], call.arg(1, "weight"), -1, groups=1)


def _mix(trace: Trace, call: Call, x: Tensor, weight: Tensor, dim: int, groups: int) -> None:
    labels, name = trace.labels(x), trace.name_of(weight)
    if labels is None or name is None:
        return _give_up(trace, call, f"the weight of {call.name} in {call.module} is not a parameter of the network")
    units = along(labels.units, dim)
    if labels.units is not None and units is None:
        return _give_up(trace, call, f"{name} reads several units in one channel")
    bias = trace.name_of(call.arg(2, "bias"))
    tensors = {"weight": name} | ({"bias": bias} if bias else {})
    depthwise = groups > 1 and groups == x.shape[dim] == weight.shape[0]
    if depthwise and units is not None:
        for tensor in tensors.values():
            trace.axis(tensor, 0, units)
        trace.label(call.out, Labels(spread(units, dim, call.out.shape), labels.sources, labels.via | {name}))
        return
    if groups == 1:
        if units is not None:
            trace.axis(name, 1, units)
        trace.read_axis[name] = 1
    produced = trace.axis(name, 0)
    assert produced is not None
    if groups > 1:
        for grouped in (units, produced):
            trace.pin(grouped, f"the convolution {name} is grouped ({groups} groups)")
    if bias:
        trace.axis(bias, 0, produced)
    options = {
        "stride": call.arg(3, "stride", 1),
        "padding": call.arg(4, "padding", 0),
        "dilation": call.arg(5, "dilation", 1),
        "groups": groups,
    }
    trace.add(Layer("mix", name, tensors, units, labels.sources, labels.via, options if "conv" in call.name else {}))
    trace.label(call.out, Labels(spread(produced, dim, call.out.shape), frozenset({name})))


# -- data movement: the labels move as the data do ----------------------------------------------------------------


def movement(trace: Trace, call: Call) -> None:
    """Apply the function itself to the labels."""
    operands = tensors_in(call.args[0])
    known = [labels for x in operands if (labels := trace.labels(x))]
    units = [labels.units for labels in known if labels.units is not None]
    moved: list[Tensor] | list[None] = [None] * len(tensors_in(call.out))
    if len(units) == len(operands):
        moved = _move(call, units)
    elif units:
        return _give_up(trace, call, f"{call.name} in {call.module} joins it to values that are not followed")
    if any(new is not None and new.shape != out.shape for new, out in zip(moved, tensors_in(call.out), strict=True)):
        return _give_up(trace, call, f"{call.name} in {call.module} changes what an element is")
    for out, labels in zip(tensors_in(call.out), moved, strict=True):
        trace.label(out, Labels(labels, *_join(trace, known)))


def _move(call: Call, units: list[Tensor]) -> list[Tensor]:
    units = [labels.detach() for labels in units]  # objects of their own, which an in-place form may reshape
    if _plain(call.name) in ("view", "reshape"):  # a view of expanded labels would need a copy
        same = isinstance(call.out, Tensor) and call.out.numel() == units[0].numel()  # a view as another dtype is not
        return [units[0].reshape(call.out.shape) if same else units[0]]
    first = units if isinstance(call.args[0], (list, tuple)) else units[0]
    return tensors_in(call.func(first, *call.args[1:], **call.kwargs))


def channelwise(trace: Trace, call: Call) -> None:
    """Pooling: positions are mixed, channels are not."""
    labels = trace.labels(call.args[0])
    assert labels is not None
    out = tensors_in(call.out)[0]
    spatial = int(_plain(call.name).partition("pool")[2][0])
    dim = out.dim() - spatial - 1
    units = along(labels.units, dim)
    if labels.units is not None and units is None:
        return _give_up(trace, call, f"{call.name} in {call.module} mixes units")
    for out in tensors_in(call.out):
        units_out = None if units is None else spread(units, dim, out.shape)
        trace.label(out, Labels(units_out, labels.sources, labels.via))


def reduction(trace: Trace, call: Call) -> None:
    """A mean or sum over positions keeps the units; one over units mixes them, and pins them."""
    labels = trace.labels(call.args[0])
    assert labels is not None
    dims = call.arg(1, "dim", call.kwargs.get("axis"))
    if labels.units is None or dims is None:
        return _give_up(trace, call, f"{call.name} in {call.module} mixes units")
    dims = sorted({d % labels.units.dim() for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
    units = labels.units
    for d in dims:
        first = units.narrow(d, 0, 1)
        if units.stride(d) and not bool((units == first).all()):
            return _give_up(trace, call, f"{call.name} in {call.module} mixes units")
        units = first
    trace.label(call.out, Labels(units.reshape(call.out.shape), labels.sources, labels.via))


_SILENT = {"__set__", "size", "dim", "numel", "is_floating_point", "requires_grad_"}
_OPERATORS = {"iadd": "add", "radd": "add", "isub": "sub", "imul": "mul", "rmul": "mul", "itruediv": "div"} | {
    "rsub": "sub",
    "truediv": "div",
    "getitem": "index",
    "get": "attribute",  # x.mT, x.data: an attribute that is a tensor has labels, too
    "multiply": "mul",
}
_POINTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid softplus logsigmoid
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout clamp clamp_min clamp_max
    add sub mul div neg abs exp log sqrt rsqrt square pow to float double half bfloat16 type detach clone contiguous
    identity
"""
_MOVEMENT = """
    view reshape flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze cat concat stack chunk split
    unbind index attribute narrow select flip roll expand channel_shuffle
"""
_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_MOVEMENT.split(), movement),
    **dict.fromkeys((f"{pool}{d}d" for pool in _POOLS.split() for d in (1, 2, 3)), channelwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduction),
    "linear": linear,
    "batch_norm": batch_norm,
}
