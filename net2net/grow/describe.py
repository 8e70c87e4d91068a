"""The unit groups of a network: which layers grow together, how wide they are, and what holds them."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network import Example, Inputs, unwrap
from ..trace.facts import Layer
from ..trace.graph import Trace
from ..trace.groups import close
from ..trace.tracer import trace


@dataclass(frozen=True)
class Group:
    """Units that only grow together.

    `layers` produce them (names of modules), `carriers` have one entry for each (norms, depthwise convolutions),
    `readers` read them, `width` is the number of units of the widest of the layers. `pinned` says why they cannot grow,
    `whole` why they move in pieces only (heads, shuffled halves), `norms` names the norms across units that see them:
    these want a multiple of the width, or means. `units` are their labels.
    """

    layers: tuple[str, ...]
    carriers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int
    pinned: str | None
    whole: str | None
    norms: tuple[str, ...]
    units: Tensor

    @property
    def free(self) -> bool:
        """Whether these units grow to any width."""
        return self.pinned is None and self.whole is None and not self.norms

    @property
    def state(self) -> str:
        """What holds them, in words."""
        if self.pinned is not None:
            return f"pinned: {self.pinned}"
        if self.whole is not None:
            return f"as a whole: {self.whole}"
        return (
            f"seen by the {self.norms[0]}" + f" and {len(self.norms) - 1} more" * (len(self.norms) > 1)
            if self.norms
            else "free"
        )


@dataclass(frozen=True)
class Description:
    """The unit groups of a network, in the order of its forward pass."""

    groups: tuple[Group, ...]

    def __str__(self) -> str:
        head = ("width", "layers", "read by", "growth")
        rows = [(str(g.width), _some(g.layers), _some(g.readers), g.state) for g in self.groups]
        wide = [max(len(row[k]) for row in [head, *rows]) for k in range(3)]
        lines = [f"{row[0]:>{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]:<{wide[2]}}  {row[3]}" for row in [head, *rows]]
        free = sum(group.free for group in self.groups)
        return "\n".join([*lines, f"{len(rows)} groups of units, {free} of them free to grow to any width"])


def _some(names: tuple[str, ...], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} +{len(names) - most}" if len(names) > most else shown


def describe(model: nn.Module, example: Example) -> Description:
    """The groups of units of `model`, which must grow together, found in one forward pass on `example`.

    The network is left as it was. Raises TransferError if the forward pass fails.
    """
    return described(trace(unwrap(model), Inputs.of(example)))


def described(traced: Trace) -> Description:
    """The same of a pass that was made already."""
    close(traced.units)
    roots = traced.units.roots()
    layers = [layer for layer in traced.layers.values() if layer.kind == "mix" and layer.produces is not None]
    group = _components([torch.unique(roots[layer.produces]) for layer in layers], len(roots))
    of: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        of[int(group[roots[layer.produces]][0])].append(layer)
    pinned, whole = _reasons(traced.units.pinned, roots), _reasons(traced.units.whole, roots)
    for contraction in traced.contractions:
        whole |= dict.fromkeys(roots[contraction.left].tolist(), "the units of a head, queries by keys")
    heads = [roots[contraction.left] for contraction in traced.contractions]
    for children, parents in traced.units.relations.values():
        if heads:
            valued = roots[children][torch.isin(roots[parents], torch.cat(heads))]
            whole |= dict.fromkeys(valued.tolist(), "the units of a head, values")
        owners = dict.fromkeys(roots[parents].tolist(), "other units belong to each of them (heads, groups, gates)")
        whole = owners | whole
    norms: dict[int, dict[str, None]] = defaultdict(dict)
    for norm in (norm for norm in traced.norms if norm.kind != "extreme"):
        for root in torch.unique(roots[norm.units]).tolist():
            norms[root][f"{'mean' if norm.kind == 'mean' else 'norm'} {norm.module or 'in the network'}"] = None
    found, carriers, readers = [], _carriers(traced, roots, group), _readers(traced, roots, group)
    for number, members in of.items():
        units = torch.unique(torch.cat([roots[layer.produces] for layer in members]))
        seen = units.tolist()
        found.append(
            Group(
                tuple(dict.fromkeys(layer.module for layer in members)),
                tuple(carriers[number]),
                tuple(dict.fromkeys(readers[number])),
                max(_width(traced, layer) for layer in members),
                next((pinned[root] for root in seen if root in pinned), None),
                next((whole[root] for root in seen if root in whole), None),
                tuple(dict.fromkeys(name for root in seen for name in norms.get(root, {}))),
                units,
            )
        )
    return Description(tuple(found))


def _width(traced: Trace, layer: Layer) -> int:
    """What the layer's class calls its width: an LSTM's counts a unit once, not each of its gates."""
    assert layer.produces is not None
    module = traced.model.get_submodule(layer.module) if layer.module in traced.module_names else None
    produced = len(layer.produces)
    return min(produced, module.hidden_size) if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else produced


def _reasons(pairs: list[tuple[Tensor, str]], roots: Tensor) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, why in pairs:
        for root in torch.unique(roots[labels]).tolist():
            found.setdefault(root, why)
    return found


def _carriers(traced: Trace, roots: Tensor, group: Tensor) -> dict[int, dict[str, None]]:
    """For every group the modules, in the order of the forward pass, that have an entry for each unit and produce
    none."""
    producers = {layer.name for layer in traced.layers.values() if layer.kind == "mix"}
    carried = {
        name: axes[0] for name, axes in traced.parameters.axes.items() if axes and axes[0] is not None
    } | traced.parameters.values
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for name, labels in carried.items():
        for number in torch.unique(group[roots[labels]]).tolist() if name not in producers else ():
            found[number][name.rpartition(".")[0] or name] = None
    return found


def _readers(traced: Trace, roots: Tensor, group: Tensor) -> dict[int, list[str]]:
    """For every group the modules that read its units."""
    found: dict[int, list[str]] = defaultdict(list)
    for layer in traced.layers.values():
        if layer.kind == "mix" and layer.reads is not None:
            for number in torch.unique(group[roots[layer.reads]]).tolist():
                found[number].append(layer.module)
    return found


def _components(sets: list[Tensor], count: int) -> Tensor:
    """For every unit a number: equal for units of layers that share some."""
    number = torch.arange(count)
    while True:
        before = number.clone()
        for units in sets:
            number[units] = number[units].min()
        if torch.equal(before, number):
            return number
