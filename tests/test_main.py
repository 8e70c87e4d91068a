"""`python -m net2net` prints the groups of a network, or how equal two are, or says in a sentence why not."""

import contextlib
import runpy
import sys

import pytest
import torch

from net2net.__main__ import main


def test_the_groups_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet18", "--size", "32", "--batch", "1"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == ["width", "layers", "read", "by", "growth"] and not shown.err
    assert lines[1].split()[:2] == ["64", "conv1,"] and lines[1].endswith("free")
    assert lines[-1] == "13 groups of units, 12 of them free to grow to any width"


@pytest.mark.slow
def test_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet18", "resnet34", "--size", "32"]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert "tensors from the teacher" in first and second.startswith("on other images: max |difference|")
    for line in (first, second):
        assert float(line.split("relative ")[1].split(",")[0]) < 1e-10
    assert not shown.err and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "resnet19: No network is called 'resnet19'"),
        (["resnet18", "resnet19", "--size", "32"], "resnet18 -> resnet19: No network is called 'resnet19'"),
        (["resnet34", "resnet18", "--size", "32"], "resnet34 -> resnet18: "),
        (["resnet18", "--size", "0"], "resnet18: The forward pass"),
        pytest.param(["r2plus1d_18", "--size", "32"], "r2plus1d_18: The forward pass", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_and_status_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith(message) and shown.err.count("\n") == 1
    assert torch.get_default_dtype() == torch.float32


def test_it_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["net2net", "squeezenet1_1", "--size", "64", "--batch", "1"])
    monkeypatch.delitem(sys.modules, "net2net.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("net2net", run_name="__main__")
    assert end.value.code == 0 and "features.0" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["resnet18", "--size", "many"], ["a", "b", "c"]])
def test_a_wrong_command_line_shows_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage: python -m net2net" in capsys.readouterr().err


def test_the_callers_default_dtype_comes_back() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        main(["resnet19"])
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
        main(["lraspp_mobilenet_v3_large", "--size", "32"])
    torch.set_default_dtype(torch.float32)
    assert not asked
