"""Networks by name: the paper's counts, and torchvision's classifiers."""

import pytest
import torch
from torch import nn

from experiments.config import ExperimentError
from experiments.models import build
from experiments.models.inception import Inception


@pytest.mark.parametrize("stem", [8, 32, 224])
def test_the_papers_network_has_25_and_47_weight_layers_and_11_modules(stem: int) -> None:
    network = Inception(10, stem=stem, slim=0.05)
    assert network.depth() == (25, 47)
    assert len(network.blocks) == 11
    assert network(torch.randn(2, 3, stem, stem)).shape == (2, 10)


def test_every_convolution_is_a_full_layer() -> None:
    network = Inception(10, slim=0.05, extra_pairs=1, pairs_on_top=1)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    full = [
        part for part in network.modules() if isinstance(part, nn.Sequential) and isinstance(part[0:1][0], nn.Conv2d)
    ]
    assert len(full) == len(convolutions)
    assert all([type(layer) for layer in part] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] for part in full)


@pytest.mark.parametrize(("changes", "more"), [({"extra_pairs": 2}, 11 * 2 * 4), ({"pairs_on_top": 4}, 11 * 8)])
def test_added_pairs(changes: dict[str, int], more: int) -> None:
    """Two more pairs after each of a module's two pairs; four pairs on top of each module."""

    def count(**options: int) -> int:
        return sum(isinstance(layer, nn.Conv2d) for layer in Inception(10, slim=0.05, **options).modules())

    assert count(**changes) - count() == more


def test_width_leaves_the_stem_alone() -> None:
    narrow, wide = Inception(10, width=0.5), Inception(10)
    assert [p.shape for p in narrow.stem.parameters()] == [p.shape for p in wide.stem.parameters()]
    assert narrow.blocks["3a"].entry[0].out_channels * 2 == wide.blocks["3a"].entry[0].out_channels
    assert sum(p.numel() for p in Inception(10, width=0.3**0.5).parameters()) / sum(
        p.numel() for p in wide.parameters()
    ) == pytest.approx(0.3, abs=0.02)  # "approximately 30 % of the parameters", section 4.2


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "googlenet", "inception_v3", "mobilenet_v2"])
def test_torchvision_by_name_gives_logits_in_both_modes(name: str) -> None:
    with torch.device("meta"):
        network = build({"name": name}, 7, 3)
        for mode in (True, False):
            assert network.train(mode)(torch.empty(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "resnet81"}, r"no network 'resnet81' \(did you mean 'resnet18'"),
        ({"name": "inception", "wdth": 2}, r"no argument 'wdth' \(did you mean 'width'"),
        ({"name": "inception", "stem": 31}, "stem=31 is none of"),
        ({"name": "resnet18", "wdth": 2}, "cannot be built"),
    ],
)
def test_what_does_not_exist_is_named(spec: dict, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        build(spec, 10, 3)


def test_torchvision_needs_colour() -> None:
    with pytest.raises(ExperimentError, match="reads 3 channels, the images have 1"):
        build({"name": "resnet18"}, 10, 1)


def inception(**changes) -> nn.Module:
    return build({"name": "inception"} | changes, 10, 3)


@pytest.mark.parametrize(
    ("changes", "depth"),
    [
        ({"extra_pairs": 2}, (25, 91)),
        ({"pairs_on_top": 4}, (113, 135)),
        ({"extra_pairs": 1, "pairs_on_top": 1}, (47, 91)),
    ],
)
def test_deeper_networks_are_as_deep_as_they_say(changes: dict, depth: tuple[int, int]) -> None:
    assert inception(slim=0.05, **changes).depth() == depth


def test_deeper_networks_have_every_name_of_the_standard_one() -> None:
    """What `transfer` needs: the same names, the same shapes."""
    standard = {name: p.shape for name, p in inception(slim=0.05).state_dict().items()}
    for changes in ({"extra_pairs": 2}, {"pairs_on_top": 4}):
        deeper = inception(slim=0.05, **changes).state_dict()
        assert all(deeper[name].shape == shape for name, shape in standard.items())
        assert len(deeper) > len(standard)


def test_the_numbers_of_parameters() -> None:
    """A change of the architecture changes these, and then the experiments have to run again."""
    counts = {
        "inception": sum(p.numel() for p in inception().parameters()),
        "resnet": sum(p.numel() for p in build({"name": "resnet"}, 10, 3).parameters()),
    }
    assert counts == {"inception": 8_956_426, "resnet": 272_474}


@pytest.mark.parametrize(("stem", "side", "last"), [(224, 224, 7), (32, 32, 4), (8, 8, 2)])
def test_the_stem_suits_its_images(stem: int, side: int, last: int) -> None:
    network = inception(slim=0.03, stem=stem).eval()
    seen = []
    network.blocks["5b"].register_forward_hook(lambda _, __, out: seen.append(out.shape))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 10)
    assert seen[0][2:] == (last, last)


@pytest.mark.parametrize(("layers", "depth"), [(2, 8), (6, 20)])
def test_a_plain_network_is_as_deep_as_the_residual_one_without_its_shortcuts(layers: int, depth: int) -> None:
    network = build({"name": "plain", "layers": layers, "width": 0.25}, 7, 1).eval()
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == depth
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 16, 20)).shape == (2, 7)


@pytest.mark.parametrize(("blocks", "depth"), [(1, 8), (3, 20), (5, 32)])
def test_resnet_has_the_depth_of_its_paper(blocks: int, depth: int) -> None:
    network = build({"name": "resnet", "blocks": blocks, "width": 0.25, "inner": 3}, 7, 1).eval()
    shortcuts = sum(isinstance(m, nn.Conv2d) for name, m in network.named_modules() if "shortcut" in name)
    weights = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules())
    assert weights - shortcuts == depth and shortcuts == 2
    assert network.stages[2][0].conv1.out_channels == 3 * 16
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 16, 20)).shape == (2, 7)
