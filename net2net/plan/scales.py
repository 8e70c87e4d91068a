"""Layer scales between what produces units and a layer norm that padding holds the mean of."""

from dataclasses import replace

import torch

from ..errors import TransferError, used_differently
from ..record import Origin, Scaled
from .plan import Plan


def scale_means(plan: Plan, origins: dict[str, Origin]) -> dict[str, Origin]:
    """Return the origins whose means are those of products with a layer scale, and of the scales, which are one there.

    Raises:
        TransferError: norms see what a layer produces in several ways: with a scale and without, or with one twice.
    """
    changed: dict[str, Origin] = {}
    sources = {source for _, ways in plan.student.norm_calls for source, path in ways if path}
    for source in sorted(sources):
        layer = plan.student.layers.get(source)
        tensors = [source] if layer is None else layer.tensors.values()
        padded = [name for name in tensors if name in origins and _holds_means(origins[name])]
        seen = [scale for scale in _find_path(plan, source) if plan.names[scale]] if padded else []
        for name in (*padded, *seen) if seen else ():
            by = [name] if name in seen else seen
            changed[name] = replace(origins[name], scaled=tuple(_scaled(plan, name, origins[name], one) for one in by))
    return changed


def _holds_means(origin: Origin) -> bool:
    return any(axis.means for axis in origin.axes.values())


def _find_path(plan: Plan, source: str) -> tuple[str, ...]:
    """Return the scales between a layer and the norms that see it; refuse a layer that they see in several ways."""
    paths = {path: norm for norm, ways in plan.student.norm_calls for name, path in ways if name == source}
    for path, norm in paths.items():
        if len(paths) > 1 or len(set(path)) < len(path):
            how = [f"times {' times '.join(each)}" if each else "without a scale" for each in sorted(paths)]
            raise TransferError(
                f"{source} cannot grow in this way: norms such as {norm} take the mean of its units "
                f"{' and '.join(how)}, and a new unit can be one mean only. A multiple of the width serves."
            )
    return next(iter(paths))


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
