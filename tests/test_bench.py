"""The benchmark of growth, on networks that take no time."""

import sys

import pytest
import torch
from torch import nn

from scripts import bench


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 1024, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 2))


def test_every_round_times_both() -> None:
    measured = bench.growth(small, large, torch.randn(2, 3, 8, 8), rounds=3)
    assert len(measured) == 3 and all(plain > 0 and grown > 0 for plain, grown in measured)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    found = bench.memory(small, large, 8)
    assert found is not None
    student = sum(p.nbytes for p in large().parameters()) / bench.MB
    assert student < found.networks < 1.1 * student
    assert found.largest == pytest.approx(1024 * 27 * 4 / bench.MB)
    assert all(0 <= peak < 50 for peak in (found.passes, found.writing, found.transfer))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_peak_is_seen_though_it_is_over() -> None:
    assert 60 < bench._peak(lambda: [torch.ones(64 * bench.MB // 4), None][1]) < 80


def test_the_map_needs_no_weights() -> None:
    bench.mapped(bench.transformer(16, 2, 1), bench.transformer(24, 3, 2), torch.randn(1, 3, 224, 224, device="meta"))


def test_a_bar_is_met_or_not() -> None:
    assert bench.verdict(2.5, 3.0) == "2.50, bar 3.00: met"
    assert bench.verdict(21.0, 20.0, " s") == "21.00 s, bar 20.00 s: NOT MET"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "grwth"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "there is no grwth: there are startup, training, loader, growth, memory, map" in capsys.readouterr().err
