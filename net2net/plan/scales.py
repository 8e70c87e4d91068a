"""Layer scales between what produces units and a layer norm that padding holds the mean of."""

from dataclasses import replace

import torch

from ..errors import TransferError, used_differently
from ..record import Origin, Scaled
from .plan import Plan


def scale_means(plan: Plan, origins: dict[str, Origin]) -> dict[str, Origin]:
    """Return the origins whose means are those of products with a layer scale, and of the scales, which are one there.

    Raises:
        TransferError: norms see what a layer produces both with a scale and without.
    """
    changed: dict[str, Origin] = {}
    for source, scales in plan.student.scales.items():
        layer = plan.student.layers.get(source)
        tensors = [source] if layer is None else layer.tensors.values()
        padded = [name for name in tensors if name in origins and _holds_means(origins[name])]
        seen = [scale for scale in scales if padded and plan.names[scale] and _is_seen(plan, source, scale)]
        for name in (*padded, *seen) if seen else ():
            by = [name] if name in seen else seen
            changed[name] = replace(origins[name], scaled=tuple(_scaled(plan, name, origins[name], one) for one in by))
    return changed


def _holds_means(origin: Origin) -> bool:
    return any(axis.means for axis in origin.axes.values())


def _is_seen(plan: Plan, source: str, scale: str) -> bool:
    """Tell whether norms across units see what a layer produces times a scale; refuse norms that see it without."""
    norms = [norm for norm in plan.student.norm_calls if source in norm.sources]
    without = [norm for norm in norms if scale not in norm.norms_since]
    if without and len(without) < len(norms):
        raise TransferError(
            f"{source} cannot grow in this way: {without[0].name} takes the mean of its units, and a norm takes "
            f"that of their products with {scale}: a new unit can be one of them only. A multiple of the width serves."
        )
    return bool(norms) and not without


def _scaled(plan: Plan, name: str, origin: Origin, scale: str) -> Scaled:
    """Return which entry of a scale multiplies each of the teacher's entries on the axis that holds means."""
    theirs, factor, parameters = plan.names[name], plan.names[scale], plan.teacher.parameters
    assert theirs is not None and factor is not None
    dim = next(dim for dim, axis in origin.axes.items() if axis.means)
    labels = parameters.values.get(theirs, parameters.axis_labels(theirs, dim))
    place = {root: k for k, root in enumerate(plan.teacher_roots[parameters.values[factor]].tolist())}
    if labels is None or not place.keys() >= set(plan.teacher_roots[labels].tolist()):
        raise used_differently(scale)
    return Scaled(factor, torch.tensor([place[root] for root in plan.teacher_roots[labels].tolist()]))
