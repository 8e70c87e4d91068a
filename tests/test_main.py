"""The command `net2net` prints the groups of a network, or how equal two are, or says in a sentence why not."""

import contextlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import net2net
from net2net.__main__ import main


def test_the_groups_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "resnet18", "--size", "32", "--batch", "1"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == ["width", "layers", "read", "by", "growth"] and not shown.err
    assert lines[1].split()[:2] == ["64", "conv1,"] and lines[1].endswith("free")
    assert lines[-1] == "13 groups of units, 12 of them free to grow to any width"


def test_json_and_a_network_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\ndef net(n=4): return nn.Sequential(nn.Conv2d(3, n, 3), nn.ReLU(), nn.Conv2d(n, 2, 3))"
    (tmp_path / "mine.py").write_text(f"{code}\ndef wider(): return net(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["describe", "mine:net", "--size", "8", "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert (first["layers"], first["width"], first["free"]) == (["0"], 4, True)
    assert last["pinned"] == "it is the network's output"
    assert main(["grow", "mine:net", "mine:wider", "--size", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["on other images"]["max_relative"] < 1e-12


def test_a_certificate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net, images = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    wider = net2net.widen(net, images, {"0": 6})
    certificate = net2net.certify(wider.growth, net, wider, images)
    file = tmp_path / "certificate.json"
    file.write_text(json.dumps(certificate))
    assert main(["verify", str(file)]) == 0 and "wider" in capsys.readouterr().out
    assert main(["verify", str(file), "--json"]) == 0 and json.loads(capsys.readouterr().out) == certificate
    file.write_text(json.dumps(certificate | {"operator": "deeper"}))
    assert main(["verify", str(file)]) == 1 and "was changed" in capsys.readouterr().err


def test_without_torchvision_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("net2net.__main__.find_spec", lambda name: None)
    assert main(["describe", "resnet18"]) == 1 and "pip install torchvision" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grow", "resnet18", "resnet34", "--size", "32"]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert "tensors from the teacher" in first and second.startswith("on other images: max_abs")
    for line in (first, second):
        assert float(line.split("relative ")[1].split(",")[0]) < 1e-10
    assert not shown.err and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "resnet81"], r"resnet81: No network is called 'resnet81' \(did you mean 'resnet18'\?\)"),
        (["describe", "torch:zeros"], "torch:zeros: zeros of torch makes no network when called without arguments"),
        (["describe", "nowhere:net"], "nowhere:net: net of nowhere makes no network .*No module named 'nowhere'"),
        (["grow", "resnet18", "resnet19", "--size", "32"], "resnet18 -> resnet19: No network is called 'resnet19'"),
        (["grow", "resnet34", "resnet18", "--size", "32"], "resnet34 -> resnet18: "),
        (["verify", "nowhere.json"], "nowhere.json: The certificate cannot be read"),
        (["describe", "resnet18", "--size", "0"], "resnet18: The forward pass"),
        pytest.param(
            ["describe", "r2plus1d_18", "--size", "32"], "r2plus1d_18: The forward pass", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_and_status_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert not shown.out and re.match(message, shown.err) and shown.err.count("\n") == 1
    assert torch.get_default_dtype() == torch.float32


def test_it_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["net2net", "describe", "squeezenet1_1", "--size", "64", "--batch", "1"])
    monkeypatch.delitem(sys.modules, "net2net.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("net2net", run_name="__main__")
    assert end.value.code == 0 and "features.0" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["resnet18"], ["describe", "resnet18", "--size", "many"], ["grow", "a"]])
def test_a_wrong_command_line_shows_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage: net2net" in capsys.readouterr().err


def test_the_callers_default_dtype_comes_back() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        main(["describe", "resnet19"])
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetched(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    with contextlib.suppress(OSError):
        main(["describe", "lraspp_mobilenet_v3_large", "--size", "32"])
    torch.set_default_dtype(torch.float32)
    assert not asked
