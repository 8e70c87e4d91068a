"""Tables that are both an embedding and the weight of an output layer.

The embedding needs whole copies, the layer needs shares. The norm, or the layers, in front of the reading layer take
the shares instead.
"""

from dataclasses import replace

from ..errors import TransferError
from ..record import NEW, Axis, Origin
from ..trace.facts import Layer, LayerKind
from .axes import unit_axis
from .plan import Plan


def is_tied(plan: Plan, name: str) -> bool:
    """Tell whether a tensor is a table of embeddings and the weight of a layer, and grows."""
    parameters = plan.student.parameters
    layer, axis = plan.student.layers.get(name), parameters.read_axis.get(name)
    if layer is None or axis is None or not layer.options.get("embedding"):
        return False
    labels = parameters.axes[name][axis]
    if labels is None:
        return False
    copied = plan.g[plan.student_roots[labels]]
    return bool(((copied < 0) | (plan.copies[copied] > 1)).any())  # a code's number of copies does not matter


def untie(plan: Plan, name: str, origins: dict[str, Origin]) -> dict[str, Origin]:
    """Return the origins of a tied table, which holds whole copies, and of what takes its shares."""
    student, axis = plan.student, plan.student.parameters.read_axis[name]
    layer = student.layers[name]
    norm = student.layers.get(layer.after_norm or "")
    before = [student.layers[source] for source in sorted(layer.sources) if source in student.layers]
    if norm is not None and "weight" in norm.tensors and _readers(plan, norm.name) == [name]:
        takers = [norm]
    elif layer.linear and before and all(_can_take_shares(plan, other, name) for other in before):
        takers = before
    else:
        raise TransferError(
            f"{name} embeds and is read by a layer: its copies would have to be whole for the one and shared out "
            "for the other. That is exact only if a norm with a weight, or a layer, stands before that layer, and "
            "before no other."
        )
    share = origins[name].axes[axis].share
    made = {name: replace(origins[name], axes=origins[name].axes | {axis: _embedding_axis(plan, name)}, tied=True)}
    for tensor in {taker.tensors[role] for taker in takers for role in taker.tensors.keys() & {"weight", "bias"}}:
        rows = origins[tensor].rows
        made[tensor] = replace(origins[tensor], rows=share if rows is None else rows * share, tied=True)
    return made


def _embedding_axis(plan: Plan, name: str) -> Axis:
    """Return the axis of a tied table as an embedding: the norm before the reader turns what pads it into zero."""
    dim, theirs = plan.student.parameters.read_axis[name], plan.names[name]
    assert theirs is not None
    units, source = plan.student.parameters.axes[name][dim], plan.teacher.parameters.axes[theirs][dim]
    assert units is not None and source is not None
    axis, _ = unit_axis(plan, name, (units, source), dim, False)
    if bool((axis.index == NEW).any()):
        raise TransferError(
            f"{name} embeds and is read by a layer, and grows by units that its teacher lacks: what is fresh for "
            "the one would have to be zero for the other."
        )
    return axis


def _readers(plan: Plan, name: str) -> list[str]:
    """List the layers that read what a layer produces, or what a norm passes on."""
    layers = plan.student.layers.values()
    return [other.name for other in layers if name in other.sources | other.norms_since]


def _can_take_shares(plan: Plan, layer: Layer, reader: str) -> bool:
    """Tell whether the units of `layer` may be scaled for the one layer that reads them."""
    parameters = plan.student.parameters
    if layer.kind != LayerKind.MIX or layer.name == reader or plan.names[layer.name] is None:
        return False
    first = parameters.axes[layer.name][0] is layer.produces and parameters.read_axis[layer.name] != 0
    return first and _readers(plan, layer.name) == [reader]
