"""Add blocks to a stack whose length the model's config holds, such as `num_hidden_layers`."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from ..pretrained import Facts, Values, list_configs, list_fields, make_from_config, set_fields, take_numbers
from .shapes import copy_network

Renamed = dict[str, str]  # prefixes of the deeper model to those of the old one; "" for new blocks


def add_blocks(model: nn.Module, after: Sequence[str]) -> tuple[nn.Module, Renamed] | None:
    """Return a copy with a new block behind each of the blocks `after`, and the old names of its blocks.

    The model's class makes the new blocks, from the config with a larger length. The result is None if `after` names no
    blocks of one stack, or if no number of the config is the length of the stack.
    """
    (stack, *others), counts = dict.fromkeys(name.rpartition(".")[0] for name in after), Counter(after)
    if others or not hasattr(model, "save_pretrained") or "save_pretrained" in vars(model):
        return None
    blocks = dict(model.named_modules()).get(stack)
    if not isinstance(blocks, nn.ModuleList) or not counts.keys() <= {f"{stack}.{k}" for k in range(len(blocks))}:
        return None
    sources = [
        k for k in range(len(blocks)) for _ in range(1 + counts[f"{stack}.{k}"])
    ]  # a new block follows its source
    new = [place for place, k in enumerate(sources) if sources.index(k) != place]
    renamed = {f"{stack}.{place}": "" if place in new else f"{stack}.{k}" for place, k in enumerate(sources)}
    for values in _list_lengths(model, sources):
        with suppress(Exception):  # the class and the config are not ours, and may raise anything
            plain, made = (Facts.of(make_from_config(model, each)) for each in ({}, values))
            if _is_longer(made, plain, renamed):
                return _insert(model, stack, values, renamed, plain), renamed
    return None


def _list_lengths(model: nn.Module, sources: list[int]) -> list[Values]:
    """List the values of the config that may make a stack longer: a number, with the lists of one entry per block."""
    fields, length = list(list_fields(model.config)), len(set(sources))
    lists = {
        name: [value[k] for k in sources] for name, value in fields if type(value) is list and len(value) == length
    }
    return [lists | {name: len(sources)} for name, value in fields if type(value) is int and value == length]


def _is_longer(made: Facts, plain: Facts, renamed: Renamed) -> bool:
    """Tell whether a model differs from the old one by new blocks alone, and by what the blocks know of their place."""
    old = {}
    for name, (fact, *more) in made.structure.items():
        if (theirs := _old_name(name, renamed)) is not None:
            old[theirs] = (fact, *more) if name.endswith(":") else (fact, _old_name(more[0], renamed), more[1])
    for mine, theirs in renamed.items():
        places = tuple(int(name.rpartition(".")[2]) for name in (theirs, mine)) if theirs else ()
        for (module, key), value in made.numbers.items():
            if theirs and (module == mine or module.startswith(f"{mine}.")):
                before = plain.numbers.get((theirs + module[len(mine) :], key))
                if before != value and (before, value) != places:  # as where kinds of blocks alternate
                    return False
    return old == plain.structure


def _insert(model: nn.Module, stack: str, values: Values, renamed: Renamed, plain: Facts) -> nn.Module:
    """Return a copy with the new blocks of a model that the class makes, and with the numbers of that model."""
    deeper, made = copy_network(model), make_from_config(model, values, weights=True)
    reference, blocks = next(p for p in model.parameters() if p.is_floating_point()), deeper.get_submodule(stack)
    pairs = zip(list_configs(made.config), list_configs(deeper.config), strict=True)
    configs = {id(theirs): mine for (theirs, _), (mine, _) in pairs}
    for place, (name, old) in enumerate(renamed.items()):
        if not old:
            block = made.get_submodule(name).to(reference.device, reference.dtype).train(model.training)
            for module in block.modules():
                vars(module).update({key: configs[id(v)] for key, v in vars(module).items() if id(v) in configs})
            blocks.insert(place, block)  # type: ignore[operator]
    set_fields(deeper.config, values)
    take_numbers(deeper, plain, Facts.of(made), lambda name: _old_name(name, renamed))
    return deeper


def _old_name(name: str, renamed: Renamed) -> str | None:
    """Return the name that a tensor or module of the deeper model had; None in a new block."""
    for mine, theirs in renamed.items():
        if name == mine or name.startswith((f"{mine}.", f"{mine}:")):
            return theirs + name[len(mine) :] if theirs else None
    return name
