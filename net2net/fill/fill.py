"""Write every student tensor as the record of a growth says."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from ..errors import TransferError
from ..network import own_precision
from ..record import NEW, How, Origin, Record
from ..tensors import computed, find_eps, merge_groups, named_tensors, parametrised
from .gather import append_means, gather, pieces
from .isometry import mix, mixing_matrix
from .new_layers import fill_new

SPLITS = ("equal", "uneven", "paired", "fresh")


@torch.no_grad()
@own_precision()
def fill(teacher: nn.Module, student: nn.Module, record: Record) -> None:
    """Fill the student in place as the record says; for `random_pad` only first copies are written."""
    generator = torch.Generator()
    generator.set_state(record.state)
    pad = record.split == "pad"
    theirs, mine = named_tensors(teacher), named_tensors(student)
    matrices = {}  # computed before anything is written, as one may have no solution
    if not pad:
        matrices = {name: [mixing_matrix(m, theirs) for m in origin.mixed] for name, origin in record.origins.items()}
    for name, origin in record.origins.items():
        fill_tensor(mine[name], origin, (theirs, mine), matrices.get(name, []), generator, record.split)
    if not pad:
        set_eps(student, record)
    _set_parametrised(student, mine)


def fill_tensor(
    target: Tensor,
    origin: Origin,
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    matrices: list[Tensor],
    generator: torch.Generator,
    split: str,
) -> None:
    """Fill one tensor of the student in place; `tensors` are the teacher's and the student's by name."""
    theirs, mine = tensors
    if origin.offset:
        target.add_(origin.offset)
    if origin.how == How.SHARED:
        assert origin.teacher is not None
        source = merge_groups(theirs[origin.teacher], *origin.merged)
        source = source + origin.offset if origin.offset else source
        source, origin = (source, _first_copies(origin)) if split == "pad" else mix(source, origin, matrices)
        source, origin = append_means(source, origin, theirs)
        for part, into, way in pieces(source, target, origin, split):
            into.copy_(gather(part, into, way, generator, split))
    elif split != "pad":
        fill_new(target, origin, mine, generator, split)
    if origin.offset:
        target.sub_(origin.offset)


def set_eps(student: nn.Module, record: Record) -> None:
    """Give the student's norms the eps of the record."""
    for place, eps in record.eps.items():
        setattr(*find_eps(student, place), eps)


def _first_copies(origin: Origin) -> Origin:
    """Return an origin that copies each of the teacher's entries once and undivided, and leaves all else as it is."""
    axes = {
        dim: replace(axis, index=torch.where(axis.first, axis.index, NEW), reads=False, means=())
        for dim, axis in origin.axes.items()
    }
    return Origin(How.SHARED, origin.teacher, axes, origin.flat, offset=origin.offset)


@torch.no_grad()
@own_precision()
def add_noise(student: nn.Module, record: Record, generator: torch.Generator) -> None:
    """Add noise to the incoming weights of all copies but the first: `record.noise` times the tensor's deviation."""
    tensors = named_tensors(student)
    for name, origin in record.origins.items():
        reading = any(axis.reads for axis in origin.axes.values())
        produced = [dim for dim, axis in origin.axes.items() if not axis.reads]
        if origin.how != How.SHARED or not reading or len(produced) != 1 or origin.flat:
            continue
        (dim,) = produced
        axis, target = origin.axes[dim], tensors[name]
        again = (~axis.first & (axis.index >= 0)).nonzero().flatten()
        if len(again) and len(axis.index) == target.shape[dim]:
            drawn = torch.randn(len(again), *target.movedim(dim, 0).shape[1:], generator=generator, dtype=torch.double)
            drawn = (record.noise * target.float().std() * drawn.to(target.device)).to(target.dtype)
            target.movedim(dim, 0)[again.to(target.device)] += drawn
    _set_parametrised(student, tensors)


def _turn_zeros(module: nn.Module, weight: str) -> None:
    """Give each row of a weight norm that is all zeros some direction: its length, which is 0, makes it zero."""
    parts = module.parametrizations[weight]  # type: ignore[index]
    if any(isinstance(part, _WeightNorm) for part in parts):
        parts.original1 += parts.original0 == 0  # type: ignore[attr-defined]


def _set_parametrised(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set every parametrised weight through the parametrisation's own inverse, and check that it holds the value."""
    for prefix, module, weight in parametrised(student):
        name = f"{prefix}.{weight}".lstrip(".")
        value = tensors[name]
        try:
            setattr(module, weight, value.clone())
            _turn_zeros(module, weight)
            held = computed(module, weight)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise TransferError(f"The parametrisation of {name} cannot be given a weight: {error}") from error
        eps = torch.finfo(value.dtype).eps
        if not torch.allclose(held, value, rtol=eps**0.75, atol=eps):
            why = "A spectral norm, for one, fixes the size of the whole matrix, which shared weights change."
            raise TransferError(f"The parametrisation of {name} cannot hold the weight that the student needs. {why}")
