"""Untie tensors that a student keeps apart and its teacher does not: a table and the last layer, for example."""

import copy
from dataclasses import replace

from torch import nn

from .record import Record

Ties = dict[str, str]  # tied tensor that the student keeps apart -> the first name that the teacher has for it


def untie(teacher: nn.Module, student: nn.Module) -> tuple[nn.Module, Ties]:
    """Return a teacher in which the tensors are untied that the student keeps apart; their values share memory."""
    mine = dict(student.named_parameters(remove_duplicate=False))
    first_names: dict[int, str] = {}
    ties: Ties = {}
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name != first and name in mine and first in mine and mine[name] is not mine[first]:
            ties[name] = first
    if not ties:
        return teacher, ties
    held = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    try:
        apart = copy.deepcopy(teacher, held)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # it cannot be copied, and is refused as it is
        return teacher, {}
    made: dict[int, nn.Parameter] = {}  # the student may tie some of them among themselves
    for name, first in ties.items():
        parameter = teacher.get_parameter(first)
        value = made.setdefault(id(mine[name]), nn.Parameter(parameter.detach(), parameter.requires_grad))
        module, _, place = name.rpartition(".")
        setattr(apart.get_submodule(module), place, value)
    return apart, {name: ties[name] for name, _ in apart.named_parameters() if name in ties}


def tie_again(record: Record, ties: Ties) -> Record:
    """Turn the record of a growth of the untied teacher into one of the teacher itself."""
    if not ties:
        return record
    tied = set(ties.values())
    origins = {}
    for name, origin in record.origins.items():
        theirs = ties.get(origin.teacher or "", origin.teacher)
        origins[name] = replace(origin, teacher=theirs, tied=origin.tied or theirs in tied)  # no gradient of its own
    theirs, mine = record.shapes
    shapes = {name: shape for name, shape in theirs.items() if name not in ties}
    return replace(record, origins=origins, shapes=(shapes, mine))
