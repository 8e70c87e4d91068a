"""Make a wider copy of a network, filled by `transfer`."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ..attempts import Patience
from ..errors import TransferError, no_other_error
from ..network import Example, Inputs, Outputs, run, unwrap
from ..pretrained import keep_configs, list_pretrained
from ..trace.graph import Trace
from ..trace.tracer import IS_OUTPUT, trace
from ..transfer import Transfer, transfer
from .describe import HEADS, Description, Group, describe_trace
from .extend import New, extend
from .shapes import (
    attach_record,
    count_copies,
    follow_widths,
    make_room,
    put_doubtful_back,
    put_idle_back,
    split_groups,
)

Widths = float | Mapping[str, float | int]
Factors = dict[int, float]  # number of a group of units -> the factor by which it grows
TRIES = 64  # see `_grow_most`
KEPT = 3  # how many of the groups that keep their width are named


@no_other_error("widen")
def widen(  # noqa: PLR0913 (public signature)
    model: nn.Module,
    example: Example,
    widths: Widths,
    *,
    generator: torch.Generator | None = None,
    split: str = "uneven",
    noise: float = 0.0,
    outputs: Outputs = None,
    new: New | None = None,
) -> nn.Module:
    """Return a wider copy of a network, of the same class and state-dict keys, that computes the same function.

    Units that only grow together (`describe`) grow by one factor. If the forward pass uses a width as a number, this
    number must be an attribute of a module, and changes with the tensors.

    Args:
        model: the network, which is left as it was.
        example: an input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        widths: layers by name (`*` stands for anything) to a factor (a float) or a number of units (an int), as
            `{"layer2.*": 1.5, "fc1": 96}`. Or one factor, for every width that nothing holds and that can grow.
        generator: as of `transfer`; so are `split` and `noise`.
        split: how the copies of a unit divide its outgoing weight.
        noise: changes the function a little.
        outputs: what of the result counts, as of `transfer`.
        new: adds entries that are no copies, where `widths` names the last layer (more classes, a larger vocabulary), a
            table (more rows) or the first layer (more channels of the input). They are "zero", the "mean" of the old
            ones, or this tensor, and stand behind the old ones, on which the function is the same.

    Returns:
        The copy. Its `growth` is the record of the transfer (`growth_` if the network has a `growth` of its own). The
        `config` of a Hugging Face model says what the copy is, or its `save_pretrained` refuses.

    Raises:
        TransferError: a name fits no layer, its units cannot grow as asked, or nothing can grow.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> net2net.widen(model, torch.randn(5, 3), {"0": 6})[0]
        Linear(in_features=3, out_features=6, bias=True)
    """
    model, inputs = unwrap(model), Inputs.of(example, outputs)
    fill = partial(transfer, model, example=example, split=split, noise=noise, outputs=outputs)
    traced = trace(model, inputs)
    if new is None:
        wider = _widen_in_a_mode(traced, inputs, widths, fill, generator)
    else:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise TransferError("A network on the meta device has no values beside which new entries could stand.")
        if not isinstance(widths, Mapping):
            raise TransferError("`new` adds entries to layers that are named: give `widths` as a dictionary.")
        for name, width in widths.items():
            _check_width(width, repr(name))
        wider = extend(model, traced, inputs, widths, new)
    keep_configs(list_pretrained(model), wider, inputs)
    return wider


Fill = Callable[..., Transfer]


def _widen_in_a_mode(
    traced: Trace, inputs: Inputs, widths: Widths, fill: Fill, generator: torch.Generator | None
) -> nn.Module:
    """Return a wider copy by the trace of the eval mode, or else by that of both modes."""
    try:
        return _widen(traced, inputs, widths, fill, generator)
    except TransferError:
        if traced.both is not None:  # what grows alone in eval mode may have to grow with others in training
            with suppress(TransferError):
                return _widen(traced.both, inputs, widths, fill, generator)
        raise


def _widen(traced: Trace, inputs: Inputs, widths: Widths, fill: Fill, generator: torch.Generator | None) -> nn.Module:
    """Return a wider copy of the network of a trace; `fill` fills a student."""
    description = describe_trace(traced)
    parts = split_groups(traced, description)
    state = (generator or torch.Generator().manual_seed(0)).get_state()

    def grow(factors: Factors, follow_all: bool = False) -> nn.Module:
        count = count_copies(traced, parts, factors)
        copied, put_back = _make_runnable(inputs, traced, count, follow_all=follow_all)
        draws = torch.Generator()
        draws.set_state(state)
        try:
            record = fill(copied, generator=draws)
        except TransferError:
            if not put_back:
                raise
            return grow(factors, follow_all=True)  # the network runs without a number, but may compute with it
        kept = [group for k, group in enumerate(description.groups) if k not in factors]
        free = "not named" if isinstance(widths, Mapping) else "free, but a wider copy of it fails"
        names = [f"{group.layers[0]} ({free if group.free else group.state})" for group in kept[:KEPT]]
        names += [f"{len(kept) - KEPT} more"] * (len(kept) > KEPT)
        grew = f"{len(factors)} of {len(description.groups)} groups of units grew"
        attach_record(copied, record, traced.model, f"{grew}, others kept their width: {', '.join(names) or 'none'}")
        if generator is not None:
            generator.set_state(draws.get_state())
        return copied

    def try_shapes(factors: Factors) -> nn.Module:
        return _make_runnable(inputs, traced, count_copies(traced, parts, factors), trial=True)[0]

    if isinstance(widths, Mapping):
        factors, wanted = _requested_factors(description, widths, traced)
        count = count_copies(traced, parts, factors)
        grown = _grow_with_heads(grow, description, factors) if bool((count > 1).any()) else None
        for k, (name, width) in wanted.items():
            _check_reached(traced, description.groups[k], count, name, width)
        return grown or grow(factors)  # which raises that nothing grows
    _check_width(widths, "the layers")
    if widths < 1:
        raise TransferError(f"The factor {widths} is below 1: a network grows, and its layers cannot shrink.")
    free = [k for k, group in enumerate(description.groups) if not group.held]
    if not free:
        why = "; ".join(f"{group.layers[0]}: {group.state}" for group in description.groups[:5])
        name = type(traced.model).__name__
        raise TransferError(f"No width of {name} is free to grow by {widths}: {why or 'it has no layers'}.")
    runnable, _ = _grow_most(try_shapes, dict.fromkeys(free, float(widths)))  # a width in the code itself stays
    return _grow_most(grow, runnable)[1]


def _grow_with_heads(grow: Callable[[Factors], nn.Module], description: Description, factors: Factors) -> nn.Module:
    """Grow these groups; if that fails, grow with them the heads that read them: code may want both equally wide."""
    try:
        return grow(factors)
    except TransferError:
        heads = {
            k: factors[stream]
            for k, group in enumerate(description.groups)
            for stream in factors
            if (group.whole or "").startswith(HEADS) and {*group.layers} & {*description.groups[stream].readers}
        }
        if not heads.keys() <= factors.keys():
            with suppress(TransferError):
                return grow(heads | factors)
        raise


def _make_runnable(
    inputs: Inputs, traced: Trace, count: Tensor, *, trial: bool = False, follow_all: bool = False
) -> tuple[nn.Module, bool]:
    """Return a copy with room for new units that runs, and whether numbers were put back that it runs without."""
    # If the copy does not run, the numbers that modules hold follow the widths. Those that it runs without are then put
    # back, unless `follow_all` or `trial` is set.
    copied = make_room(traced.model, traced, count, trial)

    def run_copy() -> None:
        run(copied, inputs)
        if traced.trains:
            run(copied, inputs, training=True)

    try:
        run_copy()
        return copied, False
    except TransferError as error:
        changes = follow_widths(copied, traced, count)
        if put_doubtful_back(run_copy, changes):
            return copied, not follow_all and not trial and put_idle_back(run_copy, changes)
        roots = traced.units.roots()
        grown = [x for x in traced.mixers if x.produces is not None and bool((count[roots[x.produces]] > 1).any())]
        wide = ", ".join(f"{x.module} is {len(x.produces)} units wide" for x in grown[:3] if x.produces is not None)
        number = f"A number in its code or its modules probably follows from the width of a layer ({wide})"
        advice = "let it follow that layer, or build the wider network yourself and call net2net.transfer"
        raise TransferError(f"{str(error).rstrip('.')}: a wider copy does not run. {number}: {advice}.") from error


def _check_width(width: object, what: str) -> None:
    if isinstance(width, bool) or not isinstance(width, Real) or not 0 < float(width) < float("inf"):
        raise TransferError(f"{width!r} is no width for {what}: give a factor (a float) or a number of units (an int).")


def _requested_factors(
    description: Description, widths: Mapping[str, float | int], traced: Trace
) -> tuple[Factors, dict[int, tuple[str, int]]]:
    """Return the factor of every group that `widths` names, and the name and number where it gives a number."""
    first_names = traced.parameters.first_names.items()
    other_names = [(name.rpartition(".")[0], first.rpartition(".")[0]) for name, first in first_names]
    factors: Factors = {}
    wanted: dict[int, tuple[str, int]] = {}
    for pattern, width in widths.items():
        _check_width(width, repr(pattern))
        also = {first for name, first in other_names if name != first and fnmatchcase(name, pattern)}
        named = {
            k: name
            for k, group in enumerate(description.groups)
            for name in group.layers + group.carriers
            if fnmatchcase(name, pattern) or name in also
        }
        if not named:
            raise _no_such_layer(description, traced, pattern)
        growing = {k: name for k, name in named.items() if description.groups[k].pinned is None}
        if not growing:
            (k, name), *_ = named.items()
            held = description.groups[k]
            how = " More outputs are no copies: say new='zero' or new='mean'." * (held.pinned in IS_OUTPUT)
            raise TransferError(f"{name} cannot grow from {held.width} units: {held.pinned}.{how}")
        for k, name in growing.items():
            now = description.groups[k].width
            factor = width / now if isinstance(width, Integral) else width
            if factor < 1:
                hint = f": {width} is a number of units, {width}.0 a factor" if isinstance(width, Integral) else ""
                raise TransferError(f"{name} has {now} units: it cannot shrink to {width}{hint}.")
            if factor >= factors.get(k, 1.0):
                factors[k] = factor
                wanted.pop(k, None)
                wanted |= {k: (name, int(width))} if isinstance(width, Integral) else {}
    return factors, wanted


def _check_reached(traced: Trace, group: Group, count: Tensor, name: str, width: int) -> None:
    """Raise TransferError if the widest layer of a group gets another number of units than was asked for."""
    roots = traced.units.roots()
    axes = [
        units for x in traced.mixers if {x.module, x.name} & {*group.layers} for units in (x.produces, x.reads)
    ]  # a tied table
    own = [roots[units] for units in axes if units is not None and bool(torch.isin(roots[units], group.units).all())]
    made = round(group.width * float(count[max(own, key=len)].mean()))
    if made != width:
        steps = "its units grow in steps, as those of gates or heads do"
        raise TransferError(f"{name} cannot grow from {group.width} to {width} units, but to {made}: {steps}.")


def _no_such_layer(description: Description, traced: Trace, pattern: str) -> TransferError:
    """Return the error of a pattern that fits no layer, though it may fit a module."""
    name = next((name for name in sorted(traced.module_names) if name and fnmatchcase(name, pattern)), None)
    if name is None:
        known = ", ".join(name for group in description.groups[:4] for name in group.layers[:2])
        return TransferError(f"No layer is called {pattern!r}: there are {known} and others (net2net.describe).")
    own = {f"{name}.{tensor}" for tensor, _ in traced.model.get_submodule(name).named_parameters(recurse=False)}
    why = "the forward pass on this example shows no width of it"
    if not own:
        why = f"it has no parameters of its own. {name + '.*'!r} names the layers in it (net2net.describe)"
    elif not own & traced.parameters.used:
        why = "the forward pass on this example shows no use of it: give an example that reaches it"
    return TransferError(f"{name} has no units to grow: {why}.")


def _grow_most(grow: Callable[[Factors], nn.Module], factors: Factors) -> tuple[Factors, nn.Module]:
    """Grow all groups that can grow together, found by halving; return them and the network grown by them."""
    # `grow` returns the grown network, or raises TransferError. If no group grows, the first reason is raised. The
    # search stops after `TRIES` attempts and returns the most that has grown until then.
    held: Factors = {}
    best: list[nn.Module] = []
    refusals: list[TransferError] = []
    patience, tries = Patience(), iter(range(TRIES))

    def add(part: Factors, fails: bool = False) -> bool:
        """Grow `part`, too, as far as possible; tell whether all of it grows. `fails` says that not all of it can."""
        if not fails:
            if next(tries, None) is None:
                return False
            try:
                best[:] = [grow(held | part)]
                held.update(part)
                return True
            except TransferError as error:
                refusals.append(error)
        if len(part) > 1 and (best or not patience.is_over()):
            items, half = list(part.items()), len(part) // 2
            add(dict(items[half:]), fails=add(dict(items[:half])))
        return False

    add(factors)
    if not best:
        raise refusals[0]
    return held, best[0]
