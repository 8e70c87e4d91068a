"""Remapping inference: one forward pass learns which axis of which tensor carries which units.

The paper (section 3.3) describes, without building it, a pass "like shape inference" that asks every operation how it
moves units. This is that pass. Every activation carries a tensor of integer unit labels of its own shape (expanded
views, so almost no memory). Data movement is applied to the labels themselves. For every other operation a short rule
says what it does to units (`rules`).
"""

import logging
from contextlib import ExitStack, suppress
from copy import deepcopy
from functools import partial
from types import CodeType
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ..errors import TransferError
from ..network import Inputs, in_mode, run, tensors_in
from ..tensors import parametrised
from .facts import Call, Key, Labels, Layer, LayerKind, NormKind
from .graph import PLAIN, SeenAs, Trace
from .modes import fork, learn_missed
from .rules.registry import REWRITES, Rewrite, apply, describe_crash, function_name, pin_operands, put_in_order

# Why the units of one output are pinned, and those of several.
IS_OUTPUT = ("it is the network's output", "it is among the network's outputs (outputs=... says which of them count)")


def trace(model: nn.Module, inputs: Inputs, seen_as: SeenAs = PLAIN) -> Trace:
    """Run an unwrapped network once in eval mode on `inputs` and return what the pass tells of its units."""
    # The network also runs once in training mode if that may show more (see `modes`). The units of the output are
    # pinned, because a result keeps its width. A teacher has run before: if the first pass fills a cache, such as one
    # of rotary angles, the second shows what the network does from then on.
    caches = _list_caches(model)
    result = _trace(model, inputs, seen_as)
    return result if _list_caches(model) <= caches else _trace(model, inputs, seen_as)


def _list_caches(model: nn.Module) -> set[tuple[str, str]]:
    """Return the names of the modules' attributes that hold tensors."""
    held = [(name, vars(module)) for name, module in model.named_modules()]
    return {(name, key) for name, attributes in held for key, value in attributes.items() if tensors_in(value)}


def _trace(model: nn.Module, inputs: Inputs, seen_as: SeenAs) -> Trace:
    """Return what a pass in eval mode tells, and one in training mode if that may show more."""
    result = Trace(model, seen_as)
    with parametrize.cached(), in_mode(model, training=False):  # in training a spectral norm refines its estimate
        for name, module, weight in parametrised(model):
            prefix = f"{name}.parametrizations.{weight}.".lstrip(".")
            result.parameters.stand_in(getattr(module, weight), f"{name}.{weight}".lstrip("."), prefix)
        result.output = _pass(model, inputs, result, training=False)
        missed = result.parameters.tensors.keys() - _reached(result)
        if not missed.isdisjoint(dict(model.named_parameters())) or _asks_for_mode(model):
            result.both = both = fork(result)
            try:
                _pass(model, inputs, both, training=True)
                result.trains = both.trains = True
            except TransferError as error:  # it may need what an example does not give: several images, a target
                result.failure = str(error)
            learn_missed(result, both, missed)
            both.parameters.complete()
        result.parameters.complete()
    return result


def trace_shapes(model: nn.Module, inputs: Inputs) -> Trace:
    """Return the trace of a network whose values do not matter, without computing any of them if that is possible."""
    # A student is such a network: its weights will be overwritten. Tensors without values are far cheaper to compute.
    # If values decide where the forward pass goes, torch raises an error, and the network runs with values. A copy of
    # the modules, with the same weights, is run: a forward pass may keep tensors in its modules.
    shapes, log = FakeTensorMode(allow_non_fake_inputs=True), logging.getLogger(FakeTensorMode.__module__)
    with suppress(Exception), patch.object(log, "disabled", True):  # it would log such an error
        twin = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        traced = trace(twin, inputs.map(shapes.from_tensor))
        if traced.failure is None:
            traced.model = model
            return traced
    return trace(model, inputs)


def _reached(result: Trace) -> set[str]:
    """Return the names of the tensors that the pass has met."""
    known, held = result.parameters, (layer.tensors.values() for layer in result.layers.values())
    return known.axes.keys() | known.values.keys() | {tensor for tensors in held for tensor in tensors}


def _asks_for_mode(model: nn.Module) -> bool:
    """Tell whether a module that is not torch's own has code that names the training mode."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = [vars(base) for base in classes if not base.__module__.startswith("torch.")]
    own += [vars(module) for module in model.modules()]
    codes = [code for held in own for method in held.values() if (code := getattr(method, "__code__", None))]
    while codes:
        code = codes.pop()
        if "training" in code.co_names:
            return True
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return False


class _Mode(TorchFunctionMode):
    """Shows every torch call of a forward pass to the rules."""

    def __init__(self, result: Trace) -> None:
        super().__init__()
        self.trace = result
        self.modules = [""]  # the modules that are running, the innermost last
        self.last = ""  # the function that was called last, and where

    def enter(self, name: str, *_: Any) -> None:
        self.modules.append(name)

    def leave(self, name: str, module: nn.Module, args: tuple, out: Any) -> None:
        self.modules.pop()
        first = next(iter(tensors_in(out)), None)
        if first is not None and (labels := self.trace.labels(first)) is not None:
            self.trace.outputs[name] = labels
            if first is not out:
                self.trace.packed.add(name)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function_name(func)
        self.last = f"{name} in {self.modules[-1] or 'the network'}"
        given = self._before_in_place(name, args)
        out = func(*args, **kwargs)
        call = Call(name, func, *put_in_order(func, name, given, kwargs), out, self.modules[-1])
        rewrite = REWRITES.get(name)
        if rewrite is None or not any(map(self.trace.follows, call.tensors)) or not self._rewrite(call, rewrite):
            self.trace.count_eps([*args, *kwargs.values()])
            apply(self.trace, call)
        return out

    def _before_in_place(self, name: str, args: tuple) -> tuple:
        """Return the arguments of a call, with a copy of a constant that the call will overwrite."""
        in_place = name.endswith("_") and (name.startswith("__i") or not name.endswith("__"))
        if in_place and isinstance(args[0], Tensor) and not self.trace.follows(args[0]):
            return (args[0].detach().clone(), *args[1:])
        return args

    def _rewrite(self, call: Call, rewrite: Rewrite) -> bool:
        """Label the results of a call like those of the functions that it is rewritten in; tell whether it has been."""
        try:
            with self:
                rewritten = rewrite(*call.args, **call.kwargs)
        except TransferError:
            raise
        except Exception as error:
            pin_operands(self.trace, call, describe_crash(rewrite, call, error))
            return True
        if rewritten is NotImplemented:
            return False
        for result, same in zip(call.results, tensors_in(rewritten), strict=False):
            if (labels := self.trace.labels(same)) is not None:
                self.trace.label(result, labels)
        return True


def _pass(model: nn.Module, inputs: Inputs, result: Trace, training: bool) -> Any:
    """Run the network in one mode, and let `result` learn from every call."""
    mode = _Mode(result)
    with ExitStack() as hooks, in_mode(model, training):
        for name, module in model.named_modules():
            # These come before the user's hooks, which may raise an error: each module that is left was entered.
            enter, leave = partial(mode.enter, name), partial(mode.leave, name)
            hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        given = inputs
        inputs = inputs.map(lambda x: x.detach().clone())  # new objects: the caller's tensors stay unlabelled
        for position, x in enumerate(inputs.tensors):
            if x.is_floating_point() or x.is_complex():
                key = Key(f"input {position}")
                units = result.units.families[key] if training else result.units.fresh(1, key)
                result.label(x, Labels(units.expand(x.shape), frozenset({"input"}), bent_by="an input of the network"))
        try:
            with mode:
                output = inputs.select(model(*inputs.args, **inputs.kwargs))
        except TransferError:
            raise
        except Exception as error:
            run(model, given, training)  # raises the true error if the network fails by itself
            raise TransferError(
                f"{type(model).__name__} runs, but not while its calls are followed: {mode.last or 'it'} fails with "
                f"{type(error).__name__}: {error}."
            ) from error
    outputs = tensors_in(output)
    for position, tensor in enumerate(outputs):
        if (labels := result.labels(tensor)) is not None:
            result.read.add(labels.statistic and labels.statistic.key)
            result.units.pin(labels.units, IS_OUTPUT[len(outputs) > 1])
            name = f"output {position}" + " in training" * training
            known = (labels.sources, labels.norms_since)
            result.add(Layer(LayerKind.OUTPUT, name, {}, None, *known, normed_by=labels.normed_by))
    # A mean that nothing uses need not be kept. An example is the mean of attention weights that a module returns.
    result.norms = [norm for norm in result.norms if norm.kind != NormKind.MEAN or norm.key in result.read]
    return output
