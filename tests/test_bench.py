"""The benchmarks, on networks that take no time."""

import pytest
import torch
from loops import pictures
from torch import nn

from scripts import bench


def small(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def test_every_round_of_growth_and_every_step_of_the_loop_is_timed_with_what_it_is_compared_with():
    grown = bench.time_growth(small, lambda: small(64), torch.randn(2, 3, 8, 8), rounds=3)
    steps = bench.compare_loops({"name": "resnet", "blocks": 1, "width": 0.1}, batch_size=4, steps=8)
    assert (len(grown), len(steps)) == (3, 5)
    assert all(seconds > 0 for pair in grown + steps for seconds in pair)
    assert bench.summarise([(1.0, 2.0), (2.0, 3.0), (10.0, 10.0)]) == (2.0, 3.0, 1.5)  # the median of the rounds


def test_without_a_gpu_the_gpu_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["gpu"])
    assert capsys.readouterr().out == "gpu: not measured, because torch finds no GPU\n"


@pytest.mark.slow
def test_a_compiled_loop_is_timed_with_a_compiled_step():
    steps = bench.compare_loops({"name": "resnet", "blocks": 1, "width": 0.1}, batch_size=4, steps=6, compile=True)
    assert len(steps) == 3 and all(seconds > 0 for pair in steps for seconds in pair)


def test_memory_is_that_of_the_work_alone():
    kept = []
    assert 60 < bench.peak_memory(lambda: kept.append(torch.ones(2**24))) < 80  # 64 MiB
    assert bench.peak_memory(lambda: None) < 8


def test_both_loaders_read_as_many_pictures(tmp_path):
    pictures(tmp_path)
    for make in (bench.torchvision_epoch, bench.our_epoch):
        epoch = make(tmp_path, 32, 16, 8, 0)
        for _ in range(2):
            assert [tuple(images.shape) for images, _ in epoch()] == [(8, 3, 16, 16)] * 4


def test_a_bar_is_met_or_not():
    assert bench.verdict(2.5, 3.0) == "2.50, bar 3.00: met"
    assert bench.verdict(21.0, 20.0, " s") == "21.00 s, bar 20.00 s: NOT MET"
    assert bench.verdict(0.9, 0.97, at_least=True) == "0.90, bar at least 0.97: NOT MET"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grwth"], "there is no part grwth: there are startup, training, gpu, loader, growth, memory"),
        (["loader", "--photos", "/nowhere"], "/nowhere has no folder train: --photos takes a folder with train/CLASS"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
