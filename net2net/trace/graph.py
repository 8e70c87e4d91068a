"""Remapping inference: one forward pass learns which axis of which tensor carries which units.

The paper (section 3.3) describes, without building it, a pass "like shape inference" that asks every
operation how it moves units. This is that pass. Every activation carries a tensor of integer unit labels of its
own shape (expanded views, so almost no memory): data movement is applied to the labels themselves, and what an
operation does to units otherwise is one short rule (`rules.py`). Labels are numbers without meaning; two labels
that meet in an elementwise operation are one unit (`find`).

A unit may have several entries in a tensor (a flattened map, the head of an attention): it is copied as a whole.
Units may also belong to a larger unit (a channel to its group, a value to its head): `relate` says so, and a copy
of the smaller one stays inside a copy of the larger one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import TransferError
from ..plan.sign_pairs import NOTHING, Passage
from .activations import Chain, Range, hull


@dataclass(frozen=True)
class Labels:
    """What is known of an activation.

    `units` has the activation's shape. `sources` names the layers whose outputs are summed or concatenated in it; `via`
    names the normalisations that it has passed since. `gain` is the product of the plain numbers that it was multiplied
    by since a layer produced it. `linear` says that it is a plain sum of what layers produced, so that one of its units
    can hold the mean of others. `normed` names the norm that it comes from directly: units which that saw as its mean,
    or as zero, are zero here. `begun` names the one norm across units that it begins with, if it is a plain sum since.
    `past` tells of activations and gates. `outer` says by how much it has just been padded, before and behind, the last
    axis first. `range` is between which numbers it lies, `chain` the activations that it has met, one directly behind
    the other, since the last layer. `raw` names the layer whose result it is, untouched.
    """

    units: Tensor
    sources: frozenset[str] = frozenset()
    via: frozenset[str] = frozenset()
    gain: float = 1.0
    linear: bool = False
    normed: str | None = None
    begun: str | None = None
    past: Passage = NOTHING
    outer: tuple[tuple[int, int], ...] = ()
    range: Range = None
    chain: Chain | None = None
    raw: str | None = None


@dataclass(frozen=True)
class Layer:
    """A parametrised operation that the forward pass met: a reader of units, a producer of units, or both.

    `kind` is `mix` (convolution, linear, embedding: reads units, produces new ones), `norm` or `scale` (one entry a
    unit) or `output` (the network's result, which reads and has no parameters). `name` is that of its weight or, for a
    norm without affine parameters, of its module. `reads` labels the entries of the axis that it reads,
    `produces` those of the axis that it produces.
    """

    kind: str
    name: str
    tensors: dict[str, str]  # role (weight, bias, mean, var) -> name of the parameter or buffer
    reads: Tensor | None
    sources: frozenset[str]
    via: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)
    produces: Tensor | None = None
    gain: float = 1.0
    linear: bool = False
    normed: str | None = None
    begun: str | None = None
    past: Passage = NOTHING
    range: Range = None  # of what it reads

    @property
    def module(self) -> str:
        """The name of the module that owns the layer's weight; of a weight of the network's own, that weight's."""
        return self.name.rpartition(".")[0] or self.name


PLAIN = ""  # what a norm sees begins with no other norm


@dataclass(frozen=True)
class Norm:
    """What takes a mean across units: exact if each of its groups sees all units of the teacher's equally often.

    `units` holds the labels of every group, one row each. `kind` is `layer` (subtracts the mean), `rms`, or, without
    normalisation, `mean` or `extreme` (exact if each unit is seen at all); `padded` says that the units before it
    could hold means, or zeros, which it can undo. `name` is that of its layer; `begun` names the norm that what it
    sees begins with, `PLAIN` if it is a sum of layers.
    """

    key: str
    kind: str
    units: Tensor
    tensors: dict[str, str]
    eps: float
    module: str
    padded: bool
    name: str = ""
    begun: str | None = None


@dataclass(frozen=True)
class Contraction:
    """A product that sums over units of two activations (queries by keys): it needs each unit once.

    `left` holds the labels of one factor, whose entries beyond the teacher's are zero in a student.
    """

    key: str
    left: Tensor


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of one: for each axis of the view the parameter's axis and the entries taken of it.

    `gain` is the number that it was multiplied by.
    """

    name: str
    axes: list[tuple[int, Tensor | None]]
    gain: float = 1.0


@dataclass(frozen=True)
class View:
    """A tensor whose elements are those of a parameter: `places` has their place on each of its axes."""

    name: str
    places: tuple[Tensor, ...]
    gain: float = 1.0


@dataclass(frozen=True)
class Call:
    """One call of a torch function, its arguments by name or by position."""

    name: str
    func: Callable
    args: Sequence
    kwargs: dict[str, Any]
    out: Any
    module: str

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument, wherever it stands in the call."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the network'}"


class Trace:
    """What one forward pass of a network tells of its units."""

    def __init__(
        self,
        model: nn.Module,
        alike: frozenset[str] = frozenset(),
        merged: dict[str, int] | None = None,
        absorbed: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.absorbed = absorbed  # layers that take the number by which their result is multiplied for their own
        self.numbers: dict[str, set[float]] = {}  # layer -> by what its result is multiplied; 1 for every other use
        self.merged = merged or {}  # grouped layers, and how many of their groups are to be seen as one
        self.alike = alike  # tensors of one group or head, to be seen as those of several
        self.layers: dict[str, Layer] = {}  # in the order of the forward pass
        self.axes: dict[str, list[Tensor | None]] = {}  # tensor name -> labels of each of its axes
        self.values: dict[str, Tensor] = {}  # tensor name -> labels of all of its elements, flat
        self.reached: dict[str, Tensor] = {}  # tensor name -> which of its elements the forward pass used, flat
        self.read_axis: dict[str, int] = {}  # tensor name -> the axis that reads units
        self.inner: dict[str, tuple[Tensor, int]] = {}  # tensor in groups -> labels of its axis 1 in every group
        self.families: dict[str, Tensor] = {}  # labels that came into being together, by a key both networks share
        self.relations: dict[str, tuple[Tensor, Tensor]] = {}  # key -> labels, and those of the units they belong to
        self.keys: set[str] = set()  # of everything that met elementwise
        self.norms: list[Norm] = []
        self.gains: dict[str, tuple[float, frozenset[str], Tensor]] = {}  # where a number's size matters: softmax
        # Where the numbers in front of units can not be undone behind: they, the units, and the operation.
        self.fixed: dict[str, tuple[tuple[float, ...], Tensor, str]] = {}
        self.contractions: list[Contraction] = []
        self.reasons: list[tuple[Tensor, str]] = []  # labels that move as a whole only, and why
        self.pinned: list[tuple[Tensor, str]] = []  # labels that may not be copied at all, and why
        self.chains: dict[str, list[Chain]] = {}  # layer -> the activations directly behind it
        self.outputs: dict[str, Labels] = {}  # module name -> labels of its result, if that is one tensor
        self.stand_ins: list[str] = []  # weights that a parametrisation computes
        self.output: Any = None
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.originals = dict(self.tensors)
        self.buffers = {name for name, _ in model.named_buffers()}
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.first_names = {name: self._names[id(tensor)] for name, tensor in every}  # of a tied tensor, too
        self.modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self._root = torch.empty(0, dtype=torch.long)  # label -> smallest label of its unit
        self._pending: list[Tensor] = []  # 2 x k: labels that are one unit, not yet in `_root`
        self._ends: list[int] = []  # where the ranges of labels that came into being together end
        self._whole: list[bool] = []  # whether they are units of one layer
        self._apart: list[Tensor] = []  # 2 x k: the same without those that a contraction joined
        self._count = 0
        self._calls: Counter[str] = Counter()

    def copied(self) -> "Trace":
        """The same, in which more units can be joined and related."""
        other = copy(self)
        other._pending, other._apart, other.relations = list(self._pending), list(self._apart), dict(self.relations)
        return other

    # -- labels -------------------------------------------------------------------------------------------------

    def labels(self, value: object) -> Labels | None:
        """The labels of an activation, or of a parameter used as one; None for what the pass does not follow."""
        if not isinstance(value, Tensor):
            return None
        known = getattr(value, "_net2net_labels", None)
        if known is None and self.counts(value) and (view := self.view(value)) is not None:
            shape = self.tensors[view.name].shape
            if view.name not in self.values:
                self.values[view.name] = self.fresh(shape.numel(), view.name, whole=False)
            flat, step = torch.zeros(value.shape, dtype=torch.long), shape.numel()
            for places, size in zip(view.places, shape, strict=True):
                step //= size
                flat = flat + places * step
            units = self.values[view.name][flat]
            self.reached.setdefault(view.name, torch.zeros(shape.numel(), dtype=torch.bool))[flat] = True
            return Labels(units, frozenset({view.name}), gain=view.gain, linear=True)
        return known

    def counts(self, value: Tensor) -> bool:
        """Whether a parameter or constant has something to say of units: a single number says the same of all."""
        return value.numel() > 1 or self.parameter_of(value) in self.alike

    def follows(self, value: object) -> bool:
        """Whether the pass follows this value: an activation, or a parameter."""
        return isinstance(value, Tensor) and (
            hasattr(value, "_net2net_labels") or hasattr(value, "_net2net_view") or id(value) in self._names
        )

    def label(self, out: Tensor, labels: Labels) -> None:
        """Attach `labels` to the activation `out`."""
        if labels.units.shape != out.shape:
            raise TransferError(
                f"The labels {tuple(labels.units.shape)} do not fit the activation {tuple(out.shape)}: a rule is wrong."
            )
        out._net2net_labels = labels  # type: ignore[attr-defined]

    def fresh(self, count: int, key: str | None = None, whole: bool = True) -> Tensor:
        """`count` labels that nothing carries yet; a `key` that both networks share lets them be paired.

        They are units of one layer, not to be made one (`meet`), unless `whole` is False (elements of a parameter).
        """
        start, self._count = self._count, self._count + count
        self._ends.append(self._count)
        self._whole.append(whole)
        made = torch.arange(start, self._count)
        if key is not None:
            self.families[key] = made
        return made

    def key(self, what: str, where: str) -> str:
        """A name for the k-th such thing in a module, which the same thing has in the other network."""
        self._calls[f"{where}|{what}"] += 1
        return f"{where}|{what}|{self._calls[f'{where}|{what}']}"

    def unite(self, a: Tensor, b: Tensor, contraction: bool = False) -> None:
        """From here on the labels `a` and `b`, entry by entry, are one unit."""
        if a.shape != b.shape:
            raise TransferError(f"Units of widths {tuple(a.shape)} and {tuple(b.shape)} meet in one parameter.")
        if a.numel():
            edges = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1)
            self._pending.append(edges)
            if not contraction:
                self._apart.append(edges)

    def relate(self, key: str, children: Tensor, parents: Tensor) -> None:
        """Each unit of `children` belongs to the unit of `parents` beside it: a copy of it stays in a copy of that."""
        pairs = torch.unique(torch.stack([children.reshape(-1), parents.reshape(-1)]), dim=1)
        self.relations[key] = (pairs[0], pairs[1])

    def bundle(self, units: Tensor, dims: Sequence[int], why: str) -> Tensor:
        """Make one unit of all labels along `dims`, which then move as a whole; `units` with these axes of length 1."""
        first = units = self.tight(units)
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if first.shape != units.shape:
            self.unite(units, first.expand_as(units))
            self.reasons.append((torch.unique(first), why))
        return first

    def tight(self, units: Tensor) -> Tensor:
        """The same labels without the axes that merely repeat them: their length is 1."""
        units = compact(units)
        for dim, size in enumerate(units.shape):
            first = units.narrow(dim, 0, 1)
            if size > 1 and torch.equal(self.find(units), self.find(first).expand_as(units)):
                units = first
        return units

    def pin(self, units: Tensor, why: str) -> None:
        """The units keep their number: growing them raises an error that says `why`."""
        self.pinned.append((torch.unique(compact(units)), why))

    def line(self, units: Tensor, dim: int, why: str) -> Tensor:
        """The labels along one axis; where the other axes do not repeat them, they become one unit each."""
        dim %= units.dim()
        others = [d for d in range(units.dim()) if d != dim]
        return self.bundle(units, others, why).reshape(-1).expand(units.shape[dim])

    def find(self, labels: Tensor) -> Tensor:
        """The smallest label of each label's unit, as far as the pass has come: equal exactly for one unit."""
        if len(self._root) < self._count:
            self._root = torch.cat([self._root, torch.arange(len(self._root), self._count)])
        if self._pending:
            edges, self._pending = torch.cat(self._pending, dim=1), []
            self._root = _joined(self._root, edges)
        return self._root[labels]

    def roots(self) -> Tensor:
        """`find` of every label."""
        return self.find(torch.arange(self._count))

    def roots_apart(self) -> Tensor:
        """The same if contractions joined nothing: queries and keys are told apart."""
        edges = torch.cat(self._apart, dim=1) if self._apart else torch.empty(2, 0, dtype=torch.long)
        return _joined(torch.arange(self._count), edges)

    def meet(self, a: Tensor, b: Tensor, call: Call) -> Tensor:
        """Labels of an elementwise result: those that meet are one unit, unless that would make one unit of several
        that a layer keeps apart (a gate over all channels, a head's weights over its values): then each belongs to
        what it meets."""
        shape, key = a.shape, self.key(call.name, call.module)
        self.keys.add(key)
        a, b = torch.broadcast_tensors(self.tight(a), self.tight(b))
        mine, theirs = self.find(a), self.find(b)
        if torch.equal(mine, theirs):
            return a.expand(shape)
        base = self._count
        pairs, inverse = torch.unique(mine * base + theirs, return_inverse=True)
        left, right = pairs // base, pairs % base
        single = [len(torch.unique(side)) == len(pairs) for side in (left, right)]
        belongs = [f"{key}|<" in self.alike, f"{key}|>" in self.alike]  # in the other network these are no pairs
        if not any(belongs) and (all(single) or not self._collapses(left, right)):
            self.unite(a, b)
            return a.expand(shape)
        if single[0] and not belongs[1]:
            self.relate(f"{key}|<", left, right)
            return a.expand(shape)
        if single[1]:
            self.relate(f"{key}|>", right, left)
            return b.expand(shape)
        joined = self.fresh(len(pairs), key)
        self.relate(f"{key}|left", joined, left)
        self.relate(f"{key}|right", joined, right)
        return joined[inverse].reshape(a.shape).expand(shape)

    def _collapses(self, left: Tensor, right: Tensor) -> bool:
        """Whether uniting the roots `left` and `right` makes one unit of two that came into being together."""
        before = self.roots()
        after = _joined(before, torch.stack([left, right]))
        meeting = torch.zeros(self._count, dtype=torch.bool)
        meeting[left] = meeting[right] = True
        touched = meeting[before].nonzero().flatten()
        family = torch.bucketize(touched, torch.tensor(self._ends), right=True)
        whole = torch.tensor(self._whole)[family]
        touched, family = touched[whole], family[whole]
        count = [len(torch.unique(family * self._count + root[touched])) for root in (before, after)]
        return count[1] < count[0]

    # -- parameters ---------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Elements of a parameter that the forward pass did not use are units of those that it did: the positions
        beyond the example's length, the rows of other classes.

        Where that cannot be told, as the used ones differ along an axis that is used in part, they are pinned.
        """
        for name, reached in self.reached.items():
            shape = self.tensors[name].shape
            if reached.all() or len(self.values[name]) != len(reached):
                continue
            box, labels = reached.reshape(shape), self.values[name].reshape(shape)
            used = [box.movedim(dim, 0).reshape(shape[dim], -1).any(1).nonzero().flatten() for dim in range(len(shape))]
            partly = [dim for dim, at in enumerate(used) if len(at) < shape[dim]]
            inside = self.find(labels[torch.meshgrid(*used, indexing="ij")])
            alike = all(torch.equal(inside, inside.narrow(dim, 0, 1).expand_as(inside)) for dim in partly)
            if int(reached.sum()) != inside.numel() or not alike:
                self.pin(labels, f"the example uses only {int(reached.sum())} of the {len(reached)} elements of {name}")
                continue
            for dim in partly:  # as the first that is used
                like = torch.arange(shape[dim])
                like[~torch.isin(like, used[dim])] = used[dim][0]
                labels = labels.index_select(dim, like)
            self.unite(self.values[name], labels.reshape(-1))

    def name_of(self, tensor: object) -> str | None:
        """The name of a parameter or buffer of the network; shared tensors go by their first name."""
        return self._names.get(id(tensor))

    def parameter_of(self, value: Tensor) -> str | None:
        """The name of the parameter that this is, or is a view of."""
        view = getattr(value, "_net2net_view", None)
        return self.name_of(value) if view is None else view.name

    def is_buffer(self, value: Tensor) -> bool:
        """Whether this is a buffer, or a view of one."""
        return self.parameter_of(value) in self.buffers

    def stand_in(self, tensor: Tensor, name: str, prefix: str) -> None:
        """Let `tensor`, computed from the parameters under `prefix`, stand for them as the weight `name`."""
        self.tensors = {n: t for n, t in self.tensors.items() if not n.startswith(prefix)} | {name: tensor}
        self.originals = dict(self.tensors)
        self.first_names = {n: first for n, first in self.first_names.items() if not n.startswith(prefix)}
        self.stand_ins.append(name)
        self._names[id(tensor)] = name
        self.first_names[name] = name

    def view(self, value: Tensor) -> View | None:
        """The parameter that this is, or is a view of; None for an activation or a constant."""
        if hasattr(value, "_net2net_labels"):
            return None
        if (name := self._names.get(id(value))) is None:
            return getattr(value, "_net2net_view", None)
        shape = value.shape
        return View(name, tuple(spread(torch.arange(n), dim, shape) for dim, n in enumerate(shape)))

    def see(self, out: Tensor, view: View) -> None:
        """Remember that `out` is a view of a parameter."""
        out._net2net_view = view  # type: ignore[attr-defined]

    def weight(self, value: Tensor) -> Weight | None:
        """The parameter behind a weight, if every axis of the weight lies along an axis of the parameter."""
        if (name := self.name_of(value)) is not None:
            return Weight(name, [(dim, None) for dim in range(value.dim())])
        if (view := self.view(value)) is None:
            return None
        axes: list[tuple[int, Tensor | None]] = [(-1, None)] * value.dim()
        for axis, places in enumerate(map(compact, view.places)):
            moving = [dim for dim, size in enumerate(places.shape) if size > 1]
            if len(moving) > 1 or (moving and axes[moving[0]][0] >= 0):
                return None
            if moving:
                axes[moving[0]] = (axis, places.reshape(-1))
        unused = [axis for axis in range(len(view.places)) if axis not in dict(axes)]
        for dim, (axis, _) in enumerate(axes):
            if axis < 0 and unused:  # of length one
                axes[dim] = (unused[0], view.places[unused.pop(0)].reshape(-1)[:1])
        return Weight(view.name, axes, view.gain)

    def axis(self, name: str, dim: int, units: Tensor | None = None, taken: Tensor | None = None) -> Tensor:
        """Say that axis `dim` of the tensor `name` carries `units` (in the entries `taken`, or all); return its labels.

        A tensor that is used a second time carries the same units again. Without `units` fresh ones are made
        (the axis produces them).
        """
        tensor = self.tensors[name]
        axes = self.axes.setdefault(name, [None] * tensor.dim())
        known = axes[dim]
        if known is None:
            if taken is None and units is not None and len(units) != tensor.shape[dim]:
                raise TransferError(f"{name} is used {len(units)} wide on axis {dim}, and is {tensor.shape[dim]}.")
            known = units if units is not None and taken is None else self.fresh(tensor.shape[dim])
            axes[dim] = known
        part = known if taken is None else known[taken]
        if units is not None and units is not part:
            self.unite(units, part)
        return part

    def inside(self, name: str, groups: int, units: Tensor | None = None) -> Tensor:
        """Say that axis 1 of the tensor `name` carries `units`, a row of them for each of its groups; return labels."""
        if name not in self.inner:
            size = self.tensors[name].shape[1] * groups
            self.inner[name] = (self.fresh(size) if units is None else units, groups)
        known = self.inner[name][0]
        if units is not None and units is not known:
            self.unite(units, known)
        return known

    def add(self, layer: Layer) -> None:
        """Record a layer; a layer that is called again joins what it reads to its first record."""
        first = self.layers.get(layer.name)
        if first is not None:
            layer = replace(
                layer,
                reads=layer.reads if first.reads is None else first.reads,
                sources=first.sources | layer.sources,
                options=first.options | layer.options,
                via=first.via | layer.via,
                normed=layer.normed if first.reads is None or first.normed == layer.normed else None,
                begun=layer.begun if first.reads is None or first.begun == layer.begun else None,
                past=layer.past if first.past == layer.past else NOTHING,
                range=hull([first.range, layer.range]),
            )
        self.layers[layer.name] = layer


def _joined(root: Tensor, edges: Tensor) -> Tensor:
    """The roots once the labels of every edge are one unit: flat, each the smallest of its unit."""
    names, ends = torch.unique(root[edges], return_inverse=True)
    parent = torch.arange(len(names))
    while True:
        high, low = torch.maximum(parent[ends[0]], parent[ends[1]]), torch.minimum(parent[ends[0]], parent[ends[1]])
        hooked = parent.scatter_reduce(0, high, low, "amin")
        while not torch.equal(hooked, hooked[hooked]):
            hooked = hooked[hooked]
        if torch.equal(hooked, parent):
            break
        parent = hooked
    moved = torch.arange(len(root))
    moved[names] = names[parent]
    return moved[root]


def in_order(values: Tensor) -> Tensor:
    """The distinct values in the order in which they first occur."""
    return torch.tensor(list(dict.fromkeys(values.tolist())), dtype=torch.long)


def compact(units: Tensor) -> Tensor:
    """The same labels without the axes along which they are merely repeated in memory."""
    return units[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in units.stride())]


def spread(units: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of an activation of `shape` that carries `units` along axis `dim`: an expanded view."""
    return units.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(tuple(shape))


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel, torch.compile or an averaging wrapper.

    Raises TransferError for networks whose parameters are not plain tensors of the whole layer.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            break
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TransferError(f"{name} has no shape yet: run the lazy network once on an input first.")
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise TransferError(
                f"{name} is a {type(tensor).__name__}, no plain tensor: gather a sharded network first, grow a "
                "quantised one before it is quantised."
            )
    if any(type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")) for module in model.modules()):
        raise TransferError("The network is quantised: grow it before.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TransferError("The network is a ScriptModule, whose operations cannot be followed: pass the original.")
    return model


Example = Tensor | tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Example) -> "Inputs":
        """One tensor, a tuple of arguments, or a dict of keyword arguments."""
        if isinstance(example, dict):
            made = cls((), example)
        elif not isinstance(example, (Tensor, tuple)):
            made = cls((), {})
        else:
            made = cls(example if isinstance(example, tuple) else (example,), {})
        if not made.tensors:
            raise TransferError(
                "The example is a tensor, a tuple of arguments or a dict of keyword arguments, with "
                "one tensor at least."
            )
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor in the arguments."""
        return tensors_in([*self.args, *self.kwargs.values()])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same arguments with every tensor changed."""
        return Inputs(
            tuple(_mapped(value, change) for value in self.args),
            {name: _mapped(value, change) for name, value in self.kwargs.items()},
        )

    def others(self, seed: int = 0, numbers: int | None = 2**16) -> "Inputs":
        """Other inputs of the same kind, drawn: normal ones as spread as they are, whole numbers from among them.

        As many rows as make about this many numbers, two at least; with None as many as the example has.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = {x.shape[0] for x in self.tensors if x.dim()}
        total = sum(x.numel() for x in self.tensors)
        rows = None
        if numbers is not None and len(sizes) == 1:
            (size,) = sizes
            rows = max(2, min(numbers * size // max(total, 1), 64 * size))

        def draw(x: Tensor) -> Tensor:
            if x.layout != torch.strided:
                return x
            shape = (rows, *x.shape[1:]) if rows and x.dim() else x.shape
            if not x.is_floating_point():
                among = x.reshape(-1)
                return (
                    among[torch.randint(max(len(among), 1), shape, generator=generator).to(x.device)]
                    if len(among)
                    else x
                )
            spread = x.double().std() if x.numel() > 1 else torch.ones(())
            return (torch.randn(shape, generator=generator, dtype=torch.double).to(x.device) * spread).to(x.dtype)

        return self.each(draw)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The network in one mode without gradients; every module's own mode comes back afterwards, every buffer and the
    random state, too, if it trains."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if training else {}
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=training):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


class _Mode(TorchFunctionMode):
    """Shows every torch call of a forward pass to the rules."""

    def __init__(self, trace: Trace, apply: Callable[[Trace, Call], None], expansions: dict[str, Callable]) -> None:
        super().__init__()
        self.trace, self.apply, self.expansions, self.modules = trace, apply, expansions, [""]

    def leave(self, name: str, out: Any) -> None:
        self.modules.pop()
        if isinstance(out, Tensor) and (labels := self.trace.labels(out)) is not None:
            self.trace.outputs[name] = labels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in self.expansions and any(self.trace.follows(x) for x in tensors_in([*args, *kwargs.values()])):
            with self:  # the same in functions that have rules; only its labels are used
                shadow = self.expansions[name](*args, **kwargs)
            if shadow is not NotImplemented:
                for mine, theirs in zip(tensors_in(out), tensors_in(shadow), strict=False):
                    if (labels := self.trace.labels(theirs)) is not None:
                        self.trace.label(mine, labels)
                return out
        if not args:  # the rules find the first argument by its position
            args = tuple(kwargs.pop(key) for key in ("input", "tensors", "self") if key in kwargs)
        self.apply(self.trace, Call(name, func, args, kwargs, out, self.modules[-1]))
        return out


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """The network's output on a copy of `inputs`, on which it may work in place; TransferError if it fails."""
    return _call(model, inputs.each(torch.clone))


def _call(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return model(*inputs.args, **inputs.kwargs)
    except TransferError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs.tensors)
        raise TransferError(f"The forward pass of {type(model).__name__} on inputs {shapes} fails: {error}") from error


def run(model: nn.Module, inputs: Inputs, training: bool = False) -> Any:
    """The network's output in eval mode (or in training mode), without gradients; the network is left as it was."""
    with in_mode(model, training):
        if training:
            torch.manual_seed(0)
        return forward(model, inputs)


def trace(
    model: nn.Module,
    inputs: Inputs,
    alike: frozenset[str] = frozenset(),
    merged: dict[str, int] | None = None,
    absorbed: frozenset[str] = frozenset(),
) -> Trace:
    """Run `model` once in eval mode on `inputs` and return what the pass tells of its units.

    Tensors named in `alike` are seen as those of one group or head, of which another network may have more; of those
    in `merged` so many groups in turn are seen as one (the last of what is left), with zeros between them, where
    another network has fewer. What multiplies the result of those in `absorbed` is seen as part of them.

    A network with parameters that the eval mode does not reach (auxiliary heads), or with code of its own that asks
    for the mode, runs once in training mode, too.
    The network is left as it was. The output's units are pinned: a network's result keeps its width. Raises
    TransferError if the forward pass fails.
    """
    from torch.nn.utils import parametrize

    result = Trace(model, alike, merged, absorbed)
    with parametrize.cached(), in_mode(model, training=False):  # in training a spectral norm refines its estimate
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module):
                for weight in module.parametrizations:  # type: ignore[union-attr]
                    prefix = f"{name}.parametrizations.{weight}." if name else f"parametrizations.{weight}."
                    result.stand_in(getattr(module, weight), f"{name}.{weight}".lstrip("."), prefix)
        result.output = _pass(model, inputs, result, training=False)
        reached = {
            *result.axes,
            *result.values,
            *(t for layer in result.layers.values() for t in layer.tensors.values()),
        }
        hidden = any(name not in reached for name, _ in model.named_parameters() if name in result.tensors)
        if hidden or _asks_for_mode(model):
            with suppress(TransferError):  # it may need what an example does not give: several images, a target
                _pass(model, inputs, result, training=True)
        result.complete()
    return result


def _asks_for_mode(model: nn.Module) -> bool:
    """Whether a module that is not torch's own has code that names the training mode."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = [vars(base) for base in classes if not base.__module__.startswith(("torch.", "builtins"))]
    own += [vars(module) for module in model.modules()]
    codes = [code for held in own for method in held.values() if (code := getattr(method, "__code__", None))]
    while codes:
        code = codes.pop()
        if "training" in code.co_names:
            return True
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return False


def _pass(model: nn.Module, inputs: Inputs, result: Trace, training: bool) -> Any:
    from .rules.elementwise import EXPANSIONS, apply

    mode = _Mode(result, apply, EXPANSIONS)
    hooks = []
    for name, module in model.named_modules():
        # Before the user's own, which may raise: what leaves a module has entered it.
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: mode.modules.append(name), prepend=True))
        hooks.append(
            module.register_forward_hook(lambda _, __, out, name=name: mode.leave(name, out), always_call=True)
        )
    try:
        with in_mode(model, training):
            inputs = inputs.each(lambda x: x.detach().clone())  # new objects: the caller's tensors stay unlabelled
            for position, x in enumerate(inputs.tensors):
                if x.is_floating_point() or x.is_complex():
                    units = result.fresh(1, f"input {position}").expand(x.shape)
                    result.label(x, Labels(units, frozenset({"input"})))
            with mode:
                output = _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for position, tensor in enumerate(tensors_in(output)):
        if (labels := result.labels(tensor)) is not None:
            result.pin(labels.units, "it is the network's output")
            name = f"output {position}" + " in training" * training
            result.add(Layer("output", name, {}, None, labels.sources, labels.via))
    return output


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]  # type: ignore
    return []
