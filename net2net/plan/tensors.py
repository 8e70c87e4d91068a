"""Turn a plan, which speaks of units, into a record, which speaks of tensors: the origin of each student tensor."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import TransferError, used_differently
from ..record import NEW, ZERO, Axis, Fill, How, Origin, Record
from ..tensors import find_eps, parametrised, refuse_spectral_norm
from ..trace.facts import Layer, LayerKind, Norm
from .axes import kernel_axis, make_axis, merged_groups, passed_entries, reading_axis, signs, unit_axis
from .new_layers import densify, new_origins
from .plan import Plan
from .scales import scale_means


def make_record(
    plan: Plan, student: nn.Module, state: Tensor, split: str, noise: float = 0.0, depth: str = "identity"
) -> Record:
    """Return the record of a growth: the origin of every tensor of the student, and the `state` that draws shares."""
    if split != "pad":  # random_pad promises no function
        _check_numbers(plan)
    new, origins = new_origins(plan), {}
    for name in plan.student.parameters.tensors:
        origins[name] = new_origin(plan, name, new) if plan.names[name] is None else shared_origin(plan, name)
    _check_modules(plan, student)
    for name, factor in plan.chains.factors.items():
        weight = plan.student.layers[name].tensors["weight"]
        origins[weight] = replace(origins[weight], factor=origins[weight].factor * factor)
    for norm, factor in {norm.name: (norm, factor) for norm, factor in plan.padding_factors.values()}.values():
        for name in _readers_of_bare(plan, norm) if "weight" not in norm.tensors else ():
            origins[name] = replace(origins[name], factor=origins[name].factor * factor**0.5)
        for role, name in norm.tensors.items():
            origins[name] = _beside_padding(origins[name], role, factor)
    origins |= scale_means(plan, origins)
    for name in [name for name, origin in origins.items() if _is_tied(plan, name, origin)]:
        origins |= _untie(plan, name, origins)
    for norm in plan.student.norms:
        other = plan.teacher_norm(norm)
        if norm.offset != (other or norm).offset:
            raise used_differently(norm.tensors["weight"])
        if norm.offset:
            origins[norm.tensors["weight"]] = replace(origins[norm.tensors["weight"]], offset=norm.offset)
    if depth == "dense":
        origins |= densify(plan, origins)
    originals = plan.teacher.parameters.originals, plan.student.parameters.originals
    theirs, mine = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in originals)
    return Record(origins, split, noise, plan.eps, state, (theirs, mine))


def _check_numbers(plan: Plan) -> None:
    """Raise TransferError if the networks multiply units by different numbers and no layer behind can undo that."""
    # Numbers in front of a softmax do not count: the queries make up for them.
    queries = plan.student_roots[plan.queries]
    made = torch.cat(
        [queries[:0], *(plan.student_roots[x.produces] for x in plan.student.mixers if x.produces is not None)]
    )
    for children, parents in plan.student_units.relations.values():  # logits that a constant joined, as in ALiBi
        constants, owners = plan.student_roots[children], plan.student_roots[parents]
        queries = torch.cat([queries, constants[torch.isin(owners, queries) & ~torch.isin(constants, made)]])
    for key, (numbers, units, call) in plan.student.fixed_gains.items():
        other = plan.convert(key)
        theirs = None if other is None else plan.teacher.fixed_gains.get(other)
        if theirs is None or theirs[0] == numbers or bool(torch.isin(plan.student_roots[units], queries).any()):
            continue
        here, there = (", ".join(f"{number:.4g}" for number in each) for each in (numbers, theirs[0]))
        differ = f"{call} takes units that are multiplied by {here} here and by {there} in the teacher"
        advice = "take the teacher's number, or multiply by it directly behind a layer, wherever its result is used"
        raise TransferError(f"{differ}, and no layer behind it can undo that: {advice}.")


def _check_modules(plan: Plan, student: nn.Module) -> None:
    """Raise TransferError if a spectral norm grows, or if a norm needs another eps and keeps none in an attribute."""
    for module_name, module, weight in parametrised(student):
        name = f"{module_name}.{weight}".lstrip(".")
        theirs, tensors = plan.names.get(name), plan.teacher.parameters.tensors
        if theirs and plan.student.parameters.tensors[name].shape != tensors[theirs].shape:
            refuse_spectral_norm(module, weight, name)
    for place, eps in plan.eps.items():
        module, attribute = find_eps(student, place)
        if not hasattr(module, attribute):
            needed = f"needs the eps {eps:.3g}, and has no attribute `eps` that could hold it"
            raise TransferError(f"The norm {place or 'in the network'} {needed}: use a norm of torch.nn.")


def _readers_of_bare(plan: Plan, norm: Norm) -> list[str]:
    """List the layers that read a norm without a weight, and undo its factor; raise TransferError if one cannot."""
    idle = plan.roles.silent | plan.roles.fresh
    readers = [x for x in plan.student.layers.values() if norm.name in x.normed_by and x.name not in idle]
    for layer in readers:
        plain = layer.after_norm == layer.first_norm == norm.name and layer.kind == LayerKind.MIX
        if not plain or plan.names[layer.name] is None:
            why = f"has no weight to undo what copies or padding do to it, and {layer.name} cannot undo it"
            raise TransferError(f"The norm in {norm.module or 'the network'} {why}. A multiple of the width may serve.")
    return [layer.name for layer in readers]


def _beside_padding(origin: Origin, role: str, factor: float) -> Origin:
    """Return the origin of the weight or bias of a norm whose mean square changes by `factor`, because of padding."""
    axes = {}
    for dim, axis in origin.axes.items():
        # The norm turns padding into zero. Any weight serves there, and the bias is zero.
        padding = axis.index.where(axis.index > ZERO, ZERO if role == "bias" else NEW)
        axes[dim] = replace(axis, index=padding, means=())
    return replace(origin, axes=axes, factor=origin.factor * (factor**0.5 if role == "weight" else 1.0))


def shared_origin(plan: Plan, name: str) -> Origin:
    """Return the origin of a tensor that both networks have."""
    theirs = plan.names[name]
    assert theirs is not None
    student, teacher = plan.student.parameters, plan.teacher.parameters
    mine, other = student.tensors[name], teacher.tensors[theirs]
    if mine.dim() != other.dim():
        raise TransferError(f"{name} has {mine.dim()} axes, the teacher's {theirs} has {other.dim()}.")
    if not mine.numel() + other.numel():
        return Origin(How.FRESH)
    if (name in student.values) != (theirs in teacher.values):
        raise used_differently(name)
    factor, rotations = _factor(plan, name, theirs), plan.rotations.get(name, ())
    if name in student.values:
        if name in student.axes or theirs in teacher.axes:
            if mine.shape != other.shape:
                raise TransferError(f"{name} cannot grow: a layer reads it, and another adds it up.")
            return Origin(How.SHARED, theirs)
        if (name in student.summed) != (theirs in teacher.summed):
            raise used_differently(name)
        axis, rows = unit_axis(plan, name, (student.values[name], teacher.values[theirs]), 0, name in student.summed)
        return Origin(How.SHARED, theirs, {0: axis}, flat=True, factor=factor, rows=rows, mixed=rotations)
    axes, rows = {}, None
    for dim in range(mine.dim()):
        units, source = student.axis_labels(name, dim), teacher.axis_labels(theirs, dim)
        if units is not None and source is not None:
            axes[dim], scaled = unit_axis(plan, name, (units, source), dim, student.read_axis.get(name) == dim)
            rows = rows if scaled is None else scaled
        elif units is not None or source is not None:
            raise used_differently(f"axis {dim} of {name}")
        elif (axis := _other_axis(plan, name, theirs, dim)) is not None:
            axes[dim] = axis
    merged = merged_groups(plan, theirs)
    return Origin(How.SHARED, theirs, axes, factor=factor, rows=rows, merged=merged, mixed=rotations)


def _other_axis(plan: Plan, name: str, theirs: str, dim: int) -> Axis | None:
    """Return an axis that carries no units: one along a larger kernel, or None for an axis that keeps its size."""
    layer, counterpart = plan.student.layers.get(name), plan.teacher.layers.get(theirs)
    mine, other = plan.student.parameters.tensors[name].shape, plan.teacher.parameters.tensors[theirs].shape
    if dim > 1 and layer is not None and counterpart is not None and "stride" in layer.options:
        return kernel_axis(layer, counterpart, (mine[dim], other[dim]), dim - 2)
    if mine[dim] == other[dim]:
        return None
    why = f"axis {dim} does not carry units that the forward pass can follow: such axes keep their size"
    if name not in plan.student.parameters.used:
        why = "the forward pass on this example shows no use of it: give an example that does"
    raise TransferError(f"{name} has shape {tuple(mine)}, the teacher's {tuple(other)}, and {why}.")


def _factor(plan: Plan, name: str, theirs: str) -> float:
    """Return the factor of a whole tensor: the networks may multiply a layer's input or result by different numbers."""
    layer, counterpart = plan.student.layers.get(name), plan.teacher.layers.get(theirs)
    factor = 1.0
    if layer is not None and counterpart is not None and layer.kind == LayerKind.MIX:
        factor = counterpart.gain / plan.gains[layer.name] * _slope_factor(plan, layer)
    return factor * _scale_factor(plan, name, theirs)


def _scale_factor(plan: Plan, name: str, theirs: str) -> float:
    """Return the factor of a layer whose result the networks multiply by different numbers (see `SeenAs`)."""
    mine, other = (
        next((each for each in trace.seen_as.scale_absorbed if t in trace.layers[each].tensors.values()), None)
        for trace, t in ((plan.student, name), (plan.teacher, theirs))
    )
    if mine is None or other is None:
        return 1.0
    return next(iter(plan.teacher.multipliers[other])) / next(iter(plan.student.multipliers[mine]))


def _slope_factor(plan: Plan, layer: Layer) -> float:
    """Return the factor that undoes what sign pairs and new gates multiply a layer's input by (see `roles`)."""
    bends = layer.passage.bends if layer.passage.bends and layer.passage.bends[0][0] in plan.sign_pairs else ()
    factor = 1.0
    for _, slope in (*bends, *(gate for gate in layer.passage.gates if gate[0] in plan.roles.silent)):
        factor /= slope
    return factor


def new_origin(plan: Plan, name: str, new: dict[str, Origin]) -> Origin:
    """Return the origin of a tensor that the teacher lacks; `new` holds what `new_origins` returned."""
    layer = plan.student.layers.get(name)
    if name in new:
        if layer is not None and layer.kind == LayerKind.SCALE and layer.reads is not None:  # a depthwise filter
            return replace(new[name], rows=_row_signs(plan, name, layer.reads))
        if layer is None or layer.kind != LayerKind.MIX or name not in plan.roles.identity:
            return new[name]
        assert layer.produces is not None and layer.reads is not None
        _, groups = plan.student.parameters.inner.get(layer.name, (None, 1))
        dim = plan.student.parameters.read_axis[layer.name]
        producing = make_axis(passed_entries(plan, layer.produces), False)
        reading = reading_axis(plan, passed_entries(plan, layer.reads), plan.student_roots[layer.reads], groups)
        state = {"factor": _slope_factor(plan, layer), "rows": _row_signs(plan, layer.name, layer.produces)}
        return Origin(How.IDENTITY, axes={1 - dim: producing, dim: reading}, fill=Fill.PASS, **state)
    for each in plan.student.layers.values():  # a bias that only the student has, on a layer of both
        if name in (each.tensors.get("bias"), each.tensors.get("shift")) and each.name not in plan.roles.fresh:
            return Origin(How.IDENTITY, fill=Fill.ZERO)
    return Origin(How.FRESH)


def _row_signs(plan: Plan, name: str, units: Tensor) -> Tensor | None:
    """Return the signs that a new layer gives its units if they pass the activation behind it in sign pairs."""
    for activations in plan.sign_pairs.values():
        for k, (carrier, _) in enumerate(activations):
            if carrier == name:
                return signs(plan.patterns[plan.student_roots[units]], k)
    return None


def _is_tied(plan: Plan, name: str, origin: Origin) -> bool:
    """Tell whether a tensor changes and is both a table of embeddings and the weight of a layer."""
    parameters = plan.student.parameters
    layer, axis = plan.student.layers.get(name), parameters.read_axis.get(name)
    if layer is None or axis is None or not layer.options.get("embedding"):
        return False
    labels = parameters.axes[name][axis]
    if labels is None:
        return False
    copied = plan.g[plan.student_roots[labels]]
    return origin.factor != 1.0 or bool(((copied < 0) | (plan.copies[copied] > 1)).any())  # codes have no copies


def _untie(plan: Plan, name: str, origins: dict[str, Origin]) -> dict[str, Origin]:
    """Return the origins of a tied table and of the tensors that take its shares."""
    # As an embedding, the table needs whole copies. As a layer, it needs shares. So the table holds whole copies, and
    # the norm or the layers in front of the reading layer are multiplied by the shares, and by what makes up for a
    # number in front of that layer, or behind the embedding.
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
            f"{name} is a table of embeddings and the weight of a layer. The table needs whole copies, and the weight "
            "needs shares of them. That is exact only if a norm with a weight, or another layer, stands before that "
            "layer, and before no other. A student that has the two apart needs nothing of that."
        )
    units, source = student.parameters.axes[name][axis], plan.teacher.parameters.axes[plan.names[name] or ""][axis]
    assert units is not None and source is not None
    # This is the axis of the table as an embedding. The norm before the reader turns padding into zero.
    whole, _ = unit_axis(plan, name, (units, source), axis, False)
    if bool((whole.index == NEW).any()):
        raise TransferError(
            f"{name} is a table of embeddings and the weight of a layer, and it grows by units that its teacher lacks: "
            "the table would hold fresh numbers where the weight has to be zero."
        )
    share = origins[name].axes[axis].share
    behind, theirs = _scale_factor(plan, name, plan.names[name] or ""), plan.teacher.layers[plan.names[name] or ""]
    embedded = behind * theirs.options["embedding"] / layer.options["embedding"]
    before = origins[name].factor / embedded / (1.0 if name in student.multiplied else behind)
    made = {name: replace(origins[name], axes=origins[name].axes | {axis: whole}, tied=True, factor=embedded)}
    for tensor in {taker.tensors[role] for taker in takers for role in taker.tensors.keys() & {"weight", "bias"}}:
        rows = origins[tensor].rows
        made[tensor] = replace(origins[tensor], rows=share if rows is None else rows * share, tied=True)
        made[tensor] = replace(made[tensor], factor=made[tensor].factor * before)
    return made


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
