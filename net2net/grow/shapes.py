"""Make room for new units: the shapes of a copy's tensors, and the sizes that its modules keep as numbers."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..errors import TransferError
from ..network import like
from ..record import Record
from ..tensors import parametrised, refuse_spectral_norm
from ..trace.graph import Trace
from .describe import Description


class Change(NamedTuple):
    """A number of a module that follows a width."""

    module: nn.Module
    attribute: str
    before: Any
    after: Any
    doubtful: bool  # whether another width in the module has the same value, and stays

    def put(self, value: Any) -> None:
        """Give the module this value."""
        vars(self.module)[self.attribute] = value


Changes = dict[Hashable, list[Change]]
Sizes = dict[str, dict[int, set[int]]]  # module name -> width -> what that width becomes in the module
DOUBTS = 5  # how many kinds of doubtful numbers are put back in all combinations


def split_groups(traced: Trace, description: Description) -> list[list[Tensor]]:
    """Split every group into parts that grow by themselves: units of one group or head that the same layers read."""
    roots = traced.units.roots()
    marks: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for key, (children, parents) in traced.units.relations.items():
        for child, parent in zip(roots[children].tolist(), roots[parents].tolist(), strict=True):
            if child != parent:
                marks[child].add((str(key), parent))
    for name, axes in traced.parameters.axes.items():
        for dim, labels in enumerate(axes):
            for root in torch.unique(roots[labels]).tolist() if labels is not None else ():
                marks[root].add((name, dim))
    parts = []
    for group in description.groups:
        alike: dict[frozenset, list[int]] = defaultdict(list)
        for unit in group.units.tolist():
            alike[frozenset(marks[unit])].append(unit)
        parts.append([torch.tensor(units) for units in alike.values()])
    return parts


def count_copies(traced: Trace, parts: list[list[Tensor]], factors: Mapping[int, float]) -> Tensor:
    """Return by how many units each label is replaced, on average over its part, if groups grow by these factors."""
    count = torch.ones(len(traced.units.roots()), dtype=torch.double)
    for k, factor in factors.items():
        for units in parts[k]:
            wanted = round(len(units) * factor + 1e-9)  # halves are rounded up, not to even
            count[units] = max(len(units), wanted) / len(units)
    _count_products(traced, {int(root) for group in parts for units in group for root in units}, count)
    return count


def _count_products(traced: Trace, counted: set[int], count: Tensor) -> None:
    """Set the count of units that are made of two others, as a query head's result is made of the query and a value."""
    # It is the product of the two counts, divided by the count of what both of them belong to, such as a key head.
    roots, relations = traced.units.roots(), traced.units.relations
    owners: dict[int, set[int]] = defaultdict(set)
    for children, parents in relations.values():
        for child, parent in zip(roots[children].tolist(), roots[parents].tolist(), strict=True):
            owners[child].add(parent)
    for key, (products, left) in relations.items():
        if key.part == "left" and key.inside is None:
            right = relations[replace(key, part="right")][1]
            for unit, a, b in zip(*(roots[each].tolist() for each in (products, left, right)), strict=True):
                if unit not in counted | {a, b}:
                    shared = [float(count[owner]) for owner in (owners[a] | {a}) & (owners[b] | {b})]
                    count[unit] = count[a] * count[b] / max(shared, default=1.0)


def make_room(model: nn.Module, traced: Trace, count: Tensor, trial: bool = False) -> nn.Module:
    """Return a copy of a network with room for `count` units in the place of each. Tensors that grow are random."""
    # In a `trial`, which only shows whether the copy runs, they are 0, and the other tensors are the model's own.
    roots = traced.units.roots()
    shapes = {name: _grown_shape(traced, roots, name, count) for name in traced.parameters.tensors}
    if all(shape == traced.parameters.tensors[name].shape for name, shape in shapes.items()):
        raise TransferError("Nothing grows: every width stays what it is.")
    copied = copy_network(model, share=trial and not traced.parameters.stand_ins)  # a parametrisation is set in place
    stand_ins = {f"{name}.{weight}".lstrip("."): (module, weight) for name, module, weight in parametrised(copied)}
    generator = torch.Generator().manual_seed(0)
    held = dict(copied.named_parameters()) | dict(copied.named_buffers())
    for name, shape in shapes.items():
        old = traced.parameters.tensors[name]
        if shape == old.shape:
            continue
        value = old.new_zeros(shape) if trial else _draw(old, shape, generator)
        if name in stand_ins:
            _set_parametrised(*stand_ins[name], value, name)
        else:
            held[name].data = value  # tied weights stay tied
    for name, tensor in held.items():
        if not tensor.numel():  # it shows no units
            sizes = _find_sizes(copied, traced, count)[name.rpartition(".")[0]]
            tensor.data = tensor.new_empty([_follow(size, sizes) for size in tensor.shape])
    _check_unreached(copied, traced, count)
    set_sizes(copied, model)
    return copied


def set_sizes(copied: nn.Module, model: nn.Module) -> None:
    """Let the sizes that torch's modules hold follow the tensors of a copy of `model`."""
    for name, module in copied.named_modules():
        _set_attributes(module, model.get_submodule(name))
        if isinstance(module, nn.MultiheadAttention) and module.embed_dim % module.num_heads:
            wants = (
                f"nn.MultiheadAttention divides its width among its {module.num_heads} heads: take a multiple of them"
            )
            raise TransferError(f"{name or 'The network'} cannot grow to {module.embed_dim} units: {wants}.")


def _check_unreached(copied: nn.Module, traced: Trace, count: Tensor) -> None:
    """Raise TransferError if a parameter of which the pass shows no use may read units that grow."""
    names = {name for name, _ in copied.named_parameters() if name in traced.parameters.tensors}
    unreached = sorted(names - traced.parameters.used)
    sizes = _find_sizes(copied, traced, count)[""] if unreached else {}
    widths = [width for width, after in sizes.items() if after != {width}]
    for name in unreached:
        shape = traced.parameters.tensors[name].shape
        for dim, size in enumerate(shape):
            # A matrix may read the units of a whole map.
            if width := next((w for w in widths if size == w or (len(shape) == 2 and dim == 1 and not size % w)), None):
                raise TransferError(
                    f"The forward pass on this example shows no use of {name}, of shape {tuple(shape)}, which may read "
                    f"units of a width that grows ({width}): give an example that reaches it, or let that width be."
                )


def copy_network(model: nn.Module, share: bool = False) -> nn.Module:
    """Return a copy without the record, with the attributes of parameters; `share` leaves the values where they are."""
    for name, module in model.named_modules():
        # A method or a partial is copied with its module, and torch.compile makes its function anew. Others are shared.
        if isinstance(vars(module).get("forward"), FunctionType) and not hasattr(module, "_orig_mod"):
            raise TransferError(
                f"The forward pass of {name or 'the network'} was replaced by a function, which a copy would share: "
                "put the old one back (`del module.forward`), or let it be a method (types.MethodType)."
            )
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()} if share else {}
    try:
        copied = copy.deepcopy(model, shared)
    except (TypeError, RuntimeError) as error:
        why = f"{type(model).__name__} cannot be copied: {error}"
        raise TransferError(f"{why}. Make the larger one yourself, and use net2net.transfer.") from error
    for module in copied.modules():
        for name, held in vars(module).items():
            if isinstance(held, FunctionType) and held.__closure__:  # such as a lambda that reads a tied table
                vars(module)[name] = _close_over(held, {id(old): new for old, new in _copies(model, copied)})
    for place in [place for place, held in vars(copied).items() if isinstance(held, Record)]:
        del copied.__dict__[place]
    theirs = dict(model.named_parameters())
    for name, parameter in copied.named_parameters():
        vars(parameter).update(vars(theirs[name]))
    return copied


def _copies(model: nn.Module, copied: nn.Module) -> Iterator[tuple[object, object]]:
    """Yield every module and tensor of a network with its copy."""
    for list_all in (nn.Module.named_modules, nn.Module.named_parameters, nn.Module.named_buffers):
        theirs = dict(list_all(copied))
        yield from ((held, theirs[name]) for name, held in list_all(model))


def _close_over(function: FunctionType, copies: Mapping[int, object]) -> FunctionType:
    """Return the function with copies in the place of the modules and tensors that it holds."""
    empty = CellType()
    held = function.__closure__ or ()
    cells = tuple(c if c == empty else CellType(copies.get(id(c.cell_contents), c.cell_contents)) for c in held)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def attach_record(grown: nn.Module, record: Record, model: nn.Module, grew: str) -> None:
    """Keep the record, with what grew, as the network's `growth`, or by the next name that is not taken."""
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, grown))
    record = replace(record, grew=f"{before:,} to {after:,} parameters; {grew}")
    place = "growth"
    while hasattr(grown, place):
        place += "_"
    setattr(grown, place, record)


def _set_parametrised(module: nn.Module, weight: str, value: Tensor, name: str) -> None:
    refuse_spectral_norm(module, weight, name)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns that buffers are resized
            setattr(module, weight, value)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise TransferError(f"The parametrisation of {name} cannot be given another width: {error}") from error


def _grown_shape(traced: Trace, roots: Tensor, name: str, count: Tensor) -> torch.Size:
    """Return the shape of a tensor with every unit replaced by `count` of them."""
    parameters, tensor = traced.parameters, traced.parameters.tensors[name]
    shape = list(tensor.shape)
    if name in parameters.values:
        units = roots[parameters.values[name].reshape(tensor.shape)]
        for dim in range(tensor.dim()):
            if not torch.equal(units, units.narrow(dim, 0, 1).expand_as(units)):  # the axis is no axis of positions
                shape[dim] = max(shape[dim], round(float(count[units].sum(dim).max())))
        return torch.Size(shape)
    for dim in range(tensor.dim()):
        if dim == 1 and name in parameters.inner:
            labels, groups = parameters.inner[name]
            shape[dim] = round(float(count[roots[labels]].sum()) / groups)
        elif name in parameters.axes and (labels := parameters.axes[name][dim]) is not None:
            shape[dim] = round(float(count[roots[labels]].sum()))
    return torch.Size(shape)


def _draw(old: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a tensor of another shape with the spread and memory layout of the old one, a vector from its entries."""
    if not old.is_floating_point() or old.is_meta:
        return torch.zeros(shape, dtype=old.dtype, device=old.device)
    if old.dim() == 1 and len(old):  # of a norm or a bias: a variance must not be negative
        return old.detach()[torch.randint(len(old), shape, generator=generator).to(old.device)]
    drawn = torch.randn(shape, generator=generator, dtype=torch.double)
    scale = old.double().std() if old.numel() > 1 else torch.ones(())
    drawn = (drawn * scale.to(drawn)).to(old)
    channels_last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    return drawn.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


_SIZES = {  # by the class of the module: attribute -> the axis of the weight whose size it is
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.GroupNorm: {"num_channels": 0},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    nn.PReLU: {"num_parameters": 0},
}
_WITH_WEIGHTS = (*_SIZES, _ConvNd, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.RNNCellBase)


def _set_attributes(module: nn.Module, before: nn.Module) -> None:
    """Let the sizes that one of torch's modules holds follow its tensors; `before` is the module that was copied."""
    weight, old = getattr(module, "weight", None), getattr(before, "weight", None)
    if isinstance(module, _NormBase):
        held = [t for t in (weight, module.running_mean) if isinstance(t, Tensor)]
        module.num_features = len(held[0]) if held else module.num_features
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        first = "_l0" if isinstance(module, nn.RNNBase) else ""
        now, were = (getattr(m, f"weight_ih{first}") for m in (module, before))
        module.input_size = now.shape[1]
        module.hidden_size = len(now) * module.hidden_size // len(were)  # an LSTM has four rows a unit
        if isinstance(module, nn.LSTM) and module.proj_size:
            module.proj_size = module.get_parameter("weight_hr_l0").shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        packed = module.in_proj_weight
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight] if packed is None else [packed] * 3
        module.embed_dim, module.kdim, module.vdim = (each.shape[1] for each in weights)
        module.head_dim = module.embed_dim // module.num_heads
    elif isinstance(weight, Tensor) and isinstance(old, Tensor):
        if isinstance(module, _ConvNd):
            _set_channels(module, weight.shape, old.shape)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(weight.shape)
        for kind, axes in _SIZES.items():
            for name, axis in axes.items() if isinstance(module, kind) else ():
                setattr(module, name, weight.shape[axis])


def _set_channels(module: _ConvNd, shape: torch.Size, old: torch.Size) -> None:
    first, second = module.out_channels, module.in_channels  # of axis 0, and of axis 1 in all groups
    if module.transposed:
        first, second = second, first
    if module.groups > 1 and old[1] == 1 and module.groups == second:  # each group has one of these
        module.groups = shape[0] * second // first
    second = shape[1] * module.groups
    module.out_channels, module.in_channels = (second, shape[0]) if module.transposed else (shape[0], second)


def follow_widths(copied: nn.Module, traced: Trace, count: Tensor) -> Changes:
    """Change each whole number that a module holds as the widths in it of this value change, if all change alike."""
    # The changes of torch's own modules are listed by class; those of the user's by class, attribute and value.
    changes: Changes = defaultdict(list)
    sizes = _find_sizes(copied, traced, count)
    for name, module in copied.named_modules():
        bare = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is None
        if name not in sizes or (isinstance(module, _WITH_WEIGHTS) and not bare):
            continue
        own = not type(module).__module__.startswith("torch.")
        for key, value in vars(module).items():
            if isinstance(value, (list, tuple)) and all(type(number) is int for number in value):
                new = like(value, [_follow(number, sizes[name]) for number in value])
            elif type(value) is int:
                new = _follow(value, sizes[name])
            else:
                continue
            if new != value:
                numbers = value if isinstance(value, (list, tuple)) else [value]
                change = Change(module, key, value, new, any(number in sizes[name][number] for number in numbers))
                changes[(type(module), key, str(value), change.doubtful) if own else type(module)].append(change)
                change.put(new)
    return changes


def _find_sizes(copied: nn.Module, traced: Trace, count: Tensor) -> Sizes:
    """Return for every module which widths are in it, of tensors and of results, and what they become."""
    sizes: Sizes = defaultdict(lambda: defaultdict(set))

    def note(name: str, before: int, after: int) -> None:
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
    return sizes


def _follow(number: int, sizes: Mapping[int, set[int]]) -> int:
    """Return what a number becomes that is equal to a width."""
    after = sizes.get(number, set()) - {number}
    return next(iter(after)) if len(after) == 1 else number


def put_doubtful_back(run: Callable[[], None], changes: Changes) -> bool:
    """Put back the fewest kinds of doubtful numbers with which the network runs, and tell whether it does."""
    # A number is doubtful where two widths are equal, such as that of a stream and that of all heads, and one grows.
    doubtful = [kind for kind, alike in changes.items() if any(change.doubtful for change in alike)][:DOUBTS]
    for kinds in (each for size in range(len(doubtful) + 1) for each in combinations(doubtful, size)):
        for change in (change for kind in kinds for change in changes[kind]):
            change.put(change.before)
        with suppress(TransferError):
            run()
            for kind in kinds:
                del changes[kind]
            return True
        for change in (change for kind in kinds for change in changes[kind]):
            change.put(change.after)
    return False


def put_idle_back(run: Callable[[], None], changes: Changes) -> bool:
    """Put back numbers that only happened to equal a width: the network runs without. Tell whether there were any."""
    any_idle = False
    for alike in changes.values():
        for change in alike:
            change.put(change.before)
        try:
            run()
            any_idle = True
        except TransferError:
            for change in alike:
                change.put(change.after)
    return any_idle
