"""Save a network to a folder, and load it again on a network of the class that was grown."""

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .blend import Blend
from .errors import TransferError
from .grow.deepen import DEEPER_HOOKS
from .network import unwrap
from .parts import COMMON, functions, is_plain, settings, tensor_names
from .pretrained import list_configs, refuse_to_save
from .record import Record, save_record
from .safetensors import read_tensors, write_tensors
from .transfer import load_record

FORMAT = 1


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a network, grown or not, for `load`: its tensors, what its modules keep, and the record of its growth.

    The folder appears complete or not at all. It holds `model.safetensors` (parameters, buffers, and tensors that are
    attributes), `network.json` (the names, classes and plain attributes of the modules, and which tensors are tied) and
    `growth.json` (`load_record` reads it). Nothing in it is code.

    Args:
        model: the network.
        folder: a folder that does not exist yet.

    Raises:
        TransferError: the folder exists, or safetensors has no name for the type of a tensor.
        OSError: the folder cannot be written.

    Example:
        >>> net2net.save(wider, "wider")
        >>> wider = net2net.load("wider", base=model)
    """
    model, folder = unwrap(model), Path(folder)
    if folder.exists():
        raise TransferError(f"{folder} exists: give the name of a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
    unfinished.mkdir()
    try:
        write_tensors(unfinished / "model.safetensors", {n: t for n, first, t in tensor_names(model) if n == first})
        (unfinished / "network.json").write_text(json.dumps(_describe(model)))
        for place in _records(model):
            save_record(vars(model)[place], unfinished / f"{place}.json")
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(folder: str | Path, base: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return the network that `save` wrote to a folder. It computes exactly what the saved one computes.

    Args:
        folder: the folder.
        base: a network of the same class, or a function without arguments that makes one: the teacher before it grew,
            or its constructor; or the constructor of the student, for `transfer`. Its widths and values do not matter.
            Layers that `deepen` has added are added again.

    Returns:
        A network of its own, in the mode of the one that was saved. Its `growth` is the record.

    Raises:
        TransferError: the base has other modules, functions, tensors or ties, or the folder is damaged or of another
            version.
        OSError: a file cannot be read.

    Example:
        >>> wider = net2net.load("wider", base=lambda: timm.create_model("resnet10t"))
    """
    folder = Path(folder)
    model = copy.deepcopy(unwrap(base)) if isinstance(base, nn.Module) else unwrap(base())
    tensors = read_tensors(folder / "model.safetensors")
    try:
        saved = json.loads((folder / "network.json").read_text(), object_hook=_from_json)
        if saved["format"] != FORMAT:
            raise TransferError(f"{folder} is of another version of net2net: its format is not {FORMAT}.")
        _rebuild(model, saved, tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TransferError(f"network.json in {folder} is damaged: {error}") from error
    for place in _records(model):
        del vars(model)[place]
    for place in saved["records"]:
        vars(model)[place] = load_record(folder / f"{place}.json")
    return model


def _records(model: nn.Module) -> list[str]:
    return [place for place, held in vars(model).items() if isinstance(held, Record)]


def _describe(model: nn.Module) -> dict[str, Any]:
    """Return what `load` needs besides the tensors."""
    refusals = {name: vars(module).get("save_pretrained") for name, module in model.named_modules()}
    return {
        "format": FORMAT,
        "records": _records(model),
        "modules": {name: _describe_module(module) for name, module in model.named_modules()},
        "configs": {name: _to_json(settings(holder)) for name, holder in _named_configs(model)},
        "tied": {name: first for name, first, _ in tensor_names(model) if name != first},
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "refusals": {name: refusal.args[0] for name, refusal in refusals.items() if isinstance(refusal, partial)},
    }


def _describe_module(module: nn.Module) -> dict[str, Any]:
    held, known, kind = vars(module), functions(module), type(module).__name__
    rest = held.keys() - COMMON - known.keys() - {key for key, value in held.items() if is_plain(value)}
    return {
        "class": kind,
        "is_ours": type(module) is _OURS.get(kind) and not rest and not known,  # whether `load` can make another
        "settings": _to_json(settings(module)),
        "functions": known,
        "hooks": [getattr(hook, "__name__", type(hook).__name__) for hook in _hooks(module)],
        "parameters": [*module._parameters],
        "buffers": [*module._buffers],
        "training": module.training,
    }


_OURS: dict[str, Any] = {name: kind for name, kind in vars(nn).items() if isinstance(kind, type)} | {"Blend": Blend}


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _named_configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """List the objects that modules keep, as configs are, and those inside them, each once."""
    known: set[int] = set()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if (
                hasattr(value, "__dict__")
                and not isinstance(value, (nn.Module, Tensor, Record))
                and not callable(value)
            ):
                for holder, way in list_configs(value):
                    if id(holder) not in known:
                        known.add(id(holder))
                        yield "/".join([name, key, *map(str, way)]), holder


def _to_json(value: Any) -> Any:
    """Return a plain value in which tuples are marked."""
    if isinstance(value, tuple):
        return {"()": [_to_json(item) for item in value]}
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list) else value


def _from_json(value: dict[str, Any]) -> Any:
    return tuple(value["()"]) if value.keys() == {"()"} else value


def _rebuild(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make a base the saved network, in place; raise TransferError if it is the base of another."""
    modules, tied = saved["modules"], saved["tied"]
    for name, entry in modules.items():
        parent, _, leaf = name.rpartition(".")
        if name and leaf not in model.get_submodule(parent)._modules:
            values = {key: tensors.get(tied.get(key, key)) for key in _tensor_names(name, entry)}
            model.get_submodule(parent).add_module(leaf, _make_module(model.get_submodule(parent), name, entry, values))
    for name, module in model.named_modules():
        entry, where = modules.get(name), name or "the network itself"
        if entry is None:
            raise _another_base(f"it has {name}, which the saved network lacks")
        if type(module).__name__ != entry["class"] or functions(module) != entry["functions"]:
            now = [type(module).__name__, *functions(module).values()]
            then = [entry["class"], *entry["functions"].values()]
            raise _another_base(
                f"{where} is {' with '.join(now)} in it, and {' with '.join(then)} in the saved network"
            )
        if not any(map(DEEPER_HOOKS.get, (getattr(hook, "__name__", "") for hook in _hooks(module)))):
            for hook in filter(None, map(DEEPER_HOOKS.get, entry["hooks"])):
                module.register_forward_hook(hook)
        if [getattr(hook, "__name__", type(hook).__name__) for hook in _hooks(module)] != entry["hooks"]:
            raise _another_base(f"{where} has other forward hooks")
        vars(module).update(entry["settings"] | {"training": entry["training"]})
    configs = dict(_named_configs(model))
    for name, values in saved["configs"].items():
        vars(configs.get(name, nn.Module())).update(values)
    for name, why in saved["refusals"].items():
        refuse_to_save(model.get_submodule(name), why)
    _set_tensors(model, tensors, tied, set(saved["frozen"]))


def _tensor_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [f"{name}.{leaf}" for leaf in (*entry["parameters"], *entry["buffers"])]


def _make_module(
    parent: nn.Module, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> nn.Module:
    """Make a module that the base lacks: one of torch's own, or a copy of one of the same class beside it."""
    if not entry["is_ours"]:
        beside = next((m for m in parent.children() if type(m).__name__ == entry["class"]), None)
        if beside is None:
            raise TransferError(
                f"The base has no {name}, and `load` cannot make a {entry['class']}: pass a base that has it, as what "
                "the same call of `deepen` on another network of the class returns."
            )
        return copy.deepcopy(beside, {id(holder): holder for _, holder in _named_configs(beside)})
    module = _OURS[entry["class"]].__new__(_OURS[entry["class"]])
    nn.Module.__init__(module)
    for leaf in entry["parameters"]:
        value = tensors[f"{name}.{leaf}"]
        module.register_parameter(leaf, None if value is None else nn.Parameter(value, value.is_floating_point()))
    for leaf in entry["buffers"]:
        module.register_buffer(leaf, tensors[f"{name}.{leaf}"])
    return module


def _set_tensors(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], frozen: set[str]) -> None:
    """Put the values into the tensors of the network, whose objects stay: others may refer to them."""
    held = [*tensor_names(model)]
    if missing := sorted((tensors.keys() | tied.keys()) ^ {name for name, _, _ in held}):
        raise _another_base(f"only one of the two has {missing[0]}")
    for name, first, tensor in held:
        if first != tied.get(name, name):
            raise _another_base(f"{name} is tied to another tensor in one of the two alone")
        if tensor.is_meta:
            raise TransferError(f"{name} of the base is on the meta device: make the base on another.")
        if name == first:
            tensor.data = tensors[name].to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(first not in frozen)


def _another_base(why: str) -> TransferError:
    return TransferError(f"The base is of another network than the folder: {why}.")
