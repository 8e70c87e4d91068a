"""Filling a student so that it computes its teacher's function (paper, section 3; Net2WiderNet and Net2DeeperNet)."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import identity
from .equivalence import Equivalence, compare
from .errors import TransferError
from .mapping import NEW, Plan, Rename, plan
from .units import run, trace

SPLITS = ("equal", "uneven")


@dataclass(frozen=True)
class Axis:
    """One axis of a student tensor: entry j comes from entry `index[j]` of the teacher's, or is new (-1).

    `first` marks the entries that are not copies of an earlier one. `reads` says that the axis reads units, so
    that its entries are shared out among copies.
    """

    index: Tensor
    first: Tensor
    reads: bool

    @property
    def copies(self) -> int:
        """How many entries repeat an earlier one."""
        return int(((self.index != NEW) & ~self.first).sum())


@dataclass(frozen=True)
class Origin:
    """Where one student tensor came from: `how` is shared, identity, silent or fresh."""

    how: str
    teacher: str | None = None
    axes: dict[int, Axis] = field(default_factory=dict)


@dataclass(frozen=True)
class Transfer:
    """The record of a transfer: where every tensor of the student came from, and what was measured.

    `measured` is the difference of the two networks on the example, before noise; None for `random_pad`.
    """

    origins: dict[str, Origin]
    split: str
    noise: float
    measured: Equivalence | None = None

    def __str__(self) -> str:
        count = {
            how: sum(o.how == how for o in self.origins.values()) for how in ("shared", "identity", "silent", "fresh")
        }
        wider = sum(any(axis.copies for axis in o.axes.values()) for o in self.origins.values())
        text = (
            f"{count['shared']} tensors from the teacher ({wider} of them wider), {count['identity']} of identities, "
            f"{count['silent']} of silent branches, {count['fresh']} fresh"
        )
        return f"{text}; {self.measured}" if self.measured else text


def transfer(
    teacher: nn.Module,
    student: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
    split: str = "equal",
    rename: Rename = None,
    calibrate: Tensor | Iterable[Tensor | tuple[Tensor, ...]] | None = None,
) -> Transfer:
    """Fill `student` in place so that it computes the function of `teacher`; return where everything came from.

    Afterwards the two agree in eval mode up to rounding (if `noise` is 0), whatever the student held before; the
    teacher is untouched. `example` is an input of both networks (a tuple for several arguments). Every layer of the
    teacher needs a counterpart of the same name in the student, at least as wide; `rename` maps student names to
    teacher names where they differ (a function, or a dict of prefixes; "" marks a layer that the teacher lacks).

    `generator` (CPU; None: seed 0) draws the units to copy and the shares. `split` shares the outgoing
    weights of a unit among its copies: "equal" (the paper's), or "uneven": positive shares drawn anew for every reading
    unit, which tells copies apart without changing the function, under any optimizer. `noise` is the standard
    deviation of Gaussian noise added to the incoming weights of all but the first copy, in units of the tensor's own
    standard deviation (section 3.3; it changes the function). `calibrate`, one batch of inputs or several, measures
    the statistics of new batch norms (section 3.4): without it they are exact in eval mode only.

    The check is on `example`: a teacher whose output does not depend on its features (a head of zeros) proves nothing.

    Raises TransferError, before the student is changed, if it is smaller than its teacher anywhere or if units would
    grow that an operation pins; and, with the student filled but unusable, if the result on `example` differs
    from the teacher's by more than the square root of the precision.
    """
    if split not in SPLITS:
        raise TransferError(f"The split {split!r} is unknown: it is one of {', '.join(SPLITS)}.")
    generator = generator or torch.Generator().manual_seed(0)
    arguments, prepared, origins = _prepare(teacher, student, example, rename, generator)
    identity.check_identity(prepared)
    _fill(prepared, origins, generator, split)
    identity.silence(student, prepared)
    identity.restore_scale(student, prepared)
    if calibrate is not None:
        identity.calibrate(student, prepared, calibrate)
    measured = compare(prepared.teacher.output, run(student, arguments))
    _refuse_if_different(measured, prepared)
    if noise:
        _add_noise(prepared, origins, generator, noise)
    return Transfer(origins, split, noise, measured)


def random_pad(
    teacher: nn.Module,
    student: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    generator: torch.Generator | None = None,
    rename: Rename = None,
) -> Transfer:
    """The paper's baseline (section 4.2): the teacher's weights in one corner, the student's own fresh ones elsewhere.

    Afterwards every entry of the student that `transfer` would fill with the first copy of a teacher's entry holds
    exactly that entry, unshared; everything else is as the student's constructor drew it, layers that
    the teacher lacks included. Raises TransferError as `transfer` does.
    """
    generator = generator or torch.Generator().manual_seed(0)
    _, prepared, origins = _prepare(teacher, student, example, rename, generator)
    _fill(prepared, origins, generator, "pad")
    return Transfer(origins, "pad", 0.0)


def _prepare(
    teacher: nn.Module,
    student: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    rename: Rename,
    generator: torch.Generator,
) -> tuple[tuple[Tensor, ...], Plan, dict[str, Origin]]:
    """Trace both networks and decide everything that can be refused, before a weight is written."""
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise TransferError("The teacher and the student share parameters: make the student a network of its own.")
    arguments = example if isinstance(example, tuple) else (example,)
    prepared = plan(trace(teacher, arguments), trace(student, arguments), rename, generator)
    origins = {name: _origin(prepared, name) for name in prepared.student.tensors}
    return arguments, prepared, origins


def _origin(plan: Plan, name: str) -> Origin:
    theirs = plan.names[name]
    if theirs is None:
        how = _role(plan, name)
        read = plan.student_units(name, 1) if how == "identity" and plan.student.read_axis.get(name) == 1 else None
        if read is None:
            return Origin(how)
        copied = plan.teacher_of[read]
        return Origin(how, None, {1: _match(torch.arange(len(read)), copied, _distinct(copied), reads=True)})
    mine, other = plan.student.tensors[name], plan.teacher.tensors[theirs]
    if mine.dim() != other.dim():
        raise TransferError(f"{name} has {mine.dim()} axes, the teacher's {theirs} has {other.dim()}.")
    axes = {}
    both = [(plan.student_units(name, dim), plan.teacher_units(theirs, dim)) for dim in range(mine.dim())]
    for dim, (units, source) in enumerate(both):
        if (units is None) != (source is None):
            raise TransferError(
                f"The forward pass of one network only follows units along axis {dim} of {name}: the teacher and the "
                "student use it differently, or one of them not at all."
            )
    for dim, (units, source) in enumerate(both):
        if units is not None and source is not None:
            reads = plan.student.read_axis.get(name) == dim
            axes[dim] = _match(units, plan.teacher_of[units], source, reads)
            if lost := len(source) - len(_distinct(axes[dim].index)):
                raise TransferError(
                    f"{name} has no counterpart of {lost} of the {len(source)} units that the teacher's has on axis "
                    f"{dim}: the student must carry every unit of its teacher to every layer that reads it."
                )
        elif mine.shape[dim] != other.shape[dim]:
            raise TransferError(
                f"{name} has shape {tuple(mine.shape)}, the teacher's {tuple(other.shape)}, and axis {dim} does not "
                "carry units that the forward pass can follow: such axes, and kernels, keep their size."
            )
    return Origin("shared", theirs, axes)


def _role(plan: Plan, name: str) -> str:
    """What becomes of a tensor of the student that the teacher lacks."""
    for how in ("identity", "silent"):
        if any(name in plan.student.layers[layer].tensors.values() for layer in getattr(plan, how)):
            return how
    return "fresh"


def _distinct(units: Tensor) -> Tensor:
    return torch.unique(units[units != NEW])


def _match(units: Tensor, copied: Tensor, source: Tensor, reads: bool) -> Axis:
    """Pair the k-th entry of a student unit with the k-th entry of the teacher unit that it copies.

    A unit has several entries on one axis where maps are flattened or a tensor is concatenated with itself; both
    networks lay them out in one order. `units` and `copied` hold each student entry's unit and the teacher unit it
    copies, `source` each teacher entry's unit.
    """
    rank, source_rank = _rank(units), _rank(source)
    ranks = int(torch.cat([rank, source_rank]).max()) + 1
    key, source_key = copied * ranks + rank, source * ranks + source_rank
    order = torch.argsort(source_key)
    place = torch.searchsorted(source_key[order], key).clamp(max=len(source) - 1)
    found = (source_key[order][place] == key) & (copied != NEW)
    index = torch.where(found, order[place], NEW)
    return Axis(index, (_rank(index) == 0) & found, reads)


def _rank(values: Tensor) -> Tensor:
    """How often each entry's value has occurred before it."""
    order = torch.argsort(values, stable=True)
    ordered = values[order]
    start = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(values)
    rank[order] = torch.arange(len(values)) - start
    return rank


@torch.no_grad()
def _fill(plan: Plan, origins: dict[str, Origin], generator: torch.Generator, split: str) -> None:
    """Write every tensor that comes from the teacher; with the split "pad", only the teacher's own entries."""
    pad = split == "pad"
    for name, origin in origins.items():
        target = plan.student.tensors[name]
        if origin.how == "shared":
            assert origin.teacher is not None
            target.copy_(_gather(plan.teacher.tensors[origin.teacher], target, origin.axes, generator, split))
        elif origin.how == "identity" and not pad and plan.student.layers.get(name):
            weight = identity.identity_weight(plan, name)
            axis = origin.axes[1]
            target.copy_(weight * _shares(axis, weight, 1, generator, split))
        elif origin.how == "identity" and not pad and _is_bias(plan, name):
            target.zero_()


def _is_bias(plan: Plan, name: str) -> bool:
    layers = (plan.student.layers[layer] for layer in plan.identity)
    return any(layer.kind == "mix" and layer.tensors.get("bias") == name for layer in layers)


def _gather(source: Tensor, target: Tensor, axes: dict[int, Axis], generator: torch.Generator, split: str) -> Tensor:
    """The teacher's tensor, gathered along every axis of units and shared out along the one that reads.

    Entries that the teacher lacks are read with zero, or keep the student's own value where they are not read.
    """
    pad = split == "pad"
    exact = target.dtype if not target.is_floating_point() else torch.promote_types(target.dtype, torch.float32)
    value = source.to(target.device, exact)
    fresh = torch.zeros((), dtype=torch.bool, device=target.device)
    for dim, axis in axes.items():
        index = axis.index.to(target.device)
        value = value.index_select(dim, index.clamp(min=0))
        shape = [-1 if d == dim else 1 for d in range(target.dim())]
        missing = index == NEW
        if pad:
            missing = ~axis.first.to(target.device)
        if axis.reads and not pad:
            value = value * _shares(axis, value, dim, generator, split) * ~missing.reshape(shape)
        else:
            fresh = fresh | missing.reshape(shape)
    return torch.where(fresh, target, value.to(target.dtype))


def _shares(axis: Axis, value: Tensor, dim: int, generator: torch.Generator, split: str) -> Tensor:
    """What part of the teacher's outgoing weight each copy takes: they sum to one over the copies of an entry.

    Broadcasts against `value`. Uneven shares differ from one reading unit to the next: a factor common to all
    readers of a copy would only scale its gradient, which RMSProp and Adam undo.
    """
    index = axis.index.clamp(min=0)
    rows = 1 if split == "equal" else value.shape[0]
    known = (axis.index != NEW).double()
    part = torch.ones(1, len(index), dtype=torch.double)
    if rows > 1:
        part = 0.5 + torch.rand(rows, len(index), generator=generator, dtype=torch.double)
    part = part * known
    whole = torch.zeros(rows, int(index.max()) + 1, dtype=torch.double).index_add_(1, index, part)
    share = part / whole[:, index].clamp(min=torch.finfo(torch.double).tiny)
    shape = [1] * value.dim()
    shape[0], shape[dim] = rows, len(index)
    return share.reshape(shape).to(value)


@torch.no_grad()
def _add_noise(plan: Plan, origins: dict[str, Origin], generator: torch.Generator, noise: float) -> None:
    """Gaussian noise on the incoming weights of every copy but the first (section 3.3)."""
    for name, origin in origins.items():
        layer = plan.student.layers.get(name)
        if origin.how != "shared" or layer is None or layer.kind != "mix":
            continue
        axis, target = origin.axes[0], plan.student.tensors[name]
        again = (~axis.first & (axis.index != NEW)).nonzero().flatten()
        if len(again):
            scale = noise * target.float().std()
            drawn = torch.randn(len(again), *target.shape[1:], generator=generator, dtype=torch.double)
            again = again.to(target.device)
            target[again] += (scale * drawn.to(target.device)).to(target.dtype)


def _refuse_if_different(measured: Equivalence, plan: Plan) -> None:
    floating = [t for t in (*plan.student.tensors.values(), *plan.teacher.tensors.values()) if t.is_floating_point()]
    tolerance = max((torch.finfo(t.dtype).eps for t in floating), default=torch.finfo(torch.float32).eps) ** 0.5
    if not measured.max_relative <= tolerance:
        new = sorted(plan.identity) or ["none"]
        raise TransferError(
            f"The filled student does not compute its teacher's function: on the example they differ by "
            f"{measured.max_relative:.1e} relative, more than {tolerance:.1e}. The two forward passes do something "
            "different with the same units: an activation behind a new layer that is not idempotent, another layout. "
            f"Layers that pass units through: {', '.join(new[:8])}."
        )
