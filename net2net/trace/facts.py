"""The vocabulary of a trace: what is known of an activation, a layer, a norm, a contraction, a call."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from torch import Tensor

from ..network import tensors_in
from .activations import NOTHING, Chain, Passage, Range

NO_NORM = ""  # the `first_norm` of a plain sum of layers' outputs

OPERATORS = {  # names of operators and aliases -> the name that their rule has
    **{f"{prefix}{name}": name for name in ("add", "sub", "mul") for prefix in "ir"},
    **dict.fromkeys(["itruediv", "truediv", "rtruediv", "divide", "true_divide"], "div"),
    **dict.fromkeys(["rmatmul", "bmm", "mm"], "matmul"),
    "multiply": "mul",
    "subtract": "sub",
    "rpow": "pow",
    "absolute": "abs",
    "negative": "neg",
    "special_expit": "sigmoid",
    **dict.fromkeys(["pos", "positive"], "identity"),
    "getitem": "index",
    "get": "attribute",  # x.mT, x.data: an attribute that is a tensor has labels, too
}


class LayerKind(StrEnum):
    """What an operation does to units."""

    MIX = "mix"  # reads units and produces new ones: convolution, linear, embedding
    NORM = "norm"  # normalises, with one entry for each unit
    SCALE = "scale"  # has one entry for each unit: layer scale, depthwise filter, slope
    OUTPUT = "output"  # is the network's result, which reads units and has no parameters


class NormKind(StrEnum):
    """What a statistic across units takes."""

    LAYER = "layer"  # subtracts the mean and divides by the standard deviation
    RMS = "rms"  # divides by the root of the mean square
    MEAN = "mean"  # the mean alone
    EXTREME = "extreme"  # the largest or smallest


@dataclass(frozen=True)
class Key:
    """A name that a thing has in both networks. Key("block", "add", 2) is the second sum in the module `block`."""

    where: str  # a module or a tensor
    what: str = ""
    number: int = 0
    part: str = ""  # tells several things of one call apart
    inside: "Key | None" = None  # for a grouping of units inside another, the other one

    def __str__(self) -> str:
        parts = (self.where, self.what, str(self.number or ""), self.part)
        text = "|".join([parts[0], *(part for part in parts[1:] if part)])
        return text if self.inside is None else f"{text} in {self.inside}"


class Step(StrEnum):
    """How far a statistic across units is on the way to a norm."""

    MEAN = "mean"
    CENTRED = "centred"  # the activation without its mean
    SQUARE = "square"  # the squares of the activation
    VARIANCE = "variance"  # the mean of the squares
    DEVIATION = "deviation"  # the root of the variance
    INVERSE = "inverse"  # one divided by that root
    NORMED = "normed"  # the norm's result
    SCALED = "scaled"  # the activation times a weight, before it is divided


@dataclass(frozen=True)
class Statistic:
    """An intermediate result of a norm that is written by hand, such as the mean of the squares of an activation."""

    of: Tensor  # the activation that it is computed from
    step: Step
    key: Key | None = None  # the key of the norm, or that of the mean
    divisor: float = 0.0  # what the sum of squares is divided by
    centred: bool = False  # whether the mean was subtracted before the squares were taken
    mean: Key | None = None  # the key of that mean
    eps: float = 0.0
    eps_at: str | None = None  # where the eps can be set
    outside: bool = False  # whether eps is added to the root, and not under it
    weight: Tensor | None = None  # the weight that has multiplied the activation


@dataclass(frozen=True)
class Labels:
    """What the trace knows of an activation: its units, and how layers have produced it."""

    units: Tensor  # the label of every element, in the activation's shape
    sources: frozenset[str] = frozenset()  # the layers whose outputs are summed or concatenated in it
    norms_since: frozenset[str] = frozenset()  # the norms and scales that those outputs have passed
    normed_by: frozenset[str] = frozenset()  # the norms across units in it, with no layer or other such norm between
    gain: float = 1.0  # the product of the plain numbers that multiplied it since a layer produced it
    linear: bool = False  # whether it is a plain sum of layers' outputs: a unit of it can hold the mean of others
    bent_by: str = ""  # the first call since its layers that made something else of it than a sum, as text
    lifted_by: str = ""  # the first call since its layers that may have made another number of zero, as text
    after_norm: str | None = None  # the norm directly in front: units that held its mean, or zero, are zero here
    first_norm: str | None = None  # the norm across units whose result it is, if only layers' outputs were added since
    passage: Passage = NOTHING  # the activations and gates since a layer produced it
    padded_by: tuple[tuple[int, int], ...] = ()  # the padding just added, before and after, the last axis first
    range: Range = None  # the smallest and the largest number that can be in it
    chain: Chain | None = None  # the activations since the last layer, each directly behind the one before
    result_of: str | None = None  # the layer whose result it is, if nothing has changed that since
    statistic: Statistic | None = None  # which step of a norm it is, if it is one
    # How the sources came here: each with the layer scales that multiplied it, one after the other. None: without any.
    paths: frozenset[tuple[str, tuple[str, ...]]] | None = None

    @property
    def ways(self) -> frozenset[tuple[str, tuple[str, ...]]]:
        """The paths of all sources. A source that comes here in several ways is there several times."""
        return frozenset((source, ()) for source in self.sources) if self.paths is None else self.paths

    @classmethod
    def of(cls, units: Tensor, *operands: "Labels", norms: Collection[str] = (), **state: Any) -> "Labels":
        """Return the labels `units` of a result with the sources and norms of all `operands`, and further `norms`."""
        # `state` holds the other attributes. Those that are not given count as unknown.
        sources = frozenset().union(*(labels.sources for labels in operands))
        lifted_by = next((labels.lifted_by for labels in operands if labels.lifted_by), "")
        normed_by = frozenset().union(*(labels.normed_by for labels in operands))
        state = {"normed_by": normed_by, "lifted_by": lifted_by} | state
        if any(labels.paths is not None for labels in operands):
            state = {"paths": frozenset().union(*(labels.ways for labels in operands))} | state
        return cls(units, sources, frozenset(norms).union(*(labels.norms_since for labels in operands)), **state)


@dataclass(frozen=True)
class Layer:
    """A parametrised operation of the forward pass: it reads units, produces units, or both."""

    # The fields without a comment are those of the activation that it reads (see `Labels`).
    kind: LayerKind
    name: str  # the name of its weight; for a norm that of its module, or its key
    tensors: dict[str, str]  # role (weight, bias, mean, var, taps, shift, factor, slope, amount) -> name
    reads: Tensor | None  # the unit of every entry on the axis that it reads
    sources: frozenset[str]
    norms_since: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)  # stride, padding and the like
    produces: Tensor | None = None  # the unit of every entry on the axis that it produces
    gain: float = 1.0
    linear: bool = False
    after_norm: str | None = None
    first_norm: str | None = None
    passage: Passage = NOTHING
    range: Range = None
    normed_by: frozenset[str] = frozenset()
    key: Key | None = None  # the key of a norm without parameters

    @property
    def module(self) -> str:
        """The name of the module that owns the layer's weight, or of the weight if the network itself owns it."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Norm:
    """A statistic that is taken across units, for every group of units by itself.

    A student keeps it exactly if its group sees each unit of the teacher's group equally often. An extreme has to see
    each of them at least once.
    """

    key: Key
    kind: NormKind
    units: Tensor  # the units of every group, one row each
    tensors: dict[str, str]  # role (weight, bias) -> name
    eps: float
    module: str  # the module that calls it
    padded: bool = False  # whether it could undo padding in front of it: means (layer norm) or zeros (RMS norm)
    name: str = ""  # the name of its layer
    first_norm: str | None = None  # that of its input (see `Labels`), or `NO_NORM` for a sum of layers' outputs
    eps_at: str | None = None  # where its eps can be set: a module, or an attribute of one
    outside: bool = False  # whether eps is added to the root of the mean square
    divisor: float = 0.0  # what the sum over a group is divided by, if not by the number of its units
    offset: float = 0.0  # what is added to the weight before it multiplies
    bent_by: str = ""  # that of its input (see `Labels`)


@dataclass(frozen=True)
class Contraction:
    """A product of two activations that sums over their units, as queries times keys do: copies would count twice."""

    key: Key
    left: Tensor  # the units of one factor; a student's further entries are zero there
    right: Tensor  # the units of the other factor; a student's further entries may be anything there


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of one whose axes lie along the parameter's."""

    name: str
    axes: list[tuple[int, Tensor | None]]  # for each axis the parameter's axis, and the entries of it (None: all)
    gain: float = 1.0  # the number that it was multiplied by

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Tell whether the axes are those of a parameter of this shape, in their order."""
        whole = [(axis, list(range(size))) for axis, size in enumerate(shape)]
        return whole == [
            (axis, list(range(size)) if entries is None else entries.tolist())
            for size, (axis, entries) in zip(shape, self.axes, strict=True)
        ]


@dataclass(frozen=True)
class View:
    """A tensor whose elements are those of a parameter, times `gain`, after `offset` has been added."""

    name: str
    places: tuple[Tensor, ...]  # for each axis of the parameter, where every element is on it
    gain: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Call:
    """One call of a torch function in the forward pass."""

    name: str  # as "conv2d" or "__iadd__"
    func: Callable
    args: Sequence
    kwargs: dict[str, Any]
    out: Any  # what it returned
    module: str  # the name of the module that called it

    @cached_property
    def plain(self) -> str:
        """The name of the rule: one name for a function, its method, its in-place form and its operator."""
        name = plain_name(self.name)
        is_number = not isinstance(self.out, Tensor) or self.out.is_floating_point() or self.out.is_complex()
        return name if is_number or name not in ("to", "type", "type_as") else "long"  # it cuts, whatever it is called

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return tensors_in([*self.args, *self.kwargs.values()])

    @cached_property
    def results(self) -> list[Tensor]:
        """The tensors that the call returned, or the tensor in which an assignment wrote."""
        return tensors_in(self.args[0] if self.name == "__setitem__" else self.out)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the network'}"


def plain_name(name: str) -> str:
    """Return one name for a function, its method, its in-place form and its operator: `add` for `__iadd__`, `add_`."""
    name = name.strip("_")
    return OPERATORS.get(name, name)
