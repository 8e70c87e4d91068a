"""Surgery without a second constructor: a wider or deeper copy of a network, filled by `transfer`."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..blend import Blend
from ..errors import TransferError
from ..network import Example, Inputs, run, unwrap
from ..record import Record
from ..tensors import parametrised, refuse_spectral_norm
from ..trace.graph import Trace
from ..trace.tracer import trace
from ..transfer import transfer
from .describe import Description, Group, described

Widths = float | Mapping[str, float | int]


def widen(
    model: nn.Module,
    example: Example,
    widths: Widths,
    *,
    generator: torch.Generator | None = None,
    split: str = "equal",
    noise: float = 0.0,
) -> nn.Module:
    """A copy of `model`, of the same class and with the same state-dict keys, that is wider and computes the same.

    By default copies of a unit get the same gradients and never part: `split="uneven"` or "paired" tells them apart.

    `widths` maps names of layers (modules with a weight; `*` stands for anything) to a factor (a float) or a number of
    units (an int): `{"layer2.*": 1.5, "fc1": 96}`; units that only grow together (`describe`) grow by one factor. Or it
    is one factor for every width that is free: what holds the others, `describe` says, and those that turn out not to
    grow are left as they are.

    The model is left as it was; `split`, `noise` and `generator` are those of `transfer`, whose record is the copy's
    `growth` (`growth_` in a network that has a `growth` of its own). A width that the forward pass has as a number must
    be an attribute of a module, which then follows.

    Raises TransferError if a name fits no layer, if its units cannot grow as asked, or if nothing can grow.
    """
    model, inputs = unwrap(model), Inputs.of(example)
    traced = trace(model, inputs)
    groups = described(traced)
    state = (generator or torch.Generator().manual_seed(0)).get_state()

    parts = _parts(traced, groups)

    def grown(factors: dict[int, float], idle: bool = False) -> nn.Module:
        copied, undone = _running(model, inputs, traced, _counts(traced, parts, factors), idle=idle)
        draws = torch.Generator()
        draws.set_state(state)
        try:
            record = transfer(model, copied, example, generator=draws, split=split, noise=noise)
        except TransferError:
            if not undone:
                raise
            return grown(factors, idle=True)  # a number without which it runs may be needed for what it computes
        _keep(copied, record)
        if generator is not None:
            generator.set_state(draws.get_state())
        return copied

    if isinstance(widths, Mapping):
        return grown(_asked(groups, widths, _second_names(traced)))
    _number(widths, "the layers")
    free = [k for k, group in enumerate(groups.groups) if group.free]
    if widths < 1 or not free:
        why = "; ".join(f"{_first(g)}: {g.state}" for g in groups.groups[:5])
        raise TransferError(
            f"No width of {type(model).__name__} is free to grow by {widths}: {why or 'it has no layers'}."
        )

    def tried(factors: dict[int, float]) -> nn.Module:
        return _running(model, inputs, traced, _counts(traced, parts, factors), trial=True)[0]

    running, _ = _as_much_as_can_be(tried, {k: widths for k in free})  # a width written into the forward pass stays
    return _as_much_as_can_be(grown, running)[1]


def _running(
    model: nn.Module, inputs: Inputs, traced: Trace, count: Tensor, *, trial: bool = False, idle: bool = False
) -> tuple[nn.Module, bool]:
    """A copy of `model` with room for the new units that runs, and whether numbers of its modules that could follow
    the widths were left as they were.

    None follow if it runs without; otherwise those that it cannot run without, and with `idle`, or for a `trial`, all.
    Raises TransferError if it does not run even so.
    """
    copied = _resized(model, traced, count, trial)
    try:
        run(copied, inputs)
        return copied, False
    except TransferError as error:
        followed = _let_numbers_follow(copied, traced, count)
        with suppress(TransferError):
            run(copied, inputs)
            return copied, not idle and not trial and _undo_idle(copied, inputs, followed)
        raise error


def _number(width: object, what: str) -> None:
    if isinstance(width, bool) or not isinstance(width, Real) or not 0 < float(width) < float("inf"):
        raise TransferError(f"{width!r} is no width for {what}: give a factor (a float) or a number of units (an int).")


def _first(group: Group) -> str:
    return group.layers[0]


def _second_names(traced: Trace) -> list[tuple[str, str]]:
    """The other names of modules that the network has twice, each beside the first."""
    pairs = [
        (name.rpartition(".")[0], first.rpartition(".")[0]) for name, first in traced.parameters.first_names.items()
    ]
    return [(name, first) for name, first in pairs if name != first]


def _asked(groups: Description, widths: Mapping[str, float | int], second: list[tuple[str, str]]) -> dict[int, float]:
    """For every group that is asked to grow by what factor."""
    factors: dict[int, float] = {}
    for pattern, width in widths.items():
        _number(width, repr(pattern))
        meant = {first for name, first in second if fnmatchcase(name, pattern)}
        fits = {
            k: name
            for k, group in enumerate(groups.groups)
            for name in group.layers + group.carriers
            if fnmatchcase(name, pattern) or name in meant
        }
        if not fits:
            known = ", ".join(name for g in groups.groups[:4] for name in g.layers[:2])
            raise TransferError(f"No layer is called {pattern!r}: there are {known} and others (net2net.describe).")
        free = {k: name for k, name in fits.items() if groups.groups[k].pinned is None}
        if not free:
            name, group = next((name, groups.groups[k]) for k, name in fits.items())
            raise TransferError(f"{name} cannot grow from {group.width} units: {group.pinned}.")
        for k in free:
            factor = width / groups.groups[k].width if isinstance(width, Integral) else width
            if factor < 1:
                raise TransferError(f"{free[k]} has {groups.groups[k].width} units: it cannot shrink to {width}.")
            factors[k] = max(factor, factors.get(k, 1.0))
    return factors


def _as_much_as_can_be(
    grown: Callable[[dict[int, float]], nn.Module], factors: dict[int, float]
) -> tuple[dict[int, float], nn.Module]:
    """All groups; or else, half by half, those that grow beside the ones that were found to; and the network grown."""
    held: dict[int, float] = {}
    best: list[nn.Module] = []
    refused: list[TransferError] = []

    def add(part: dict[int, float], fails: bool = False) -> bool:
        """Grow `part`, too, as far as that goes; whether all of it does. What is known to fail need not be tried."""
        if not fails:
            try:
                best[:] = [grown(held | part)]
                held.update(part)
                return True
            except TransferError as error:
                refused.append(error)
        if len(part) > 1:
            items, half = list(part.items()), len(part) // 2
            add(dict(items[half:]), fails=add(dict(items[:half])))
        return False

    add(factors)
    if not best:
        raise refused[0]
    return held, best[0]


# -- shapes -------------------------------------------------------------------------------------------------------


def _resized(model: nn.Module, traced: Trace, count: Tensor, trial: bool = False) -> nn.Module:
    """A copy of `model` with room for the new units; what it holds is drawn like the old, and means nothing.

    For a `trial`, which shows whether it runs, it holds zeros where it grows, and elsewhere the model's parameters.
    """
    roots = traced.units.roots()
    shapes = {name: _shape(traced, roots, name, count) for name in traced.parameters.tensors}
    if all(shape == traced.parameters.tensors[name].shape for name, shape in shapes.items()):
        raise TransferError("Nothing grows: every width stays what it is.")
    copied = _copied(model, shared=trial and not traced.parameters.stand_ins)  # a parametrisation is set in place
    stand_ins = {f"{name}.{weight}".lstrip("."): (module, weight) for name, module, weight in parametrised(copied)}
    generator = torch.Generator().manual_seed(0)
    places = _places(copied)
    for name, shape in shapes.items():
        old = traced.parameters.tensors[name]
        if shape == old.shape:
            continue
        value = old.new_zeros(shape) if trial else _drawn(old, shape, generator)
        if name in stand_ins:
            _set_parametrised(*stand_ins[name], value, name)
        else:
            _replace(places[name], value)
    for name, module in copied.named_modules():
        _set_attributes(module, model.get_submodule(name))
    return copied


def _copied(model: nn.Module, shared: bool = False) -> nn.Module:
    """A copy that knows of no growth, of parameters of its own or the same; attributes of those, which copying drops,
    stay on."""
    tensors = list(model.parameters()) if shared else []
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except (TypeError, RuntimeError) as error:
        raise TransferError(
            f"{type(model).__name__} cannot be copied: {error}. Make the larger one yourself, and use net2net.transfer."
        ) from error
    for place in [place for place, held in vars(copied).items() if isinstance(held, Record)]:
        del copied.__dict__[place]
    if shared:
        return copied
    theirs = dict(model.named_parameters())
    for name, parameter in copied.named_parameters():
        for tag, what in vars(theirs[name]).items():
            setattr(parameter, tag, what)
    return copied


def _keep(copied: nn.Module, record: Record) -> None:
    """The record is the copy's `growth`, or the next name that is not taken."""
    place = "growth"
    while hasattr(copied, place):
        place += "_"
    setattr(copied, place, record)


def _set_parametrised(module: nn.Module, weight: str, value: Tensor, name: str) -> None:
    refuse_spectral_norm(module, weight, name)
    try:
        with warnings.catch_warnings(action="ignore"):  # that its buffers are resized
            setattr(module, weight, value)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise TransferError(f"The parametrisation of {name} cannot be given another width: {error}") from error


def _parts(traced: Trace, groups: Description) -> list[list[Tensor]]:
    """The units of every group in parts that grow by themselves."""
    signature = _signatures(traced, traced.units.roots())
    return [signature(group.units) for group in groups.groups]


def _counts(traced: Trace, parts: list[list[Tensor]], factors: dict[int, float]) -> Tensor:
    """By how many units each unit is replaced, on average over those that are alike."""
    count = torch.ones(len(traced.units.roots()), dtype=torch.double)
    for k, factor in factors.items():
        for alike in parts[k]:
            count[alike] = max(len(alike), round(len(alike) * factor + 1e-9)) / len(
                alike
            )  # a half is rounded up, not to even
    return count


def _signatures(traced: Trace, roots: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """Units in parts that grow by themselves: those of one group or head, which the same layers read."""
    marks: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for key, (children, parents) in traced.units.relations.items():
        for child, parent in zip(roots[children].tolist(), roots[parents].tolist(), strict=True):
            if child != parent:
                marks[child].append((str(key), parent))
    for name, axes in traced.parameters.axes.items():
        for dim, labels in enumerate(axes):
            if labels is not None:
                for root in torch.unique(roots[labels]).tolist():
                    marks[root].append((name, dim))

    def parts(units: Tensor) -> list[Tensor]:
        alike: dict[tuple, list[int]] = defaultdict(list)
        for unit in units.tolist():
            alike[tuple(sorted(set(marks[unit])))].append(unit)
        return [torch.tensor(members) for members in alike.values()]

    return parts


def _shape(traced: Trace, roots: Tensor, name: str, count: Tensor) -> torch.Size:
    tensor = traced.parameters.tensors[name]
    shape = list(tensor.shape)
    if name in traced.parameters.values:
        units = roots[traced.parameters.values[name].reshape(tensor.shape)]
        for dim in range(tensor.dim()):
            if not torch.equal(units, units.narrow(dim, 0, 1).expand_as(units)):  # not along positions
                shape[dim] = max(shape[dim], round(float(count[units].sum(dim).max())))
        return torch.Size(shape)
    for dim in range(tensor.dim()):
        if dim == 1 and name in traced.parameters.inner:
            labels, groups = traced.parameters.inner[name]
            shape[dim] = round(float(count[roots[labels]].sum()) / groups)
        elif name in traced.parameters.axes and (labels := traced.parameters.axes[name][dim]) is not None:
            shape[dim] = round(float(count[roots[labels]].sum()))
    return torch.Size(shape)


def _drawn(old: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values for entries that no teacher entry stands for: as spread as the old ones."""
    if not old.is_floating_point():
        return torch.zeros(shape, dtype=old.dtype, device=old.device)
    drawn = torch.randn(shape, generator=generator, dtype=torch.double)
    scale = old.double().std() if old.numel() > 1 else torch.ones(())
    made = (drawn * scale.to(drawn) if not old.is_meta else drawn).to(old)
    return made.contiguous(memory_format=_layout(old))


def _layout(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _places(model: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where modules hold each tensor of the network, by its first name: tied ones in several places."""
    found: dict[int, tuple[str, list[tuple[dict[str, Any], str]]]] = {}
    for prefix, module in model.named_modules():
        for store in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)):
            for key, held in store.items():
                if held is not None:
                    found.setdefault(id(held), (f"{prefix}.{key}".lstrip("."), []))[1].append((store, key))
    return dict(found.values())


def _replace(places: list[tuple[dict[str, Any], str]], value: Tensor) -> None:
    """Put a tensor of a new shape wherever the old one is: tied weights stay tied, tags stay on."""
    store, key = places[0]
    old = store[key]
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for tag, what in vars(old).items():
        setattr(new, tag, what)
    for store, key in places:
        store[key] = new


def _set_attributes(module: nn.Module, before: nn.Module) -> None:
    """Let a module's own numbers follow its tensors."""
    weight, old = getattr(module, "weight", None), getattr(before, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) else None
    if isinstance(module, nn.Linear) and shape is not None:
        module.out_features, module.in_features = shape
    elif isinstance(module, _ConvNd) and shape is not None and isinstance(old, Tensor):
        full, inside = (
            (module.in_channels, module.out_channels)
            if module.transposed
            else (module.out_channels, module.in_channels)
        )
        if module.groups > 1 and module.groups == full and old.shape[1] == 1 and full == inside:
            module.groups = shape[0]  # depthwise
        elif module.groups > 1 and old.shape[1] == 1 and module.groups == inside:
            module.groups = shape[0] * inside // full  # one unit a group, several out of it
        inside = shape[1] * module.groups
        module.out_channels, module.in_channels = (inside, shape[0]) if module.transposed else (shape[0], inside)
    elif isinstance(module, _NormBase):
        known = [t for t in (weight, module.running_mean) if isinstance(t, Tensor)]
        if known:
            module.num_features = len(known[0])
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and shape is not None:
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.GroupNorm) and shape is not None:
        module.num_channels = shape[0]
    elif isinstance(module, nn.Embedding) and shape is not None:
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU) and shape is not None:
        module.num_parameters = shape[0]
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        first = "_l0" if isinstance(module, nn.RNNBase) else ""
        held, were = (getattr(m, f"weight_ih{first}") for m in (module, before))
        module.input_size = held.shape[1]
        module.hidden_size = len(held) * module.hidden_size // len(were)  # of an LSTM four rows each
        if isinstance(module, nn.LSTM) and module.proj_size:
            module.proj_size = module.get_parameter("weight_hr_l0").shape[0]


_KNOWN = (
    nn.Linear,
    _ConvNd,
    _NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.PReLU,
    nn.RNNBase,
    nn.RNNCellBase,
)


Followed = dict[Hashable, list[tuple[nn.Module, str, Any, Any]]]  # modules, attributes, values before and after


def _let_numbers_follow(copied: nn.Module, traced: Trace, count: Tensor) -> Followed:
    """Let whole numbers that modules hold follow the widths in these modules that they are equal to, where all of the
    widths that grow become the same; return what changed: torch's own modules by class, the user's by attribute."""
    changed: Followed = defaultdict(list)
    sizes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))  # of a module -> before -> after

    def note(name: str, before: int, after: int) -> None:
        if before != after:
            parts = name.split(".")
            for depth in range(len(parts) + 1):  # every module around it
                sizes[".".join(parts[:depth])][before].add(after)

    roots = traced.units.roots()
    for name, labels in traced.outputs.items():
        units = traced.units.drop_repeats(labels.units)
        for dim, size in enumerate(units.shape):
            if size > 1:
                note(name, size, round(float(count[roots[units.movedim(dim, 0).reshape(size, -1)[:, 0]]].sum())))
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if name in traced.parameters.tensors:
            for before, after in zip(traced.parameters.tensors[name].shape, tensor.shape, strict=True):
                note(name, before, after)
    for name, module in copied.named_modules():
        if name in sizes and not isinstance(module, _KNOWN):
            for key, value in vars(module).items():
                new = value
                if isinstance(value, (list, tuple)) and all(type(number) is int for number in value):
                    new = type(value)(_followed(number, sizes[name]) for number in value)
                elif type(value) is int:
                    new = _followed(value, sizes[name])
                if new != value:
                    own = not type(module).__module__.startswith("torch.")
                    changed[(type(module), key, str(value)) if own else type(module)].append((module, key, value, new))
                    vars(module)[key] = new
    return changed


def _undo_idle(copied: nn.Module, inputs: Inputs, followed: Followed) -> bool:
    """Put back the numbers without which the network runs as well: they only happened to be equal. Whether any were."""
    undone = False
    for changes in followed.values():
        for module, key, before, _ in changes:
            vars(module)[key] = before
        try:
            run(copied, inputs)
            undone = True
        except TransferError:
            for module, key, _, after in changes:
                vars(module)[key] = after
    return undone


def _followed(number: int, sizes: Mapping[int, set[int]]) -> int:
    after = sizes.get(number, set())
    return next(iter(after)) if len(after) == 1 else number


# -- depth --------------------------------------------------------------------------------------------------------


def deepen(
    model: nn.Module,
    example: Example,
    after: str | Sequence[str],
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    make: Callable[[int, int], nn.Module] | None = None,
    generator: torch.Generator | None = None,
    depth: str = "identity",
    calibrate: Tensor | Iterable[Example] | None = None,
) -> nn.Module:
    """A copy of `model`, of the same class, with a new layer behind each module of `after`, that computes the same.

    The new layer is the module's child `deeper`: a linear layer, or a convolution of kernel 3 that keeps the size, on
    as many units as the module gives, and then `Blend(activation())`, the identity at first, whatever the activation.
    Old keys of the state dict stay. `make(units, dims)` gives another new layer (`dims` positions: 0 for a
    linear one); it must be able to be an identity. `depth`, `generator` and `calibrate` are those of
    `transfer`, whose record is the copy's `growth`. The model is left as it was.

    Raises TransferError if there is no such module, or its result is not one tensor with one axis of units.
    """
    model, inputs = unwrap(model), Inputs.of(example)
    if not after:
        raise TransferError("No module is named to put a layer behind.")
    traced = trace(model, inputs)
    copied = _copied(model)
    for name in [after] if isinstance(after, str) else after:
        units, dims = _units_of(traced, name)
        new = make(units, dims) if make else nn.Sequential(_layer(units, dims), Blend(activation()))
        module = copied.get_submodule(name)
        reference = next(p for part in (module, copied) for p in part.parameters() if p.is_floating_point())
        place = "deeper"
        while hasattr(module, place):
            place += "_"
        module.add_module(place, new.to(reference.device, reference.dtype).train(model.training))
        if type(module).forward is not nn.Sequential.forward:  # that calls its children by itself
            module.register_forward_hook(_Deeper(place))
    _keep(copied, transfer(model, copied, example, generator=generator, rename={}, depth=depth, calibrate=calibrate))
    return copied


class _Deeper:
    """The hook that sends a module's result through its child: a class, so that copies and pickles keep it."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return module.get_submodule(self.place)(output)


def _units_of(traced: Trace, name: str) -> tuple[int, int]:
    """How many units a module gives, and along how many positions (0: units come last)."""
    if name not in traced.module_names:
        raise TransferError(f"There is no module {name!r} to put a layer behind.")
    labels = traced.outputs.get(name)
    axes = (
        []
        if labels is None
        else [dim for dim, size in enumerate(traced.units.drop_repeats(labels.units).shape) if size > 1]
    )
    if labels is None or len(axes) != 1:
        raise TransferError(
            f"The result of {name} is not one tensor with one axis of units: no layer can stand behind it."
        )
    (axis,), rank = axes, labels.units.dim()
    if axis not in (1, rank - 1):
        raise TransferError(f"The units of {name} are on axis {axis}: a layer behind it wants them on axis 1, or last.")
    return labels.units.shape[axis], 0 if axis == rank - 1 else rank - 2


def _layer(units: int, dims: int) -> nn.Module:
    if dims == 0:
        return nn.Linear(units, units)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](units, units, 3, padding=1)
