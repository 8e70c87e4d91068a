"""Rules for layers, whose weights read units and produce new ones, and for products of two activations."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...tensors import merge_groups
from ..activations import ALL, Passage
from ..facts import Call, Contraction, Key, Labels, Layer, LayerKind, Weight
from ..graph import Trace
from ..units import spread
from .registry import CannotFollow, carries_no_units, rule, unknown


@dataclass(frozen=True)
class Product:
    """How a layer's weight reads an activation."""

    x: Tensor  # the activation
    dim: int  # its axis that the weight reads; in the result, this axis holds what the weight produces
    weight: Tensor
    bias: Tensor | None = None
    reads: int = 1  # the axis of the weight that reads
    produces: int = 0  # the axis that produces
    groups: int = 1
    options: dict[str, Any] = field(default_factory=lambda: {"groups": 1})


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(trace: Trace, call: Call) -> None:
    """The output axis produces units, the input axis reads them; in groups each group reads its own."""
    x, weight = call.args[0], call.arg(1, "weight")
    transposed = "transpose" in call.name
    positions = (3, 4, 6, 7) if transposed else (3, 4, 6, 5)
    stride, padding, groups, dilation = (
        call.arg(position, name, 0 if name == "padding" else 1)
        for position, name in zip(positions, ("stride", "padding", "groups", "dilation"), strict=True)
    )
    owner, labels, spatial = trace.model.get_submodule(call.module), trace.labels(x), weight.dim() - 2
    outer = () if labels is None else labels.padded_by
    if getattr(owner, "padding_mode", "zeros") != "zeros":  # another function has padded
        padding, outer = owner.padding, ()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "transposed": transposed, "groups": groups}
    options["outer"] = tuple(outer[k] if k < len(outer) else (0, 0) for k in reversed(range(spatial)))
    reads, produces = (0, 1) if transposed else (1, 0)
    dim = x.dim() - weight.dim() + 1
    apply_layer(trace, call, Product(x, dim, weight, call.arg(2, "bias"), reads, produces, groups, options))


@rule("linear")
def linear(trace: Trace, call: Call) -> None:
    """The output axis produces units, the input axis reads them."""
    apply_layer(trace, call, Product(call.args[0], -1, call.arg(1, "weight"), call.arg(2, "bias")))


def apply_layer(trace: Trace, call: Call, product: Product) -> None:
    """Record a layer, and label its result with the units that it produces."""
    weight = trace.parameters.weight(product.weight)
    if weight is None or min(weight.axes[product.reads][0], weight.axes[product.produces][0]) < 0:
        raise CannotFollow(f"the weight of {call} is not a parameter of the network")
    name, labels = weight.name, trace.labels(product.x)
    trace.products += call.out.numel() * product.weight[0].numel()
    reads = beside = None
    if labels is not None:
        reads, beside = _read(trace, call, product, labels.units, name)
    shape, times = product.weight.shape, trace.seen_as.merged_groups.get(name, 1)
    if times > 1:
        if trace.parameters.tensors[name] is product.weight:
            trace.parameters.tensors[name] = merge_groups(product.weight, product.groups, times)
        shape = trace.parameters.tensors[name].shape
    read_axis, read_entries = weight.axes[product.reads]
    produced_axis, produced_entries = weight.axes[product.produces]
    split = Key(name, "groups") in trace.seen_as.as_grouped
    if product.groups > times or Key(name) in trace.seen_as.as_grouped or split:
        if reads is None or labels is None:
            raise CannotFollow(f"{name} has groups, and it is not known which units they read")
        if shape[0] == product.groups and shape[1] == 1 and not split:
            if produced_entries is None or len(produced_entries) >= len(reads):
                return _apply_depthwise(trace, call, product, name, reads)
            # The weight is one filter, which is repeated for all units.
            return trace.label(call.out, Labels.of(spread(reads, product.dim, call.out.shape), labels))
        produced = _produce_in_groups(trace, product, name, reads, times)
    else:
        if reads is not None:
            trace.parameters.axis(name, read_axis, reads, read_entries)
        produced = trace.parameters.axis(name, produced_axis, None, produced_entries)
    trace.parameters.read_axis[name] = read_axis
    if product.bias is not None:
        if (part := trace.parameters.weight(product.bias)) is not None:
            axis, entries = part.axes[0]
            trace.parameters.axis(part.name, axis, produced, entries)
        elif (entries := trace.labels(product.bias)) is not None:
            trace.units.unite(entries.units.reshape(-1), produced)
    _record_layer(trace, product, weight, (reads, produced))
    units = spread(produced, product.dim, call.out.shape)
    if beside is not None:
        units = trace.units.combine(beside.expand(units.shape), units, call)
    state = {"linear": beside is None, "passage": Passage(carrier=name, rest=0.0), "range": ALL, "result_of": name}
    state["lifted_by"] = "" if beside is None or product.bias is None else f"the bias of {name}"
    trace.label(call.out, Labels(units, frozenset({name}), **state))


def _read(trace: Trace, call: Call, product: Product, units: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the units that a weight reads along one axis, and those of other axes beside them, which it keeps."""
    # A layer that mixes positions, as in a mixer, treats every unit alike. Its result belongs to the unit, and to what
    # the layer produces; the next such layer reads what the first one produced.
    units, dim = trace.units.drop_repeats(units), product.dim % units.dim()
    others = [d for d, size in enumerate(units.shape) if size > 1 and d != dim]
    alike = {"stride": 1, "padding": 0, "transposed": False, "groups": 1}
    shifts = product.weight.shape[2:].numel() > 1 or any(
        value not in (alike.get(key, value), (alike.get(key, value),)) for key, value in product.options.items()
    )
    if others and not shifts and product.x.shape[dim] > 1:
        if units.shape[dim] == 1:
            positions = trace.units.fresh(1, trace.units.key("positions", call.module))
            return positions.expand(product.x.shape[dim]), units
        for key in [key for key in trace.units.relations if key.part in ("left", "right")]:
            mine, beside = (trace.units.owners(replace(key, part=part), units) for part in (key.part, _OTHER[key.part]))
            if mine is not None and beside is not None:
                mine, beside = trace.units.drop_repeats(mine), trace.units.drop_repeats(beside)
                if mine.numel() == mine.shape[dim] and beside.shape[dim] == 1:
                    return mine.reshape(-1), beside
    return trace.units.units_along(units.expand(product.x.shape), dim, f"{name} reads them with one weight"), None


_OTHER = {"left": "right", "right": "left"}


def _tensor_names(trace: Trace, product: Product, weight: str) -> dict[str, str]:
    """Return the names of a layer's weight and bias by their roles."""
    bias = trace.parameters.name_of(product.bias)
    return {"weight": weight} | ({} if bias is None else {"bias": bias})


def _record_layer(trace: Trace, product: Product, weight: Weight, units: tuple[Tensor | None, Tensor]) -> None:
    """Record a layer; `units` are those that it reads and produces in this call."""
    name, labels = weight.name, trace.labels(product.x)
    reads, produced = units
    if name not in trace.parameters.inner:  # the call may use a part of the weight
        axes = trace.parameters.axes[name]
        reads, produced = axes[weight.axes[product.reads][0]], axes[weight.axes[product.produces][0]]
    read = labels or Labels(units[1])  # of constants nothing is known
    gain = weight.gain if labels is None else weight.gain * labels.gain
    state = (gain, read.linear, read.after_norm, read.first_norm, read.passage, read.range, read.normed_by)
    tensors = _tensor_names(trace, product, name)
    known = (read.sources, read.norms_since, product.options)
    trace.add(Layer(LayerKind.MIX, name, tensors, reads, *known, produced, *state))


def _apply_depthwise(trace: Trace, call: Call, product: Product, name: str, reads: Tensor) -> None:
    """Record a layer with one filter for each unit, and label its result with the units that it reads."""
    labels = trace.labels(product.x)
    assert labels is not None
    tensors = _tensor_names(trace, product, name)
    for tensor in tensors.values():
        trace.parameters.axis(tensor, 0, reads)
    roles = {"taps": name} | ({"shift": tensors["bias"]} if "bias" in tensors else {})
    known = (labels.sources, labels.norms_since, product.options)
    trace.add(Layer(LayerKind.SCALE, name, roles, reads, *known, range=labels.range))
    passage = replace(labels.passage, carrier=name, rest=None)
    units = spread(reads, product.dim, call.out.shape)
    trace.label(call.out, Labels.of(units, labels, norms=[name], passage=passage, range=ALL))


def _produce_in_groups(trace: Trace, product: Product, name: str, reads: Tensor, times: int) -> Tensor:
    """Return the units that a grouped layer produces, and relate all units that a group reads or produces to it."""
    # `times` neighbouring groups count as one. The last one takes what is left.
    groups = product.groups
    count = -(-groups // times)
    if product.reads == 0:  # transposed
        trace.parameters.axis(name, 0, reads)
        produced = trace.parameters.inside(name, count)
        produced = produced[: len(produced) * groups // (count * times)]
    else:
        missing = (count * times - groups) * len(reads) // groups  # the places of groups that do not exist
        places = trace.units.fresh(missing, distinct=False)
        trace.parameters.inside(name, count, torch.cat([reads, places]))
        produced = trace.parameters.axis(name, 0)
    key = Key(name, "groups")
    owners = trace.units.families[key] if key in trace.units.families else trace.units.fresh(count, key)
    owned = [owners[torch.arange(len(units)) * groups // len(units) // times] for units in (reads, produced)]
    trace.units.relate(key, torch.cat([reads, produced]), torch.cat(owned))
    return produced


@rule("zero")
def overwrite(trace: Trace, call: Call) -> None:
    """A copy of a parameter that is set to zero is the same for all units."""
    if trace.is_activation(call.args[0]):
        unknown(trace, call)


@rule("embedding")
def embedding(trace: Trace, call: Call) -> None:
    """Every row of the table holds the same units; the length of the table is fixed."""
    found = trace.parameters.weight(call.arg(1, "weight"))
    if found is None or found.axes[0][0] != 0:
        raise CannotFollow(f"the table of {call} is not a parameter of the network")
    if not carries_no_units(trace, call.args[0]):
        raise CannotFollow(f"{call} is told by units which rows to take")
    if call.arg(3, "max_norm") is not None:
        raise CannotFollow(f"{call} shortens its rows to the norm max_norm, which copies change")
    name, nothing = found.name, frozenset()
    produced = trace.parameters.axis(name, 1)
    trace.add(Layer(LayerKind.MIX, name, {"weight": name}, None, nothing, nothing, {"embedding": found.gain}, produced))
    units = spread(produced, -1, call.out.shape)
    trace.label(call.out, Labels(units, frozenset({name}), linear=True, result_of=name))


@rule("matmul")
def matmul(trace: Trace, call: Call) -> None:
    """A layer, if one factor is a parameter; else a contraction of two activations."""
    a, b = call.args[:2]
    if _is_weight(trace, b) and not _is_contracted(trace, a):
        return apply_layer(trace, call, Product(a, -1, b, reads=0, produces=1))
    if _is_weight(trace, a) and b.dim() > 1:
        return apply_layer(trace, call, Product(b, -2, a))
    if _is_stack(trace, a, b):
        return apply_layer(trace, call, Product(a, -1, b, reads=b.dim() - 2, produces=b.dim() - 1))
    if not (a.dim() > 1 and b.dim() > 1) or not (trace.follows(a) or trace.follows(b)):
        raise CannotFollow(f"{call} multiplies vectors")
    left, right = trace.labels(a), trace.labels(b)
    if left is None or right is None:
        labels, dim = (left, -1) if left is not None else (right, -2)
        assert labels is not None
        # A constant matrix has one size in both networks.
        units = trace.units.tie_along(labels.units, [labels.units.dim() + dim], f"{call} multiplies it with a constant")
        units = units.broadcast_to((*call.out.shape[:-2], *units.shape[-2:])).expand(call.out.shape)
        return trace.label(call.out, Labels.of(units, labels))
    _contract(trace, call, left, right)


@rule("grouped_mm")
def grouped_product(trace: Trace, call: Call) -> None:
    """Each group of rows is multiplied by one matrix of a stack. The numbers that end the groups are no units."""
    x, weight, ends = call.args[0], call.args[1], call.arg(2, "offs")
    if x.dim() != 2 or weight.dim() != 3 or ends is None or not carries_no_units(trace, ends):
        raise CannotFollow(f"{call} multiplies something else than rows by a stack of matrices")
    apply_layer(trace, call, Product(x, -1, weight, reads=1, produces=2))


def _is_weight(trace: Trace, factor: Tensor) -> bool:
    found = None if factor.dim() != 2 or trace.is_activation(factor) else trace.parameters.weight(factor)
    return found is not None and -1 not in dict(found.axes)  # a vector that was made a matrix is a table


def _is_stack(trace: Trace, x: Tensor, weight: Tensor) -> bool:
    """Tell whether a stack of matrices, one for each position, multiplies the same units at all positions."""
    found = None if trace.is_activation(weight) else trace.parameters.weight(weight)
    if found is None or weight.dim() < 3 or weight.dim() != x.dim() or not trace.is_activation(x):
        return False
    labels = trace.labels(x)
    return labels is not None and max(trace.units.drop_repeats(labels.units).shape[:-1]) == 1


def _is_contracted(trace: Trace, x: Tensor) -> bool:
    """Tell whether `x` holds queries or keys of a contraction: a matrix that multiplies it then holds some, too."""
    labels = trace.labels(x)
    known = [side for each in trace.contractions for side in (each.left, each.right)]
    if labels is None or not known:
        return False
    units = torch.unique(trace.units.drop_repeats(labels.units))
    return bool(torch.isin(trace.units.find(units), trace.units.find(torch.cat(known))).all())


def _contract(trace: Trace, call: Call, left: Labels, right: Labels) -> None:
    """Sum over the last axis of `left` and the last but one of `right`: positions, or units that meet in pairs."""
    shape, gain = call.out.shape, left.gain * right.gain
    one, two = trace.units.drop_repeats(left.units), trace.units.drop_repeats(right.units)
    sides = torch.unique(one), torch.unique(two)  # before queries and keys are one unit
    key = trace.units.key("contraction", call.module)
    as_grouped = key in trace.seen_as.as_grouped
    sums_units = [one.shape[-1] > 1 or as_grouped, two.shape[-2] > 1 or as_grouped]
    why = f"{call} sums products over these units"
    one = trace.units.tie_along(one, [one.dim() - 1], why)
    two = trace.units.tie_along(two, [two.dim() - 2], why)
    units = trace.units.combine(one.expand(shape), two.expand(shape), call, contraction=any(sums_units))
    if all(sums_units):
        trace.contractions.append(Contraction(key, *sides))
    if any(sums_units):
        met = trace.units.drop_repeats(units)
        _, numbers = torch.unique(trace.units.find(met), return_inverse=True)
        units = trace.units.fresh(int(numbers.max()) + 1)[numbers]  # heads: labels of their own, of neither factor
        trace.units.unite(units, met, contraction=True)
    trace.label(call.out, Labels.of(units.expand(shape), left, right, gain=gain))
