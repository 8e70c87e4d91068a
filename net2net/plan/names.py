"""Find the teacher's counterpart of each student tensor, by its name.

The names are compared as they are, or as the caller renames them. New layers renumber the layers behind them in a
container (vgg11 -> vgg13 -> vgg16): the layers of such a container are paired in order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from ..errors import TransferError
from ..trace.facts import Key, Layer, LayerKind
from ..trace.graph import Trace

Names = dict[str, str | None]  # the teacher's name of every student tensor; None where it has no such tensor
Rename = Mapping[str, str] | Callable[[str], str | None] | None
Children = list[tuple[str, nn.Module]]
Kind = tuple[type, tuple[tuple[str, torch.Size], ...]]  # the class of a layer, and the shapes of its parameters


class Unpaired(TransferError):
    """A layer of the teacher has no counterpart by name."""


def teacher_names(student: Trace, teacher: Trace, rename: Rename) -> Names:
    """Return the teacher's name of every student tensor, and of norms without tensors; None where it has none."""
    # `rename` is a function, or a dict of prefixes. A prefix ends at a dot; the longest one that fits is used.
    convert = rename if callable(rename) else _prefix_converter(rename or {})
    names = {name: convert(name) for name in student.parameters.tensors}
    found = {name: teacher.parameters.first_names.get(theirs) if theirs else None for name, theirs in names.items()}
    if lost := set(teacher.parameters.tensors) - set(found.values()):
        first = next(name for name in teacher.parameters.tensors if name in lost)
        makes = " If its forward pass makes that, run the student once before." * (first in teacher.parameters.buffers)
        raise Unpaired(
            f"The student has no counterpart of the teacher's {first} ({len(lost)} tensors in all): a student keeps "
            "every layer of its teacher. If it goes by another name, pass rename={'student.prefix': 'teacher.prefix'}."
            f"{makes}"
        )
    for layer in student.layers.values():
        if layer.key is not None:
            theirs = str(replace(layer.key, where=convert(layer.key.where) or ""))
            found[layer.name] = theirs if theirs in teacher.layers else None
    return found


def _prefix_converter(rename: Mapping[str, str]) -> Callable[[str], str | None]:
    """Return the function that converts a student's name by its longest prefix in `rename`."""

    def convert(name: str) -> str | None:
        prefix = name
        while prefix and prefix not in rename:
            prefix = prefix.rpartition(".")[0]
        if not prefix:
            return name
        return rename[prefix] + name[len(prefix) :] if rename[prefix] else None

    return convert


def key_converter(names: Names, moved: Names | None = None) -> Callable[[Key], Key | None]:
    """Return the function that converts a student's key to the teacher's; None where a tensor has no counterpart.

    `moved` holds names of tensors that have changed their module. They are converted by it, but pair no modules.
    """
    modules: dict[str, str] = {}
    for mine, theirs in names.items():
        while mine and theirs is not None:
            mine, _, a = mine.rpartition(".")
            theirs, _, b = theirs.rpartition(".")
            if a != b and modules.get(mine, theirs) != theirs:
                break
            modules.setdefault(mine, theirs)
    names = names | (moved or {})

    def convert(key: Key) -> Key | None:
        if key.inside is not None:
            inner, outer = convert(replace(key, inside=None)), convert(key.inside)
            return None if inner is None or outer is None else replace(inner, inside=outer)
        if key.where in names:
            theirs = names[key.where]
            return None if theirs is None else replace(key, where=theirs)
        return replace(key, where=modules.get(key.where, key.where))

    return convert


def teacher_layer(layer: Layer, names: Names) -> str:
    """Return the name that a layer of the student would have among the teacher's layers."""
    if layer.kind == LayerKind.OUTPUT:
        return layer.name
    for name in layer.tensors.values():
        if (theirs := names[name]) is not None:
            return theirs if layer.name in layer.tensors.values() else theirs.rpartition(".")[0]
    return names.get(layer.name) or layer.name


def candidates(teacher: nn.Module, student: nn.Module) -> list[dict[str, str]]:
    """List the ways to pair the student's layers with the teacher's, as prefixes to rename; "" marks new layers."""
    # The first way leaves all names as they are. The others align the containers of numbered layers that have grown:
    # in order, every layer of the teacher gets a counterpart of its own type that is at least as large. One way takes
    # the earliest such layers, the other those of the closest sizes. Only the forward pass shows which is right.
    found: list[dict[str, str]] = [{}]
    for closest in (False, True):
        names: dict[str, str] = {}
        _pair_children(teacher, student, ("", ""), names, closest)
        names = {mine: theirs for mine, theirs in names.items() if mine != theirs}
        if names not in found:
            found.append(names)
    return found


def _pair_children(
    teacher: nn.Module, student: nn.Module, paths: tuple[str, str], found: dict[str, str], closest: bool
) -> None:
    """Pair the children of two paired modules, whose `paths` are (teacher's, student's), and write that to `found`."""
    theirs, mine = paths
    a, b = list(teacher.named_children()), list(student.named_children())
    numbered = isinstance(student, (nn.Sequential, nn.ModuleList)) and all(name.isdigit() for name, _ in a + b)
    pairs = _align(a, b, closest) if numbered and len(a) < len(b) else None
    if pairs is None:
        at = {name: position for position, (name, _) in enumerate(a)}
        pairs = {k: at[name] for k, (name, _) in enumerate(b) if name in at}
    else:
        found.update({f"{mine}.{name}".lstrip("."): "" for k, (name, _) in enumerate(b) if k not in pairs})
    for k, position in pairs.items():
        (mine_name, mine_child), (their_name, their_child) = b[k], a[position]
        inner = f"{theirs}.{their_name}".lstrip("."), f"{mine}.{mine_name}".lstrip(".")
        found[inner[1]] = inner[0]
        _pair_children(their_child, mine_child, inner, found, closest)


def _align(teacher: Children, student: Children, closest: bool) -> dict[int, int] | None:
    """Map positions of the student to all positions of the teacher, in order; None if that is impossible."""
    rows, columns = len(teacher), len(student)
    theirs, mine = ([(type(child), _shapes(child)) for _, child in each] for each in (teacher, student))
    best = [[0.0] * (columns + 1)] + [[math.inf] * (columns + 1) for _ in range(rows)]  # best[i][j]: i of the first j
    for i in range(1, rows + 1):
        for j in range(i, columns + 1):
            best[i][j] = min(best[i][j - 1], best[i - 1][j - 1] + _cost(theirs[i - 1], mine[j - 1], closest))
    if math.isinf(best[rows][columns]):
        return None
    pairs, j = {}, columns
    for i in range(rows, 0, -1):
        while best[i][j - 1] <= best[i][j]:  # the earliest position at no greater cost
            j -= 1
        j -= 1
        pairs[j] = i - 1
    return pairs


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, tensor.shape) for name, tensor in module.named_parameters())


@lru_cache
def _cost(teacher: Kind, student: Kind, closest: bool) -> float:
    """Return how much larger the student's layer is, or 0 unless `closest`; infinity if it is no counterpart."""
    if teacher[0] is not student[0]:
        return math.inf
    shapes, cost = dict(student[1]), 0.0
    for name, theirs in teacher[1]:
        mine = shapes.get(name)
        if mine is None or len(mine) != len(theirs) or any(m < t for m, t in zip(mine, theirs, strict=True)):
            return math.inf
        cost += math.log(mine.numel() / theirs.numel()) if closest else 0.0
    return cost
