"""Describe the unit groups of a network: which layers grow together, how wide they are, and what holds them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..errors import no_other_error
from ..network import Example, Inputs, Outputs, unwrap
from ..trace.facts import Layer, NormKind
from ..trace.graph import Trace
from ..trace.tracer import trace
from ..trace.units import join

Reasons = dict[int, dict[str, None]]  # unit, or group of units -> names or sentences, in order
HEADS = "the units of a head"  # how the reason begins why units of attention move as a whole


@dataclass(frozen=True)
class Group:
    """Units that only grow together."""

    layers: tuple[str, ...]  #: the modules that produce them
    carriers: tuple[str, ...]  #: the modules that have one entry for each of them (norms, depthwise convolutions)
    readers: tuple[str, ...]  #: the modules that read them
    width: int  #: the number of units of the widest layer
    pinned: str | None  #: why they cannot grow
    whole: str | None  #: why they grow in whole pieces only (heads, shuffled halves)
    norms: tuple[str, ...]  #: the norms across units that see them: these want a multiple of the width, or padding
    units: Tensor  #: their labels in the trace
    step: int = 1  #: how many entries of the widest layer a unit has (one for each gate, say)

    @property
    def held(self) -> bool:
        """Whether something keeps these units from growing as they like."""
        return self.pinned is not None or self.whole is not None or bool(self.norms)

    @property
    def free(self) -> bool:
        """Whether these units grow to any width."""
        return not self.held and self.step == 1

    @property
    def state(self) -> str:
        """What holds them, in words."""
        if self.pinned is not None:
            return f"pinned: {self.pinned}"
        if self.whole is not None:
            return f"as a whole: {self.whole}"
        if not self.norms:
            return "free" if self.free else f"in steps of {self.step}: each unit has {self.step} entries"
        return f"seen by the {self.norms[0]}" + f" and {len(self.norms) - 1} more" * (len(self.norms) > 1)


@dataclass(frozen=True)
class Description:
    """The unit groups of a network, in the order of its forward pass; as a string it is a table.

    Layers that the pass does not follow come last.
    """

    groups: tuple[Group, ...]

    def __str__(self) -> str:
        head = ("width", "layers", "read by", "growth")
        rows = [(str(g.width), _list_some(g.layers), _list_some(g.readers), g.state) for g in self.groups]
        wide = [max(len(row[k]) for row in [head, *rows]) for k in range(3)]
        lines = [f"{row[0]:>{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]:<{wide[2]}}  {row[3]}" for row in [head, *rows]]
        free = sum(group.free for group in self.groups)
        return "\n".join([*lines, f"{len(rows)} groups of units, {free} of them free to grow to any width"])


def _list_some(names: tuple[str, ...], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} +{len(names) - most}" if len(names) > most else shown


@no_other_error("describe")
def describe(model: nn.Module, example: Example, *, outputs: Outputs = None) -> Description:
    """Return the groups of units that only grow together, found in one forward pass.

    Args:
        model: the network, which is left as it was.
        example: an input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        outputs: what of the result counts, as of `transfer`.

    Returns:
        The groups; printed, they are a table.

    Raises:
        TransferError: the forward pass fails.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(net2net.describe(model, torch.randn(5, 3)))
        width  layers  read by  growth
            4  0       2        free
            2  2                pinned: it is the network's output
        2 groups of units, 1 of them free to grow to any width
    """
    return describe_trace(trace(unwrap(model), Inputs.of(example, outputs)))


def describe_trace(traced: Trace) -> Description:
    """Return the groups of units of a network that was traced already. Closes the groups of its units."""
    traced.units.close()
    roots = traced.units.roots()
    layers = traced.mixers
    produced = [(layer, layer.produces) for layer in layers if layer.produces is not None]
    # A table that is read as a layer's weight, too, is that layer in the trace; its rows are what the layer reads.
    tables = [(layer, layer.reads) for layer in layers if layer.options.get("embedding") and layer.reads is not None]
    together = [*(units for _, units in produced), *_find_equal_widths(traced)]
    number = _components([torch.unique(roots[units]) for units in together], len(roots))
    members: dict[int, list[tuple[Layer, Tensor]]] = defaultdict(list)
    for layer, units in tables + produced:
        members[int(number[roots[units]][0])].append((layer, units))
    groups_of: dict[str, dict[str, int]] = defaultdict(dict)  # of each module: its weights, and a group of each
    for k, producers in members.items():
        for layer, _ in producers:
            groups_of[layer.module][layer.name] = k
    apart = {module for module, known in groups_of.items() if len(set(known.values())) > 1}
    names = {layer.name: layer.name if layer.module in apart else layer.module for layer in layers}
    readers = _collect(((layer.reads, names[layer.name]) for layer in layers if layer.reads is not None), number[roots])
    # Tensors with an entry for each unit, of layers that produce none.
    entries = {name: axes[0] for name, axes in traced.parameters.axes.items() if axes and axes[0] is not None}
    entries = (entries | traced.parameters.values).items()
    made = {layer.name for layer, _ in produced}
    held = ((units, name.rpartition(".")[0] or name) for name, units in entries if name not in made)
    carriers = _collect(held, number[roots])
    seen = [(n.units, n.module or "in the network", n.kind) for n in traced.norms if n.kind != NormKind.EXTREME]
    kinds = {NormKind.MEAN: "mean"}
    norms = _collect(((units, f"{kinds.get(kind, 'norm')} {where}") for units, where, kind in seen), roots)
    pinned, whole = _collect(traced.units.pinned, roots), _find_wholes(traced, roots)
    groups = []
    for k, producers in members.items():
        units = torch.unique(torch.cat([roots[units] for _, units in producers]))
        labels = units.tolist()
        width, widest = max(((_width(traced, *each), each[1]) for each in producers), key=itemgetter(0))
        most = int(torch.unique(roots[widest], return_counts=True)[1].max())
        groups.append(
            Group(
                layers=tuple(dict.fromkeys(names[layer.name] for layer, _ in producers)),
                carriers=tuple(carriers[k]),
                readers=tuple(readers[k]),
                width=width,
                pinned=next((why for label in labels for why in pinned[label]), None),
                whole=next((whole[label] for label in labels if label in whole), None),
                norms=tuple(dict.fromkeys(name for label in labels for name in norms[label])),
                units=units,
                step=most * width // len(widest),
            )
        )
    return Description((*groups, *_find_held(traced, roots, pinned, groups)))


def _find_held(traced: Trace, roots: Tensor, pinned: Reasons, groups: Iterable[Group]) -> list[Group]:
    """Return a group for each module that is none of the layers in `groups`, but whose parameters are pinned."""
    known = {name for group in groups for name in (*group.layers, *group.carriers, *group.readers)}
    held: dict[str, list[str]] = defaultdict(list)
    for name, _ in traced.model.named_parameters():
        module = name.rpartition(".")[0] or name
        if name in traced.parameters.used and name in traced.parameters.values and module not in known:
            held[module].append(name)
    found = []
    for module, names in held.items():
        units = torch.unique(torch.cat([roots[traced.parameters.values[name]] for name in names]))
        output = traced.outputs.get(module)
        result = () if output is None else torch.unique(roots[output.units]).tolist()
        why = next((why for label in (*result, *units.tolist()) for why in pinned[label]), None)
        if why is not None:
            sizes = {size for name in names for size in traced.parameters.tensors[name].shape}
            width = max(sizes & set(() if output is None else output.units.shape[1:]) or sizes, default=1)
            found.append(Group((module,), (), (), width, why, None, (), units))
    return found


def _collect(pairs: Iterable[tuple[Tensor, str]], number: Tensor) -> Reasons:
    """Return for every number the names that stand beside labels of this number, each once and in order."""
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for labels, name in pairs:
        for k in torch.unique(number[labels]).tolist():
            found[k][name] = None
    return found


def _width(traced: Trace, layer: Layer, units: Tensor) -> int:
    """Return what the layer's class calls its width: an LSTM counts a unit once, not each of its gates."""
    module = traced.model.get_submodule(layer.module) if layer.module in traced.module_names else None
    if isinstance(module, nn.MultiheadAttention):
        return min(len(units), module.embed_dim)
    return min(len(units), module.hidden_size) if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else len(units)


def _find_wholes(traced: Trace, roots: Tensor) -> dict[int, str]:
    """Return for every unit that grows in whole pieces only the reason."""
    whole = {unit: next(iter(why)) for unit, why in _collect(traced.units.whole, roots).items()}
    heads = [roots[side] for contraction in traced.contractions for side in (contraction.left, contraction.right)]
    for key, (children, parents) in traced.units.relations.items():
        if heads:
            values = roots[children][torch.isin(roots[parents], torch.cat(heads))]
            whole |= dict.fromkeys(values.tolist(), f"{HEADS}, values")
        if key.part in ("left", "right"):  # a unit made of two, as a mixer makes it, has a copy for each copy of both
            continue
        owners = dict.fromkeys(roots[parents].tolist(), "other units belong to each of them (heads, groups, gates)")
        whole = owners | whole
    return whole | {unit: f"{HEADS}, queries by keys" for units in heads for unit in units.tolist()}


def _find_equal_widths(traced: Trace) -> list[Tensor]:
    """Return units that torch wants equally many of: the heads' of a `MultiheadAttention`, and those of its query."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for layer in traced.mixers:
        module = traced.model.get_submodule(layer.module) if layer.module in traced.module_names else None
        if isinstance(module, nn.MultiheadAttention) and layer.produces is not None:
            found[layer.module].append(layer.produces)
            if layer.reads is not None and not layer.name.endswith(("k_proj_weight", "v_proj_weight")):
                found[layer.module].append(layer.reads)
    return [torch.cat(units) for units in found.values()]


def _components(sets: list[Tensor], count: int) -> Tensor:
    """Number all units. Units of sets that overlap, directly or through other sets, get the same number."""
    edges = [torch.empty(2, 0, dtype=torch.long), *(torch.stack([x, x[:1].expand_as(x)]) for x in sets)]
    return torch.arange(count).index_copy_(0, *join(torch.cat(edges, dim=1)))
