"""Which axis, or which view, of a parameter carries which units."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TransferError
from .facts import Key, View, Weight
from .units import Units, compact, spread


class Parameters:
    """The parameters and buffers of one network, and the units of their axes as far as the pass has come."""

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.units = units
        # A weight that a parametrisation computes replaces the tensors it is computed from.
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.originals = dict(self.tensors)  # as they were before groups were merged in any of them
        self.buffers = {name for name, _ in model.named_buffers()}
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.first_names = {name: self._names[id(tensor)] for name, tensor in every}  # all names, also of tied tensors
        self.stand_ins: list[str] = []  # the weights that parametrisations compute
        self.axes: dict[str, list[Tensor | None]] = {}  # tensor name -> the units of each of its axes
        self.values: dict[str, Tensor] = {}  # tensor used as an activation -> the units of all its elements, flat
        self.read_axis: dict[str, int] = {}  # tensor name -> the axis that reads units
        self.inner: dict[str, tuple[Tensor, int]] = {}  # grouped tensor -> units of axis 1 in every group, groups
        self.chosen: dict[tuple[str, int], str] = {}  # (tensor, axis along which values choose entries) -> what chooses
        self.summed: dict[str, int] = {}  # tensor whose elements times units are summed -> in how many sums
        self.masks: set[tuple[str, str]] = set()  # buffers, each with a weight of its axes that it multiplies
        self.used: set[str] = set()  # tensors that a call was given
        self.reached: dict[str, Tensor] = {}  # tensor name -> which of its elements the pass used, flat
        self._mark = object()  # tells notes of this pass from those of others, on tensors that a cache keeps

    def name_of(self, tensor: object) -> str | None:
        """Return the name of a parameter or buffer of the network; a tied tensor goes by its first name."""
        return self._names.get(id(tensor))

    def owner_of(self, value: Tensor) -> str | None:
        """Return the name of the parameter that this is, or is a view of."""
        view = self.noted(value, "view")
        return self.name_of(value) if view is None else view.name

    def stand_in(self, tensor: Tensor, name: str, prefix: str) -> None:
        """Let `tensor`, which is computed from the parameters under `prefix`, stand for them as the weight `name`."""
        self.tensors = {n: t for n, t in self.tensors.items() if not n.startswith(prefix)} | {name: tensor}
        self.originals = dict(self.tensors)
        self.first_names = {n: first for n, first in self.first_names.items() if not n.startswith(prefix)}
        self.first_names[name] = name
        self.stand_ins.append(name)
        self._names[id(tensor)] = name

    def view(self, value: Tensor) -> View | None:
        """Return this parameter, or view of a parameter, as a view; None for an activation or a constant."""
        if self.noted(value, "labels") is not None:
            return None
        if (name := self.name_of(value)) is None:
            return self.noted(value, "view")
        shape = value.shape
        return View(name, tuple(spread(torch.arange(n), dim, shape) for dim, n in enumerate(shape)))

    def remember_view(self, out: Tensor, view: View) -> None:
        """Remember that `out` is a view of a parameter."""
        self.note(out, "view", view)

    def note(self, value: Tensor, what: str, note: object) -> None:
        """Attach a note of this pass to a tensor."""
        setattr(value, f"_net2net_{what}", (self._mark, note))

    def noted(self, value: object, what: str) -> Any:
        """Return what this pass has noted on a tensor; None if it has noted nothing."""
        mark, note = getattr(value, f"_net2net_{what}", (None, None))
        return note if mark is self._mark else None

    def weight(self, value: Tensor) -> Weight | None:
        """Return the parameter behind a weight; None unless every axis of the weight lies along one of its axes."""
        if (name := self.name_of(value)) is not None:
            return Weight(name, [(dim, None) for dim in range(value.dim())])
        if (view := self.view(value)) is None or view.offset:
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

    def elements(self, view: View, shape: torch.Size) -> Tensor:
        """Return the units of a parameter's elements that are used as an activation of `shape`."""
        sizes = self.tensors[view.name].shape
        if view.name not in self.values:
            self.values[view.name] = self.units.fresh(sizes.numel(), Key(view.name), distinct=False)
        flat, step = torch.zeros(shape, dtype=torch.long), sizes.numel()
        for places, size in zip(view.places, sizes, strict=True):
            step //= size
            flat = flat + places * step
        units = self.values[view.name][flat]
        self.reached.setdefault(view.name, torch.zeros(sizes.numel(), dtype=torch.bool))[flat] = True
        return units

    def axis(self, name: str, dim: int, units: Tensor | None = None, taken: Tensor | None = None) -> Tensor:
        """Let axis `dim` of a tensor carry `units` (None: fresh ones), and return the labels of the entries `taken`."""
        # A tensor that is used a second time carries the same units again.
        size = self.tensors[name].shape[dim]
        axes = self.axes.setdefault(name, [None] * self.tensors[name].dim())
        known = axes[dim]
        if known is None:
            if taken is None and units is not None and len(units) != size:
                raise TransferError(f"{name} is used with {len(units)} entries on axis {dim}, and has {size}.")
            axes[dim] = known = units if units is not None and taken is None else self.units.fresh(size)
        part = known if taken is None else known[taken]
        if units is not None and units is not part:
            self.units.unite(units, part)
        return part

    def axis_labels(self, name: str, dim: int) -> Tensor | None:
        """Return the labels of a tensor's axis. Inside groups these are the labels of one group after the other."""
        if name in self.inner and dim == 1:
            return self.inner[name][0]
        return self.axes[name][dim] if name in self.axes else None

    def inside(self, name: str, groups: int, units: Tensor | None = None) -> Tensor:
        """Let axis 1 of the tensor `name` carry `units`, one row of them for each of its groups; return the labels."""
        if name not in self.inner:
            size = self.tensors[name].shape[1] * groups
            self.inner[name] = (self.units.fresh(size) if units is None else units, groups)
        known = self.inner[name][0]
        if units is not None and units is not known:
            self.units.unite(units, known)
        return known

    def _wear(self, mask: str, weight: str) -> None:
        """Let the axes of a mask carry the units of its weight's, except those along which it is one number."""
        for dim, size in enumerate(self.tensors[mask].shape):
            if size == self.tensors[weight].shape[dim]:
                if weight in self.inner and dim == 1:
                    self.inside(mask, self.inner[weight][1], self.inner[weight][0])
                elif (units := self.axis_labels(weight, dim)) is not None:
                    self.axis(mask, dim, units)

    def complete(self) -> None:
        """Let elements that the pass did not use have the units of those that it used."""
        # Such elements are positions beyond the example's length, or rows of other classes. If the used elements differ
        # along an axis that was used in part, they do not show the units of the others, and all units are pinned.
        for mask, weight in sorted(self.masks):
            self._wear(mask, weight)
        apart = torch.bincount(self.units.roots(), minlength=1) == 1  # roots of units that met nothing
        for name, reached in self.reached.items():
            if len(self.values[name]) != len(reached):
                continue
            # A pass may take a whole table and use a part of it.
            met = reached & ~apart[self.units.find(self.values[name])]
            if not self._complete(name, met) and not reached.all() and not self._complete(name, reached):
                why = f"the example uses only {int(reached.sum())} of the {len(reached)} elements of {name}"
                self.units.pin(self.values[name], why)
        for (name, dim), why in self.chosen.items():
            if name not in self.axes and name not in self.values:
                self.values[name] = self.units.fresh(1, Key(name), distinct=False).expand(self.tensors[name].numel())
            if (labels := self.axis_labels(name, dim)) is not None:
                self.units.pin(labels, why)
            if name in self.values:  # whichever entries are chosen, the units are the same, if they are along the axis
                labels = self.units.find(self.values[name]).reshape(self.tensors[name].shape)
                same = torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))
                if not same or len(torch.unique(labels)) == 1:
                    self.units.pin(labels, why)

    def _complete(self, name: str, reached: Tensor) -> bool:
        """Let a tensor's other elements have the units of those that are `reached`, if these show them; tell if so."""
        shape = self.tensors[name].shape
        box, labels = reached.reshape(shape), self.values[name].reshape(shape)
        used = [box.movedim(d, 0).reshape(shape[d], -1).any(1).nonzero().flatten() for d in range(len(shape))]
        partly = [dim for dim, at in enumerate(used) if len(at) < shape[dim]]
        inside = self.units.find(labels[torch.meshgrid(*used, indexing="ij")])
        if not reached.any() or int(reached.sum()) != inside.numel():
            return False
        if not all(torch.equal(inside, inside.narrow(dim, 0, 1).expand_as(inside)) for dim in partly):
            return False
        for dim in partly:  # as the first that is used
            like = torch.arange(shape[dim])
            like[~torch.isin(like, used[dim])] = used[dim][0]
            labels = labels.index_select(dim, like)
        self.units.unite(self.values[name], labels.reshape(-1))
        return True
