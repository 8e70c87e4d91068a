"""Elementwise functions: the result carries its operands' units, and units that meet are one unit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...blend import blend as blend_function
from ...network import tensors_in
from ..activations import NOTHING, Chain, Passage, Range, add_ranges, apply_gate, range_after
from ..facts import Call, Key, Labels, Layer, LayerKind, Step
from ..graph import Trace
from ..units import compact, spread
from .by_hand import add_affine, followed, number_in, result_of_norm
from .registry import CannotFollow, carries_no_units, factor_in, first_labels, first_norm_of_sum, names, rule

LINEAR = names("mul div neg to type type_as float double half bfloat16 dropout detach clone contiguous identity")
HOMOGENEOUS = names("relu leaky_relu abs")  # f(kx) = k f(x) for k > 0
SUMS = names("add sub where masked_fill")
ROLES = {"mul": "factor", "add": "shift", "sub": "shift"}  # of a parameter with one entry for each unit
ZERO_AT_ZERO = LINEAR | names("relu relu6 leaky_relu elu selu celu gelu silu mish tanh hardtanh hardswish abs")
POINTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid softplus logsigmoid
    log_sigmoid softsign tanhshrink hardshrink softshrink threshold sign sin cos erf expm1 log1p reciprocal ceil floor
    round trunc dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout clamp
    clamp_min clamp_max clip maximum minimum where masked_fill lerp addcmul addcdiv copysign nan_to_num add sub mul div
    neg abs exp log sqrt rsqrt square pow float double half bfloat16 type detach clone contiguous identity logaddexp
    fmod remainder floordiv eq ne lt le gt ge logical_not logical_and logical_or and or invert isnan isinf isfinite int
    long bool xor logical_xor greater less greater_equal less_equal not_equal isclose signbit sgn tan asin acos atan
    arcsin arccos arctan sinh cosh asinh acosh atanh arcsinh arccosh arctanh atan2 arctan2 exp2 log2 log10
    logaddexp2 erfc erfinv sinc frac fix lgamma digamma logit xlogy float_power fmax fmin hypot heaviside
    special_erf special_erfc special_exp2 special_expm1 special_log1p special_xlogy special_entr special_logit
    special_sinc complex polar real imag angle conj conj_physical resolve_conj
"""


@rule(*names(POINTWISE))
def pointwise(trace: Trace, call: Call) -> None:
    """A function of every element by itself, or of elements at the same place."""
    if call.name == "where" and len(call.tensors) == 1:
        return list_places(trace, call)
    join(trace, call, [x for x in call.tensors if x is not call.kwargs.get("out")])


@rule("zeros_like")
def zeros_like(trace: Trace, call: Call) -> None:
    """Zeros in the shape of units are those units, as a layer may read them: the queries of a detector begin so."""
    labels = trace.labels(call.args[0])
    if labels is not None and trace.units.drop_repeats(labels.units).numel() > 1:
        trace.label(call.out, Labels.of(labels.units, linear=True, range=(0.0, 0.0)))


@rule("nonzero", "argwhere", "one_hot", "histc", "bincount")
def list_places(trace: Trace, call: Call) -> None:
    """Places of elements, or a table of them. These are no units, and the values that choose them must not be any."""
    labels = first_labels(trace, call)
    if not carries_no_units(trace, call.args[0]):
        raise CannotFollow(f"{call} chooses among units by values")
    unit = compact(labels.units).reshape(-1)[:1]
    for out in call.results:
        trace.label(out, Labels.of(unit.expand(out.shape), labels))


@rule("copy")
def overwrite_whole(trace: Trace, call: Call) -> None:
    """A whole activation is overwritten by another one. If a part is overwritten, it is unknown what the rest holds."""
    if call.args[0]._is_view():
        raise CannotFollow(f"{call} writes into a part of another tensor")
    join(trace, call, [call.args[1]])


@rule("to", "type_as", "cpu", "cuda")
def convert(trace: Trace, call: Call) -> None:
    """The same numbers in another type or place; a second tensor only says in which."""
    join(trace, call, tensors_in(call.args[0]))


def join(trace: Trace, call: Call, operands: Sequence[Tensor]) -> None:
    """Label the elementwise result of `operands`, which may be activations, parameters and constants."""
    out, name = call.results[0], call.plain
    if any(x.dim() > out.dim() for x in operands) or (out.dim() and out.shape != _broadcast_shape(operands)):
        raise CannotFollow(f"{call} returns elements that are not those of its input")
    if (weight := _weight_of_numbers(trace, call, operands)) is not None:
        operands = [weight]
    activations = [x for x in operands if trace.is_activation(x)]
    others = [x for x in operands if not trace.is_activation(x) and trace.tells_units(x)]
    if not activations:
        if (first := _parameter_in_front(trace, call, others, len(operands))) is None:
            return
        activations, others = [first], [x for x in others if x is not first]
    labels = [known for x in activations if (known := trace.labels(x))]
    _pin_beside_unknown(trace, labels)
    units, *rest = (known.units.broadcast_to(out.shape) for known in labels)
    for other in rest:
        units = trace.units.combine(units, other, call)
    statistic = followed(trace, call, operands)
    units, scales, constants = _combine_others(trace, call, units, others, labels)
    if len(activations) == len(others) == 1 and len(operands) == 2:
        statistic = add_affine(trace, call, others[0], labels[0])
    alone = labels[0] if len(labels) == len(operands) == 1 else None
    # A mask that is the same for all units may multiply a plain sum, as in stochastic depth.
    count = len([x for x in operands if x.numel() > 1]) - (constants if name == "mul" else 0)
    is_product = name in ("mul", "div") and len(labels) > 1
    is_sum = name in (LINEAR | {"add", "sub"}) and not is_product and len(labels) == count
    is_scaled = name == "mul" and len(activations) == len(scales) == 1 and _is_layer_scale(trace, labels[0], *scales)
    is_sum |= is_scaled
    result_range, chain = _range_and_chain(trace, call, labels, len(operands))
    state = {
        "gain": _gain_of_result(trace, call, labels, [x.dtype for x in activations]),
        "linear": is_sum and all(each.linear for each in labels),
        "after_norm": alone.after_norm if alone is not None and name in ZERO_AT_ZERO else None,
        "first_norm": first_norm_of_sum(labels) if is_sum else None,
        "passage": _passage(trace, call, labels, len(operands), len(activations)),
        "range": result_range,
        "chain": chain,
        "statistic": statistic,
        "lifted_by": _lifted_by(trace, call, units, operands),
    }
    if statistic is not None and statistic.step in (Step.VARIANCE, Step.DEVIATION):
        state["gain"] = 1.0  # the statistic holds the number
    if is_scaled:
        state["paths"] = frozenset((source, (*path, *scales)) for source, path in labels[0].ways)
    state |= result_of_norm(trace, statistic)
    if statistic is not None and statistic.step == Step.NORMED:
        scales = {str(state["after_norm"])}
    trace.label(out, Labels.of(units, *labels, norms=scales, **state))


def _lifted_by(trace: Trace, call: Call, units: Tensor, operands: Sequence[Tensor]) -> str:
    """Return the call that may make another number of a unit that is zero: an earlier one, or this one; else ""."""
    shape = trace.units.drop_repeats(units).shape
    known = [labels for x in operands if trace.is_activation(x) and (labels := trace.labels(x))]
    earlier = next((labels.lifted_by for labels in known if labels.lifted_by), "")
    low, high = {}, {}  # numbers that the operands may have where a unit is zero
    for x in operands:
        labels = trace.labels(x) if trace.is_activation(x) else None
        padded = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
        is_zero = any(a > 1 and b > 1 for a, b in zip(padded, shape, strict=True))  # it carries the unit
        if is_zero and labels is not None:
            is_zero = not labels.lifted_by
        elif is_zero and not trace.follows(x):
            is_zero = x.is_meta or not bool(x.any())
        for values, number in ((low, -7.0), (high, 7.0)):
            value = torch.full((1,), 0.0 if is_zero else number, dtype=torch.double)
            values[id(x)] = value > 0 if x.dtype == torch.bool else value.to(x.dtype)
    if not all(id(x) in low for x in call.tensors):  # an operand is a part of an argument
        return earlier
    try:
        for values in (low, high):
            args = [values.get(id(x), x) for x in call.args]
            if bool(call.func(*args, **{key: values.get(id(x), x) for key, x in call.kwargs.items()}).any()):
                return earlier or str(call)
    except Exception:  # it takes no such numbers
        return earlier
    return ""


def _weight_of_numbers(trace: Trace, call: Call, operands: Sequence[Tensor]) -> Tensor | None:
    """Return the parameter that multiplies numbers of the input, as an embedding of numbers does; its units go on."""
    weights = [x for x in operands if not trace.is_activation(x)]
    if call.plain != "mul" or len(operands) != 2 or len(weights) != 1 or weights[0].numel() < 2:
        return None
    numbers = trace.labels(next(x for x in operands if trace.is_activation(x)))
    is_input = numbers is not None and numbers.sources == {"input"} and numbers.gain == 1.0
    owner = trace.parameters.owner_of(weights[0])
    if owner is None or owner in trace.parameters.buffers or not is_input:
        return None
    return weights[0] if carries_no_units(trace, next(x for x in operands if trace.is_activation(x))) else None


def _pin_beside_unknown(trace: Trace, operands: Sequence[Labels]) -> None:
    """Pin the units that meet the result of a call without a rule, entry by entry: that result keeps its width."""
    for labels in operands if trace.unknown else ():
        for label in trace.unknown.keys() & set(torch.unique(compact(labels.units)).tolist()):
            for units in (trace.units.drop_repeats(other.units) for other in operands if other is not labels):
                wide = zip(reversed(units.shape), reversed(labels.units.shape), strict=False)
                if any(size > 1 and beside > 1 for size, beside in wide):
                    at, units = torch.broadcast_tensors(compact(labels.units) == label, units)
                    trace.units.pin(units[at], trace.unknown[label])


def _parameter_in_front(trace: Trace, call: Call, others: Sequence[Tensor], count: int) -> Tensor | None:
    """Return the parameter that counts as the activation in a call without activations; None if none has to."""
    parameters = [x for x in others if trace.follows(x)]
    all_buffers = all(trace.parameters.owner_of(x) in trace.parameters.buffers for x in parameters)
    out = call.results[0]
    if not parameters or (all_buffers and not (out.is_floating_point() or out.is_complex())):  # a mask, or places
        return None
    if len(parameters) == count == 1 and (view := trace.parameters.view(parameters[0])):
        number = number_in(call)
        if call.plain in LINEAR or (call.plain in ("long", "int") and not parameters[0].is_floating_point()):
            view = replace(view, gain=view.gain * factor_in(trace, call))
        elif call.plain == "add" and number is not None and parameters[0].dim() == 1 and not all_buffers:
            view = replace(view, offset=view.offset + number / view.gain)  # as in the weight 1 + w of a norm
        else:
            return parameters[0]
        trace.parameters.remember_view(call.results[0], view)
        return None
    return None if _is_masked_weight(trace, call, parameters, count) else parameters[0]


def _is_masked_weight(trace: Trace, call: Call, factors: Sequence[Tensor], count: int) -> bool:
    """Tell whether the call multiplies a weight by a mask, a buffer of its shape; the product stays that weight."""
    buffers = trace.parameters.buffers
    weights = [x for x in factors if trace.parameters.owner_of(x) not in buffers]
    masks = [x for x in factors if trace.parameters.owner_of(x) in buffers]
    if call.plain != "mul" or count != 2 or len(weights) != 1 or len(masks) != 1 or weights[0].dim() < 2:
        return False
    view, (weight, mask) = trace.parameters.view(weights[0]), map(trace.parameters.weight, (weights[0], masks[0]))
    if view is None or weight is None or mask is None or call.results[0].shape != weights[0].shape:
        return False
    shapes = [trace.parameters.tensors[each.name].shape for each in (weight, mask)]
    if shapes != [weights[0].shape, masks[0].shape] or len(shapes[0]) != len(shapes[1]):
        return False
    if not weight.is_whole(shapes[0]) or not mask.is_whole(shapes[1]):
        return False
    trace.parameters.masks.add((mask.name, weight.name))
    trace.parameters.remember_view(call.results[0], view)
    return True


def _combine_others(
    trace: Trace, call: Call, units: Tensor, others: Sequence[Tensor], labels: list[Labels]
) -> tuple[Tensor, set[str], int]:
    """Let activations of these `units` meet parameters and constants; append the parameters' labels to `labels`.

    Return the units, the names of the parameters that have one entry for each unit, and the number of constants that
    are the same for all units.
    """
    scales: set[str] = set()
    constants = 0
    for x in others:
        padded = (1,) * (units.dim() - x.dim()) + tuple(x.shape)
        varying = [dim for dim, size in enumerate(trace.units.drop_repeats(units).shape) if size > 1]
        shared = [dim for dim in varying if padded[dim] > 1]
        if not shared and Key(trace.parameters.owner_of(x) or "") not in trace.seen_as.as_grouped:
            constants += not trace.follows(x)
        elif (known := trace.labels(x)) is not None:
            units = trace.units.combine(units, known.units.broadcast_to(units.shape), call)
            labels.append(known)
            scales |= _record_scale(trace, call, x, labels[0])
        else:
            constant = x.reshape(padded)
            rows = [constant.narrow(dim, 0, 1).expand_as(constant) for dim in shared]
            if x.is_meta or not all(torch.equal(constant, row) for row in rows):  # one number serves every width
                sizes = [size if dim in shared else 1 for dim, size in enumerate(padded)]
                key = trace.units.key(f"constant beside {call.name}", call.module)
                entries = trace.units.fresh(math.prod(sizes), key)
                trace.units.pin(entries, f"{call} joins it to a constant of its own width")
                units = trace.units.combine(units, entries.reshape(sizes).expand(units.shape), call)
    return units, scales, constants


def _passage(trace: Trace, call: Call, labels: Sequence[Labels], count: int, activations: int) -> Passage:
    """Return the passage of an elementwise result of `count` operands, the first `activations` are activations."""
    before = labels[0].passage
    if count == 1:
        if call.plain in LINEAR:
            return replace(before, rest=None if before.rest is None else before.rest * factor_in(trace, call))
        return before.apply(_as_function(call)) if call.args else NOTHING
    if activations == 1:
        return replace(before, rest=None) if call.plain in ROLES else NOTHING
    return apply_gate([(each.passage, each.sources) for each in labels]) if call.plain == "mul" else NOTHING


def _range_and_chain(trace: Trace, call: Call, labels: Sequence[Labels], count: int) -> tuple[Range, Chain | None]:
    """Return the range of an elementwise result of `count` operands, and the activations since the last layer."""
    if count > 1 or not call.args:
        is_sum = call.plain == "add" and len(labels) == count
        return add_ranges(each.range for each in labels) if is_sum else None, None
    before, chain = labels[0], labels[0].chain
    if call.plain in LINEAR and factor_in(trace, call) == 1.0:
        return before.range, chain
    function = _as_function(call)
    if chain is not None:
        chain = Chain(chain.behind, (*chain.functions, function))
    elif before.passage.carrier is not None:
        chain = Chain(before.passage.carrier, (function,))
    if chain is not None:
        others = [one for one in trace.chains.get(chain.behind, []) if one.functions != chain.functions[:-1]]
        trace.chains[chain.behind] = [*others, chain]
    return range_after(function, before.range), chain


def _as_function(call: Call) -> Callable[[Tensor], Tensor]:
    """Return the call as a function of its first argument, without a reference to its activations."""
    function, args = call.func, tuple(call.args[1:])
    options = {key: value for key, value in call.kwargs.items() if key != "out"}
    return lambda x: function(x, *args, **options)


def _broadcast_shape(operands: Sequence[Tensor]) -> torch.Size | None:
    try:
        return torch.broadcast_tensors(*operands)[0].shape  # torch.broadcast_shapes imports sympy, for seconds
    except RuntimeError:
        return None


@rule(blend_function)
def blend(trace: Trace, call: Call) -> None:
    """An activation that is faded in (`net2net.Blend`): the identity while the amount is 0."""
    x, activated, amount = call.args
    before = trace.labels(x)
    join(trace, call, [x, activated])
    name, after = trace.parameters.name_of(amount), trace.labels(call.out)
    if name is None or before is None or after is None:
        return
    trace.add(Layer(LayerKind.SCALE, name, {"amount": name}, None, before.sources, before.norms_since))
    is_identity = not amount.is_meta and not bool(amount.any())
    after = replace(after, norms_since=after.norms_since | {name}, linear=before.linear and is_identity)
    trace.label(call.out, replace(after, range=before.range if is_identity else None))
    if chains := trace.chains.get(before.passage.carrier or ""):
        chains.pop()  # behind a new layer the blend is new, too, and its amount is 0


def _gain_of_result(trace: Trace, call: Call, operands: Sequence[Labels], dtypes: Sequence[torch.dtype]) -> float:
    """Return the number in front of an elementwise result of `operands`, the first of which are activations."""
    # If no layer that reads the result can undo the number, the trace notes it: both networks need the same number.
    first = operands[0].gain
    if call.plain in LINEAR and len(operands) == 1:
        absorbed = operands[0].result_of in trace.seen_as.scale_absorbed
        return first if absorbed else first * factor_in(trace, call)
    if call.plain == "mul":
        return math.prod(labels.gain for labels in operands)
    if call.plain in HOMOGENEOUS and len(operands) == 1 and first > 0:
        return first
    # The number in front of a mask of booleans does not count.
    gains = {labels.gain for labels, dtype in zip(operands, dtypes, strict=False) if dtype != torch.bool} or {1.0}
    alone = len(operands) == len(dtypes) == len(call.tensors)
    numbers = [x for x in call.args if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if gains != {1.0} and not (call.plain in ("add", "sub") and len(gains) == 1 and alone and not numbers):
        scaled = [labels for labels in operands if labels.gain != 1.0]
        units = torch.cat([torch.unique(trace.units.drop_repeats(labels.units)) for labels in scaled])
        key = trace.units.key(f"number before {call.plain}", call.module)
        trace.fixed_gains[key] = (tuple(labels.gain for labels in scaled), units, str(call))
    # A sum of logits and a mask keeps the number in front of the logits, which the rule of softmax notes.
    return gains.pop() if call.plain in SUMS and len(gains) == 1 else 1.0


def _record_scale(trace: Trace, call: Call, parameter: Tensor, labels: Labels) -> set[str]:
    """Record a parameter with one entry for each unit, such as layer scale; return its name, if it is one."""
    name, role = trace.parameters.name_of(parameter), ROLES.get(call.plain)
    if role == "shift":  # one row of a table of shifts is one, too
        name = trace.parameters.owner_of(parameter)
    if name is None or role is None:
        return set()
    trace.add(Layer(LayerKind.SCALE, name, {role: name}, None, labels.sources, labels.norms_since))
    return {name}


def _is_layer_scale(trace: Trace, summed: Labels, name: str) -> bool:
    """Tell whether a parameter has one entry for each unit of a plain sum of layers' outputs."""
    units = trace.parameters.values[name]
    return summed.linear and len(torch.unique(trace.units.find(units))) == len(units)


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
