"""Run a network and leave it as it was: its inputs, its modes, its wrappers."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .errors import TransferError

Example = Tensor | tuple[Any, ...] | dict[str, Any]
Outputs = Callable[[Any], Any] | str | Sequence[str] | None  # what of a network's result counts; None: all of it

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
QUANTISED_MODULES = ("torch.ao.nn", "torch.nn.quantized")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, torch.compile and the like; refuse what cannot be filled."""
    if not isinstance(model, nn.Module):
        what = (
            "a state dict, which has no forward pass" if isinstance(model, dict) else f"of type {type(model).__name__}"
        )
        advice = "build the network, load its weights (load_state_dict), and pass the network"
        raise TransferError(f"A network (a torch.nn.Module) is needed, and this is {what}: {advice}.")
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            break
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):  # costly to import
        advice = "gather its weights (summon_full_params, or a full state dict) and pass the network without it"
        raise TransferError(f"The network is sharded by FullyShardedDataParallel: {advice}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TransferError(f"{name} has no shape yet: run the lazy network once on an input first.")
        if type(tensor) not in PLAIN_TENSORS:
            raise TransferError(
                f"{name} is a {type(tensor).__name__}, not a plain tensor: gather a sharded network first, and grow a "
                "quantised one before it is quantised."
            )
    if any(type(module).__module__.startswith(QUANTISED_MODULES) for module in model.modules()):
        raise TransferError("The network is quantised: grow it before it is quantised.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TransferError("The network is a ScriptModule, whose operations cannot be followed: pass the original.")
    return model


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward pass, and what of its result counts."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs = None

    @classmethod
    def of(cls, example: Example, outputs: Outputs = None) -> "Inputs":
        """Return the arguments that `example` stands for: one tensor, a tuple of arguments or a dict of keywords."""
        args = example if isinstance(example, tuple) else (example,) if isinstance(example, Tensor) else ()
        inputs = cls(args, example if isinstance(example, dict) else {}, outputs)
        if not inputs.tensors:
            kinds = "a tensor, a tuple of arguments or a dict of keyword arguments"
            raise TransferError(f"The example must be {kinds}, with at least one tensor in it.")
        return inputs

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor in the arguments."""
        return tensors_in([*self.args, *self.kwargs.values()])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the same arguments with every tensor changed."""
        return replace(self, args=map_tensors(self.args, change), kwargs=map_tensors(self.kwargs, change))

    def select(self, result: Any) -> Any:
        """Return what counts of a network's result; raise TransferError if it has no such part."""
        if self.outputs is None:
            return result
        if callable(self.outputs):
            chosen = self.outputs(result)
        else:
            names = [self.outputs] if isinstance(self.outputs, str) else self.outputs
            chosen = [result.get(name) if isinstance(result, dict) else getattr(result, name, None) for name in names]
        if not tensors_in(chosen):
            raise TransferError(f"outputs={self.outputs!r} chooses no tensor of the result, a {type(result).__name__}.")
        return chosen

    def draw_like(self, numbers: int | None = 2**16) -> "Inputs":
        """Draw other inputs: normal noise of the same deviation for floating tensors, else the example's numbers."""
        # The batch gets as many rows as hold about `numbers` numbers; None keeps its size. Images get at least one row,
        # other tensors at least two: the first axis may be the length of a sequence, and with one position attention
        # has nothing to choose from.
        generator, rows = torch.Generator().manual_seed(0), None
        sizes = {x.shape[0] for x in self.tensors if x.dim()}
        if numbers is not None and len(sizes) == 1:
            (size,), total = sizes, sum(x.numel() for x in self.tensors)
            least = 1 if all(x.dim() > 3 for x in self.tensors) else 2
            rows = max(least, min(numbers * size // max(total, 1), 64 * size))
        return self.map(lambda x: _draw_like(x, rows, generator))


def _draw_like(x: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if x.layout != torch.strided:
        return x
    shape = (rows, *x.shape[1:]) if rows and x.dim() else x.shape
    if not x.is_floating_point():
        among = x.reshape(-1)
        if not len(among):
            return x
        return among[torch.randint(len(among), shape, generator=generator).to(x.device)]
    deviation = x.double().std() if x.numel() > 1 else torch.ones(())
    return (torch.randn(shape, generator=generator, dtype=torch.double).to(x.device) * deviation).to(x.dtype)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested containers."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: map_tensors(getattr(value, each.name), change) for each in fields(value) if each.init}
        )
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return like(value, [map_tensors(item, change) for item in value])
    return value


def map_first(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the first tensor in nested containers; the others stay what they are."""
    changes = iter([change])
    return map_tensors(value, lambda x: next(changes, _stay)(x))


def _stay(x: Tensor) -> Tensor:
    return x


def like(value: Any, items: list[Any]) -> Any:
    """Return `items` as a list or tuple of the type of `value`, which may be a named tuple."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def tensors_in(value: object) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]  # type: ignore
    return []


@contextmanager
def own_precision() -> Iterator[None]:
    """While the block runs, computations have the precision of their tensors: an autocast block around it is off."""
    # Autocast keeps the weights that it has cast until its outermost block ends, and does not see that they change in
    # place. These casts are dropped before and after, because networks are filled here.
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as off:
        for kind in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.amp.is_autocast_available(kind):
                off.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def uncompiled() -> AbstractContextManager:
    """Let what torch compiles run as it was written: the compiler would compile the rules that follow its calls."""
    is_loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and loading it takes seconds
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Hold the network in one mode, without gradients or autocast, while the block runs; then restore its modes."""
    # In training mode the buffers and the random state are restored, too.
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if training else {}
    try:
        model.train(training)
    except NotImplementedError as error:
        name = type(model).__name__
        why = "runs in one mode only, as a network from torch.export does"
        raise TransferError(f"{name} {why}: pass the original.") from error
    try:
        with own_precision(), uncompiled(), torch.no_grad(), torch.random.fork_rng(enabled=training):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return the network's output on these very tensors; raise TransferError if the forward pass fails."""
    try:
        return inputs.select(model(*inputs.args, **inputs.kwargs))
    except TransferError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs.tensors)
        what = f"The forward pass of {type(model).__name__} on inputs {shapes} fails"
        raise TransferError(f"{what}: {str(error) or type(error).__name__}") from error


def refuse_empty(output: object) -> None:
    """Raise TransferError if an output holds no tensor, or an empty one, as that of a detector that finds nothing."""
    # What makes an empty part may compute anything, and its units would seem to be free.
    if not tensors_in(output):
        advice = "choose some by outputs, as in outputs=lambda result: result.logits"
        raise TransferError(f"The network returns a {type(output).__name__}, in which no tensors are found: {advice}.")
    if not all(x.numel() for x in tensors_in(output)):
        advice = "give inputs for which none is empty, or name the `outputs` that count"
        raise TransferError(f"An output of the network is empty, so there is nothing to compare: {advice}.")


def run(
    model: nn.Module,
    inputs: Inputs,
    training: bool = False,
    seed: int = 0,
    modes: Iterable[AbstractContextManager] = (),
) -> Any:
    """Return the network's output in one mode, without gradients; the network and the inputs stay as they were."""
    # `seed` is that of dropout; `modes` of torch are on during the forward pass.
    with in_mode(model, training), ExitStack() as on:
        if training:
            torch.manual_seed(seed)
        inputs = inputs.map(torch.clone)
        for mode in modes:
            on.enter_context(mode)
        return call(model, inputs)
