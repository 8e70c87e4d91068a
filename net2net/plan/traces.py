"""Make the traces of two networks comparable: the same groups, the same heads, the same constant factors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from ..errors import TransferError, used_differently
from ..network import Inputs, refuse_empty
from ..trace.facts import Key, Norm
from ..trace.graph import SeenAs, Trace
from ..trace.tracer import trace, trace_shapes
from ..trace.units import Units
from .names import Names, Rename, Unpaired, key_converter, teacher_names
from .norm_chains import NormChains

LARGE = 10**10  # with so many products in the teacher's pass, it is faster to trace the student without values


@dataclass(frozen=True)
class Traces:
    """The traces of a teacher and a student, and the ways to look at them."""

    inputs: Inputs  # what both networks were run on
    plain: tuple[Trace, Trace]  # of teacher and student, each as the network is
    scaled_layers: tuple[frozenset[str], frozenset[str]]  # layers whose result the other network multiplies otherwise

    @cached_property
    def absorbed(self) -> tuple[Trace, Trace]:
        """The traces in which the numbers that multiply the results of `scaled_layers` count as part of the weights."""
        pairs = zip(self.plain, self.scaled_layers, strict=True)
        theirs, mine = (trace(each.model, self.inputs, SeenAs(scale_absorbed=layers)) for each, layers in pairs)
        return theirs, mine

    @property
    def has_groups(self) -> bool:
        """Whether the student has a layer with groups."""
        return bool(self.plain[1].parameters.inner)

    @property
    def training_counts(self) -> bool:
        """Whether either network was run in training mode, too, because that may show more than the eval mode."""
        return any(each.both is not None for each in self.plain)

    def comparable(self, rename: Rename, absorb: bool = False, both_modes: bool = True) -> tuple[Trace, Trace]:
        """Return the traces of teacher and student, each traced again if the other has other groups or heads."""
        # With `absorb` they are the traces of `absorbed`, and with `both_modes` they hold what the training mode adds.
        theirs, mine = ((both_modes and each.both) or each for each in (self.absorbed if absorb else self.plain))
        names = teacher_names(mine, theirs, rename)
        merged = _merged_groups(theirs, mine, names)
        related, as_grouped = _split_pairs(theirs, mine, names)
        related |= _split_groups(theirs, mine, names) - {Key(name) for name in merged}
        if related or merged:
            again = trace(theirs.model, self.inputs, SeenAs(related, merged, theirs.seen_as.scale_absorbed))
            theirs = (both_modes and again.both) or again
        if as_grouped:
            again = trace(mine.model, self.inputs, SeenAs(as_grouped, scale_absorbed=mine.seen_as.scale_absorbed))
            mine = (both_modes and again.both) or again
        return theirs, mine


def trace_both(teacher: nn.Module, student: nn.Module, inputs: Inputs, rename: Rename) -> Traces:
    """Trace both networks, which must share no parameters, on `inputs`."""
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise TransferError("The teacher and the student share parameters: make the student a network of its own.")
    theirs = trace(teacher, inputs)
    refuse_empty(theirs.output)  # it would pin no units
    has_values = not any(x.is_meta for x in inputs.tensors)
    plain = theirs, (trace_shapes if theirs.products > LARGE and has_values else trace)(student, inputs)
    return Traces(inputs, plain, _differing_scales(plain, rename))


def _differing_scales(traces: tuple[Trace, Trace], rename: Rename) -> tuple[frozenset[str], frozenset[str]]:
    """Find the layers whose result is always multiplied by one number, and by another in the other network."""
    # An example is an embedding times the root of the width, to which positions are added: no reader of the sum can
    # undo that number, but the embedding can.
    theirs, mine = (
        {layer: next(iter(by)) for layer, by in each.multipliers.items() if len(by) == 1} for each in traces
    )
    try:
        names = teacher_names(traces[1], traces[0], rename)
    except Unpaired:  # new layers renumber old ones: the attempts will find the names, and equal ones serve here
        names = {name: name for name in mine}
    differing = {name: other for name in mine if (other := names.get(name)) in theirs and mine[name] != theirs[other]}
    return frozenset(other for other in differing.values() if other), frozenset(differing)


def _split_groups(theirs: Trace, mine: Trace, names: Names) -> frozenset[Key]:
    """Find the layers and products that have one group or head in the teacher, and several in the student."""
    depthwise = [{layer.name for layer in each.layers.values() if "taps" in layer.tensors} for each in (theirs, mine)]
    grouped = {names[name] for name in depthwise[1] | mine.parameters.values.keys()}
    found = {Key(name) for name in grouped - depthwise[0] - theirs.parameters.values.keys() if name is not None}
    inner = {names[name] for name in mine.parameters.inner} - theirs.parameters.inner.keys()
    found |= {Key(name, "groups") for name in inner if name is not None}
    convert = key_converter(names)
    keys = {convert(c.key) for c in mine.contractions} - {c.key for c in theirs.contractions}
    return frozenset(found | {key for key in keys if key is not None})


def _split_pairs(theirs: Trace, mine: Trace, names: Names) -> tuple[frozenset[Key], frozenset[Key]]:
    """Find the calls whose operands' units become one in one network, and belong to each other in the other."""
    # The keys are those of the teacher and those of the student. Where one network makes joint units of both operands
    # (the part `left`), the other has to do so, too.
    convert, found = key_converter(names), (set(), set())
    for key in mine.units.meetings:
        other = convert(key)
        if other not in theirs.units.meetings:
            continue
        sides = (theirs, other), (mine, key)
        parts = [{p for p in ("<", ">", "left") if replace(k, part=p) in s.units.relations} for s, k in sides]
        wanted = parts[0] | parts[1]
        for keys, (_, each), has in zip(found, sides, parts, strict=True):
            keys |= {replace(each, part=part) for part in wanted & {"left"} or wanted} if has != wanted else set()
    return frozenset(found[0]), frozenset(found[1])


def _merged_groups(theirs: Trace, mine: Trace, names: Names) -> dict[str, int]:
    """Find the layers with fewer groups in the student, and how many of the teacher's groups become one there."""
    found: dict[str, int] = {}
    for layer in mine.layers.values():
        other = theirs.layers.get(names.get(layer.name) or "")
        if other is not None and (groups := layer.options.get("groups", 1)) < (more := other.options.get("groups", 1)):
            times = -(-more // groups)
            room = mine.parameters.tensors[layer.name].shape[1] // theirs.parameters.tensors[other.name].shape[1]
            found |= {other.name: times} if times <= room else {}
    return found


@dataclass(frozen=True)
class Networks:
    """Both traces, and the names and units that a plan works with. The plan changes no trace."""

    teacher: Trace
    student: Trace
    names: Names  # the teacher's name of every student tensor; None where it has no such tensor
    convert: Callable[[Key], Key | None]  # from the student's keys to the teacher's
    chains: NormChains  # the student's norms that stand in a row for one of the teacher's
    teacher_units: Units  # a copy of the trace's units, in which the plan unites more of them
    student_units: Units
    teacher_roots: Tensor  # for every label its root: the one label that stands for its unit
    student_roots: Tensor

    def teacher_norm(self, norm: Norm) -> Norm | None:
        """Return the teacher's counterpart of a norm of the student."""
        if norm.name in self.chains.parts:
            return self.chains.parts[norm.name]
        if any(self.names[tensor] is None for tensor in norm.tensors.values()):
            return None
        key = self.convert(norm.key)
        return next((other for other in self.teacher.norms if other.key == key), None)

    def produced(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the roots of the units that a layer produces in the student and in the teacher."""
        theirs = self.names[name]
        assert theirs is not None
        mine = self.student.layers[name].produces
        other = self.teacher.layers[theirs].produces if theirs in self.teacher.layers else None
        if mine is None or other is None:
            raise used_differently(name)
        if len(mine) < len(other):
            raise TransferError(
                f"The student is smaller than its teacher: {name} has {len(mine)} units, the teacher's {len(other)}, "
                f"{len(other) - len(mine)} too few. A student is at least as wide everywhere."
            )
        return self.student_roots[mine], self.teacher_roots[other]
