"""Let the config of a model with `save_pretrained` describe the grown model, or let `save_pretrained` refuse.

Hugging Face's `from_pretrained` makes a model by its class from its config alone. So a config is right if the class
makes the very same modules from it: the same classes, names, shapes, ties, numbers and buffers that are not saved. Such
models are known by what they have (`save_pretrained` and `config`); transformers is not imported.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import combinations
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import TransferError
from .network import Inputs, run, tensors_in
from .parts import functions, settings, tensor_names
from .tensors import view_bytes

Field = tuple[str | int, ...]  # the way to a value of a config: attributes, then the place in a list
Values = Mapping[Field, Any]
ADVICE = "save it by net2net.save(model, folder), and load it by net2net.load(folder, base=...)"


@dataclass(frozen=True)
class Facts:
    """What a class makes from a config."""

    structure: dict[str, Any]  # modules: classes; their functions; tensors: shapes, ties, and values that are not saved
    numbers: dict[tuple[str, str], Any]  # module, attribute -> a plain value

    @classmethod
    def of(cls, model: nn.Module) -> "Facts":
        """List the facts of a model."""
        structure, numbers, saved = {}, {}, model.state_dict().keys()
        for name, module in model.named_modules():
            structure[f"{name}:"] = (type(module).__name__, functions(module))
            numbers |= {(name, key): value for key, value in settings(module).items()}
        for name, first, tensor in tensor_names(model):
            structure[name] = (tuple(tensor.shape), first, None if name in saved else _values(tensor))
        return cls(structure, numbers)


def _values(tensor: Tensor) -> bytes | None:
    """Return the bytes of a buffer, in single precision at most."""
    value = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return None if tensor.is_meta else bytes(view_bytes(value.cpu().contiguous()))


class _EmptyOnMeta(TorchFunctionMode):
    """Put the results of `torch.empty`, such as weights, on the meta device; computed tables keep their values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        first = next(iter((*args, *(kwargs or {}).values())), None)
        if getattr(func, "__name__", "") in ("normal_", "uniform_") and isinstance(first, Tensor) and first.is_meta:
            return first  # torch would load its compiler, to do nothing
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def list_pretrained(network: nn.Module) -> dict[str, "Facts"]:
    """Return the facts of each model with `save_pretrained` in a network; without structure where saving refuses."""
    models = {name: model for name, model in network.named_modules() if hasattr(model, "save_pretrained")}
    doubtful = {name for name, model in models.items() if "save_pretrained" in vars(model)}
    facts = {name: Facts.of(model) for name, model in models.items()}
    return facts | {name: replace(facts[name], structure={}) for name in doubtful}


def keep_configs(before: Mapping[str, "Facts"], grown: nn.Module, inputs: Inputs) -> None:
    """Let the config of each model in a grown network say what it is, or its `save_pretrained` refuse.

    `before` are the facts of the models before they grew, by name. What the network computes on the inputs stays as it
    is to the last bit.
    """
    right: set[int] = set()  # the ids of configs that are right
    for name, old in before.items():
        model, kind = grown.get_submodule(name), type(grown.get_submodule(name)).__name__
        if id(getattr(model, "config", None)) in right:
            continue
        vars(model).pop("save_pretrained", None)
        refusal = None
        try:
            if (new := Facts.of(model)) != old and isinstance(model.config, dict):
                refusal = f"net2net does not change the config of {kind}, which is a {type(model.config).__name__}"
            elif new != old:
                refusal = _Search(model, old, new, partial(run, grown, inputs)).run()
        except Exception as error:  # the class and the config are not ours, and may raise anything
            refusal = f"{kind} cannot be made from its config alone ({error})"
        if refusal is not None:
            refuse_to_save(model, f"{refusal}: {ADVICE}.")
        elif hasattr(model, "config"):
            right |= {id(holder) for holder, _ in list_configs(model.config)}


def refuse_to_save(model: nn.Module, why: str) -> None:
    """Let `save_pretrained` raise TransferError from now on."""
    model.save_pretrained = partial(_refuse, why)  # type: ignore[assignment]


def _refuse(why: str, *args: object, **options: object) -> NoReturn:
    raise TransferError(why)


class _Search:
    """The search for the values of a config from which the class makes the model as it is."""

    def __init__(self, model: nn.Module, before: Facts, after: Facts, compute: Callable[[], Any]) -> None:
        self.model, self.before, self.after, self.compute = model, before, after, compute
        self.plain = Facts.of(make_from_config(model, {}))
        self.made: dict[frozenset, Facts | None] = {}

    def run(self) -> str | None:
        """Change the config and the idle numbers of the model; or return why no config says what it is."""
        values: dict[Field, Any] = {}
        moves = list(self._list_moves())
        while wrong := self._list_wrong(values):
            tries = [*moves, *self._list_missing(wrong)]
            better = (values | move for move in tries if len(self._list_wrong(values | move)) < len(wrong))
            if (found := next(better, None)) is None:
                what = wrong[0].rstrip(":") or "it"
                return f"The config of {type(self.model).__name__} has no value that makes {what} as it is now"
            values = found
        fitting = (values | more for more in ({}, *moves) if not self._list_wrong(values | more))
        if next(self.model.parameters()).is_meta:  # no values tell which is right: the one that changes least
            fitting = sorted(fitting, key=self._count_changes)
        for each in fitting:  # several configs may make the same shapes: other numbers of heads of another size
            if self._take(each):
                return None
        return f"What {type(self.model).__name__} computes from its config changes with the sizes that have grown"

    def _facts(self, values: Values) -> Facts | None:
        key = frozenset((field, str(value)) for field, value in values.items())
        if key not in self.made:
            self.made[key] = None
            with suppress(Exception):  # sizes that do not fit together
                self.made[key] = Facts.of(make_from_config(self.model, values))
        return self.made[key]

    def _list_wrong(self, values: Values) -> list[str]:
        """List what the class makes of these values that differs from the model; numbers that stayed do not count."""
        made, mine, before = self._facts(values), self.after, self.before
        if made is None:
            return [*self.plain.structure, *mine.structure, *("" for _ in mine.numbers), ""]  # more than any other
        wrong = [
            name
            for name in dict.fromkeys((*before.structure, *mine.structure, *made.structure))
            if (now := mine.structure.get(name)) != (new := made.structure.get(name))
            # A difference that was there before the growth does not count.
            and (now != before.structure.get(name) or new != self.plain.structure.get(name))
        ]
        for place, now in mine.numbers.items():
            if now != made.numbers.get(place) and now != before.numbers.get(place):
                wrong.append(".".join(place).strip("."))
        return wrong

    def _list_moves(self) -> Iterator[dict[Field, Any]]:
        """List changes to try: a number becomes what an equal size became, or one or two numbers grow like a size."""
        mine, plain = self.after, self.plain
        pairs = {
            (old, mine.numbers.get(place)): None for place, old in plain.numbers.items() if type(old) in (int, float)
        }
        for name, (shape, *_) in plain.structure.items():
            if name in mine.structure and not isinstance(shape, str):
                pairs |= dict.fromkeys(zip(shape, mine.structure[name][0], strict=False))
        sizes = [(a, b) for a, b in pairs if type(a) is int and type(b) is int and 0 < a != b]
        ratios = dict.fromkeys(Fraction(b, a) for a, b in sizes)
        fields = list(list_fields(self.model.config))
        single: dict[tuple, dict[Field, Any]] = {}
        for field, value in fields:
            found = [b for a, b in pairs if type(a) is type(value) in (int, float) and a == value != b]
            if type(value) is int and value > 0:
                found += [int(value * ratio) for ratio in ratios if (value * ratio).denominator == 1]
            if type(value) is float and value >= 1:  # such as the ratio of two widths
                found += [value * float(ratio) for ratio in ratios]
            for new in (*found, *[value] * bool(found)):  # the old value, to take back what was wrong
                single[field, new] = {field: new}
        yield from single.values()
        for ratio in ratios:  # two numbers at a time: one may be valid only with the other
            grown = [(field, value * ratio) for field, value in fields if type(value) is int and value > 0]
            whole = [{field: int(value)} for field, value in grown if value.denominator == 1]
            alone = [move for move in whole if self._facts(move) is None]
            yield from (a | b for a, b in combinations(whole, 2) if a in alone or b in alone)

    def _list_missing(self, wrong: list[str]) -> list[dict[Field, Any]]:
        """List the sizes of tensors that are wrong, for each value that the config leaves open."""
        shapes = [self.after.structure[name][0] for name in wrong if name in self.after.structure]
        sizes = dict.fromkeys(size for shape in shapes if not isinstance(shape, str) for size in shape)
        return [{field: size} for field, value in list_fields(self.model.config) if value is None for size in sizes]

    def _count_changes(self, values: Values) -> int:
        """Return how many numbers of the model the class makes otherwise from these values."""
        made = self._facts(values)
        numbers = made.numbers.items() if made else ()
        return sum(self.after.numbers.get(place) != value for place, value in numbers)

    def _take(self, values: Values) -> bool:
        """Give the model these values and the numbers that follow from them; undo it if it computes anything else."""
        made = self._facts(values)
        assert made is not None
        results = tensors_in(self.compute())
        undo = take_numbers(self.model, self.plain, made)
        old = dict(list_fields(self.model.config))
        set_fields(self.model.config, values)
        with suppress(TransferError):
            again = tensors_in(self.compute())
            if all(a.shape == b.shape if a.is_meta else torch.equal(a, b) for a, b in zip(results, again, strict=True)):
                return True
        set_fields(self.model.config, {field: old[field] for field in values})
        for module, key, value in undo:
            vars(module)[key] = value
        return False


def take_numbers(
    model: nn.Module, plain: Facts, made: Facts, old_name: Callable[[str], str | None] = lambda name: name
) -> list[tuple[nn.Module, str, Any]]:
    """Let the modules keep the numbers that are others in `made` than in `plain`; return those that they had."""
    modules, had = dict(model.named_modules()), []
    for (name, key), value in made.numbers.items():
        module, before = modules.get(name), plain.numbers.get((old_name(name) or "", key))
        if module is not None and key in vars(module) and before != value and old_name(name) is not None:
            had.append((module, key, vars(module)[key]))
            vars(module)[key] = copy.deepcopy(value)
    return had


def make_from_config(model: nn.Module, values: Values, weights: bool = False) -> Any:
    """Make a model of the same class from the same config with other `values`; without weights, unless asked for."""
    config = copy.deepcopy(model.config)
    set_fields(config, values)
    if weights:
        with torch.device("meta" if next(model.parameters()).is_meta else torch.get_default_device()):
            return type(model)(config)
    return make_empty(type(model), config)


def make_empty(kind: Callable[[Any], Any], config: Any) -> Any:
    """Make a model whose parameters are on the meta device; tables that its class computes have their values."""
    before = logging.root.manager.disable
    try:
        logging.disable()  # a config that is only tried may be a strange one
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]), _EmptyOnMeta():
            if hasattr(config, "to_dict") and hasattr(config, "from_dict"):  # as a file would hold it
                config = type(config).from_dict(config.to_dict())  # type: ignore[union-attr]
            return kind(config)
    finally:
        logging.disable(before)


def list_configs(config: Any, way: Field = ()) -> Iterator[tuple[Any, Field]]:
    """List a config and the configs inside it, with the way to each."""
    yield config, way
    for key, value in vars(config).items():
        if hasattr(value, "__dict__") and not callable(value) and len(way) < 3:
            yield from list_configs(value, (*way, key))


def list_fields(config: Any) -> Iterator[tuple[Field, Any]]:
    """List the values of a config and of the configs inside it, lists both as a whole and entry by entry."""
    for holder, way in list_configs(config):
        for key, value in vars(holder).items():
            yield (*way, key), value
            if isinstance(value, list):
                yield from (((*way, key, place), entry) for place, entry in enumerate(value))


def set_fields(config: Any, values: Values) -> None:
    """Set values of a config."""
    for (*way, key), value in values.items():
        holder = config
        for step in way:
            holder = holder[step] if isinstance(step, int) else getattr(holder, step)
        if isinstance(key, int):
            holder[key] = value
        else:
            setattr(holder, key, value)
