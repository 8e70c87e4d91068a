"""Networks on the meta device: the record alone, the same as that of networks with values."""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from checks import refused
from networks import chain, images
from pretrained import Model, teacher, words
from torch import nn

from net2net import deepen, replay, transfer, widen
from net2net.fill import gather
from net2net.record import Record, _to_json

pytestmark = pytest.mark.usefixtures("float64")


def data(record: Record) -> dict[str, Any]:
    """What a record says of tensors."""
    held = {key: vars(record)[key] for key in ("origins", "eps", "state", "shapes")}
    return json.loads(json.dumps(held, default=_to_json))


GROWTHS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "a factor": lambda model, x: widen(model, x, 1.5),
    "padded norms": lambda model, x: widen(model, x, {"words": 12, "*.up": 48, "*.qkv": 1.5}),
    "more blocks": lambda model, x: deepen(model, x, ["blocks.0", "blocks.1"]),
    "a new layer": lambda model, x: deepen(model, x, "blocks.0.up"),
}


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_record_is_that_of_networks_with_values(growth: str) -> None:
    model, x, grow = teacher(heads=4), words(), GROWTHS[growth]
    bare, real = grow(copy.deepcopy(model).to("meta"), x.to("meta")), grow(model, x)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    assert data(bare.growth) == data(real.growth) and bare.growth.measured is None
    assert "not measured" in bare.growth.modes["eval"] and "not measured" in str(bare.growth)
    assert vars(bare.config) == vars(real.config)
    with torch.no_grad():
        for tensor in (again := copy.deepcopy(real)).parameters():
            tensor.fill_(2.0)
    new = [name for name, origin in real.growth.origins.items() if not origin.teacher]
    again.load_state_dict({name: real.state_dict()[name] for name in new}, strict=False)
    replay(bare.growth, model, again)
    assert torch.equal(again(x), real(x))


def test_what_needs_values_is_refused() -> None:
    small, large = (chain(n, 5).to("meta") for n in (4, 8))
    x = images().to("meta")
    needing: list[Mapping[str, Any]] = [{"noise": 0.1}, {"calibrate": x}]
    for options in needing:
        with refused("A network on the meta device has no values to grow, which noise and calibration need"):
            transfer(small, large, x, **options)
    with refused("A network on the meta device has no values to grow, which both networks must have"):
        transfer(chain(4, 5), large, x)
    with refused("A network on the meta device has no values beside which new entries could stand"):
        widen(small, x, {"head": 14}, new="zero")
    assert transfer(small, large, x).measured is None


@pytest.mark.parametrize("split", ["uneven", "equal", "paired", "fresh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_tensors_are_filled_in_pieces(split: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get the same numbers, to the last bit: shares are drawn in the same order."""
    model, x, calls, made = teacher(heads=4).to(dtype), words(), [], gather.replace

    def count(*args, **changes) -> object:
        calls.append(args)
        return made(*args, **changes)

    for widths in ({"*.up": 50}, {"words": 12, "*.qkv": 1.5}, {"words": 2.0}, {"*.up": 1.5, "*.qkv": 2.0}):
        whole = widen(model, x, widths, split=split)
        with monkeypatch.context() as patch:
            patch.setattr(gather, "PIECE", 7)
            calls.clear()
            patch.setattr(gather, "replace", count)
            parts = widen(model, x, widths, split=split)
        assert calls and all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_weights_that_are_read_along_their_first_axis_are_filled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, inner)), nn.Parameter(torch.randn(inner, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.a).relu() @ self.b

    model, wide, parts, x = Rows(8), Rows(13), Rows(13), torch.randn(5, 6)
    transfer(model, wide, x)
    monkeypatch.setattr(gather, "PIECE", 7)
    transfer(model, parts, x)
    assert torch.equal(wide.a, parts.a) and torch.equal(wide.b, parts.b)


def test_a_model_is_as_it_was() -> None:
    model: Model = teacher().to("meta")
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    widen(model, words().to("meta"), 1.5)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
