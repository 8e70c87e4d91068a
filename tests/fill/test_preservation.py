"""The bar: every experiment's pair, and torchvision's, agree to 1e-12 relative in float64, on statistics disturbed."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import BAR, assert_same, change, change_axes, drop_shares, images
from torch import nn
from torchvision import models

from experiments.models import build
from net2net import Origin, equivalence, replay, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def inception(**changes: float) -> nn.Module:
    return build({"name": "inception", "slim": 0.07} | changes, 10, 3)


def resnet(**changes: float) -> nn.Module:
    return build({"name": "resnet"} | changes, 10, 3)


def vgg_rename() -> dict[str, str]:
    """vgg13_bn has one more convolution in each of its first two blocks: `features.3` and `features.10`."""
    teacher, student = (0, 4, 8, 11, 15, 18, 22, 25), (0, 7, 14, 17, 21, 24, 28, 31)
    rename = {f"features.{s + k}": f"features.{t + k}" for s, t in zip(student, teacher, strict=True) for k in (0, 1)}
    return rename | {f"features.{s + k}": "" for s in (3, 10) for k in (0, 1)}


def googlenet() -> nn.Module:
    return models.googlenet(num_classes=10, aux_logits=False, init_weights=False)


EXPERIMENTS = {
    "wider_inception": (lambda: inception(width=math.sqrt(0.3)), lambda: inception()),
    "deeper_inception": (lambda: inception(), lambda: inception(extra_pairs=2)),
    "design_space_wider": (lambda: inception(), lambda: inception(width=math.sqrt(2))),
    "design_space_deeper": (lambda: inception(slim=0.04), lambda: inception(slim=0.04, pairs_on_top=4)),
    "quickstart": (lambda: inception(stem=8, width=math.sqrt(0.3)), lambda: inception(stem=8)),
    "wider_and_deeper": (lambda: inception(), lambda: inception(width=1.7, extra_pairs=1, pairs_on_top=1)),
    "resnet_wider": (lambda: resnet(), lambda: resnet(width=2.3)),
    "resnet_deeper": (lambda: resnet(), lambda: resnet(blocks=5, inner=1.5)),
}
QUICK = ("quickstart", "deeper_inception")
TORCHVISION = {
    "resnet50_wide": (models.resnet50, models.wide_resnet50_2),
    "resnet18_34": (models.resnet18, models.resnet34),
    "vgg11_13": (models.vgg11_bn, models.vgg13_bn),
    "densenet121_169": (models.densenet121, models.densenet169),
    "mobilenet_v2": (lambda: models.MobileNetV2(10, 0.5), lambda: models.MobileNetV2(10, 1.0)),
    "mnasnet": (lambda: models.MNASNet(0.5, 10), lambda: models.MNASNet(1.0, 10)),
    "efficientnet_b0_b1": (models.efficientnet_b0, models.efficientnet_b1),
    "googlenet": (googlenet, googlenet),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS]
)
def test_a_student_of_every_experiment_computes_its_teachers_function(name: str) -> None:
    side = 8 if name == "quickstart" else 20
    x = images(8, 3, side, side + 4)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS[name])
    outputs = teacher(x)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs.abs().max(), "a dead network proves nothing"
    for split in ("equal", "uneven"):
        transfer(teacher, student, x[:2], split=split)
        measured = equivalence(teacher, student, images(3, 3, side, side + 4))
        assert measured.max_relative <= BAR and measured.agree == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_grow_exactly(name: str) -> None:
    make_teacher, make_student = TORCHVISION[name]
    x = images(4, 3, 64, 64) if name.startswith(("eff", "goog")) else images(4, 3, 32, 64)
    teacher, student = look_trained(make_teacher(), x), make_student()
    rename = vgg_rename() if name == "vgg11_13" else None
    transfer(teacher, student, x[:1], split="uneven", rename=rename)
    assert_same(teacher, student, torch.randn_like(x[:2]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("inception_v3", 75), ("resnet18", 32)])
def test_a_network_of_the_same_size_is_copied(name: str, side: int) -> None:
    x, options = images(4, 3, side, side), {"init_weights": True, "aux_logits": False} if "inception" in name else {}
    teacher, student = (look_trained(models.get_model(name, **options), x) for _ in range(2))
    transfer(teacher, student, x)
    for mine, theirs in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_widening_is_exact_in_train_mode() -> None:
    x = images(16, 3, 16, 16)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS["quickstart"])
    transfer(teacher, student, x[:2], split="uneven")
    assert_same(teacher, student, x, ("train",), bar=1e-11)


def fill_zero(which: Callable[[Origin], bool]) -> Callable:
    """The record with zeros in the new tensors that `which` picks."""
    return lambda record: change(record, lambda origin: replace(origin, fill="zero") if which(origin) else origin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("resnet_wider", lambda record: change_axes(record, drop_shares)),
        ("wider_inception", lambda record: change_axes(record, drop_shares)),
        ("deeper_inception", fill_zero(lambda origin: origin.fill == "deviation")),
        ("deeper_inception", fill_zero(lambda origin: origin.fill == "mean")),
        ("deeper_inception", fill_zero(lambda origin: origin.fill == "pass")),
        (
            "resnet_deeper",
            lambda record: change(record, lambda o: replace(o, fill="one") if o.how == "silent" else o),
        ),
    ],
)
def test_without_one_step_the_student_differs(name: str, spoil: Callable) -> None:
    x = images(8, 3, 32, 32)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS[name])
    replay(spoil(transfer(teacher, student, x)), teacher, student)
    assert not equivalence(teacher, student, x).max_relative < 1e-3


@pytest.mark.parametrize("role", ["running_mean", "running_var", "weight", "bias"])
def test_without_the_batch_norms_own_entries_the_student_differs(role: str) -> None:
    """Statistics that are not copied, or copied for one new unit only, are the commonest fault of all."""
    x = images(8, 3, 16, 16)
    teacher, student = (look_trained(make(), x) for make in EXPERIMENTS["quickstart"])
    transfer(teacher, student, x)
    with torch.no_grad():
        getattr(student.get_submodule("blocks.3a.two.0.1"), role)[-1] += 1.0
    assert equivalence(teacher, student, x).max_relative > 1e-6
