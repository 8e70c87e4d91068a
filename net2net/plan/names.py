"""Finding a layer's counterpart when new layers have renumbered those behind them (vgg11 -> vgg13 -> vgg16)."""

import math

from torch import nn

Child = tuple[str, nn.Module]


def candidates(teacher: nn.Module, student: nn.Module) -> list[dict[str, str]]:
    """Ways to pair the student's layers with the teacher's, as prefixes to rename, the likeliest first.

    All names as they are; or, in containers of numbered layers (`nn.Sequential`, `nn.ModuleList`) that have grown,
    in order: every layer of the teacher has a counterpart of its own type, at least as large, the earliest or the
    closest in size, and the student's others are new (they map to ""). Which of these is right shows in the
    forward pass alone.
    """
    found: list[dict[str, str]] = [{}]
    for closest in (False, True):
        names: dict[str, str] = {}
        _walk(teacher, student, "", "", names, closest)
        names = {mine: theirs for mine, theirs in names.items() if mine != theirs}
        if names not in found:
            found.append(names)
    return found


def _walk(teacher: nn.Module, student: nn.Module, theirs: str, mine: str, found: dict[str, str], closest: bool) -> None:
    a, b = list(teacher.named_children()), list(student.named_children())
    numbered = isinstance(student, (nn.Sequential, nn.ModuleList)) and all(name.isdigit() for name, _ in a + b)
    pairs = _aligned(a, b, closest) if numbered and len(a) < len(b) else None
    if pairs is None:
        at = {name: position for position, (name, _) in enumerate(a)}
        pairs = {k: at[name] for k, (name, _) in enumerate(b) if name in at}
    else:
        found.update({f"{mine}.{name}".lstrip("."): "" for k, (name, _) in enumerate(b) if k not in pairs})
    for k, position in pairs.items():
        (mine_name, mine_child), (their_name, their_child) = b[k], a[position]
        their_path, mine_path = f"{theirs}.{their_name}".lstrip("."), f"{mine}.{mine_name}".lstrip(".")
        found[mine_path] = their_path
        _walk(their_child, mine_child, their_path, mine_path, found, closest)


def _aligned(teacher: list[Child], student: list[Child], closest: bool) -> dict[int, int] | None:
    """For student positions the teacher's, so that all of the teacher's are taken in order; None if that cannot be."""
    rows, columns = len(teacher), len(student)
    best = [[0.0] * (columns + 1)] + [[math.inf] * (columns + 1) for _ in range(rows)]  # of the first i in the first j
    for i in range(1, rows + 1):
        for j in range(i, columns + 1):
            best[i][j] = min(best[i][j - 1], best[i - 1][j - 1] + _cost(teacher[i - 1][1], student[j - 1][1], closest))
    if math.isinf(best[rows][columns]):
        return None
    pairs, j = {}, columns
    for i in range(rows, 0, -1):
        while best[i][j - 1] <= best[i][j]:  # as early as can be at no greater cost
            j -= 1
        j -= 1
        pairs[j] = i - 1
    return pairs


def _cost(teacher: nn.Module, student: nn.Module, closest: bool) -> float:
    """How much larger the student's layer is, if that counts; infinite if it is no counterpart."""
    if type(teacher) is not type(student):
        return math.inf
    shapes, cost = {name: tensor.shape for name, tensor in student.named_parameters()}, 0.0
    for name, tensor in teacher.named_parameters():
        mine = shapes.get(name)
        if mine is None or len(mine) != tensor.dim() or any(m < t for m, t in zip(mine, tensor.shape, strict=True)):
            return math.inf
        cost += math.log(mine.numel() / tensor.numel()) if closest else 0.0
    return cost
