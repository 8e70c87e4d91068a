"""Make a deeper copy of a network, filled by `transfer`."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blend import Blend
from ..errors import TransferError, no_other_error
from ..network import Example, Inputs, Outputs, map_first, unwrap
from ..pretrained import keep_configs, list_pretrained
from ..trace.graph import Trace
from ..trace.tracer import trace
from ..transfer import transfer
from .blocks import add_blocks
from .shapes import attach_record, copy_network


@no_other_error("deepen")
def deepen(  # noqa: PLR0913 (public signature)
    model: nn.Module,
    example: Example,
    after: str | Sequence[str],
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    make: Callable[[int, int], nn.Module] | None = None,
    generator: torch.Generator | None = None,
    depth: str = "identity",
    calibrate: Tensor | Iterable[Example] | None = None,
    outputs: Outputs = None,
) -> nn.Module:
    """Return a deeper copy of a network, of the same class, that computes the same function (paper, section 3.4).

    Behind each module of `after` stands a new layer, as its child `deeper`: a linear layer, or a convolution of kernel
    3 that keeps the size, with as many units as the module gives. `Blend(activation())` follows it, which is the
    identity at first whatever the activation. The old keys of the state dict stay.

    Behind blocks of a stack whose length the model's `config` counts (Hugging Face's `num_hidden_layers`), the new
    layers are further blocks of that stack, if these can be exact. The config then says what the copy is; where no
    config can, its `save_pretrained` refuses.

    Args:
        model: the network, which is left as it was.
        example: an input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        after: the modules to put a new layer behind, by name. Of several results the first tensor goes through it.
        activation: makes the activation behind a new layer.
        make: makes the new layer instead, from the number of units and the number of dimensions of positions (0: a
            linear layer). The layer must be able to be an identity.
        generator: as of `transfer`.
        depth: as of `transfer`.
        calibrate: as of `transfer`.
        outputs: as of `transfer`.

    Returns:
        The copy. Its `growth` is the record of the transfer (`growth_` if the network has a `growth` of its own).

    Raises:
        TransferError: there is no such module, its result is no tensor with one axis of units, or the new layer cannot
            be an identity.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> deeper = net2net.deepen(model, torch.randn(5, 3), "0", activation=nn.Tanh)
        >>> len(deeper.state_dict()) - len(model.state_dict())
        3
    """
    model, inputs = unwrap(model), Inputs.of(example, outputs)
    names = [after] if isinstance(after, str) else list(after)
    if not names:
        raise TransferError("No module is named to put a layer behind.")
    grew = f"new layers stand behind {', '.join(names)}"
    how = {"generator": generator, "depth": depth, "calibrate": calibrate, "outputs": outputs}
    fill = partial(transfer, model, example=example, **how)
    if make is None and (blocks := add_blocks(model, names)) is not None:
        deeper, renamed = blocks
        with suppress(TransferError):
            attach_record(deeper, fill(deeper, rename=renamed), model, grew)
            return deeper
    traced = trace(model, inputs)
    deeper = copy_network(model)
    for name in names:
        units, dims = _result_of(traced, name)
        new = make(units, dims) if make else nn.Sequential(_layer(units, dims), Blend(activation()))
        module = _last_new(deeper.get_submodule(name))
        reference = next(p for part in (module, deeper) for p in part.parameters() if p.is_floating_point())
        if hasattr(module, "deeper"):
            raise TransferError(f"{name} has a 'deeper' of its own, which is where the new layer would stand.")
        module.add_module("deeper", new.to(reference.device, reference.dtype).train(model.training))
        if not _calls_children(module):
            module.register_forward_hook(_call_deeper_first if name in traced.packed else _call_deeper)
    attach_record(deeper, fill(deeper, rename={}), model, grew)
    keep_configs(list_pretrained(model), deeper, inputs)
    return deeper


def _call_deeper(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Send a module's result through its child: a hook that copies and pickles keep, and that TorchScript compiles."""
    return module.deeper(output)


def _call_deeper_first(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Send the first tensor of a module's results through its child."""
    return map_first(output, module.deeper)


DEEPER_HOOKS = {hook.__name__: hook for hook in (_call_deeper, _call_deeper_first)}  # by the names that `save` writes


def _calls_children(module: nn.Module) -> bool:
    """Tell whether a module calls its children by itself, one after the other."""
    return type(module).forward is nn.Sequential.forward


def _last_new(module: nn.Module) -> nn.Module:
    """Return the module, or if it was deepened before, the last layer that was put behind it."""
    while not {*DEEPER_HOOKS.values()}.isdisjoint(module._forward_hooks.values()) or (
        _calls_children(module) and [*module._modules][-1:] == ["deeper"]
    ):
        module = module.get_submodule("deeper")
    return module


def _result_of(traced: Trace, name: str) -> tuple[int, int]:
    """Return how many units a module gives, and along how many dimensions of positions (0: units come last)."""
    if name not in traced.module_names:
        raise TransferError(f"There is no module {name!r} to put a layer behind.")
    labels, axes = traced.outputs.get(name), []
    if labels is not None:
        axes = [dim for dim, size in enumerate(traced.units.drop_repeats(labels.units).shape) if size > 1]
    if labels is None or len(axes) != 1:
        raise TransferError(f"The result of {name} is no tensor with one axis of units, as a layer needs it.")
    (axis,), rank = axes, labels.units.dim()
    if axis not in (1, rank - 1):
        raise TransferError(f"The units of {name} are on axis {axis}: a layer behind it wants them on axis 1, or last.")
    return labels.units.shape[axis], 0 if axis == rank - 1 else rank - 2


def _layer(units: int, dims: int) -> nn.Module:
    """Make a layer that keeps the number of units and the size of a map."""
    if dims == 0:
        return nn.Linear(units, units)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](units, units, 3, padding=1)
