"""Register rules, find the rule of a call, and offer what all rules need."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from itertools import takewhile
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor
from torch._C import _jit_get_schemas_for_operator
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import TransferError
from ..facts import Call, Key, Labels, plain_name
from ..graph import Trace

Rule = Callable[[Trace, Call], None]
Rewrite = Callable[..., Any]
Function = TypeVar("Function", bound=Callable)

RULES: dict[str, Rule] = {}
REWRITES: dict[str, Rewrite] = {}


def rule(*functions: str | Callable, rewrite: bool = False, replace: bool = False) -> Callable[[Function], Function]:
    """Return a decorator that registers a rule: what `functions` do to units.

    The forward pass calls the rule as `rule(trace, call)` after each call of such a function. The rule reads the labels
    of the call's arguments (`trace.labels`) and labels its results (`trace.label`).

    Args:
        functions: what the rule is for. A torch function goes by its name, "conv2d", which stands for its method, its
            in-place form and its operator, too. A custom operator goes by its full name, "mylib::crop". A Python
            function that calls `torch.overrides.handle_torch_function` is given itself.
        rewrite: the decorated function is not a rule. It takes the arguments of the original and computes a result in
            other functions, which have rules. The labels of this result are used, its values are not.
        replace: take the place of a rule that is there already.

    Raises:
        ValueError: one of the functions has a rule already, and `replace` is not set.

    Example:
        >>> import net2net
        >>> from net2net.trace.rules import pointwise
        >>> net2net.rule("mylib::swish")(pointwise)  # an elementwise operator  # doctest: +SKIP
    """

    def register(function: Function) -> Function:
        for each in functions:
            name = each if isinstance(each, str) else function_name(each)
            if not replace and (plain_name(name) in RULES or name in REWRITES):
                raise ValueError(f"{name} has a rule already: pass replace=True to put another in its place.")
            RULES.pop(plain_name(name), None)
            REWRITES.pop(name, None)
            if rewrite:
                REWRITES[name] = function
            else:
                RULES[plain_name(name)] = function
        return function

    return register


def names(text: str) -> frozenset[str]:
    """Return the names of functions in a text."""
    return frozenset(text.split())


def function_name(function: Callable) -> str:
    """Return the name of a function in calls and rules: short for torch's own, qualified for everything else."""
    if isinstance(function, (OpOverload, OpOverloadPacket)) and not str(function).startswith("aten."):
        namespace, name = str(function).split(".")[:2]
        return f"{namespace}::{name}"
    if isinstance(function, FunctionType) and not str(function.__module__).startswith("torch."):
        return f"{function.__module__}.{function.__qualname__}"
    return getattr(function, "__name__", str(function))


def put_in_order(function: Callable, name: str, args: Sequence, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return a call's arguments with those given by keyword in their places, up to the first that is not given."""
    # Rules and rewrites find arguments by position.
    given: list[str] = []
    for order in _positional_names(function, name) if kwargs else ():
        names = [next((each for each in (own, *_ALIASES.get(own, ())) if each in kwargs), own) for own in order]
        if kwargs.keys().isdisjoint(names[: len(args)]):
            given = max(given, list(takewhile(kwargs.__contains__, names[len(args) :])), key=len)
    return (*args, *map(kwargs.__getitem__, given)), {key: kwargs[key] for key in kwargs if key not in given}


# Functions and methods call one argument by two names, and torch takes those of NumPy, too.
_ALIASES = {"self": ("input", "x", "a", "x1"), "other": ("x2",), "dim": ("axis",), "keepdim": ("keepdims",)}


@lru_cache
def _positional_names(function: Callable, name: str) -> list[list[str]]:
    """Return the names of a function's positional parameters, for each of its overloads."""
    if isinstance(function, FunctionType):
        parameters = signature(function).parameters.values()
        return [[each.name for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD]]
    overloads = _jit_get_schemas_for_operator(name if "::" in name else f"aten::{name}")
    return [[each.name for each in overload.arguments if not each.kwarg_only] for overload in overloads]


def apply(trace: Trace, call: Call) -> None:
    """Label the results of `call`, by the rule of its function, if the pass follows any of its arguments."""
    found = RULES.get(call.plain, unknown)
    if found is ignore or not any(map(trace.follows, call.tensors)):
        return
    for x in call.tensors:
        if (owner := trace.parameters.owner_of(x)) is not None:
            trace.parameters.used.add(owner)
        labels = trace.labels(x) if trace.is_activation(x) else None
        if labels is not None and labels.statistic is not None:
            trace.read.add(labels.statistic.key)
        if labels is not None and labels.result_of is not None:
            alone = len(call.tensors) == 1 and call.plain in ("mul", "div")
            factor = factor_in(trace, call) if alone else 1.0
            trace.multipliers.setdefault(labels.result_of, set()).add(factor)
            if factor != 1.0 and labels.passage.carrier == labels.result_of:  # not that of an embedding
                trace.multiplied.add(labels.result_of)
    if call.results:
        try:
            _check_not_empty(trace, call)
            bent_by = _bent_by(trace, call)
            found(trace, call)
            for out in call.results:
                labels = trace.labels(out) if trace.is_activation(out) else None
                if labels is not None and not labels.linear:
                    trace.label(out, dataclasses.replace(labels, bent_by=bent_by))
        except CannotFollow as reason:
            pin_operands(trace, call, str(reason))
        except TransferError:
            raise
        except Exception as error:
            pin_operands(trace, call, describe_crash(found, call, error))


def _bent_by(trace: Trace, call: Call) -> str:
    """Return the first call that made something else than a sum of layers' outputs: one before, or this one."""
    known = [labels for x in call.tensors if trace.is_activation(x) and (labels := trace.labels(x))]
    by = [f" with {name}" for x in call.tensors if (name := trace.parameters.owner_of(x))]
    return next((labels.bent_by for labels in known if labels.bent_by), f"{call}{by[0] if by else ''}")


def _check_not_empty(trace: Trace, call: Call) -> None:
    """Raise CannotFollow where units would have to meet, or be read, in a tensor that is empty on this example."""
    # A parameter without entries has none on any example.
    followed = [x for x in call.tensors if trace.follows(x) and (x.numel() or trace.is_activation(x))]
    if len(followed) < 2 or call.plain == "index" or all(x.numel() for x in followed):
        return
    if call.plain in ("cat", "concat", "concatenate"):  # it adds no units, but its positions might belong to others
        dim, filled = call.arg(1, "dim", 0), [known for x in followed if x.numel() and (known := trace.labels(x))]
        if any(trace.units.drop_repeats(known.units).shape[dim] > 1 for known in filled):
            return
    raise CannotFollow(f"{call} works on an empty tensor, which shows no units: give an example that fills it")


def describe_crash(rule: Rule | Rewrite, call: Call, error: Exception) -> str:
    """Return the reason for pinning units where a rule raises an error that it should not."""
    if any(isinstance(x, FakeTensor) for x in call.tensors):
        raise error  # it may have asked for a value that is not there (see `trace_shapes`)
    return f"the rule {function_name(rule)} fails on {call} ({type(error).__name__}: {error})"


SILENT = """
    set size dim ndimension numel is_floating_point requires_grad is_contiguous stride storage_offset shape device
    dtype ndim is_cuda layout new_zeros new_ones new_empty new_full new_tensor ones_like empty_like full_like
    rand_like randn_like bernoulli item tolist len is_complex get_device element_size is_nested has_names names grad
    is_sparse is_quantized data_ptr assert_async
"""


@rule(*names(SILENT))
def ignore(trace: Trace, call: Call) -> None:
    """Do nothing: the results carry no units, and the call does not change its arguments."""


def unknown(trace: Trace, call: Call) -> None:
    """Give up: the function has no rule."""
    raise CannotFollow(f"{call} has no rule for units (net2net.rule adds one)")


class CannotFollow(Exception):
    """A rule raises this, with the reason, where it cannot say what a call does to units."""


def pin_operands(trace: Trace, call: Call, why: str) -> None:
    """Pin every unit that meets in `call`, and follow none of them further: each result is one unit of fixed size."""
    values, alone = trace.parameters.values, not any(map(trace.is_activation, call.tensors))
    for x in call.tensors:  # one unit for all elements of a parameter
        if not x.numel() or (view := trace.parameters.view(x)) is None:
            continue
        if alone:  # it may be a layer's weight, too, whose axes keep their widths then
            trace.parameters.chosen.update({(view.name, dim): why for dim in range(len(view.places))})
        elif view.name not in values:
            unit = trace.units.fresh(1, Key(view.name), distinct=False)
            values[view.name] = unit.expand(trace.parameters.tensors[view.name].numel())
    operands = [labels for x in call.tensors if not alone and (labels := trace.labels(x))]
    for labels in operands:
        trace.units.pin(labels.units, why)
    key = trace.units.key(call.name, call.module)
    for position, out in enumerate(call.results):
        unit = trace.units.fresh(1, dataclasses.replace(key, part=str(position)))
        trace.units.pin(unit, why)
        trace.unknown[int(unit)] = why
        trace.label(out, Labels.of(unit[0].expand(out.shape), *operands))


def carries_no_units(trace: Trace, x: Tensor) -> bool:
    """Tell whether a tensor tells no units apart: all its elements are one unit, or the pass knows none of them."""
    labels = trace.labels(x) if trace.is_activation(x) else None
    return labels is None or trace.units.drop_repeats(labels.units).numel() <= 1


def first_labels(trace: Trace, call: Call) -> Labels:
    """Return the labels of the first argument."""
    if (labels := trace.labels(call.args[0])) is None:
        raise CannotFollow(f"{call} acts on a parameter or constant")
    return labels


def label_constant(trace: Trace, call: Call, shape: Sequence[int]) -> Tensor:
    """Return labels for a tensor of constants: they are all one unit, which both networks have."""
    return trace.units.fresh(1, trace.units.key(f"constant {call.name}", call.module))[0].expand(tuple(shape))


def factor_in(trace: Trace, call: Call) -> float:
    """Return the plain number by which the call multiplies, else 1."""
    factor = 1.0
    for value in call.args[:2]:
        if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta and not trace.follows(value):
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            factor = value
    if call.plain == "div":
        return 1 / factor if not call.name.startswith("__r") else 1.0
    return factor if call.plain == "mul" else 1.0


def first_norm_of_sum(operands: Sequence[Labels | None]) -> str | None:
    """Return the one norm that a plain sum of `operands` begins with, None if there are several."""
    norms = {labels and labels.first_norm for labels in operands if labels is None or not labels.linear}
    return norms.pop() if len(norms) == 1 else None
