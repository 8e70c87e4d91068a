"""The plan of a growth, decided before a single weight is written."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..record import Axis, Mixed
from ..trace.activations import Bends
from ..trace.facts import Key, Norm
from ..trace.graph import Trace
from ..trace.units import Units
from .mapping import map_units
from .mixing import find_rotations, find_streams
from .names import Rename, key_converter, teacher_names
from .norm_chains import find_norm_chains
from .norms import adjust_norms, norm_kinds
from .roles import Roles, assign_roles, find_sign_pairs, unite_passed
from .traces import Networks

Labels = tuple[Tensor, Tensor]  # the labels of one axis in the student and in the teacher


@dataclass(frozen=True)
class Plan(Networks):
    """The plan of a growth: what each unit of the student copies, and what each new layer becomes."""

    g: Tensor  # for every student root the teacher root that it copies, or `NEW`, `ZERO` or `MEAN - k`
    means: list[Tensor]  # the teacher units that the code `MEAN - k` is the mean of
    roles: Roles  # what each layer becomes that the teacher lacks
    padding_factors: dict[Key, tuple[Norm, float]]  # norms that see another mean square here, and its factor
    eps: dict[str, float]  # module, or attribute of one -> the eps that a norm needs there
    sign_pairs: dict[str, Bends]  # new layer -> the activations that its units pass in sign pairs
    patterns: Tensor  # for units in sign pairs: bit k is 1 if the unit is negated before activation k
    rotations: dict[str, tuple[Mixed, ...]]  # tensor on a rotated stream -> how each of its axes is rotated
    # Axes that are known already: the four tensors of a batch norm share one. The keys are the ids of two tensors of
    # labels. The value holds these tensors, so that no other tensor gets their ids.
    producing_axes: dict[tuple[int, int], tuple[Labels, Axis, Tensor | None]] = field(default_factory=dict)

    @cached_property
    def copies(self) -> Tensor:
        """For every teacher root the number of student units that copy it. Units of identities alone do not count."""
        handed, own = [], []
        for layer in self.student.mixers:
            if layer.produces is not None:
                (handed if layer.name in self.roles.identity else own).append(self.student_roots[layer.produces])
        units = torch.unique(self.student_roots)
        if handed and own:
            units = units[~torch.isin(units, torch.cat(handed)) | torch.isin(units, torch.cat(own))]
        copied = self.g[units]
        return torch.bincount(copied[copied >= 0], minlength=len(self.teacher_roots))

    @cached_property
    def gains(self) -> dict[str, float]:
        """For each layer of the student the number that multiplies its input, also before new identities."""
        gains: dict[str, float] = {}
        for name, layer in self.student.layers.items():
            passed = {gains.get(source, 1.0) for source in layer.sources & self.roles.identity}
            gains[name] = layer.gain * (passed.pop() if len(passed) == 1 else 1.0)
        return gains

    @cached_property
    def apart(self) -> Tensor:
        """The student's roots as if contractions had united nothing: a query and its key are two units here."""
        return self.student_units.roots_without_contractions()

    @cached_property
    def teacher_apart(self) -> Tensor:
        """The same for the teacher."""
        return self.teacher_units.roots_without_contractions()

    @cached_property
    def queries(self) -> Tensor:
        """The labels of queries. A query may have more entries here than in the teacher: the further ones are zero."""
        return self._with_parts([c.left for c in self.student.contractions])

    @cached_property
    def keys(self) -> Tensor:
        """The labels of keys: what queries are multiplied by."""
        return self._with_parts([c.right for c in self.student.contractions])

    def _with_parts(self, sides: list[Tensor]) -> Tensor:
        """Return the labels of queries or keys, with those of layers that they are sums of, as rotated pairs are."""
        none = torch.empty(0, dtype=torch.long)
        labels = torch.cat([none, *sides])
        produced = self.apart[torch.cat([none, *(x.produces for x in self.student.mixers if x.produces is not None)])]
        for key, (joined, parts) in reversed(self.student_units.relations.items()):
            if key.part in ("left", "right"):
                of_layers = torch.isin(self.apart[parts], produced)
                labels = torch.cat([labels, parts[of_layers & torch.isin(self.apart[joined], self.apart[labels])]])
        return labels

    @cached_property
    def padded_norms(self) -> set[str]:
        """The names of the norms that see another mean square than in the teacher, as padding changes it."""
        return {norm.name for norm, _ in self.padding_factors.values()}

    @cached_property
    def query_gains(self) -> dict[int, float]:
        """Root of a query in `apart` -> its factor, which turns the student's number into the teacher's."""
        # This is the number that multiplies logits before a softmax, or before a mask is added to them.
        gains: dict[int, float] = {}
        theirs = _numbers_of_logits(self.teacher)
        for key, (gain, units) in _numbers_of_logits(self.student).items():
            wanted = theirs.get(self.convert(key) or key, (gain, units))[0]
            for contraction in self.student.contractions if wanted != gain else ():
                if bool(torch.isin(self.student_roots[contraction.left], self.student_roots[units]).any()):
                    queries = self._with_parts([contraction.left])
                    gains |= dict.fromkeys(self.apart[queries].tolist(), wanted / gain)
        return gains


def _numbers_of_logits(traced: Trace) -> dict[Key, tuple[float, Tensor]]:
    """Return for each softmax, and each call with one number in front of its operands, that number and the units."""
    found = {key: (gain, units) for key, (gain, _, units) in traced.softmax_gains.items()}
    return found | {k: (by[0], units) for k, (by, units, _) in traced.fixed_gains.items() if len(by) == 1}


def _close(
    teacher_units: Units, units: Units, convert: Callable[[Key], Key | None], teacher_first: bool = False
) -> None:
    """Close the units of both networks: a grouping inside another in the first lies inside it in the second, too."""
    # The first is the student, or with `teacher_first` the teacher.
    if not teacher_first:
        units.close()
        teacher_units.close({other for key in units.relations if key.inside and (other := convert(key)) is not None})
        return
    mine = {convert(key): key for key in units.relations}
    teacher_units.close()
    pairs = [(mine.get(replace(key, inside=None)), mine.get(key.inside)) for key in teacher_units.relations]
    units.close({replace(a, inside=b) for a, b in pairs if a is not None and b is not None})


def make_plan(
    traces: tuple[Trace, Trace],
    rename: Rename,
    generator: torch.Generator,
    passing_all: bool,
    in_pairs: bool,
    side_by_side: bool,
    fresh: bool,
) -> Plan:
    """Decide which teacher unit every student unit copies and what each new layer becomes (paper, section 3)."""
    # With `passing_all`, every new layer is an identity unless its units are also those of a layer that both networks
    # have. That is right for a block that works on one part of a stream and then shuffles it with the rest. With
    # `in_pairs`, units pass activations behind new layers in sign pairs (see `roles`), where there is room for them.
    # With `side_by_side`, the copies of a unit stand beside it.
    teacher, student = traces
    names = teacher_names(student, teacher, rename)
    units, teacher_units = student.units.copy(), teacher.units.copy()
    roles = assign_roles(teacher, student, units, names, passing_all)
    idle = roles.silent | roles.fresh
    chains = find_norm_chains(teacher, student, units, names, idle)
    convert = key_converter(names, chains.names)
    if chains.names:
        names = names | chains.names
        roles = assign_roles(teacher, student, units, names, passing_all)
    sign_pairs = find_sign_pairs(student.layers.values(), roles.identity, idle) if in_pairs else {}
    unite_passed(student, units, roles.identity, sign_pairs)
    _close(teacher_units, units, convert, teacher_first=bool(student.seen_as.as_grouped))
    known = (teacher, student, names, convert, chains, teacher_units, units, teacher_units.roots(), units.roots())
    networks = Networks(*known)
    streams = find_streams(networks, roles.identity)
    rotated = torch.zeros(len(networks.student_roots), dtype=torch.bool)
    for stream in streams:
        rotated[stream.units] = True
    identities = [layer for layer in student.mixers if layer.name in roles.identity]
    passing = [(layer, len(sign_pairs.get(layer.name, ()))) for layer in identities]
    unit_map = map_units(networks, passing, norm_kinds(networks), rotated, generator, (side_by_side, fresh))
    g, means, patterns, norms = unit_map.g, unit_map.means, unit_map.patterns, adjust_norms(unit_map)
    return Plan(*known, g, means, roles, *norms, sign_pairs, patterns, find_rotations(networks, streams))
