"""Rules for norms, which take statistics of each unit (batch norm) or across units (layer norm, group norm)."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..activations import ALL
from ..facts import NO_NORM, Call, Labels, Layer, LayerKind, Norm, NormKind, Statistic, Step, View
from ..graph import Trace
from ..units import spread
from .by_hand import take_eps
from .registry import first_labels, rule


@rule("batch_norm", "instance_norm")
def batch_norm(trace: Trace, call: Call) -> None:
    """Statistics and affine parameters have one entry for each unit; the units go on as they are."""
    labels = first_labels(trace, call)
    units = trace.units.units_along(labels.units, 1, f"{call} has one entry for them")
    roles = {"mean": (1, "running_mean"), "var": (2, "running_var"), "weight": (3, "weight"), "bias": (4, "bias")}
    tensors = _parameters(trace, call, roles, units)
    key = None if tensors else trace.units.key("norm", call.module)
    name = str(key) if key else next(iter(tensors.values())).rpartition(".")[0]
    options = {"eps": call.arg(7, "eps", 1e-5), "module": call.module}
    trace.add(Layer(LayerKind.NORM, name, tensors, units, labels.sources, labels.norms_since, options, key=key))
    passage = replace(labels.passage, rest=None)
    units = spread(units, 1, call.out.shape)
    trace.label(call.out, Labels.of(units, labels, norms=[name], passage=passage, range=ALL))


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, call: Call) -> None:
    """The norm must see all units equally often, or padding that it undoes: means (layer norm) or zeros (RMS norm)."""
    labels = first_labels(trace, call)
    is_rms = call.plain == "rms_norm"
    units, tensors, offset = labels.units, {}, 0.0
    for role, tensor in (("weight", call.arg(2, "weight")), ("bias", None if is_rms else call.arg(3, "bias"))):
        if tensor is not None and (entries := trace.labels(tensor)) is not None:
            units = trace.units.combine(units, entries.units.broadcast_to(units.shape), call)
            if (name := trace.parameters.name_of(tensor)) is not None:
                tensors[role] = name
            elif role == "weight" and (view := _shifted_whole(trace, tensor)):
                tensors[role], offset = view.name, view.offset
    eps = call.arg(3 if is_rms else 4, "eps", None if is_rms else 1e-5)
    if eps is None:
        eps = torch.finfo(call.args[0].dtype).eps
    shape = call.arg(1, "normalized_shape")
    size = math.prod(shape)
    lead = trace.units.drop_repeats(units).shape[: units.dim() - len(shape)]
    rows = units[tuple(slice(0, n) for n in lead)].reshape(-1, size)
    # If the norm takes several positions together, a unit that holds the mean of each position is not centred to zero.
    once = size == max(shape) and len(torch.unique(trace.units.find(rows[0]))) == size
    kind = NormKind.RMS if is_rms else NormKind.LAYER
    norm = Norm(trace.units.key("norm", call.module), kind, rows, tensors, eps, call.module, offset=offset)
    _record(trace, call, replace(labels, units=units), norm, once)


@rule("group_norm")
def group_norm(trace: Trace, call: Call) -> None:
    """Layer norm inside every group of channels."""
    labels = first_labels(trace, call)
    channels = trace.units.units_along(labels.units, 1, f"{call} has one entry for them")
    tensors = _parameters(trace, call, {"weight": (2, "weight"), "bias": (3, "bias")}, channels)
    groups = call.arg(1, "num_groups")
    rows = channels.reshape(groups, -1)
    if groups > 1:
        key = trace.units.key("groups", call.module)
        trace.units.relate(key, rows, trace.units.fresh(groups, key)[:, None].expand_as(rows))
    key, eps = trace.units.key("norm", call.module), call.arg(4, "eps", 1e-5)
    norm = Norm(key, NormKind.LAYER, rows, tensors, eps, call.module)
    _record(trace, call, labels, norm, once=call.args[0][0].numel() == rows.numel())


def _shifted_whole(trace: Trace, tensor: Tensor) -> View | None:
    """Return a whole parameter to which a number was added, as in the weight 1 + w."""
    view = trace.parameters.view(tensor)
    if view is None or not view.offset or view.gain != 1.0:
        return None
    return view if tensor.numel() == trace.parameters.tensors[view.name].numel() else None


def _parameters(trace: Trace, call: Call, roles: dict[str, tuple[int, str]], units: Tensor) -> dict[str, str]:
    """Return the names of the tensors with one entry for each of `units`; `roles` says which arguments they are."""
    given = {role: trace.parameters.name_of(call.arg(*place)) for role, place in roles.items()}
    tensors = {role: name for role, name in given.items() if name is not None}
    for name in tensors.values():
        trace.parameters.axis(name, 0, units)
    return tensors


def _record(trace: Trace, call: Call, labels: Labels, norm: Norm, once: bool) -> None:
    """Record a norm across units, and label its result; `once` says that each row holds each of its units once."""
    tensors, key = norm.tensors, norm.key
    name = next(iter(tensors.values())).rpartition(".")[0] if tensors else str(key)
    is_rms = norm.kind == NormKind.RMS
    padded = not labels.lifted_by if is_rms else labels.linear and once
    first = NO_NORM if labels.linear else labels.first_norm
    place = take_eps(trace, call, norm.eps)
    known = {"first_norm": first, "eps_at": place, "bent_by": labels.lifted_by if is_rms else labels.bent_by}
    trace.norms.append(replace(norm, padded=padded, name=name, **known))
    known = (labels.sources, labels.norms_since, {"across": True})
    trace.norm_calls.append((name, labels.ways))
    state = {"normed_by": labels.normed_by, "key": None if tensors else key}
    trace.add(Layer(LayerKind.NORM, name, tensors, norm.units.reshape(-1), *known, **state))
    state = {"after_norm": name, "first_norm": name, "normed_by": frozenset({name})}
    if not tensors:  # a weight may follow
        state["statistic"] = Statistic(call.args[0], Step.NORMED, key)
    trace.label(call.out, Labels.of(labels.units, labels, norms=[name], **state))
