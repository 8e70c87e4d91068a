"""The benchmarks, on networks and runs that take no time."""

from pathlib import Path

import pytest
import torch
from loops import pictures
from torch import nn

from scripts import bench


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def test_every_round_of_growth_times_both() -> None:
    pairs = bench.time_growth(small, large, torch.randn(2, 3, 8, 8), rounds=3)
    assert len(pairs) == 3 and all(plain > 0 and grown > 0 for plain, grown in pairs)


def test_every_step_of_the_loop_is_compared_with_a_bare_one() -> None:
    pairs = bench.compare_loops({"name": "resnet", "blocks": 1, "width": 0.1}, batch_size=4, steps=8)
    assert len(pairs) == 5 and all(real > 0 and bare > 0 for real, bare in pairs)


def test_both_loaders_read_as_many_pictures(tmp_path: Path) -> None:
    pictures(tmp_path)
    for make in (bench.torchvision_epoch, bench.our_epoch):
        epoch = make(tmp_path, 32, 16, 8, 0)
        for _ in range(2):
            batches = [tuple(images.shape) for images, _ in epoch()]
            assert batches == [(8, 3, 16, 16)] * 4


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    assert bench.summarise([(1.0, 2.0), (2.0, 3.0), (10.0, 10.0)]) == (2.0, 3.0, 1.5)


def test_a_bar_is_met_or_not() -> None:
    assert bench.verdict(2.5, 3.0) == "2.50, bar 3.00: met"
    assert bench.verdict(21.0, 20.0, " s") == "21.00 s, bar 20.00 s: NOT MET"
    assert bench.verdict(0.9, 0.97, at_least=True) == "0.90, bar at least 0.97: NOT MET"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grwth"], "there is no part grwth: there are startup, training, loader, growth, runs"),
        (["loader", "--photos", "/nowhere"], "/nowhere has no folder train: --photos takes a folder with train/CLASS"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
