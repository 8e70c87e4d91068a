"""The vocabulary of a trace: what is known of an activation, a layer, a norm, a contraction, a call."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from torch import Tensor

from ..network import tensors_in
from .activations import NOTHING, Chain, Passage, Range

NO_NORM = ""  # the `first_norm` of a plain sum of layers

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
    NORM = "norm"  # normalises; one entry a unit
    SCALE = "scale"  # one entry a unit: layer scale, depthwise filter, slope
    OUTPUT = "output"  # the network's result: reads, and has no parameters


class NormKind(StrEnum):
    """What a statistic across units takes."""

    LAYER = "layer"  # subtracts the mean and divides by the standard deviation
    RMS = "rms"  # divides by the root of the mean square
    MEAN = "mean"  # the mean alone
    EXTREME = "extreme"  # the largest or smallest


@dataclass(frozen=True)
class Key:
    """The name of something in both networks: the `number`-th `what` in the module (or of the tensor) `where`."""

    where: str
    what: str = ""
    number: int = 0
    part: str = ""  # tells apart several such things
    inside: "Key | None" = None  # one grouping of units that lies inside another

    def __str__(self) -> str:
        parts = (self.where, self.what, str(self.number or ""), self.part)
        text = "|".join([parts[0], *(part for part in parts[1:] if part)])
        return text if self.inside is None else f"{text} in {self.inside}"


class Step(StrEnum):
    """How far a statistic across units is on the way to a norm."""

    MEAN = "mean"
    CENTRED = "centred"  # the activation without its mean
    SQUARE = "square"  # of the activation
    VARIANCE = "variance"  # the mean of the squares
    DEVIATION = "deviation"  # its root
    INVERSE = "inverse"  # one by the root
    NORMED = "normed"  # the norm's result
    SCALED = "scaled"  # the activation times a weight, before it is divided


@dataclass(frozen=True)
class Statistic:
    """What is computed of an activation, on the way to a norm that is written by hand."""

    of: Tensor  # the activation
    step: Step
    key: Key | None = None  # of the norm, or of the mean
    divisor: float = 0.0  # of the sum of squares
    centred: bool = False  # whether the squares are those of what is left without the mean
    mean: Key | None = None  # that mean
    eps: float = 0.0
    eps_at: str | None = None
    outside: bool = False  # whether eps is added to the root
    weight: Tensor | None = None  # that has multiplied the activation


@dataclass(frozen=True)
class Labels:
    """What is known of an activation."""

    units: Tensor  # of every element, in the activation's shape
    sources: frozenset[str] = frozenset()  # the layers whose outputs are summed or concatenated in it
    norms_since: frozenset[str] = frozenset()  # the norms that it has passed since
    normed_by: frozenset[str] = frozenset()  # the norms across units whose results reach it past no layer or such norm
    gain: float = 1.0  # the product of the plain numbers that multiplied it since a layer produced it
    linear: bool = False  # a plain sum of what layers produced: one of its units can hold the mean of others
    after_norm: str | None = None  # the norm directly before; units it saw as its mean, or as zero, are zero
    first_norm: str | None = None  # the one norm across units that it begins with, if it is a plain sum since
    passage: Passage = NOTHING  # the activations and gates since a layer produced it
    padded_by: tuple[tuple[int, int], ...] = ()  # the padding just added, before and after, the last axis first
    range: Range = None  # the numbers that it can be
    chain: Chain | None = None  # the activations since the last layer, each directly behind the one before
    result_of: str | None = None  # the layer whose result it is, untouched
    statistic: Statistic | None = None  # what it is on the way to a norm

    @classmethod
    def of(cls, units: Tensor, *operands: "Labels", norms: Collection[str] = (), **state: Any) -> "Labels":
        """Return the labels `units` of a result with the sources and norms of all `operands`, and further `norms`."""
        # Of the other attributes (`state`) what is not given counts as unknown.
        sources = frozenset().union(*(labels.sources for labels in operands))
        state = {"normed_by": frozenset().union(*(labels.normed_by for labels in operands))} | state
        return cls(units, sources, frozenset(norms).union(*(labels.norms_since for labels in operands)), **state)


@dataclass(frozen=True)
class Layer:
    """A parametrised operation of the forward pass: it reads units, produces units, or both."""

    # What has no comment is that of the activation which it reads (see `Labels`).
    kind: LayerKind
    name: str  # of its weight; of a norm without parameters, that of its module and a number
    tensors: dict[str, str]  # role (weight, bias, mean, var, taps, shift, factor, slope, amount) -> name
    reads: Tensor | None  # the units of the entries of the axis that it reads
    sources: frozenset[str]
    norms_since: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)  # stride, padding and the like
    produces: Tensor | None = None  # the units of the entries of the axis that it produces
    gain: float = 1.0
    linear: bool = False
    after_norm: str | None = None
    first_norm: str | None = None
    passage: Passage = NOTHING
    range: Range = None
    normed_by: frozenset[str] = frozenset()
    key: Key | None = None  # what a norm without parameters is called in both networks

    @property
    def module(self) -> str:
        """The name of the module that owns the layer's weight; of a weight of the network's own, that weight's."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Norm:
    """A statistic across units. It is exact if each of its groups sees all units of the teacher's equally often."""

    # An extreme is exact if each unit is seen at all.
    key: Key
    kind: NormKind
    units: Tensor  # the units of every group, one row each
    tensors: dict[str, str]  # role (weight, bias) -> name
    eps: float
    module: str  # in which it is called
    padded: bool = False  # it could undo means (layer norm) or zeros (RMS norm) that the units before it hold
    name: str = ""  # of its layer
    first_norm: str | None = None  # what its input begins with, `NO_NORM` if that is a sum of layers
    eps_at: str | None = None  # where its eps can be set: a module, or an attribute of one
    outside: bool = False  # whether eps is added to the root of the mean square
    divisor: float = 0.0  # what the sum over a group is divided by, if not by the number of its units
    offset: float = 0.0  # what is added to the weight before it multiplies


@dataclass(frozen=True)
class Contraction:
    """A product that sums over units of two activations (queries by keys): it needs each unit once."""

    key: Key
    left: Tensor  # the units of one factor, whose entries beyond the teacher's are zero in a student
    right: Tensor  # those of the other, whose entries beyond the teacher's may then be anything


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of one whose axes lie along the parameter's."""

    name: str
    axes: list[tuple[int, Tensor | None]]  # for each axis, the parameter's and the entries taken of it (None: all)
    gain: float = 1.0  # the number that it was multiplied by


@dataclass(frozen=True)
class View:
    """A tensor whose elements are those of a parameter, times `gain`, after `offset` has been added."""

    name: str
    places: tuple[Tensor, ...]  # of the elements on each of the parameter's axes
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
        return plain_name(self.name)

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
