"""Remapping inference: one forward pass learns which axis of which tensor carries which units.

The paper (section 3.3) describes, without building it, a pass "like shape inference" that asks every
operation how it moves units. This is that pass. Every activation carries a tensor of integer unit labels of its
own shape (expanded views, so almost no memory): data movement is applied to the labels themselves, and what an
operation does to units otherwise is one short rule (`rules.py`). Labels are numbers without meaning; two labels
that meet in an elementwise operation are one unit, which `Trace.roots` resolves once the pass is over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import TransferError


@dataclass(frozen=True)
class Labels:
    """What is known of an activation.

    `units` has the activation's shape, or is None where nothing is known unit by unit (the network's input, the
    output of an operation without a rule). `sources` names the layers whose outputs are summed or concatenated in it;
    `via` names the normalisations that it has passed since.
    """

    units: Tensor | None
    sources: frozenset[str]
    via: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layer:
    """A parametrised operation that the forward pass met: a reader of units, a producer of units, or both.

    `kind` is `mix` (convolution, linear: reads units, produces new ones), `norm` (one entry a unit) or
    `output` (the network's result, which reads and has no parameters). `name` is that of its weight or, for a norm
    without affine parameters, of its module. `reads` labels the entries of the axis that it reads.
    """

    kind: str
    name: str
    tensors: dict[str, str]  # role (weight, bias, mean, var) -> name of the parameter or buffer
    reads: Tensor | None
    sources: frozenset[str]
    via: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The name of the module that owns the layer's weight."""
        return self.name.rpartition(".")[0] if self.kind == "mix" else self.name


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


class Trace:
    """What one forward pass of a network tells of its units."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, Layer] = {}  # in the order of the forward pass
        self.axes: dict[str, list[Tensor | None]] = {}  # tensor name -> labels of each of its axes
        self.read_axis: dict[str, int] = {}  # tensor name -> the axis that reads units
        self.pins: list[tuple[Tensor, str]] = []  # labels that must keep their number, and why
        self.output: Any = None
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.first_names = {name: self._names[id(tensor)] for name, tensor in every}  # of a tied tensor, too
        self._edges: list[Tensor] = []  # 2 x k: labels that are one unit
        self._count = 0

    # -- labels -------------------------------------------------------------------------------------------------

    def labels(self, value: object) -> Labels | None:
        """The labels of an activation; None for what the pass does not follow (constants, parameters)."""
        return getattr(value, "_net2net_labels", None) if isinstance(value, Tensor) else None

    def label(self, out: Tensor, labels: Labels) -> None:
        """Attach `labels` to the activation `out`."""
        if labels.units is not None and labels.units.shape != out.shape:
            raise TransferError(
                f"The labels {tuple(labels.units.shape)} do not fit the activation {tuple(out.shape)}: a rule is wrong."
            )
        out._net2net_labels = labels  # type: ignore[attr-defined]

    def fresh(self, count: int) -> Tensor:
        """`count` labels that nothing carries yet."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """From here on the labels `a` and `b`, entry by entry, are one unit."""
        if a.shape != b.shape:
            raise TransferError(f"Units of widths {tuple(a.shape)} and {tuple(b.shape)} meet in one parameter.")
        self._edges.append(torch.stack([a, b]))

    def pin(self, units: Tensor | None, why: str) -> None:
        """The units keep their number: growing them raises an error that says `why`."""
        if units is not None:
            self.pins.append((torch.unique(compact(units)), why))

    def roots(self) -> Tensor:
        """For every label the smallest label of its unit: labels are one unit exactly if their roots agree."""
        parent = torch.arange(self._count)
        if not self._edges:
            return parent
        a, b = torch.cat(self._edges, dim=1)
        while True:
            high, low = torch.maximum(parent[a], parent[b]), torch.minimum(parent[a], parent[b])
            hooked = parent.scatter_reduce(0, high, low, "amin")
            while not torch.equal(hooked, hooked[hooked]):
                hooked = hooked[hooked]
            if torch.equal(hooked, parent):
                return parent
            parent = hooked

    # -- parameters ---------------------------------------------------------------------------------------------

    def name_of(self, tensor: object) -> str | None:
        """The name of a parameter or buffer of the network; shared tensors go by their first name."""
        return self._names.get(id(tensor))

    def axis(self, name: str, dim: int, units: Tensor | None = None) -> Tensor | None:
        """Say that axis `dim` of the tensor `name` carries `units`; return the labels it carries.

        A tensor that is used a second time carries the same units again. Without `units` fresh ones are made
        (the axis produces them). An axis that reads what is not followed carries no labels.
        """
        tensor = self.tensors[name]
        axes = self.axes.setdefault(name, [None] * tensor.dim())
        if axes[dim] is None:
            axes[dim] = self.fresh(tensor.shape[dim]) if units is None else units
        elif units is not None and units is not axes[dim]:
            self.unite(units, axes[dim])  # type: ignore[arg-type]
        return axes[dim]

    def add(self, layer: Layer) -> None:
        """Record a layer; a layer that is called again joins what it reads to its first record."""
        first = self.layers.get(layer.name)
        if first is None:
            self.layers[layer.name] = layer
        else:
            self.layers[layer.name] = Layer(
                layer.kind,
                layer.name,
                layer.tensors,
                layer.reads if first.reads is None else first.reads,
                first.sources | layer.sources,
                first.via | layer.via,
                layer.options,
            )


def compact(units: Tensor) -> Tensor:
    """The same labels without the axes along which they are merely repeated in memory."""
    return units[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in units.stride())]


def along(units: Tensor | None, dim: int) -> Tensor | None:
    """The labels along one axis, if all other axes repeat them; else None."""
    if units is None:
        return None
    dim %= units.dim()
    line = units[tuple(slice(None) if d == dim else 0 for d in range(units.dim()))]
    lead = tuple(slice(None) if d == dim or s else slice(0, 1) for d, s in enumerate(units.stride()))
    shape = [-1 if d == dim else 1 for d in range(units.dim())]
    return line if bool((units[lead] == line.reshape(shape)).all()) else None


def spread(units: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of an activation of `shape` that carries `units` along axis `dim`: an expanded view."""
    return units.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(tuple(shape))


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """The network in eval mode without gradients; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Mode(TorchFunctionMode):
    """Shows every torch call of a forward pass to the rules."""

    def __init__(self, trace: Trace, apply: Callable[[Trace, Call], None]) -> None:
        super().__init__()
        self.trace, self.apply, self.modules = trace, apply, [""]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if not args:  # the rules find the first argument by its position
            args = tuple(kwargs.pop(key) for key in ("input", "tensors", "self") if key in kwargs)
        name = getattr(func, "__name__", str(func))
        self.apply(self.trace, Call(name, func, args, kwargs, out, self.modules[-1]))
        return out


def forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The network's output on a copy of `inputs`, on which it may work in place; TransferError if it fails."""
    try:
        return model(*(x.clone() for x in inputs))
    except TransferError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise TransferError(f"The forward pass of {type(model).__name__} on inputs {shapes} fails: {error}") from error


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The network's output in eval mode, without gradients; the network is left as it was."""
    with _inference(model):
        return forward(model, inputs)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Run `model` once in eval mode on `inputs` and return what the pass tells of its units.

    The network is left as it was. The output's units are pinned: a network's result keeps its width. Raises
    TransferError if the forward pass fails.
    """
    from .rules import apply

    if not all(isinstance(x, Tensor) for x in inputs):
        raise TransferError("The example is a tensor, or a tuple of tensors for several arguments.")

    result = Trace(model)
    mode = _Mode(result, apply)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: mode.modules.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: (mode.modules.pop(), None)[1], always_call=True))
    try:
        with _inference(model):
            inputs = tuple(x.detach() for x in inputs)  # new objects: the caller's tensors stay unlabelled
            for x in inputs:
                result.label(x, Labels(None, frozenset({"input"})))
            with mode:
                result.output = forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for position, tensor in enumerate(tensors_in(result.output)):
        labels = result.labels(tensor)
        if labels is not None:
            result.pin(labels.units, "it is the network's output")
            name = f"output {position}"
            result.add(Layer("output", name, {}, None, labels.sources, labels.via))
    return result


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
