"""Networks by name: the paper's counts, and torchvision's classifiers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import net2net
from experiments.config import ExperimentError
from experiments.models import build
from net2net.testing import look_trained


def inception(**changes: float) -> nn.Module:
    return build({"name": "inception"} | changes, 10, 3)


def count(network: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(layer, kinds) for layer in network.modules())


@pytest.mark.parametrize(("stem", "last"), [(224, 7), (64, 4), (32, 4), (8, 2)])
def test_the_papers_network_has_25_to_47_layers_in_11_modules_for_any_size_of_images(stem, last):
    network = inception(stem=stem, slim=0.03).eval()
    assert network.depth() == (25, 47)
    assert len(network.blocks) == 11
    seen = []
    network.blocks["5b"].register_forward_hook(lambda _, __, out: seen.append(out.shape))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, stem, stem)).shape == (2, 10)
    assert seen[0][2:] == (last, last)


def test_every_convolution_is_a_full_layer():
    network = inception(slim=0.05, extra_pairs=1, pairs_on_top=1)
    full = [
        part for part in network.modules() if isinstance(part, nn.Sequential) and isinstance(part[0:1][0], nn.Conv2d)
    ]
    assert len(full) == count(network, nn.Conv2d)
    assert all([type(layer) for layer in part] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] for part in full)


@pytest.mark.parametrize(
    ("changes", "more", "depth"),
    [
        ({"extra_pairs": 2}, 11 * 2 * 4, (25, 91)),  # after each of a module's two pairs
        ({"pairs_on_top": 4}, 11 * 8, (113, 135)),
        ({"extra_pairs": 1, "pairs_on_top": 1}, 11 * (4 + 2), (47, 91)),
    ],
)
def test_a_deeper_network_has_more_layers_beside_those_of_the_standard_one(changes, more, depth):
    standard, deeper = inception(slim=0.05), inception(slim=0.05, **changes)
    assert deeper.depth() == depth
    assert count(deeper, nn.Conv2d) - count(standard, nn.Conv2d) == more
    tensors = deeper.state_dict()
    assert all(tensors[name].shape == tensor.shape for name, tensor in standard.state_dict().items())


def test_width_leaves_the_stem_alone_and_the_numbers_of_parameters_are_known():
    """A change of the architecture changes these numbers, and then the experiments have to run again."""
    with torch.device("meta"):
        wide, narrow, resnet = inception(), inception(width=0.3**0.5), build({"name": "resnet"}, 10, 3)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (wide, narrow, resnet)]
    assert (sizes[0], sizes[2]) == (8_956_426, 272_474)
    assert sizes[1] / sizes[0] == pytest.approx(0.3, abs=0.02)  # "approximately 30 % of the parameters", section 4.2
    assert [p.shape for p in narrow.stem.parameters()] == [p.shape for p in wide.stem.parameters()]


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "googlenet", "inception_v3", "mobilenet_v2"])
def test_torchvision_by_name_gives_logits_in_both_modes(name):
    with torch.device("meta"):
        network = build({"name": name}, 7, 3)
        for mode in (True, False):
            assert network.train(mode)(torch.empty(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    ("spec", "channels", "message"),
    [
        ({"name": "resnet81"}, 3, r"no network 'resnet81' \(did you mean 'resnet18'"),
        ({"name": "inception", "wdth": 2}, 3, r"no argument 'wdth' \(did you mean 'width'"),
        ({"name": "inception", "stem": 31}, 3, "stem=31 is none of"),
        ({"name": "resnet18", "wdth": 2}, 3, "cannot be built"),
        ({"name": "resnet18"}, 1, "reads 3 channels, the images have 1"),
    ],
)
def test_what_does_not_exist_is_named(spec, channels, message):
    with pytest.raises(ExperimentError, match=message):
        build(spec, 10, channels)


@pytest.mark.parametrize(
    ("spec", "depth", "shortcuts"),
    [
        ({"name": "plain", "layers": 2}, 8, 0),
        ({"name": "plain", "layers": 6}, 20, 0),
        ({"name": "resnet", "blocks": 1, "inner": 3}, 8, 2),
        ({"name": "resnet", "blocks": 5, "inner": 3}, 32, 2),
    ],
)
def test_networks_for_cifar_have_the_depth_of_their_paper(spec, depth, shortcuts):
    network = build(spec | {"width": 0.25}, 7, 1).eval()
    assert count(network, nn.Conv2d, nn.Linear) - shortcuts == depth
    assert sum(isinstance(m, nn.Conv2d) for name, m in network.named_modules() if "shortcut" in name) == shortcuts
    if shortcuts:
        assert network.stages[2][0].conv1.out_channels == 3 * 16
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 16, 20)).shape == (2, 7)


def speedrun(**changes: object) -> nn.Module:
    return build({"name": "speedrun", "slim": 0.1} | changes, 10, 3)


def test_the_speed_run_network_whitens_its_patches() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(3, 3)
    images = F.avg_pool2d(torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 3, 35, 35)), 4, 1)  # colours, blurred
    network = speedrun(slim=1.0)
    network.set_from_data(images)
    out = network.whiten(images).transpose(0, 1).flatten(1)
    covariance = out @ out.T / out.shape[1]
    expected = torch.eye(12)
    # The smallest eigenvalues are damped; none is enlarged, and each direction occurs with both signs.
    torch.testing.assert_close(covariance[12:, 12:], covariance[:12, :12])
    torch.testing.assert_close(covariance[:12, 12:], -covariance[:12, :12])
    assert (covariance[:12, :12] - torch.diag(covariance[:12, :12].diag())).abs().max() < 1e-3
    assert covariance.diag().max() < 1 + 1e-4 and covariance.diag()[:4].min() > 0.99 * expected[0, 0]
    assert not network.whiten.weight.requires_grad


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("changes", [{"widths": [64, 128, 128]}, {"extra": 1, "residual": True}])
def test_the_speed_run_network_grows_into_its_students(activation: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    small, large = ({}, changes) if "extra" in changes else (changes, {})
    teacher, student = (speedrun(activation=activation, **one).double() for one in (small, large))
    look_trained(teacher)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    record = net2net.transfer(teacher, student, images, split="uneven")
    assert record.measured is not None and record.measured.max_relative < 1e-12


def test_the_speed_run_networks_first_units_pass_the_image_on() -> None:
    network = speedrun(slim=1.0)
    layer = network.groups[1].second.conv.weight
    torch.testing.assert_close(layer.detach(), nn.init.dirac_(torch.empty_like(layer)))


def own_network(classes: int, channels: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, width), nn.Linear(width, classes))


def test_a_network_of_ones_own_is_named_by_where_it_is() -> None:
    assert build({"name": f"{__name__}:own_network", "width": 6}, 5, 3)[2].weight.shape == (5, 6)
    assert build({"name": "torchvision.models:squeezenet1_1"}, 7, 3).num_classes == 7
    for name, why in (("nowhere:net", "No module named 'nowhere'"), ("torch.nn:Linaer", "no attribute 'Linaer'")):
        with pytest.raises(ExperimentError, match=f"names no function that can be imported.*{why}"):
            build({"name": name}, 5, 3)
