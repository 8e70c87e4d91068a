"""Filling a student so that it computes its teacher's function (paper, section 3; Net2WiderNet and Net2DeeperNet)."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .equivalence import Equivalence, compare
from .errors import TransferError, used_differently
from .fill.calibrate import calibrate as measure_norms
from .fill.gather import SPLITS, add_noise, fill
from .network import Example, Inputs, run, tensors_in, unwrap
from .optimizer import gradients, optimizer_state
from .plan import new_layers as identity
from .plan.mapping import Plan, Rename, Unpaired, key_names, plan, teacher_names
from .plan.names import candidates
from .plan.sign_pairs import signs, undone
from .record import MEAN, NEW, ZERO, Axis, Fill, How, Origin, Record, read_record
from .tensors import named_tensors, parametrised, refuse_spectral_norm
from .trace.facts import Key, Layer
from .trace.graph import SeenAs, Trace
from .trace.tracer import trace


@dataclass(frozen=True, eq=False)
class Transfer(Record):
    """The record of a growth together with its two networks.

    Attributes:
        models: weak references to the teacher and the student; None for a record that was loaded, copied or unpickled.
            They are weak because a grown network holds its record: a strong reference would drag the teacher into every
            copy and every pickle of the student, and keep it in memory as long as the student lives.
    """

    models: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "models": None}  # a weak reference can be neither copied nor pickled

    def of(self, teacher: nn.Module, student: nn.Module) -> "Transfer":
        """Return the same record with these two networks, which it holds weakly."""
        return replace(self, models=(weakref.ref(teacher), weakref.ref(student)))

    def gradients(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the student's gradients from the teacher's (see `net2net.optimizer.gradients`)."""
        return gradients(self, theirs, self._networks()[1])

    def optimizer_state(self, old: Optimizer, new: Optimizer) -> None:
        """Carry the state of the teacher's optimizer `old` into the student's optimizer `new`, in place (see
        `net2net.optimizer.optimizer_state`)."""
        optimizer_state(self, old, new, *self._networks())

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        """Return the teacher and the student, or raise TransferError."""
        teacher, student = (None, None) if self.models is None else (ref() for ref in self.models)
        if teacher is None or student is None:
            raise TransferError("This record knows of no networks: say which by record.of(teacher, student).")
        return teacher, student


def load_record(path: str | Path) -> Transfer:
    """Read a record that `save_record` wrote. It has no networks yet: `load_record(path).of(teacher, student)`.

    Args:
        path: the JSON file.

    Returns:
        The record, for `replay`, or with its networks for `gradients` and `optimizer_state`.

    Raises:
        TransferError: the file is not a record, or of another format.
        OSError: the file cannot be read.

    Example:
        >>> record = net2net.transfer(nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3))
        >>> net2net.save_record(record, "growth.json")
        >>> net2net.replay(net2net.load_record("growth.json"), nn.Linear(3, 4), nn.Linear(3, 4))
    """
    return Transfer(**vars(read_record(path)))


def transfer(
    teacher: nn.Module,
    student: nn.Module,
    example: Example,
    *,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
    split: str = "equal",
    depth: str = "identity",
    rename: Rename = None,
    calibrate: Tensor | Iterable[Example] | None = None,
) -> Transfer:
    """Fill `student` in place so that it computes the function of `teacher`; return where everything came from.

    By default copies of a unit get the same gradients and never part, unless dropout tells them apart: `split="uneven"`
    or "paired" does so from the first step.

    Afterwards the two agree in eval mode up to rounding (if `noise` is 0), whatever the student held before; the
    teacher is untouched. `example` is an input of both networks: a tensor, a tuple of arguments, or a dict of keyword
    arguments. Every layer of the teacher needs a counterpart of the same name in the student, at least as wide, with a
    kernel at least as large; layers of an `nn.Sequential` that new ones have renumbered are found. `rename` maps
    student names to teacher names where they differ otherwise (a function, or a dict of prefixes; "" marks a layer that
    the teacher lacks).

    `generator` (CPU; None: seed 0) draws the units to copy and the shares. `split` shares the outgoing
    weights of a unit among its copies: "equal" (the paper's); "uneven": positive shares drawn anew for every reading
    unit; or "paired": equal shares, and noise on the weights that the copies of a unit cancel among themselves. The
    last two tell copies apart without changing the function, under any optimizer. `noise` is the standard
    deviation of Gaussian noise added to the incoming weights of all but the first copy, in units of the tensor's own
    standard deviation (section 3.3; it changes the function). `depth` says what a new layer on the way of units
    becomes: "identity" (section 3.4), or "dense" where no activation stands between it and the layer behind it: a
    random rotation of the units, which that layer undoes (a factorisation of one layer into two, after Network
    Morphism). `calibrate`, one batch of inputs or several, measures the statistics of new batch norms (section 3.4):
    without it they are exact in eval mode only.

    The eps of a layer norm that sees padding (its width no multiple of the teacher's) changes in the student's module.
    The check is on `example` and on random inputs like it: a teacher whose output does not depend on its features (a
    head of zeros) proves nothing.

    Raises TransferError with the student as it was if that is smaller than its teacher anywhere or if units would grow
    that an operation pins. The student may be filled by then, and unusable, if only numbers show the reason: a result
    that differs from the teacher's by more than the square root of the precision, a forward pass or a calibration that
    fails, a parametrisation that cannot hold its weight.
    """
    if not 0 <= noise < math.inf:
        raise TransferError(f"The noise is {noise}: it is a standard deviation, a number of 0 or more.")
    if split not in SPLITS:
        raise TransferError(f"The split {split!r} is unknown: it is one of {', '.join(SPLITS)}.")
    if any(parameter.is_meta for model in (teacher, student) for parameter in model.parameters()):
        raise TransferError("A network on the meta device has no values to grow.")
    if depth not in ("identity", "dense"):
        raise TransferError(f"The depth {depth!r} is unknown: it is identity or dense.")
    generator = generator or torch.Generator().manual_seed(0)
    teacher, student = unwrap(teacher), unwrap(student)
    inputs, traces = _traced(teacher, student, example)
    absorbed = _absorbed(traces, rename)
    attempts = _attempts(teacher, student, rename)
    several = len(attempts) > 1 or bool(absorbed[0])
    batches = calibrate if calibrate is None or isinstance(calibrate, (Tensor, dict)) else list(calibrate)

    def grow(names: Rename, passing_all: bool, paired: bool) -> Record:
        prepared = plan(*_alike(teacher, inputs, traces, names), names, generator, passing_all, paired)
        identity.check_identity(prepared)
        record = _record(prepared, student, split, noise, generator)
        if depth == "dense":
            record = replace(record, origins=record.origins | identity.dense(prepared, record.origins))
        with _put_back_if_refused(student, record) if several else nullcontext():
            fill(teacher, student, record)
            if batches is not None:
                measure_norms(student, record, identity.new_batch_norms(prepared), batches)
            measured = compare(prepared.teacher.output, run(student, inputs))
            enough = _tolerance(prepared)
            _refuse_if_different(measured, prepared, "the example", enough)
            if (others := _on_others(teacher, student, inputs, enough)) is not None:
                _refuse_if_different(others[0], prepared, "other inputs like it", others[1])
        return replace(record, measured=measured)

    state = generator.get_state()
    try:
        record = _first(grow, attempts, generator)
    except TransferError as refused:
        if not absorbed[0]:
            raise
        generator.set_state(state)
        theirs, mine = (SeenAs(scale_absorbed=each) for each in absorbed)
        traces = trace(teacher, inputs, theirs), trace(student, inputs, mine)
        try:
            record = _first(grow, attempts, generator)
        except TransferError:
            raise refused from None
    if noise:
        add_noise(student, record, generator)
    return Transfer(**vars(record)).of(teacher, student)


def random_pad(
    teacher: nn.Module,
    student: nn.Module,
    example: Example,
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
    teacher, student = unwrap(teacher), unwrap(student)
    inputs, traces = _traced(teacher, student, example)

    def pad(names: Rename, passing_all: bool, paired: bool) -> Record:
        prepared = plan(*_alike(teacher, inputs, traces, names), names, generator, passing_all, paired)
        return _record(prepared, student, "pad", 0.0, generator)

    record = _first(pad, _attempts(teacher, student, rename), generator)
    fill(teacher, student, record)
    return Transfer(**vars(record)).of(teacher, student)


def replay(record: Record, teacher: nn.Module, student: nn.Module) -> None:
    """Fill `student` from `teacher` as `record` says: the same weights as the transfer that made it gave, before noise
    and calibration. TransferError if the networks have not the tensors of the record."""
    shapes = [
        {name: tuple(t.shape) for name, t in named_tensors(unwrap(model)).items()} for model in (teacher, student)
    ]
    for which, mine, theirs in zip(("teacher", "student"), shapes, record.shapes, strict=True):
        if mine != theirs:
            name = next(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise TransferError(
                f"The record is of another {which}: {name} is {mine.get(name)} here, {theirs.get(name)} there."
            )
    try:
        fill(unwrap(teacher), unwrap(student), record)
    except (KeyError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
        raise TransferError(f"The record is damaged, or of other networks than these: {error}") from error


def _traced(teacher: nn.Module, student: nn.Module, example: Example) -> tuple[Inputs, tuple[Trace, Trace]]:
    """One forward pass of each network."""
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise TransferError("The teacher and the student share parameters: make the student a network of its own.")
    inputs = Inputs.of(example)
    return inputs, (trace(teacher, inputs), trace(student, inputs))


def _absorbed(traces: tuple[Trace, Trace], rename: Rename) -> tuple[frozenset[str], frozenset[str]]:
    """The layers of either network whose results are multiplied, and nowhere used otherwise, by a number that differs.

    The root of the width behind an embedding, say, before positions are added: what reads the sum cannot undo it.
    """
    theirs, mine = (
        {layer: next(iter(by)) for layer, by in each.multipliers.items() if len(by) == 1 and by != {1.0}}
        for each in traces
    )
    try:
        names = teacher_names(traces[1], traces[0], rename)
    except TransferError:  # names are found as layers are paired
        names = {name: name for name in mine}
    differing = {name: other for name in mine if (other := names.get(name)) in theirs and mine[name] != theirs[other]}
    return frozenset(other for other in differing.values() if other), frozenset(differing)


def _alike(teacher: nn.Module, inputs: Inputs, traces: tuple[Trace, Trace], rename: Rename) -> tuple[Trace, Trace]:
    """The traces; the teacher's anew if what it has one of (a group, a head) is to grow into several."""
    theirs, mine = traces
    names = teacher_names(mine, theirs, rename)
    depthwise = [{layer.name for layer in each.layers.values() if "taps" in layer.tensors} for each in traces]
    one = {names[name] for name in depthwise[1] | mine.parameters.values.keys()}
    one = {Key(name) for name in one - depthwise[0] - theirs.parameters.values.keys() if name is not None}
    split = {
        Key(other, "groups")
        for name in mine.parameters.inner
        if (other := names[name]) is not None and other not in theirs.parameters.inner
    }
    keys = key_names(names)
    alike = one | split | ({keys(c.key) for c in mine.contractions} - {c.key for c in theirs.contractions})
    met = {keys(key) for key in mine.units.relations.keys() - theirs.units.relations.keys()}
    alike |= {
        key
        for key in met - theirs.units.relations.keys()
        if key is not None and replace(key, part="") in theirs.units.met
    }
    merged = {}
    for layer in mine.layers.values():
        other = theirs.layers.get(names.get(layer.name) or "")
        if other is not None and (groups := layer.options.get("groups", 1)) < (more := other.options.get("groups", 1)):
            times = -(-more // groups)
            room = mine.parameters.tensors[layer.name].shape[1] // theirs.parameters.tensors[other.name].shape[1]
            merged |= {other.name: times} if times <= room else {}
    as_grouped = frozenset(key for key in alike if key is not None) - {Key(name) for name in merged}
    if not as_grouped and not merged:
        return traces
    return trace(teacher, inputs, SeenAs(as_grouped, merged, theirs.seen_as.scale_absorbed)), mine


Attempt = tuple[Rename, bool, bool]  # how layers are paired, then what `plan` calls `passing_all` and `paired`


def _attempts(teacher: nn.Module, student: nn.Module, rename: Rename) -> list[Attempt]:
    """The ways to fill the student, the likeliest first."""
    pairings = candidates(teacher, student) if rename is None else [rename]
    deeper = len(list(student.parameters())) > len(list(teacher.parameters()))
    ways = ((False, False), (True, False), (False, True))[: 3 if deeper else 1]
    return [(names, *way) for way in ways for names in pairings]


def _first(grow: Callable[[Rename, bool, bool], Record], attempts: list[Attempt], generator: torch.Generator) -> Record:
    """`grow` with the first of `attempts` that serves, each from the same random state; else an error."""
    state, refused = generator.get_state(), []
    for attempt in attempts:
        try:
            return grow(*attempt)
        except TransferError as error:
            refused.append(error)
            generator.set_state(state)
    # Where layers are renumbered, names that are the same tell little: the last pairing is the likeliest.
    pairings = sum(attempt[1:] == attempts[0][1:] for attempt in attempts)
    likely = [*reversed(refused[:pairings]), *refused]
    raise next((error for error in likely if not isinstance(error, Unpaired)), refused[0])


@contextmanager
def _put_back_if_refused(student: nn.Module, record: Record) -> Iterator[None]:
    """If the block, which fills the student, refuses, the student is as it was: the next attempt finds its own values,
    and the refusal of another attempt, which filled nothing, can be the one that is raised.

    The copy is in main memory: an accelerator may have no room for it.
    """
    tensors = [*student.parameters(), *student.buffers()]
    held = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    eps = [(module, module.eps) for module in map(student.get_submodule, record.eps)]
    try:
        yield
    except TransferError:
        with torch.no_grad():
            for tensor, value in zip(tensors, held, strict=True):
                tensor.copy_(value)
        for module, value in eps:
            module.eps = value
        raise


# -- from the plan to the record ----------------------------------------------------------------------------------


def _record(plan: Plan, student: nn.Module, split: str, noise: float, generator: torch.Generator) -> Record:
    builder = _Builder(plan)
    if split != "pad":  # which promises no function
        builder.check_numbers()
    origins = {name: builder.origin(name) for name in plan.student.parameters.tensors}
    for name, module, weight in parametrised(student):
        key = f"{name}.{weight}".lstrip(".")
        if (theirs := plan.names.get(key)) and plan.student.parameters.tensors[
            key
        ].shape != plan.teacher.parameters.tensors[theirs].shape:
            refuse_spectral_norm(module, weight, key)
    for module in plan.eps:
        if not hasattr(student.get_submodule(module), "eps"):
            raise TransferError(f"The norm {module} needs another eps than it has, and has no attribute to set.")
    for norm, factor in {norm.module: (norm, factor) for norm, factor in plan.rescaled.values()}.values():
        if "weight" not in norm.tensors:
            raise TransferError(f"The norm {norm.module} would see padding, and has no weight to undo what it does.")
        for role, name in norm.tensors.items():
            origins[name] = _padded(origins[name], role, factor**0.5 if role == "weight" else 1.0)
    for name in [name for name in origins if builder.is_tied(name)]:
        origins |= builder.untied(name, origins)
    shapes = (
        {name: tuple(t.shape) for name, t in trace.parameters.originals.items()}
        for trace in (plan.teacher, plan.student)
    )
    return Record(origins, split, noise, plan.eps, generator.get_state(), tuple(shapes))  # type: ignore[arg-type]


class _Builder:
    """Where every tensor of the student comes from, by the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.new = identity.origins(plan)
        student = plan.student
        mixers = [layer for layer in student.layers.values() if layer.kind == "mix" and layer.produces is not None]
        made = {
            new: [layer.produces for layer in mixers if (layer.name in plan.identity) == new] for new in (True, False)
        }
        handed = (
            torch.unique(plan.student_roots[torch.cat([x for x in made[True] if x is not None])])
            if made[True]
            else None
        )
        real = torch.unique(plan.student_roots)
        if handed is not None and made[False]:  # what an identity hands on is no copy of its own
            own = torch.unique(plan.student_roots[torch.cat([x for x in made[False] if x is not None])])
            real = real[~torch.isin(real, handed) | torch.isin(real, own)]
        copied = plan.teacher_of[real]
        self.count = torch.zeros(len(plan.teacher_roots), dtype=torch.long)
        self.count.index_add_(0, copied[copied >= 0], torch.ones_like(copied[copied >= 0]))
        apart = plan.units.roots_without_contractions()
        left = [c.left for c in student.contractions]
        self.open = {int(r) for labels in left for r in plan.student_roots[labels].unique()}
        self.left = torch.unique(apart[torch.cat(left)]) if left else torch.empty(0, dtype=torch.long)
        self.apart, self.teacher_apart = apart, plan.teacher_units.roots_without_contractions()
        self.padded_norms = {
            norm.tensors["weight"].rpartition(".")[0] for norm, _ in plan.rescaled.values() if norm.tensors
        }
        told = [*plan.units.whole, *plan.units.pinned]
        self.why = [(set(plan.student_roots[labels].tolist()), why) for labels, why in told]
        self.gains = self._softmax_gains()

    def check_numbers(self) -> None:
        """Raise TransferError where numbers that the two networks multiply units by differ, and stay in what follows.

        Those in front of a softmax do not: the queries undo them.
        """
        plan = self.plan
        logits = {int(r) for c in plan.student.contractions for r in plan.student_roots[c.left].unique()}
        key_of = key_names(plan.names)
        for key, (numbers, units, call) in plan.student.fixed_gains.items():
            theirs = plan.teacher.fixed_gains.get(key_of(key) or Key(""))
            if theirs is None or theirs[0] == numbers or logits & set(plan.student_roots[units].tolist()):
                continue
            mine, other = (", ".join(f"{number:.4g}" for number in each) for each in (numbers, theirs[0]))
            raise TransferError(
                f"{call} takes units that are multiplied by {mine} here and by {other} in the teacher, and no layer "
                "behind it can undo that: let the number be the teacher's, or put it behind a layer alone."
            )

    def _softmax_gains(self) -> dict[int, float]:
        """For queries whose logits the student scales by another number than its teacher, by what to multiply them."""
        gains = {}
        for key, (gain, _, units) in self.plan.student.softmax_gains.items():
            theirs = self.plan.teacher.softmax_gains.get(key)
            if theirs is not None and theirs[0] != gain:
                heads = set(self.plan.student_roots[units].tolist())
                for contraction in self.plan.student.contractions:
                    if heads & set(self.plan.student_roots[contraction.left].tolist()):
                        gains |= dict.fromkeys(self.apart[contraction.left].tolist(), theirs[0] / gain)
        return gains

    def origin(self, name: str) -> Origin:
        """Where the student's tensor `name` comes from."""
        plan, theirs = self.plan, self.plan.names[name]
        if theirs is None:
            return self._new(name)
        mine, other = plan.student.parameters.tensors[name], plan.teacher.parameters.tensors[theirs]
        if mine.dim() != other.dim():
            raise TransferError(f"{name} has {mine.dim()} axes, the teacher's {theirs} has {other.dim()}.")
        if (name in plan.student.parameters.values) != (theirs in plan.teacher.parameters.values):
            raise used_differently(name)
        layer, counterpart = plan.student.layers.get(name), plan.teacher.layers.get(theirs)
        factor = 1.0
        if layer and counterpart and layer.kind == "mix":
            factor = counterpart.gain / layer.gain * self._undone(layer)
        factor *= self._absorbed(name, theirs)
        if name in plan.student.parameters.values:
            if name in plan.student.parameters.axes or theirs in plan.teacher.parameters.axes:
                return self._whole(name, theirs, "a layer reads it, and another adds it up")
            axis, rows = self._axis(
                name, plan.student.parameters.values[name], plan.teacher.parameters.values[theirs], 0, False
            )
            mixed = plan.mixed.get(name, ())
            return Origin(How.SHARED, theirs, {0: axis}, flat=True, factor=factor, rows=rows, mixed=mixed)
        axes, rows = {}, None
        for dim in range(mine.dim()):
            units, source = _entries(plan.student, name, dim), _entries(plan.teacher, theirs, dim)
            if (units is None) != (source is None):
                raise TransferError(
                    f"The forward pass of one network only follows units along axis {dim} of {name}: the teacher and "
                    "the student use it differently, or one of them not at all."
                )
            if units is not None and source is not None:
                reads = plan.student.parameters.read_axis.get(name) == dim
                axes[dim], scaled = self._axis(name, units, source, dim, reads)
                rows = scaled if dim == 0 else rows
            elif dim > 1 and layer is not None and counterpart is not None and layer.options:
                if (taps := _taps(layer, counterpart, mine.shape[dim], other.shape[dim], dim - 2)) is not None:
                    axes[dim] = taps
            elif mine.shape[dim] != other.shape[dim] and layer is None and name not in plan.student.parameters.axes:
                raise TransferError(
                    f"{name} has shape {tuple(mine.shape)}, the teacher's {tuple(other.shape)}, and the forward pass "
                    "on this example does not use it: give an example that does."
                )
            elif mine.shape[dim] != other.shape[dim]:
                raise TransferError(
                    f"{name} has shape {tuple(mine.shape)}, the teacher's {tuple(other.shape)}, and axis {dim} does "
                    "not carry units that the forward pass can follow: such axes keep their size."
                )
        merged, mixed = self._merged(theirs), plan.mixed.get(name, ())
        return Origin(How.SHARED, theirs, axes, factor=factor, rows=rows, merged=merged, mixed=mixed)

    def _absorbed(self, name: str, theirs: str) -> float:
        """By what a layer's weight or bias is multiplied for the sake of what its result is multiplied by."""
        mine, other = (
            next((n for n in each.seen_as.scale_absorbed if t in each.layers[n].tensors.values()), None)
            for each, t in ((self.plan.student, name), (self.plan.teacher, theirs))
        )
        if mine is None or other is None:
            return 1.0
        return next(iter(self.plan.teacher.multipliers[other])) / next(iter(self.plan.student.multipliers[mine]))

    def _undone(self, layer: Layer) -> float:
        """By what its weight is multiplied for the sake of what its units have passed in new layers."""
        bends = layer.passage.bends if layer.passage.bends[:1] and layer.passage.bends[0][0] in self.plan.bends else ()
        return undone(layer.passage, bends, self.plan.silent)

    def _merged(self, theirs: str) -> tuple[int, int]:
        """Into how many groups a layer of the teacher's falls, and how many of them are one here."""
        times = self.plan.teacher.seen_as.merged_groups.get(theirs, 1)
        return (self.plan.teacher.layers[theirs].options["groups"], times) if times > 1 else (1, 1)

    def _whole(self, name: str, theirs: str, why: str) -> Origin:
        if self.plan.student.parameters.tensors[name].shape != self.plan.teacher.parameters.tensors[theirs].shape:
            raise TransferError(f"{name} cannot grow: {why}.")
        return Origin(How.SHARED, theirs)

    def _new(self, name: str) -> Origin:
        """What becomes of a tensor that the teacher lacks."""
        plan = self.plan
        layer = plan.student.layers.get(name)
        if name in self.new and layer is not None and layer.kind == "mix" and name in plan.identity:
            assert layer.produces is not None and layer.reads is not None
            produced, read = self._entries_of(layer.produces), self._entries_of(layer.reads)
            groups = plan.student.parameters.inner[name][1] if name in plan.student.parameters.inner else 1
            axes = {0: _axis(produced, False), 1: self._reading(read, plan.student_roots[layer.reads], groups)}
            turned = self._turned(name, layer.produces)
            return Origin(How.IDENTITY, axes=axes, fill=Fill.PASS, factor=self._undone(layer), rows=turned)
        if name in self.new:
            taps = layer is not None and layer.kind == "scale" and layer.reads is not None
            return replace(self.new[name], rows=self._turned(name, layer.reads)) if taps else self.new[name]  # type: ignore
        for layer in plan.student.layers.values():  # a bias that only the student has, on a layer of both
            if name in (layer.tensors.get("bias"), layer.tensors.get("shift")) and layer.name not in plan.fresh:
                return Origin(How.IDENTITY, fill=Fill.ZERO)
        return Origin(How.FRESH)

    def _turned(self, name: str, units: Tensor) -> Tensor | None:
        """The signs that a new layer gives to the units that pass an activation behind it in pairs."""
        for bends in self.plan.bends.values():
            for k, (carrier, _) in enumerate(bends):
                if carrier == name:
                    return signs(self.plan.patterns[self.plan.student_roots[units]], k)
        return None

    def _reading(self, index: Tensor, roots: Tensor, groups: int, means: tuple[Tensor, ...] = ()) -> Axis:
        """The axis that reads units: of pairs the difference, with the shares of copies that have the same signs."""
        patterns = self.plan.patterns[roots]
        if not bool(patterns.any()):
            return _axis(index, True, groups, means=means)
        keyed = torch.where(index >= 0, index * (int(patterns.max()) + 1) + patterns, index)
        axis = _axis(keyed, True, groups)
        first = _axis(index, True, groups).first
        return Axis(index, first, True, axis.share * signs(patterns), groups, means)

    def _entries_of(self, units: Tensor) -> Tensor:
        """For each label the entry of a teacher's unit that it stands for; -1 for units that the teacher lacks."""
        roots = self.plan.student_roots[units]
        copied = self.plan.teacher_of[roots]
        return torch.where(copied >= 0, copied * len(self.plan.student_roots) + _rank(roots), NEW)

    def _axis(self, name: str, units: Tensor, source: Tensor, dim: int, reads: bool) -> tuple[Axis, Tensor | None]:
        """One axis of a tensor that both networks have, and by what its entries are multiplied."""
        plan = self.plan
        roots, theirs = plan.student_roots[units], plan.teacher_roots[source]
        inner = plan.student.parameters.inner.get(name)
        groups = inner[1] if inner is not None and (dim == 1 or reads) else 1
        if inner is not None and dim == 1:
            index = self._inside(name, units, source, groups)
        else:
            index = self._matched(units, source)
            self._check_complete(name, index, len(source), dim)
            self._check_closed(name, roots, index)
        rows, share = None, None
        if reads:
            layer = plan.student.layers.get(name)
            kept = layer is not None and layer.after_norm in self.padded_norms
            index = torch.where(index >= 0, index, torch.where((index <= ZERO) & kept, NEW, ZERO))
        else:
            apart = self.apart[units]
            queries = torch.isin(apart, self.left)
            index = torch.where(queries & (index == NEW), ZERO, index)
            if self.gains and bool(queries.any()):
                rows = torch.tensor([self.gains.get(label, 1.0) for label in apart.tolist()], dtype=torch.double)
            share = 1.0 / self.count[plan.teacher_of[roots].clamp(min=0)].clamp(min=1).double()
        index, means = self._means(index, roots, theirs)
        if reads:
            return self._reading(index, roots, groups, means), rows
        return _axis(index, reads, groups, share, means), rows

    def _matched(self, units: Tensor, source: Tensor) -> Tensor:
        """For every entry of a student's axis, by its label, the teacher's entry, or the code of what it holds."""
        plan = self.plan
        roots, theirs = plan.student_roots[units], plan.teacher_roots[source]
        parts = _part(roots, self.apart[units]), _part(theirs, self.teacher_apart[source])
        return _matched(roots, plan.teacher_of[roots], theirs, parts)

    def _means(self, index: Tensor, roots: Tensor, theirs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The index with a code of its own for every mean, and the teacher's entries that each is over.

        The k-th entry of a unit holds the mean of the k-th entries of the units that it is the mean of.
        """
        if not bool((index <= MEAN).any()):
            return index, ()
        rank, source_rank = _rank(roots), _rank(theirs)
        index, codes, means = index.clone(), {}, []
        for entry in (index <= MEAN).nonzero().flatten().tolist():
            what = MEAN - int(index[entry]), int(rank[entry])
            if what not in codes:
                codes[what] = MEAN - len(means)
                among = torch.isin(theirs, self.plan.means[what[0]]) & (source_rank == what[1])
                means.append(among.nonzero().flatten())
            index[entry] = codes[what]
        return index, tuple(means)

    def _inside(self, name: str, units: Tensor, source: Tensor, groups: int) -> Tensor:
        """The axis inside a group: for every student group its places in the teacher's group that it copies."""
        plan = self.plan
        other = plan.teacher.parameters.inner.get(plan.names[name] or "")
        if other is None:
            raise TransferError(f"{name} is in groups that its teacher's counterpart does not fit into.")
        theirs = plan.teacher_roots[source].reshape(other[1], -1)
        among, times = self._merged(plan.names[name] or "")
        empty = (-among % times) * theirs.shape[1] // times  # places in the last group that nothing fills
        rows = []
        for mine in plan.student_roots[units].reshape(groups, -1):
            copied = plan.teacher_of[mine]
            owner = (torch.isin(theirs, copied)).any(1).nonzero().flatten()
            if not len(owner):
                raise TransferError(f"A group of {name} reads no units that a group of its teacher reads.")
            index = _matched(
                mine, copied, theirs[owner[0]], (torch.zeros_like(mine), torch.zeros_like(theirs[owner[0]]))
            )
            entries = theirs.shape[1] - (empty if int(owner[0]) == len(theirs) - 1 else 0)
            self._check_complete(name, index, entries, 1)
            self._check_closed(name, mine, index)
            rows.append(index)
        return torch.cat(rows)

    def _check_complete(self, name: str, index: Tensor, entries: int, dim: int) -> None:
        if lost := entries - len(torch.unique(index[index >= 0])):
            raise TransferError(
                f"{name} has no counterpart of {lost} of the {entries} units that the teacher's has on axis {dim}: the "
                "student must carry every unit of its teacher to every layer that reads it."
            )

    def _check_closed(self, name: str, roots: Tensor, index: Tensor) -> None:
        """A unit with several entries is copied with all of them; only queries and keys may have more than their
        teacher's, which are zero."""
        lost = (index == NEW) & (self.plan.teacher_of[roots] >= 0)
        for root in roots[lost].tolist():
            if root not in self.open:
                why = next((f", as {why}" for units, why in self.why if root in units), "")
                raise TransferError(
                    f"{name} cannot grow in this way: it has {int((roots == root).sum())} entries of one unit, more "
                    f"than its teacher. They move as a whole{why}."
                )

    # -- tied weights -----------------------------------------------------------------------------------------

    def is_tied(self, name: str) -> bool:
        """Whether a table of embeddings is the weight of a layer, too, and grows."""
        axis = self.plan.student.parameters.read_axis.get(name)
        layer = self.plan.student.layers.get(name)
        entries = None if axis is None or layer is None else self.plan.student.parameters.axes[name][axis]
        tied = layer is not None and layer.options.get("embedding") and entries is not None
        if not tied or entries is None:
            return False
        copied = self.plan.teacher_of[self.plan.student_roots[entries]]
        return bool(((copied < 0) | (self.count[copied] > 1)).any())  # `count` of a code is never looked at

    def untied(self, name: str, origins: dict[str, Origin]) -> dict[str, Origin]:
        """A tied table holds copies as they are; the norm before the layer that reads it takes the shares instead."""
        student, axis = self.plan.student, self.plan.student.parameters.read_axis[name]
        layer = student.layers[name]
        norm = student.layers.get(layer.after_norm or "")
        before = [student.layers[source] for source in sorted(layer.sources) if source in student.layers]
        if norm is not None and "weight" in norm.tensors and self._readers(norm.name) == [name]:
            takers = [norm]
        elif layer.linear and before and all(self._takes_shares(other, name) for other in before):
            takers = before
        else:
            raise TransferError(
                f"{name} embeds and is read by a layer: its copies would have to be whole for the one and shared out "
                "for the other. That is exact only if a norm with a weight, or a layer, stands before that layer, and "
                "before no other."
            )
        share = origins[name].axes[axis].share
        made = {name: replace(origins[name], axes=origins[name].axes | {axis: self._embedded(name, axis)}, tied=True)}
        for tensor in {taker.tensors[role] for taker in takers for role in taker.tensors.keys() & {"weight", "bias"}}:
            rows = origins[tensor].rows
            made[tensor] = replace(origins[tensor], rows=share if rows is None else rows * share, tied=True)
        return made

    def _embedded(self, name: str, dim: int) -> Axis:
        """The axis of a tied table as what embeds: padding holds what the norm before the reader makes zero of."""
        theirs = self.plan.names[name]
        assert theirs is not None
        units, source = _entries(self.plan.student, name, dim), _entries(self.plan.teacher, theirs, dim)
        assert units is not None and source is not None
        axis, _ = self._axis(name, units, source, dim, reads=False)
        if bool((axis.index == NEW).any()):
            raise TransferError(
                f"{name} embeds and is read by a layer, and grows by units that its teacher lacks: what is fresh for "
                "the one would have to be zero for the other."
            )
        return axis

    def _readers(self, name: str) -> list[str]:
        """The layers that read what a layer produces, or a norm passes on."""
        return [other.name for other in self.plan.student.layers.values() if name in other.sources | other.norms_since]

    def _takes_shares(self, layer: Layer, reader: str) -> bool:
        """Whether the units of `layer` may be scaled for the sake of the one layer that reads them."""
        student = self.plan.student
        own = layer.kind == "mix" and layer.name != reader and self.plan.names[layer.name] is not None
        first = (
            own
            and student.parameters.axes[layer.name][0] is layer.produces
            and student.parameters.read_axis[layer.name] != 0
        )
        return bool(first) and self._readers(layer.name) == [reader]


def _padded(origin: Origin, role: str, factor: float) -> Origin:
    """The affine tensor of a norm that sees padding: what the norm has centred is multiplied by anything."""
    axes = {}
    for dim, axis in origin.axes.items():
        index = torch.where(axis.index <= ZERO, ZERO if role == "bias" else NEW, axis.index)
        axes[dim] = replace(axis, index=index, means=())
    return replace(origin, axes=axes, factor=origin.factor * factor)


def _entries(trace: Trace, name: str, dim: int) -> Tensor | None:
    """The labels of a tensor's axis; of one inside groups those of every group in turn."""
    if name in trace.parameters.inner and dim == 1:
        return trace.parameters.inner[name][0]
    return trace.parameters.axes[name][dim] if name in trace.parameters.axes else None


def _axis(
    index: Tensor, reads: bool, groups: int = 1, share: Tensor | None = None, means: tuple[Tensor, ...] = ()
) -> Axis:
    """An axis with what follows from its index: which entries are first, and equal shares among those that read."""
    keyed = index
    if groups > 1:
        keyed = index + torch.arange(groups).repeat_interleave(len(index) // groups) * (int(index.max()) + 2)
        keyed = torch.where(index >= 0, keyed, index)
    if reads:
        _, inverse, counts = torch.unique(keyed, return_inverse=True, return_counts=True)
        share = torch.where(index >= 0, 1.0 / counts[inverse].double(), 0.0)
    assert share is not None or not reads
    share = torch.ones(len(index), dtype=torch.double) if share is None else share
    return Axis(index, (_rank(keyed) == 0) & (index >= 0), reads, share, groups, means)


def _taps(layer: Layer, other: Layer, mine: int, theirs: int, dim: int) -> Axis | None:
    """Where the teacher's kernel lies in a larger one: at the taps that look at the same places; None if all of it."""
    options = [
        {
            what: value[dim] if isinstance(value := each.options.get(what, 1), (tuple, list)) else value
            for what in ("stride", "dilation", "padding", "outer")
        }
        for each in (layer, other)
    ]
    same = mine == theirs and options[0] == options[1]
    if same:
        return None
    places, shorter = [], []  # where each tap looks, and by how much the result is shorter than what is read
    for option, size in zip(options, (mine, theirs), strict=True):
        spread, padding = option["dilation"], option["padding"]
        padding = padding if not isinstance(padding, str) else (spread * (size - 1) // 2 if padding == "same" else 0)
        before, behind = option["outer"]
        places.append([tap * spread - padding - before for tap in range(size)])
        same_size = option["padding"] == "same"
        shorter.append((0 if same_size else spread * (size - 1) - 2 * padding) - before - behind)
    lost = set(places[1]) - set(places[0])
    resized = shorter[0] != shorter[1] and options[0]["stride"] == 1 and not layer.options["transposed"]
    if lost or resized or options[0]["stride"] != options[1]["stride"]:
        raise TransferError(
            f"The kernel of {layer.name} ({mine} taps, padding {options[0]['padding']}, stride {options[0]['stride']}, "
            f"dilation {options[0]['dilation']}) does not look at every place that the teacher's looks at "
            f"({theirs} taps, padding {options[1]['padding']}, stride {options[1]['stride']}, "
            f"dilation {options[1]['dilation']}): a larger kernel has the teacher's in its middle, and more padding."
        )
    where = {place: tap for tap, place in enumerate(places[1])}
    index = torch.tensor([where.get(place, ZERO) for place in places[0]])
    return _axis(index, True)


def _matched(units: Tensor, copied: Tensor, source: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
    """Pair the k-th entry of a student unit with the k-th entry of the teacher unit that it copies.

    A unit has several entries on one axis where maps are flattened or a tensor is concatenated with itself; both
    networks lay them out in one order. `units` and `copied` hold each student entry's unit and the teacher unit it
    copies, `source` each teacher entry's unit. `parts` (of queries, of keys) are counted each for itself.
    """
    many = int(max(part.max() for part in parts)) + 1
    rank, source_rank = (_rank(side * many + part) for side, part in zip((units, source), parts, strict=True))
    ranks = int(torch.cat([rank, source_rank]).max()) + 1
    key, source_key = (
        (side * many + part) * ranks + k
        for side, part, k in zip((copied, source), parts, (rank, source_rank), strict=True)
    )
    order = torch.argsort(source_key)
    place = torch.searchsorted(source_key[order], key).clamp(max=len(source) - 1)
    found = (source_key[order][place] == key) & (copied >= 0)
    return torch.where(found, order[place], torch.where(copied >= 0, NEW, copied))


def _part(roots: Tensor, apart: Tensor) -> Tensor:
    """For every entry how many parts of its unit, which only a contraction joins, begin before its own does."""
    if torch.equal(torch.unique(roots), torch.unique(apart)):
        return torch.zeros_like(roots)
    begin = {part: k for k, part in reversed(list(enumerate(apart.tolist())))}
    first = torch.tensor([begin[part] for part in apart.tolist()])
    numbers = torch.empty_like(roots)
    for root in torch.unique(roots).tolist():
        at = roots == root
        numbers[at] = torch.unique(first[at], return_inverse=True)[1]
    return numbers


def _rank(values: Tensor) -> Tensor:
    """How often each entry's value has occurred before it."""
    order = torch.argsort(values, stable=True)
    ordered = values[order]
    start = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(values)
    rank[order] = torch.arange(len(values)) - start
    return rank


def _on_others(
    teacher: nn.Module, student: nn.Module, inputs: Inputs, enough: float
) -> tuple[Equivalence, float] | None:
    """The difference on inputs that are drawn: what is dead on the example may be alive on those.

    With it the difference that rounding may make there, if it is not small `enough`: far from its data a deep network
    can amplify it without bound. None if no such inputs serve.
    """
    for others in (inputs.draw_like(), inputs.draw_like(numbers=None)):
        try:
            theirs = run(teacher, others)
        except TransferError:
            continue  # it takes no other number of rows
        if all(bool(x.isfinite().all()) for x in tensors_in(theirs)):
            measured = compare(theirs, run(student, others))
            if measured.max_relative <= enough:
                return measured, enough
            # Rounding disturbs every layer, this the input alone, by little: 1e4 times its effect leaves room for that.
            # A hundredth of the output is no rounding, however deep the network.
            beside = others.map(lambda x: x * (1 + 4 * torch.finfo(x.dtype).eps) if x.is_floating_point() else x)
            return measured, max(enough, min(1e4 * compare(theirs, run(teacher, beside)).max_relative, 1e-2))
    return None


def _tolerance(plan: Plan) -> float:
    """The relative difference that rounding may make: the square root of the coarsest precision."""
    floating = [
        t
        for t in (*plan.student.parameters.tensors.values(), *plan.teacher.parameters.tensors.values())
        if t.is_floating_point()
    ]
    return max((torch.finfo(t.dtype).eps for t in floating), default=torch.finfo(torch.float32).eps) ** 0.5


def _refuse_if_different(measured: Equivalence, plan: Plan, where: str, tolerance: float) -> None:
    if not measured.max_relative <= tolerance:
        new = sorted(plan.identity) or ["none"]
        raise TransferError(
            f"The filled student does not compute its teacher's function: on {where} they differ by "
            f"{measured.max_relative:.1e} relative, more than {tolerance:.1e}. The two forward passes do something "
            "different with the same units: an activation behind a new layer that is not idempotent, another layout. "
            f"Layers that pass units through: {', '.join(new[:8])}."
        )
