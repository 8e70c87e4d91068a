"""What one forward pass found: layers, norms, contractions, and the units of every tensor."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..errors import TransferError
from .activations import NOTHING, Chain, join_ranges
from .facts import Contraction, Key, Labels, Layer, LayerKind, Norm
from .parameters import Parameters
from .units import Units


@dataclass(frozen=True)
class SeenAs:
    """How a pass looks at a network, so that its trace compares with that of a network with other groups or numbers."""

    as_grouped: frozenset[Key] = frozenset()  # tensors and calls with one group or head, seen as one of several
    merged_groups: dict[str, int] = field(default_factory=dict)  # grouped layer -> how many groups are seen as one
    scale_absorbed: frozenset[str] = frozenset()  # layers whose weights include the number that multiplies their result


PLAIN = SeenAs()


class Trace:
    """What one forward pass tells of a network."""

    def __init__(self, model: nn.Module, seen_as: SeenAs = PLAIN) -> None:
        self.model = model
        self.seen_as = seen_as  # how the pass looks at the network
        self.units = Units(seen_as.as_grouped)
        self.parameters = Parameters(model, self.units)
        self.eps_places = _tell_eps_apart(model)
        self.eps_uses: Counter[str | None] = Counter()  # place of an eps -> how many calls use it, but for the norms
        self.module_names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self.layers: dict[str, Layer] = {}  # by name, in the order of the forward pass
        self.norms: list[Norm] = []  # the statistics across units
        # Of each call of a norm across units: its name, and how the sources of what it reads came to it.
        self.norm_calls: list[tuple[str, frozenset[tuple[str, tuple[str, ...]]]]] = []
        self.contractions: list[Contraction] = []  # products that sum over units of two activations
        self.multipliers: dict[str, set[float]] = {}  # layer -> the numbers that uses multiply its result by (1: none)
        self.multiplied: set[str] = set()  # layers whose product a number multiplies
        # softmax -> the number in front of its logits, the layers they come from, their units
        self.softmax_gains: dict[Key, tuple[float, frozenset[str], Tensor]] = {}
        # call -> numbers that multiply its operands and that no layer behind can undo, the units, the call as text
        self.fixed_gains: dict[Key, tuple[tuple[float, ...], Tensor, str]] = {}
        self.read: set[Key | None] = set()  # the statistics across units that a call uses, or that are returned
        self.unknown: dict[int, str] = {}  # label of the result of a call without a rule -> why its shape is fixed
        self.chains: dict[str, list[Chain]] = {}  # layer -> the activations directly behind it
        self.outputs: dict[str, Labels] = {}  # module -> the labels of the first tensor of its result
        self.packed: set[str] = set()  # the modules that return their tensors in a container
        self.output: Any = None  # what the network returned
        self.products = 0  # how many multiplications the layers have made
        self.both: Trace | None = None  # the trace of both modes; None if the network was not run in training mode
        self.trains = False  # whether the pass in training mode came to its end
        self.failure: str | None = None  # why it did not

    @property
    def mixers(self) -> list[Layer]:
        """The layers that read units and produce new ones."""
        return [layer for layer in self.layers.values() if layer.kind == LayerKind.MIX]

    def labels(self, value: object) -> Labels | None:
        """Return the labels of an activation, or of a parameter used as one; None for what the pass does not follow."""
        if not isinstance(value, Tensor):
            return None
        known = self.parameters.noted(value, "labels")
        if known is None and self.tells_units(value) and (view := self.parameters.view(value)) is not None:
            units = self.parameters.elements(view, value.shape)
            return Labels(units, frozenset({view.name}), gain=view.gain, linear=True)
        return known

    def is_activation(self, value: object) -> bool:
        """Tell whether the pass has labelled this tensor."""
        return self.parameters.noted(value, "labels") is not None

    def tells_units(self, value: Tensor) -> bool:
        """Tell whether a parameter or constant says something of units: a single number says the same of all."""
        owner = self.parameters.owner_of(value)
        return value.numel() > 1 or (owner is not None and Key(owner) in self.seen_as.as_grouped)

    def follows(self, value: object) -> bool:
        """Tell whether the pass follows this value: an activation, or a parameter."""
        return isinstance(value, Tensor) and (self.is_activation(value) or self.parameters.owner_of(value) is not None)

    def eps_place(self, value: object) -> str | None:
        """Return the place of the attribute that this very number was read from, if it is that of an eps."""
        return self.eps_places[id(value)][0] if id(value) in self.eps_places else None

    def count_eps(self, arguments: Iterable[object]) -> None:
        """Count a use of every eps among the arguments of a call, or in lists among them."""
        for value in arguments:
            if isinstance(value, (list, tuple)):
                self.count_eps(value)
            elif (place := self.eps_place(value)) is not None:
                self.eps_uses[place] += 1

    def label(self, out: Tensor, labels: Labels) -> None:
        """Attach `labels` to the activation `out`."""
        if labels.units.shape != out.shape:
            shapes = f"{tuple(labels.units.shape)} do not fit the activation {tuple(out.shape)}"
            raise TransferError(f"The labels {shapes}: a rule is wrong.")
        self.parameters.note(out, "labels", labels)

    def add(self, layer: Layer) -> None:
        """Record a layer. One that is called again adds what it reads to its first record."""
        first = self.layers.get(layer.name)
        if first is not None:
            fresh = first.reads is None
            layer = replace(
                layer,
                reads=layer.reads if fresh else first.reads,
                sources=first.sources | layer.sources,
                options=first.options | layer.options,
                norms_since=first.norms_since | layer.norms_since,
                normed_by=first.normed_by | layer.normed_by,
                after_norm=layer.after_norm if fresh or first.after_norm == layer.after_norm else None,
                first_norm=layer.first_norm if fresh or first.first_norm == layer.first_norm else None,
                passage=layer.passage if first.passage == layer.passage else NOTHING,
                range=join_ranges([first.range, layer.range]),
            )
        self.layers[layer.name] = layer


def _tell_eps_apart(model: nn.Module) -> dict[int, tuple[str, float]]:
    """Make every eps that a module keeps as an attribute a float object of its own; return its place by its id."""
    # Then the object in a call says which attribute it came from, even if several hold the same number.
    places: dict[int, tuple[str, float]] = {}
    for name, module in model.named_modules():
        if type(own := getattr(type(module), "eps", None)) is float:
            vars(module).setdefault("eps", own)
        for attribute, value in vars(module).items():
            if "eps" in attribute.lower() and type(value) is float:
                vars(module)[attribute] = own = value + 0.0
                places[id(own)] = name if attribute == "eps" else f"{name}.{attribute}".lstrip("."), own
    return places
