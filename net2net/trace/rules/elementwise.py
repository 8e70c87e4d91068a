"""What each torch function does to units: one short rule a family.

A rule reads the labels of a call's arguments and labels its result. A function without a rule pins the units it
meets: they keep their width, and an attempt to grow them is refused with the function's name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...network import tensors_in
from ...tensors import merge_groups
from ..activations import ALL, NOTHING, Chain, Passage, Range, gated, hull, image, total
from ..facts import NO_NORM, Call, Contraction, Key, Labels, Layer, LayerKind, Norm, NormKind
from ..graph import Trace
from ..units import spread
from .recurrent import RECURRENT

Rule = Callable[[Trace, Call], None]


def apply(trace: Trace, call: Call) -> None:
    """Label the result of `call`, if it has one that the pass follows."""
    name = _plain(call.name)
    if name in _SILENT or not any(trace.follows(x) for x in tensors_in([*call.args, *call.kwargs.values()])):
        return
    for x in tensors_in([*call.args, *call.kwargs.values()]):
        if (layer := getattr(getattr(x, "_net2net_labels", None), "result_of", None)) is not None:
            trace.multipliers.setdefault(layer, set()).add(_number(trace, call))
    if call.name == "__setitem__":
        return assignment(trace, call)
    if tensors_in(call.out):
        RULES.get(name, unknown)(trace, call)


def _plain(name: str) -> str:
    """One name for a function, its method, its in-place form and its operator: `__iadd__` and `add_` are `add`."""
    name = name.strip("_")
    return _OPERATORS.get(name, name)


def _operands(trace: Trace, call: Call) -> list[Labels]:
    """The labels of every argument that is followed."""
    return [labels for x in tensors_in([*call.args, *call.kwargs.values()]) if (labels := trace.labels(x))]


def _made(units: Tensor, of: Sequence[Labels], **flags: Any) -> Labels:
    """Labels of what was made of all of `of`."""
    return Labels(
        units,
        frozenset().union(*(labels.sources for labels in of)),
        frozenset().union(*(labels.norms_since for labels in of)),
        **flags,
    )


def give_up(trace: Trace, call: Call, why: str) -> None:
    """Pin every unit that meets in `call` and follow none of them further: the result is one thing, of fixed size."""
    for x in tensors_in([*call.args, *call.kwargs.values()]):
        if (
            view := trace.parameters.view(x)
        ) is not None and view.name not in trace.parameters.values:  # of no use to tell them apart
            trace.parameters.values[view.name] = trace.units.fresh(1, Key(view.name), distinct=False).expand(
                trace.parameters.tensors[view.name].numel()
            )
    met = _operands(trace, call)
    for labels in met:
        trace.units.pin(labels.units, why)
    key = trace.units.key(call.name, call.module)
    for position, out in enumerate(tensors_in(call.args[0] if call.name == "__setitem__" else call.out)):
        units = trace.units.fresh(1, replace(key, part=str(position)))[0].expand(out.shape)
        trace.units.pin(units, why)
        trace.label(out, _made(units, met))


def unknown(trace: Trace, call: Call) -> None:
    """A function without a rule."""
    give_up(trace, call, f"{call} has no rule for units")


# -- one entry a unit ---------------------------------------------------------------------------------------------


def pointwise(trace: Trace, call: Call) -> None:
    """Every element on its own: the result carries its operands' units; units that meet are one unit."""
    if _plain(call.name) in ("to", "type_as"):  # another tensor says of what dtype, on what device
        return join(trace, call, tensors_in(call.args[0]))
    join(trace, call, [x for x in tensors_in([*call.args, *call.kwargs.values()]) if x is not call.kwargs.get("out")])


def join(trace: Trace, call: Call, operands: Sequence[Tensor]) -> None:
    """Label an elementwise result of `operands`, which may be activations, parameters and constants."""
    out = tensors_in(call.out)[0]
    if any(x.dim() > out.dim() for x in operands) or (out.dim() and out.shape != _broadcast(operands)):
        return give_up(trace, call, f"{call} changes what an element is")
    activations = [x for x in operands if hasattr(x, "_net2net_labels")]
    others = [x for x in operands if not hasattr(x, "_net2net_labels") and trace.tells_units(x)]
    if not activations:  # parameters alone
        parameters = [x for x in others if trace.follows(x)]
        if not parameters or (out.dtype == torch.bool and all(map(trace.parameters.is_buffer, parameters))):
            return  # a mask of positions
        if len(parameters) == len(operands) == 1 and _scaled(call) and (view := trace.parameters.view(parameters[0])):
            return trace.parameters.remember_view(out, replace(view, gain=view.gain * _gain(trace, call)))
        activations, others = parameters[:1], [x for x in others if x is not parameters[0]]
    met = [labels for x in activations if (labels := trace.labels(x))]
    passed: set[str] = set()
    alike = 0  # constants that are the same for all units
    first, *rest = (labels.units.broadcast_to(out.shape) for labels in met)
    for units in rest:
        first = trace.units.combine(first, units, call)
    for x in others:
        varying = [dim for dim, size in enumerate(trace.units.drop_repeats(first).shape) if size > 1]
        shape = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
        shared = [dim for dim in varying if shape[dim] > 1]
        if not shared and Key(trace.parameters.owner_of(x) or "") not in trace.seen_as.as_grouped:
            alike += not trace.follows(x)
            continue
        if (labels := trace.labels(x)) is not None:
            first = trace.units.combine(first, labels.units.broadcast_to(out.shape), call)
            met.append(labels)
            passed |= _record_scale(trace, call, x, met)
        else:
            why = f"{call} joins it to a constant of its own width"
            if any(not _uniform(x.reshape(shape), dim) for dim in shared):  # zeros, ones serve every width
                trace.units.pin(first, why)
    name = _plain(call.name)
    factor = 1.0 if met[0].result_of in trace.seen_as.scale_absorbed else _gain(trace, call)
    gain = _joined_gain(trace, call, met, factor, [x.dtype for x in activations])
    scaled = name in ("mul", "div") and len(met) > 1
    many = len([x for x in operands if x.numel() > 1]) - (alike if name == "mul" else 0)  # stochastic depth, for one
    plain = name in (_LINEAR | {"add", "sub"}) and not scaled and len(met) == many
    linear = plain and all(labels.linear for labels in met)
    normed = met[0].after_norm if len(met) == len(operands) == 1 and name in _KEEP_ZERO else None
    past = _passage(trace, call, operands, met, len(activations))
    begun = _begun(met) if plain else None
    lies, chain = _range(trace, call, operands, met)
    made = _made(
        first, met, gain=gain, linear=linear, after_norm=normed, first_norm=begun, passage=past, range=lies, chain=chain
    )
    trace.label(out, replace(made, norms_since=made.norms_since | passed))


def _joined_gain(
    trace: Trace, call: Call, met: Sequence[Labels], factor: float, dtypes: Sequence[torch.dtype]
) -> float:
    """The number in front of an elementwise result of `met`, the first of which are activations of `dtypes`.

    Where nothing that reads the result can undo it, it is noted: both networks need the same there.
    """
    name, first = _plain(call.name), met[0].gain
    if name in _LINEAR and len(met) == 1:
        return first * factor
    if name == "mul":
        return math.prod(labels.gain for labels in met)
    if name in _HOMOGENEOUS and len(met) == 1 and first > 0:
        return first
    gains = {labels.gain for labels, dtype in zip(met, dtypes, strict=False) if dtype != torch.bool}  # masks: no size
    alone = len(met) == len(dtypes) == len(tensors_in([*call.args, *call.kwargs.values()]))
    numbers = [x for x in call.args if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if gains != {1.0} and not (name in ("add", "sub") and len(gains) == 1 and alone and not numbers):
        units = torch.cat(
            [torch.unique(trace.units.drop_repeats(labels.units)) for labels in met if labels.gain != 1.0]
        )
        key = trace.units.key(f"number before {name}", call.module)
        trace.fixed_gains[key] = (tuple(labels.gain for labels in met if labels.gain != 1.0), units, str(call))
    # What a plain number multiplies keeps it beside what is added: softmax asks for it.
    return gains.pop() if name in _SUMS and len(gains) == 1 else 1.0


def _uniform(constant: Tensor, dim: int) -> bool:
    """Whether a constant is the same all along an axis."""
    return not constant.is_meta and torch.equal(constant, constant.narrow(dim, 0, 1).expand_as(constant))


def _begun(met: Sequence[Labels | None]) -> str | None:
    """The one norm that a plain sum begins with."""
    norms = {labels and labels.first_norm for labels in met if labels is None or not labels.linear}
    return norms.pop() if len(norms) == 1 else None


def _passage(trace: Trace, call: Call, operands: Sequence[Tensor], met: Sequence[Labels], activations: int) -> Passage:
    """What the elementwise result of `operands`, the first of which are activations, has met."""
    name, past = _plain(call.name), met[0].passage
    if len(operands) == 1:
        if name in _LINEAR:
            return past.scaled(_gain(trace, call))
        rest = {key: value for key, value in call.kwargs.items() if key != "out"}
        return past.bent(lambda x: call.func(x, *call.args[1:], **rest)) if call.args else NOTHING
    if activations == 1:
        return replace(past, rest=None) if name in _SCALES else NOTHING
    return gated([(labels.passage, labels.sources) for labels in met]) if name == "mul" else NOTHING


def _range(trace: Trace, call: Call, operands: Sequence[Tensor], met: Sequence[Labels]) -> tuple[Range, Chain | None]:
    """Between which numbers the elementwise result lies, and the activations that it has met behind a layer."""
    name, lies = _plain(call.name), [labels.range for labels in met]
    if len(operands) > 1 or not call.args:
        return total(lies) if name == "add" and len(met) == len(operands) else None, None
    before, chain = met[0], met[0].chain
    if name in _LINEAR and _gain(trace, call) == 1.0:
        return before.range, chain
    rest = {key: value for key, value in call.kwargs.items() if key != "out"}
    function = partial(_of_one, call.func, call.args[1:], rest)  # not the call, which holds its activations
    if chain is not None:
        chain = chain.longer(function)
    elif before.passage.carrier is not None:
        chain = Chain(before.passage.carrier, (function,))
    if chain is not None:
        shorter = [one for one in trace.chains.get(chain.behind, []) if one.functions != chain.functions[:-1]]
        trace.chains[chain.behind] = [*shorter, chain]
    return image(function, before.range), chain


def _of_one(function: Callable, more: Sequence, options: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, *more, **options)


def _broadcast(operands: Sequence[Tensor]) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(*(x.shape for x in operands))
    except RuntimeError:
        return None


def _scaled(call: Call) -> bool:
    return _plain(call.name) in _LINEAR


def _gain(trace: Trace, call: Call) -> float:
    """The plain number that the call multiplies by, else 1."""
    name, factor = _plain(call.name), 1.0
    for value in (*call.args[:2], call.kwargs.get("other")):
        if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta and not trace.follows(value):
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            factor = value
    if name == "div":
        return 1 / factor if not call.name.startswith("__r") else 1.0
    return factor if name == "mul" else 1.0


def _number(trace: Trace, call: Call) -> float:
    """The plain number that the call multiplies its one tensor by, else 1."""
    alone = len(tensors_in([*call.args, *call.kwargs.values()])) == 1
    return _gain(trace, call) if alone and _plain(call.name) in ("mul", "div") else 1.0


def _record_scale(trace: Trace, call: Call, x: Tensor, met: Sequence[Labels]) -> set[str]:
    """A parameter with one entry a unit, as layer scale, which a student may have alone: its name, if it is one."""
    name, role = trace.parameters.name_of(x), _SCALES.get(_plain(call.name))
    if name is None or role is None:
        return set()
    trace.add(Layer(LayerKind.SCALE, name, {role: name}, None, met[0].sources, met[0].norms_since))
    return {name}


def prelu(trace: Trace, call: Call) -> None:
    """One slope for all units, or one a unit along axis 1."""
    x, weight = call.args[0], call.arg(1, "weight")
    units = trace.labels(x)
    slopes = trace.labels(weight)
    if units is None:
        return give_up(trace, call, f"{call} acts on a parameter")
    first = units.units
    if slopes is not None:
        dim = 1 if x.dim() > 1 else 0
        first = trace.units.combine(first, spread(slopes.units, dim, x.shape), call)
    if (name := trace.parameters.name_of(weight)) is not None:
        trace.add(Layer(LayerKind.SCALE, name, {"slope": name}, None, units.sources, units.norms_since))
        units = replace(units, norms_since=units.norms_since | {name})
    trace.label(call.out, Labels(first, units.sources, units.norms_since, after_norm=units.after_norm))


def blend(trace: Trace, call: Call) -> None:
    """An activation faded in: the amount is one number, and the identity at 0 (`net2net.Blend`)."""
    x, activated, amount = call.args
    before = trace.labels(x)
    join(trace, call, [x, activated])
    name, after = trace.parameters.name_of(amount), trace.labels(call.out)
    if name is not None and before is not None and after is not None:
        trace.add(Layer(LayerKind.SCALE, name, {"amount": name}, None, before.sources, before.norms_since))
        open_ = not amount.is_meta and not bool(amount.any())
        kept = before.range if open_ else None
        trace.label(
            call.out, replace(after, norms_since=after.norms_since | {name}, linear=before.linear and open_, range=kept)
        )
        if chains := trace.chains.get(before.passage.carrier or ""):
            chains.pop()  # a new layer does not meet it: the amount of a new blend is zero


def assignment(trace: Trace, call: Call) -> None:
    """A part of an activation is overwritten: by units of another, or by constants."""
    x, index, value = call.args
    labels, new = trace.labels(x), trace.labels(value)
    if any(hasattr(i, "_net2net_labels") for i in tensors_in([index])):
        return give_up(trace, call, f"{call} writes where the values say")
    met = [known for known in (labels, new) if known is not None]
    units = _constant(trace, call, x.shape) if labels is None else labels.units
    value_units = None if new is None else new.units
    if value_units is None:
        part = units[index]
        if isinstance(value, Tensor) and value.numel() > 1:
            return give_up(trace, call, f"{call.module or 'the network'} writes constants into a part of it")
        if torch.equal(torch.unique(trace.units.find(part)), torch.unique(trace.units.find(units))):
            return  # a number at some positions of every unit
        value_units = _constant(trace, call, part.shape)
    units = units.clone()
    units[index] = value_units
    trace.label(x, _made(units, met))


def _constant(trace: Trace, call: Call, shape: Sequence[int]) -> Tensor:
    """Labels of a tensor of constants: of one width in both networks."""
    return trace.units.fresh(1, trace.units.key(f"constant {call.name}", call.module))[0].expand(tuple(shape))


# -- normalisation ------------------------------------------------------------------------------------------------


def batch_norm(trace: Trace, call: Call) -> None:
    """Statistics and affine parameters have one entry a unit; the units go on as they are. Instance norm likewise."""
    labels = trace.labels(call.args[0])
    if labels is None or not hasattr(call.args[0], "_net2net_labels"):
        return give_up(trace, call, f"{call} normalises a parameter")
    units = trace.units.units_along(labels.units, 1, f"{call} has one entry for them")
    positions = {"mean": 1, "var": 2, "weight": 3, "bias": 4}
    keys = {"mean": "running_mean", "var": "running_var", "weight": "weight", "bias": "bias"}
    roles = {role: call.arg(position, keys[role]) for role, position in positions.items()}
    tensors = {role: name for role, tensor in roles.items() if (name := trace.parameters.name_of(tensor)) is not None}
    for name in tensors.values():
        trace.parameters.axis(name, 0, units)
    key = None if tensors else trace.units.key("norm", call.module)
    name = str(key) if key else next(iter(tensors.values())).rpartition(".")[0]
    options = {"eps": call.arg(7, "eps", 1e-5), "module": call.module}
    trace.add(Layer(LayerKind.NORM, name, tensors, units, labels.sources, labels.norms_since, options, key=key))
    past = replace(labels.passage, rest=None)
    made = Labels(
        spread(units, 1, call.out.shape), labels.sources, labels.norms_since | {name}, passage=past, range=ALL
    )
    trace.label(call.out, made)


def layer_norm(trace: Trace, call: Call) -> None:
    """Normalises across units: all must be seen equally often, or means (layer norm), zeros (RMS norm) added."""
    rms = _plain(call.name) == "rms_norm"
    shape = call.arg(1, "normalized_shape")
    labels = trace.labels(call.args[0])
    if labels is None or not hasattr(call.args[0], "_net2net_labels"):
        return give_up(trace, call, f"{call} normalises a parameter")
    units, tensors = labels.units, {}
    for role, tensor in (("weight", call.arg(2, "weight")), ("bias", None if rms else call.arg(3, "bias"))):
        if tensor is not None and (entries := trace.labels(tensor)) is not None:
            units = trace.units.combine(units, entries.units.broadcast_to(units.shape), call)
            if (name := trace.parameters.name_of(tensor)) is not None:
                tensors[role] = name
    eps = call.arg(3 if rms else 4, "eps", None if rms else 1e-5)
    if eps is None:
        eps = torch.finfo(call.args[0].dtype).eps
    size = math.prod(shape)
    lead = trace.units.drop_repeats(units).shape[: units.dim() - len(shape)]
    rows = units[tuple(slice(0, n) for n in lead)].reshape(-1, size)
    # A unit that holds a mean has no deviation from it, but at other positions.
    alone = size == max(shape) and len(torch.unique(trace.units.find(rows[0]))) == size
    _cross(
        trace, call, replace(labels, units=units), rows, tensors, eps, NormKind.RMS if rms else NormKind.LAYER, alone
    )


def group_norm(trace: Trace, call: Call) -> None:
    """Layer norm inside every group of channels."""
    groups = call.arg(1, "num_groups")
    labels = trace.labels(call.args[0])
    if labels is None or not hasattr(call.args[0], "_net2net_labels"):
        return give_up(trace, call, f"{call} normalises a parameter")
    line = trace.units.units_along(labels.units, 1, f"{call} has one entry for them")
    roles = {"weight": call.arg(2, "weight"), "bias": call.arg(3, "bias")}
    tensors = {role: name for role, tensor in roles.items() if (name := trace.parameters.name_of(tensor)) is not None}
    for name in tensors.values():
        trace.parameters.axis(name, 0, line)
    units = line.reshape(groups, -1)
    if groups > 1:
        key = trace.units.key("groups", call.module)
        trace.units.relate(key, units, trace.units.fresh(groups, key)[:, None].expand_as(units))
    alone = call.args[0][0].numel() == units.numel()
    _cross(trace, call, labels, units, tensors, call.arg(4, "eps", 1e-5), NormKind.LAYER, alone)


def _cross(
    trace: Trace,
    call: Call,
    labels: Labels,
    rows: Tensor,
    tensors: dict[str, str],
    eps: float,
    kind: NormKind,
    alone: bool,
) -> None:
    """Record a norm that takes the mean over each of `rows`, and nothing but one entry of each unit if `alone`."""
    key = trace.units.key("norm", call.module)
    name = next(iter(tensors.values())).rpartition(".")[0] if tensors else str(key)
    padded = kind == "rms" or (labels.linear and alone)
    trace.norms.append(
        Norm(key, kind, rows, tensors, eps, call.module, padded, name, NO_NORM if labels.linear else labels.first_norm)
    )
    trace.add(
        Layer(
            LayerKind.NORM,
            name,
            tensors,
            rows.reshape(-1),
            labels.sources,
            labels.norms_since,
            {"across": True},
            key=None if tensors else key,
        )
    )
    trace.label(
        call.out, Labels(labels.units, labels.sources, labels.norms_since | {name}, after_norm=name, first_norm=name)
    )


# -- layers that read units and produce new ones ----------------------------------------------------------------


def convolution(trace: Trace, call: Call) -> None:
    """The output axis is a row of new units, the input axis reads; in groups each group for itself."""
    x, weight = call.args[0], call.arg(1, "weight")
    transposed = "transpose" in call.name
    at = (3, 4, 6, 7) if transposed else (3, 4, 6, 5)
    stride, padding, groups, dilation = (
        call.arg(position, name, 0 if name == "padding" else 1)
        for position, name in zip(at, ("stride", "padding", "groups", "dilation"), strict=True)
    )
    owner, labels, spatial = trace.model.get_submodule(call.module), trace.labels(x), weight.dim() - 2
    outer = () if labels is None else labels.padded_by
    if getattr(owner, "padding_mode", "zeros") != "zeros":  # padded by another function, before
        padding, outer = owner.padding, ()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "transposed": transposed, "groups": groups}
    options["outer"] = tuple(outer[k] if k < len(outer) else (0, 0) for k in reversed(range(spatial)))
    mix(trace, call, x, weight, x.dim() - weight.dim() + 1, (0, 1) if transposed else (1, 0), groups, options)


def linear(trace: Trace, call: Call) -> None:
    """The output axis is a row of new units, the input axis reads."""
    mix(trace, call, call.args[0], call.arg(1, "weight"), -1, (1, 0))


def mix(
    trace: Trace,
    call: Call,
    x: Tensor,
    weight: Tensor,
    dim: int,
    axes: tuple[int, int],
    groups: int = 1,
    options: dict | None = None,
    bias: Tensor | None = None,
) -> None:
    """A layer whose weight reads axis `dim` of `x` with `axes[0]` and produces the same axis with `axes[1]`."""
    found = trace.parameters.weight(weight)
    if found is None:
        return give_up(trace, call, f"the weight of {call} is not a parameter of the network")
    name, options = found.name, options or {"groups": 1}
    bias = call.arg(2, "bias") if bias is None and call.name != "matmul" else bias
    tensors = {"weight": name}
    if (bias_name := trace.parameters.name_of(bias)) is not None:
        tensors["bias"] = bias_name
    labels = trace.labels(x)
    reads = None
    if labels is not None:
        reads = trace.units.units_along(labels.units, dim, f"{name} reads them with one weight")
    (in_dim, in_taken), (out_dim, out_taken) = found.axes[axes[0]], found.axes[axes[1]]
    times = trace.seen_as.merged_groups.get(name, 1)
    if times > 1:
        if trace.parameters.tensors[name] is weight:
            trace.parameters.tensors[name] = merge_groups(weight, groups, times)
        weight = trace.parameters.tensors[name]
    split = Key(name, "groups") in trace.seen_as.as_grouped
    grouped = groups > times or Key(name) in trace.seen_as.as_grouped or split
    if grouped and reads is None:
        return give_up(trace, call, f"{name} is grouped and reads what is not followed")
    if grouped and reads is not None and labels is not None:
        if weight.shape[0] == groups and weight.shape[1] == 1 and not split:
            if out_taken is not None and len(out_taken) < len(reads):  # one filter, the same for every unit
                made = Labels(spread(reads, dim, call.out.shape), labels.sources, labels.norms_since)
                return trace.label(call.out, made)
            return _depthwise(trace, call, labels, reads, dim, tensors, options)
        produced = _grouped(trace, name, reads, groups, times, transposed=axes == (0, 1))
    else:
        if reads is not None:
            trace.parameters.axis(name, in_dim, reads, in_taken)
        produced = trace.parameters.axis(name, out_dim, None, out_taken)
    trace.parameters.read_axis[name] = in_dim
    if bias is not None and (part := trace.parameters.weight(bias)) is not None:
        trace.parameters.axis(part.name, part.axes[0][0], produced, part.axes[0][1])
    elif bias is not None and (more := trace.labels(bias)) is not None:
        trace.units.unite(more.units.reshape(-1), produced)
    gain = found.gain if labels is None else found.gain * labels.gain
    every = (
        [reads, produced]
        if name in trace.parameters.inner
        else [trace.parameters.axes[name][axis] for axis in (in_dim, out_dim)]
    )
    read = labels or Labels(produced)  # of constants: nothing is known
    state = (gain, read.linear, read.after_norm, read.first_norm, read.passage, read.range)
    trace.add(Layer(LayerKind.MIX, name, tensors, every[0], read.sources, read.norms_since, options, every[1], *state))
    past = Passage(carrier=name, rest=0.0)
    units = spread(produced, dim, call.out.shape)
    trace.label(call.out, Labels(units, frozenset({name}), linear=True, passage=past, range=ALL, result_of=name))


def _depthwise(
    trace: Trace, call: Call, labels: Labels | None, reads: Tensor, dim: int, tensors: dict[str, str], options: dict
) -> None:
    """A filter for every unit: the unit goes on."""
    assert labels is not None
    for tensor in tensors.values():
        trace.parameters.axis(tensor, 0, reads)
    name = tensors["weight"]
    roles = {"taps": name} | ({"shift": tensors["bias"]} if "bias" in tensors else {})
    trace.add(
        Layer(LayerKind.SCALE, name, roles, reads, labels.sources, labels.norms_since, options, range=labels.range)
    )
    past = replace(labels.passage, carrier=name, rest=None)
    units = spread(reads, dim, call.out.shape)
    trace.label(call.out, Labels(units, labels.sources, labels.norms_since | {name}, passage=past, range=ALL))


def _grouped(trace: Trace, name: str, reads: Tensor, groups: int, times: int, transposed: bool) -> Tensor:
    """Units read and produced inside one group belong to it; `times` groups in turn are one, the last what is left."""
    packs = -(-groups // times)
    if transposed:
        trace.parameters.axis(name, 0, reads)
        produced = trace.parameters.inside(name, packs)
        produced = produced[: len(produced) * groups // (packs * times)]
    else:
        places = trace.units.fresh(
            (packs * times - groups) * len(reads) // groups, distinct=False
        )  # of groups that are not
        trace.parameters.inside(name, packs, torch.cat([reads, places]))
        produced = trace.parameters.axis(name, 0)
    key = Key(name, "groups")
    owners = trace.units.families[key] if key in trace.units.families else trace.units.fresh(packs, key)
    owned = [owners[torch.arange(len(units)) * groups // len(units) // times] for units in (reads, produced)]
    trace.units.relate(key, torch.cat([reads, produced]), torch.cat(owned))
    return produced


def overwritten(trace: Trace, call: Call) -> None:
    """Zeros in a copy of a parameter: the same for all units, whatever they copy."""
    if hasattr(call.args[0], "_net2net_labels"):
        unknown(trace, call)


def embedding(trace: Trace, call: Call) -> None:
    """Every entry of the table is a row of units; the table's length is fixed."""
    found = trace.parameters.weight(call.arg(1, "weight"))
    if found is None or found.axes[0][0] != 0 or hasattr(call.args[0], "_net2net_labels"):
        return give_up(trace, call, f"the table of {call} is not a parameter of the network")
    if call.arg(3, "max_norm") is not None:
        return give_up(trace, call, f"{call} shortens its rows to a norm, which copies change")
    name, tensors = found.name, {"weight": found.name}
    produced = trace.parameters.axis(name, 1)
    trace.add(Layer(LayerKind.MIX, name, tensors, None, frozenset(), frozenset(), {"embedding": True}, produced))
    trace.label(call.out, Labels(spread(produced, -1, call.out.shape), frozenset({name}), linear=True, result_of=name))


# -- products that sum over an axis -------------------------------------------------------------------------------


def matmul(trace: Trace, call: Call) -> None:
    """A layer, if one factor is a parameter; else a contraction of two activations."""
    a, b = call.args[0], call.arg(1, "other", call.kwargs.get("mat2"))
    if not hasattr(b, "_net2net_labels") and trace.parameters.weight(b) is not None and b.dim() == 2:
        return mix(trace, call, a, b, -1, (0, 1))
    if not hasattr(a, "_net2net_labels") and trace.parameters.weight(a) is not None and a.dim() == 2 and b.dim() > 1:
        return mix(trace, call, b, a, -2, (1, 0))
    if not (a.dim() > 1 and b.dim() > 1) or not (trace.follows(a) or trace.follows(b)):
        return give_up(trace, call, f"{call} multiplies vectors")
    contract(trace, call, a, b, call.out.shape)


def contract(trace: Trace, call: Call, a: Tensor, b: Tensor, shape: Sequence[int]) -> None:
    """Sum over the last axis of `a` and the last but one of `b`: over positions, or over units that meet in pairs."""
    left, right = trace.labels(a), trace.labels(b)
    met = [labels for labels in (left, right) if labels is not None]
    gain = math.prod(labels.gain for labels in met)
    batch = tuple(shape[:-2])
    if left is None or right is None:  # a constant matrix, of one size in both networks
        labels, dim = (left, -1) if left is not None else (right, -2)
        assert labels is not None
        units = trace.units.tie_along(labels.units, [labels.units.dim() + dim], f"{call} multiplies it with a constant")
        trace.label(call.out, _made(units.broadcast_to((*batch, *units.shape[-2:])).expand(tuple(shape)), met))
        return
    one, two = trace.units.drop_repeats(left.units), trace.units.drop_repeats(right.units)
    key = trace.units.key("contraction", call.module)
    as_grouped = key in trace.seen_as.as_grouped
    inner = [one.shape[-1] > 1 or as_grouped, two.shape[-2] > 1 or as_grouped]
    why = f"{call} sums products over them"
    one = trace.units.tie_along(one, [one.dim() - 1], why)
    two = trace.units.tie_along(two, [two.dim() - 2], why)
    if any(inner):
        apart, together = torch.broadcast_tensors(one, two)
        trace.units.unite(apart, together, contraction=True)
        if all(inner):
            trace.contractions.append(Contraction(key, torch.unique(trace.units.drop_repeats(left.units))))
        _, numbers = torch.unique(trace.units.find(apart), return_inverse=True)
        heads = trace.units.fresh(int(numbers.max()) + 1)  # a label of their own, which is neither factor's
        units = heads[numbers]
        trace.units.unite(units, apart, contraction=True)
        trace.label(call.out, _made(units.expand(tuple(shape)), met, gain=gain))
        return
    units = trace.units.combine(one.expand(tuple(shape)), two.expand(tuple(shape)), call)
    trace.label(call.out, _made(units, met, gain=gain))


# -- data movement: the labels move as the data do ----------------------------------------------------------------


def movement(trace: Trace, call: Call) -> None:
    """Apply the function itself to the labels."""
    operands = tensors_in(call.args[0])
    where = [] if call.name.endswith("_as") else [*call.args[1:], *call.kwargs.values()]  # that asks for a shape alone
    if any(hasattr(x, "_net2net_labels") for x in tensors_in(where)):
        return give_up(trace, call, f"{call} moves it to where the values say")
    if not any(hasattr(x, "_net2net_labels") for x in operands) and len(operands) == 1:
        view = trace.parameters.view(operands[0])
        moved = [] if view is None else [_move(call, [places]) for places in view.places]
        if view is not None and None not in moved:
            for out, *places in zip(tensors_in(call.out), *moved, strict=True):  # type: ignore[arg-type]
                trace.parameters.remember_view(out, replace(view, places=tuple(places)))
        return
    labels = [trace.labels(x) for x in operands]
    known = [one for one in labels if one is not None]
    if not known:
        return
    units = [
        _constant(trace, call, x.shape) if one is None else one.units for x, one in zip(operands, labels, strict=True)
    ]
    moved = _move(call, units)
    if moved is None:
        return give_up(trace, call, f"{call} changes what an element is")
    gain = known[0].gain if len({one.gain for one in known}) == 1 else 1.0
    linear = all(one is not None and one.linear for one in labels)
    normed = known[0].after_norm if len({one and one.after_norm for one in labels}) == 1 else None
    past = known[0].passage if len({one and one.passage for one in labels}) == 1 else NOTHING
    lies = hull(one and one.range for one in labels)
    for out, new in zip(tensors_in(call.out), moved, strict=True):
        state = {
            "gain": gain,
            "linear": linear,
            "after_norm": normed,
            "first_norm": _begun(labels),
            "passage": past,
            "range": lies,
        }
        trace.label(out, _made(new, known, **state))


def _move(call: Call, units: list[Tensor]) -> list[Tensor] | None:
    outs = tensors_in(call.out)
    units = [labels.detach() for labels in units]  # objects of their own, which an in-place form may reshape
    if _plain(call.name) in ("view", "reshape", "view_as", "reshape_as"):  # a view of expanded labels would need a copy
        same = len(outs) == 1 and outs[0].numel() == units[0].numel()  # a view as another dtype is not
        return [units[0].reshape(outs[0].shape)] if same else None
    args = [units if isinstance(call.args[0], (list, tuple)) else units[0], *call.args[1:]]
    try:
        moved = tensors_in(call.func(*args, **call.kwargs))
    except (RuntimeError, NotImplementedError, IndexError, TypeError):  # it does not move integers, or a meta index
        return None
    fits = len(moved) == len(outs) and all(new.shape == out.shape for new, out in zip(moved, outs, strict=True))
    return moved if fits and not any(new.is_floating_point() for new in moved) else None


def channelwise(trace: Trace, call: Call) -> None:
    """Pooling, interpolation: positions are mixed, channels are not."""
    labels = trace.labels(call.args[0])
    if labels is None:
        return give_up(trace, call, f"{call} acts on a parameter")
    name, out = _plain(call.name), tensors_in(call.out)[0]
    spatial = int(name.partition("pool")[2][0]) if "pool" in name else out.dim() - 2
    dim = out.dim() - spatial - 1
    units = trace.units.units_along(labels.units, dim, f"{call} mixes positions")
    for out in tensors_in(call.out):
        linear = labels.linear and "avg" in name
        state = (labels.gain, linear, labels.after_norm, None, labels.passage if "avg" in name else NOTHING)
        lies = hull([labels.range, (0.0, 0.0)]) if "pool" in name and "lp" not in name else None  # of the padding
        trace.label(out, Labels(spread(units, dim, out.shape), labels.sources, labels.norms_since, *state, range=lies))


def reduction(trace: Trace, call: Call) -> None:
    """A mean or sum over positions keeps the units. A mean or an extreme over units is a unit of its own, which stays
    what it is if each is copied equally often; any other result makes one of them, which moves as a whole."""
    labels = trace.labels(call.args[0])
    if any(isinstance(x, Tensor) for x in [*call.args[1:], call.kwargs.get("other")]):
        return pointwise(trace, call)  # the maximum of two
    if labels is None:
        return unknown(trace, call)
    dims = call.arg(2 if _plain(call.name) == "norm" else 1, "dim", call.kwargs.get("axis"))
    rank = labels.units.dim()
    dims = range(rank) if dims is None else sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})
    if _plain(call.name) in ("mean", "amax", "amin", "max", "min", "all", "any"):
        units = _across(trace, call, labels.units, dims)
    else:
        units = trace.units.tie_along(labels.units, list(dims), f"{call} mixes them")
    shape = [1 if d in dims else size for d, size in enumerate(labels.units.shape)]
    linear = _plain(call.name) in ("mean", "sum")
    for out in tensors_in(call.out):
        units_out = units.expand(shape).reshape(out.shape)
        gain = labels.gain if linear else 1.0
        made = Labels(units_out, labels.sources, labels.norms_since, gain)
        if linear:
            made = replace(
                made,
                linear=labels.linear,
                after_norm=labels.after_norm,
                first_norm=labels.first_norm,
                passage=labels.passage,
            )
        if _plain(call.name) in ("mean", "amax", "amin"):
            made = replace(made, range=labels.range)
        trace.label(out, made)


def _across(trace: Trace, call: Call, units: Tensor, dims: Sequence[int]) -> Tensor:
    """A new unit for each set of units that `dims` hold together; one that is alone stays itself."""
    units = trace.units.drop_repeats(units)
    mixed = [d for d in dims if units.shape[d] > 1]
    if not mixed:
        return units
    kept = [1 if d in mixed else size for d, size in enumerate(units.shape)]
    rows = units.movedim(mixed, list(range(-len(mixed), 0))).flatten(-len(mixed)).reshape(math.prod(kept), -1)
    rows, which = torch.unique(trace.units.find(rows), dim=0, return_inverse=True)  # the same at several positions
    key = trace.units.key("across", call.module)
    kind = NormKind.MEAN if _plain(call.name) == "mean" else NormKind.EXTREME
    trace.norms.append(Norm(key, kind, rows, {}, 0.0, call.module, padded=False))
    made = trace.units.fresh(len(rows), key)
    if len(rows) > 1:
        trace.units.relate(key, rows, made[:, None].expand_as(rows))
    return made[which].reshape(kept)


def lengthwise(trace: Trace, call: Call) -> None:
    """Softmax, sorting, cumulation along an axis: over positions they keep the units; units move as a whole."""
    labels = trace.labels(call.args[0])
    if labels is None:
        return unknown(trace, call)
    name = _plain(call.name)
    default = {"normalize": 1, "sort": -1, "argsort": -1, "topk": -1}.get(name)
    dim = call.arg(2 if name in ("normalize", "topk") else 1, "dim", call.kwargs.get("axis", default))
    if dim is None or not isinstance(dim, int):
        return give_up(trace, call, f"{call} mixes elements along an axis that is not named")
    units = trace.units.tie_along(labels.units, [dim], f"{call} mixes them")
    if "softm" in call.name:
        trace.softmax_gains[trace.units.key("softmax", call.module)] = (
            labels.gain,
            labels.sources,
            torch.unique(units),
        )
    for out in tensors_in(call.out):
        trace.label(out, Labels(units.expand(out.shape), labels.sources, labels.norms_since))


def pad(trace: Trace, call: Call) -> None:
    """Positions added to a map belong to its units; channels added are units of their own, which hold a constant."""
    labels = trace.labels(call.args[0])
    if labels is None:
        return give_up(trace, call, f"{call} acts on a parameter")
    units, amounts, mode = labels.units, call.arg(1, "pad"), call.arg(2, "mode", "constant")
    outer = tuple(zip(amounts[::2], amounts[1::2], strict=True))
    zeros = mode == "constant" and not call.arg(3, "value")  # which any sum and any norm leave zero
    if mode != "constant" and max(trace.units.drop_repeats(units).shape[-(len(amounts) // 2) :]) > 1:
        units, amounts = F.pad(units.double(), amounts, mode).long(), []
    for k in range(len(amounts) // 2):
        dim, (before, after) = units.dim() - 1 - k, amounts[2 * k : 2 * k + 2]
        size = units.shape[dim] + before + after
        if trace.units.drop_repeats(units).shape[dim] == 1:
            units = units.narrow(dim, 0, 1).expand([size if d == dim else n for d, n in enumerate(units.shape)])
            continue
        if before < 0 or after < 0:
            return give_up(trace, call, f"{call} removes some of them")
        parts = [units]
        for position, count in ((0, before), (len(parts) + 1, after)):
            if count:
                new = trace.units.fresh(count, trace.units.key("padding", call.module))
                shape = [count if d == dim else n for d, n in enumerate(units.shape)]
                parts.insert(position, spread(new, dim, shape))
                zeros = False  # it holds no mean of others
        units = torch.cat(parts, dim)
    made = Labels(units, labels.sources, labels.norms_since, labels.gain, padded_by=outer)
    if zeros:
        made = replace(made, range=hull([labels.range, (0.0, 0.0)]))
        made = replace(made, linear=labels.linear, after_norm=labels.after_norm, first_norm=labels.first_norm)
    trace.label(call.out, made)


def unfold(trace: Trace, call: Call) -> None:
    """Patches of a map: every unit once for each place in the patch."""
    labels = trace.labels(call.args[0])
    if labels is None or labels.units.dim() != 4:
        return unknown(trace, call)
    units = trace.units.units_along(labels.units, 1, f"{call} mixes positions")
    units = units.repeat_interleave(call.out.shape[1] // len(units))
    trace.label(call.out, Labels(spread(units, 1, call.out.shape), labels.sources, labels.norms_since, labels.gain))


def fold(trace: Trace, call: Call) -> None:
    """Patches summed into a map: the entries of one channel are one unit."""
    labels = trace.labels(call.args[0])
    if labels is None or labels.units.dim() != 3:
        return unknown(trace, call)
    units = trace.units.units_along(labels.units, 1, f"{call} mixes positions").reshape(call.out.shape[1], -1)
    units = trace.units.tie_along(units, [1], f"{call} sums over patches").reshape(-1)
    trace.label(call.out, Labels(spread(units, 1, call.out.shape), labels.sources, labels.norms_since, labels.gain))


# -- functions that are other functions ---------------------------------------------------------------------------


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    logits = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.is_floating_point():
        logits = logits + attn_mask
    return logits.softmax(-1) @ value


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> object:
    if static_k is not None or static_v is not None:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)  # type: ignore
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]  # type: ignore
    for which, more in ((1, bias_k), (2, bias_v)):
        if more is not None:
            shape = (1, *projected[which].shape[1:-1], projected[which].shape[-1])
            projected[which] = torch.cat([projected[which], more.reshape(-1).expand(shape)])
    heads = [x.unflatten(-1, (num_heads, -1)).movedim(0, -2) for x in projected]  # (..., head, position, unit)
    out = _attention(*heads)  # type: ignore[arg-type]
    out = F.linear(out.movedim(-2, 0).flatten(-2), out_proj_weight, out_proj_bias)
    return out, None  # the weights are a result that hardly anyone reads: they must not pin the heads


def _einsum(equation: object, *operands: Tensor) -> object:
    """Two factors: a matrix product, or a product element by element and a sum, in other words."""
    terms, arrow, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    a, comma, b = terms.partition(",")
    if not (arrow and comma) or "." in terms or any(len(set(term)) < len(term) for term in (a, b, result)):
        return NotImplemented
    if len(operands) != 2 or not set(result) <= set(a) | set(b):
        return NotImplemented
    shared = set(a) & set(b)
    batch, summed = [c for c in a if c in shared and c in result], [c for c in a if c in shared and c not in result]
    rows, columns = [c for c in a if c not in shared], [c for c in b if c not in shared]
    if not (summed and rows and columns and set(rows + columns) <= set(result)):
        every = [*result, *(c for c in dict.fromkeys(a + b) if c not in result)]
        left, right = (
            x.permute([term.index(c) for c in every if c in term]).reshape(
                [x.shape[term.index(c)] if c in term else 1 for c in every]
            )
            for x, term in zip(operands, (a, b), strict=True)
        )
        product = left * right
        return product.sum(list(range(len(result), len(every)))) if len(every) > len(result) else product
    size = dict(zip(a, operands[0].shape, strict=True)) | dict(zip(b, operands[1].shape, strict=True))
    left = operands[0].permute([a.index(c) for c in batch + rows + summed]).flatten(len(batch) + len(rows))
    left = left.reshape(*left.shape[: len(batch)], math.prod(size[c] for c in rows), math.prod(size[c] for c in summed))
    right = operands[1].permute([b.index(c) for c in batch + summed + columns])
    right = right.reshape(*right.shape[: len(batch)], left.shape[-1], math.prod(size[c] for c in columns))
    out = (left @ right).reshape([size[c] for c in batch + rows + columns])
    return out.permute([(batch + rows + columns).index(c) for c in result])


EXPANSIONS: dict[str, Callable] = {
    "glu": _glu,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "einsum": _einsum,
    "addmm": lambda bias, a, b, **_: a @ b + bias,
    "baddbmm": lambda bias, a, b, **_: a @ b + bias,
    **RECURRENT,
}

_SILENT = set(
    [
        "set",
        "size",
        "dim",
        "ndimension",
        "numel",
        "is_floating_point",
        "requires_grad",
        "is_contiguous",
        "stride",
        "storage_offset",
        "shape",
        "device",
        "dtype",
        "ndim",
        "is_cuda",
        "layout",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "bernoulli",
        "item",
        "tolist",
        "len",
        "is_complex",
        "get_device",
        "element_size",
        "is_nested",
        "has_names",
        "names",
        "grad",
        "is_sparse",
        "is_quantized",
        "data_ptr",
        "assert_async",
    ]
)
_OPERATORS = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "rtruediv": "div",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "rpow": "pow",
    "getitem": "index",
    "get": "attribute",  # x.mT, x.data: an attribute that is a tensor has labels, too
    "rmatmul": "matmul",
    "bmm": "matmul",
    "mm": "matmul",
}
_POINTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid softplus
    logsigmoid log_sigmoid softsign tanhshrink hardshrink softshrink threshold sign sin cos erf expm1 log1p reciprocal
    ceil floor round trunc
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    clamp clamp_min clamp_max clip maximum minimum where masked_fill lerp addcmul addcdiv copysign nan_to_num
    add sub mul div neg abs exp log sqrt rsqrt square pow to float double half bfloat16 type type_as detach clone
    contiguous identity requires_grad_ logaddexp fmod remainder floordiv eq ne lt le gt ge logical_not logical_and
    logical_or and or invert isnan isinf isfinite int long bool
"""
_MOVEMENT = """
    view reshape flatten unflatten permute transpose swapaxes movedim moveaxis t squeeze unsqueeze cat concat
    concatenate stack chunk split split_with_sizes tensor_split unbind index attribute narrow select flip fliplr flipud
    roll expand expand_as broadcast_to view_as reshape_as channel_shuffle native_channel_shuffle pixel_shuffle
    pixel_unshuffle index_select repeat repeat_interleave tile gather take_along_dim swapdims adjoint rot90 diagonal
    hsplit vsplit hstack vstack dstack ravel contiguous_format meshgrid
"""
_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool"
_LINEAR = frozenset(
    [
        "mul",
        "div",
        "neg",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "dropout",
        "detach",
        "clone",
        "contiguous",
        "identity",
    ]
)
_KEEP_ZERO = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "hardtanh",
        "hardswish",
        "mul",
        "div",
        "neg",
        "abs",
        "dropout",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "detach",
        "clone",
        "contiguous",
        "identity",
    ]
)
_HOMOGENEOUS = frozenset(["relu", "leaky_relu", "abs"])
_SUMS = frozenset(["add", "sub", "where", "masked_fill"])
_SCALES = {"mul": "factor", "add": "shift", "sub": "shift"}

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_MOVEMENT.split(), movement),
    **dict.fromkeys((f"{pool}{d}d" for pool in _POOLS.split() for d in (1, 2, 3)), channelwise),
    **dict.fromkeys((f"max_pool{d}d_with_indices" for d in (1, 2, 3)), channelwise),
    **dict.fromkeys(("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"), channelwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    **dict.fromkeys(
        [
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "prod",
            "var",
            "std",
            "var_mean",
            "std_mean",
            LayerKind.NORM,
            "logsumexp",
            "all",
            "any",
            "argmax",
            "argmin",
        ],
        reduction,
    ),
    **dict.fromkeys(
        ["softmax", "log_softmax", "softmin", "cumsum", "cumprod", "sort", "argsort", "topk", "normalize"], lengthwise
    ),
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "zero": overwritten,
    "group_norm": group_norm,
    "linear": linear,
    "embedding": embedding,
    "matmul": matmul,
    "prelu": prelu,
    "blend": blend,
    "pad": pad,
    "unfold": unfold,
    "fold": fold,
}
