"""save and load: a network that was grown comes back from its folder with a difference of 0."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import refused, state, unchanged
from networks import Net, conv, images, mlp, tied
from pretrained import teacher, words
from torch import Tensor, nn

from net2net import Blend, TransferError, deepen, load, load_record, save, transfer, widen
from net2net.safetensors import DTYPES, read_tensors, write_tensors
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def blocks() -> nn.Module:
    """A convolution with a norm, a residual block that keeps a function, a number and a tensor, and a linear layer."""
    parts = {"a": conv(4, 7), "n": nn.BatchNorm2d(7), "b": conv(7, 4)}
    residual = Net(parts, lambda net, x: x * net.shift + net.b(net.act(net.n(net.a(x)))))
    residual.act, residual.shift = F.gelu, torch.rand(())
    return look_trained(nn.Sequential(conv(3, 4), residual, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))


def recurrent() -> nn.Module:
    return Net(
        {"l": nn.LSTM(4, 6, num_layers=2, bidirectional=True), "h": nn.Linear(12, 3)}, lambda n, x: n.h(n.l(x)[0])
    )


def grow_blocks(model: nn.Module) -> nn.Module:
    model = deepen(model, images(), ["0", "1", "1.n", "4"], activation=nn.GELU)
    return widen(deepen(model, images(), ["1", "1"]), images(), {"1.a": 9, "1.n.deeper.0": 1.5})


def rows() -> Tensor:
    return torch.randn(5, 6)


def steps() -> Tensor:
    return torch.randn(5, 3, 4)


CASES: dict[str, tuple[Callable, Callable, Callable]] = {
    "wider and deeper": (blocks, grow_blocks, images),
    "as it was": (blocks, copy.deepcopy, images),
    "recurrent": (recurrent, lambda model: widen(model, steps(), {"l": 9}), steps),
    "tied": (lambda: tied(4), lambda model: widen(model, images(), {"a": 6}), images),
    "config": (teacher, lambda model: deepen(widen(model, words(), {"blocks.0.up": 48}), words(), "blocks.1"), words),
    "more blocks": (teacher, lambda model: deepen(model, words(), ["blocks.0", "blocks.0"]), words),
    "another eps": (
        lambda: teacher(heads=4),
        lambda model: widen(model, words(), {"words": 12, "*.up": 48, "*.qkv": 1.5}),
        words,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_grown_network_comes_back(case: str, tmp_path: Path) -> None:
    make, grow, inputs = CASES[case]
    model = make()
    grown = grow(model)
    grown.get_parameter(next(name for name, _ in grown.named_parameters())).requires_grad_(False)
    save(grown, tmp_path / "grown")
    before, x = state(model), inputs()
    with torch.no_grad():
        for parameter in (other := make()).parameters():
            parameter.normal_()
    for base in (model, make, lambda: other, grown):
        again = load(tmp_path / "grown", base)
        assert again.training == grown.training and torch.equal(again(x), grown(x))
        assert unchanged(grown, state(again)) and str(again) == str(grown)
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in grown.parameters()]
        if case != "as it was":
            assert again.growth.shapes == grown.growth.shapes == load_record(tmp_path / "grown/growth.json").shapes
    assert unchanged(model, before) and not [*tmp_path.glob(".*")]


def test_saving_goes_on_from_what_was_loaded(tmp_path: Path) -> None:
    model = teacher()
    half = widen(model, words(), {"blocks.0.up": 48})
    save(half, tmp_path / "half")
    again = load(tmp_path / "half", teacher)
    with refused("The config of Model has no value that makes"):
        again.save_pretrained(tmp_path)
    more = deepen(model, words(), "blocks.0")
    save(more, tmp_path / "more")
    again = load(tmp_path / "more", model)
    assert again.config.blocks == 3 and all(block.config is again.config for block in again.blocks)
    assert widen(again, words(), {"*.up": 48}).config.inner == 48


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = blocks()
    save(grow_blocks(model), tmp_path / "grown")
    changes: dict[Callable, str] = {
        lambda net: setattr(net[1], "act", F.relu): "1 is Net .* relu in it, and Net .* gelu in the saved network",
        lambda net: net.insert(4, nn.ReLU()): "4 is ReLU in it, and Linear in the saved network",
        lambda net: net[1].add_module("more", nn.ReLU()): "it has 1.more, which the saved network lacks",
        lambda net: setattr(net[1], "shift", None): "only one of the two has 1.shift",
        lambda net: net[0].register_forward_pre_hook(lambda *_: None): "0 has other forward hooks",
        lambda net: setattr(net[1].n, "bias", net[1].n.weight): "1.n.bias is tied to another tensor in one of the two",
    }
    for change, why in changes.items():
        change(base := copy.deepcopy(model))
        with refused(why):
            load(tmp_path / "grown", base)
    own = deepen(mlp(6, 8, 4), rows(), "0", make=lambda units, _: nn.Sequential(Own(units), Blend(nn.GELU())))
    save(own, tmp_path / "own")
    with refused("The base has no 0.deeper.0, and `load` cannot make a Own: pass a base that has it"):
        load(tmp_path / "own", mlp(6, 8, 4))


class Own(nn.Linear):
    def __init__(self, units: int) -> None:
        super().__init__(units, units)


def test_nothing_half_written_has_the_name(tmp_path: Path, monkeypatch) -> None:
    save(mlp(6, 8, 4), tmp_path / "net")
    with refused("exists: give the name of a new folder"):
        save(mlp(6, 8, 4), tmp_path / "net")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(mlp(6, 8, 4), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("file", ["model.safetensors", "network.json"])
def test_damage_is_told(file: str, tmp_path: Path) -> None:
    save(mlp(6, 8, 4), tmp_path / "net")
    whole = (tmp_path / "net" / file).read_bytes()
    for damaged in (whole[:-9], b"", b"x" + whole):
        (tmp_path / "net" / file).write_bytes(damaged)
        with pytest.raises(TransferError, match="damaged"):
            load(tmp_path / "net", mlp(6, 8, 4))


def test_the_file_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: (torch.randn(3, 2) * 9).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "turned": torch.randn(2, 3).T}
    write_tensors(tmp_path / "ours", tensors)
    torch_files.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    for found in (read_tensors(tmp_path / "theirs"), torch_files.load_file(tmp_path / "ours")):
        assert found.keys() == tensors.keys()
        assert all(t.dtype == found[n].dtype and torch.equal(t.cfloat(), found[n].cfloat()) for n, t in tensors.items())
    with refused("x is of torch.complex128, torch.strided, which safetensors has no name for"):
        write_tensors(tmp_path / "wrong", {"x": torch.randn(2).to(torch.complex128)})


def test_the_student_of_another_constructor(tmp_path: Path) -> None:
    student = mlp(6, 12, 12, 4)
    transfer(mlp(6, 8, 4), student, rows())
    save(student, tmp_path / "student")
    x = rows()
    assert torch.equal(load(tmp_path / "student", lambda: mlp(6, 9, 9, 4))(x), student(x))
