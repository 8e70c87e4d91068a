"""The bar: every experiment's pair, and torchvision's, agree to 1e-12 relative in float64 on randomised statistics."""

import math
from itertools import pairwise

import pytest
import torch
from networks import without
from torch import nn
from torchvision import models

import net2net
from experiments.models import build
from net2net.fill import gather as filling

BAR = 1e-12


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Statistics and affine parameters of a trained network: fresh ones hide faults, and so does a dead network.

    The statistics are those of `images`, then disturbed; the output depends on the input.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            deviation = norm.running_var.sqrt()
            norm.running_mean += 0.2 * deviation * torch.randn_like(deviation)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(deviation)
            norm.weight *= 0.8 + 0.4 * torch.rand_like(deviation)
            norm.bias += 0.2 * torch.randn_like(deviation)
        outputs = model.eval()(images)
    outputs = getattr(outputs, "logits", outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs.abs().max(), "a dead network proves nothing"
    return model


def inception(**changes: float) -> nn.Module:
    return build({"name": "inception", "slim": 0.07} | changes, 10, 3)


def vgg_rename() -> dict[str, str]:
    """vgg13_bn has one more convolution in each of its first two blocks: `features.3` and `features.10`."""
    teacher, student = (0, 4, 8, 11, 15, 18, 22, 25), (0, 7, 14, 17, 21, 24, 28, 31)
    rename = {f"features.{s + k}": f"features.{t + k}" for s, t in zip(student, teacher, strict=True) for k in (0, 1)}
    return rename | {f"features.{s + k}": "" for s in (3, 10) for k in (0, 1)}


EXPERIMENTS = {
    "wider_inception": (lambda: inception(width=math.sqrt(0.3)), lambda: inception()),
    "deeper_inception": (lambda: inception(), lambda: inception(extra_pairs=2)),
    "design_space_wider": (lambda: inception(), lambda: inception(width=math.sqrt(2))),
    "design_space_deeper": (lambda: inception(slim=0.04), lambda: inception(slim=0.04, pairs_on_top=4)),
    "quickstart": (lambda: inception(stem=8, width=math.sqrt(0.3)), lambda: inception(stem=8)),
    "wider_and_deeper": (lambda: inception(), lambda: inception(width=1.7, extra_pairs=1, pairs_on_top=1)),
    "resnet_wider": (lambda: build({"name": "resnet"}, 10, 3), lambda: build({"name": "resnet", "width": 2.3}, 10, 3)),
    "resnet_deeper": (
        lambda: build({"name": "resnet"}, 10, 3),
        lambda: build({"name": "resnet", "blocks": 5, "inner": 1.5}, 10, 3),
    ),
}
TORCHVISION = {
    "resnet50_wide": (models.resnet50, models.wide_resnet50_2, None),
    "resnet18_34": (models.resnet18, models.resnet34, None),
    "vgg11_13": (models.vgg11_bn, models.vgg13_bn, vgg_rename()),
    "densenet121_169": (models.densenet121, models.densenet169, None),
}


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_student_of_every_experiment_computes_its_teachers_function(name: str, split: str) -> None:
    torch.manual_seed(0)
    side = 8 if name == "quickstart" else 20
    images = torch.randn(8, 3, side, side + 4)  # not square
    teacher, student = (randomise(make(), images) for make in EXPERIMENTS[name])
    net2net.transfer(teacher, student, images[:2], split=split)
    measured = net2net.equivalence(teacher, student, torch.randn(3, 3, side, side + 4))
    assert 0 <= measured.max_relative <= BAR
    assert measured.agree == 3


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_grow_exactly(name: str) -> None:
    torch.manual_seed(0)
    make_teacher, make_student, rename = TORCHVISION[name]
    images = torch.randn(4, 3, 32, 64)
    teacher, student = randomise(make_teacher(), images), make_student()
    net2net.transfer(teacher, student, images[:1], split="uneven", rename=rename)
    assert net2net.equivalence(teacher, student, torch.randn(2, 3, 32, 64)).max_relative <= BAR


@pytest.mark.parametrize("name", ["inception_v3", "resnet18"])
def test_a_network_of_the_same_size_is_copied(name: str) -> None:
    images = torch.randn(4, 3, *((75, 75) if name == "inception_v3" else (32, 32)))
    options = {"init_weights": True, "aux_logits": False} if name == "inception_v3" else {}
    teacher, student = (randomise(models.get_model(name, **options), images) for _ in range(2))
    net2net.transfer(teacher, student, images)
    for mine, theirs in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_widening_is_exact_in_train_mode() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32)
    teacher, student = (randomise(make(), images) for make in EXPERIMENTS["wider_inception"])
    net2net.transfer(teacher, student, images[:2], split="uneven")
    assert net2net.equivalence(teacher, student, images, mode="train").max_relative <= 1e-11


def test_calibration_makes_a_deeper_student_close_in_train_mode() -> None:
    torch.manual_seed(0)
    teacher, student, plain = inception(), inception(extra_pairs=1), inception(extra_pairs=1)
    images = torch.randn(64, 3, 32, 32)
    for norm in teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the teacher's own statistics are those of its data, as a trained network's are
    with torch.no_grad():
        teacher.train()(images)
    net2net.transfer(teacher, plain, images[:2])
    net2net.transfer(teacher, student, images[:2], calibrate=images)
    assert net2net.equivalence(teacher, student, images).max_relative <= BAR
    calibrated = net2net.equivalence(teacher, student, images, mode="train").max_relative
    fresh = net2net.equivalence(teacher, plain, images, mode="train").max_relative
    assert calibrated < 0.1 < fresh


def without_sharing(monkeypatch) -> None:
    monkeypatch.setattr(filling, "_shares", lambda axis, value, *_: torch.ones(()).to(value))


def without_the_identity(monkeypatch) -> None:
    monkeypatch.setattr(filling, "passing", lambda origin, target: torch.zeros_like(target))


@pytest.mark.parametrize(
    ("name", "leave_out"),
    [
        ("resnet_wider", without_sharing),
        ("wider_inception", without_sharing),
        ("deeper_inception", lambda patch: without(patch, lambda origin: origin.fill in ("deviation", "mean"))),
        ("resnet_deeper", lambda patch: without(patch, lambda origin: origin.how == "silent")),
        ("deeper_inception", without_the_identity),
    ],
)
def test_without_one_step_the_student_is_refused(monkeypatch, name, leave_out) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    teacher, student = (randomise(make(), images) for make in EXPERIMENTS[name])
    leave_out(monkeypatch)
    with pytest.raises(net2net.TransferError, match="does not compute its teacher's function"):
        net2net.transfer(teacher, student, images)


@pytest.mark.parametrize("buffer", ["running_mean", "running_var", "weight", "bias"])
def test_without_the_batch_norms_own_entries_the_student_differs(buffer: str) -> None:
    """Statistics that are not copied, or copied for one new unit only, are the commonest fault of all."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    teacher, student = (randomise(make(), images) for make in EXPERIMENTS["wider_inception"])
    net2net.transfer(teacher, student, images)
    norm = student.get_submodule("blocks.3a.two.0.1")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        getattr(norm, buffer)[-1] += 1.0
    assert net2net.equivalence(teacher, student, images).max_relative > 1e-6


def test_the_teacher_and_the_random_state_are_untouched() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    teacher, student = (randomise(make(), images) for make in EXPERIMENTS["deeper_inception"])
    teacher.blocks.train(), teacher.stem.eval(), student.train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    state = torch.get_rng_state()
    net2net.transfer(teacher, student, images, noise=0.1, calibrate=images)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert modes == [module.training for module in teacher.modules()]
    assert all(module.training for module in student.modules())


def test_noise_changes_incoming_weights_of_later_copies_alone() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), None
    student = nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 2))
    record = net2net.transfer(teacher, student, torch.randn(2, 3), noise=0.1)
    axis = record.origins["0.weight"].axes[0]
    difference = (student[0].weight - teacher[0].weight[axis.index]).abs().amax(1)
    assert torch.equal(difference > 0, ~axis.first)
    assert axis.first[:4].all() and not axis.first[4:].any()
    counts = torch.bincount(axis.index, minlength=4)
    assert torch.allclose(student[2].weight, teacher[2].weight[:, axis.index] / counts[axis.index], atol=0, rtol=1e-15)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.RMSprop(p, 1e-3)]
)
@pytest.mark.parametrize("split", ["equal", "uneven"])
def test_copies_part_only_where_they_are_told_apart(split: str, make) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    student = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
    record = net2net.transfer(teacher, student, torch.randn(2, 5), split=split)
    inputs, targets = torch.randn(64, 5), torch.randn(64, 3)
    optimizer = make(student.parameters())
    for _ in range(50):
        optimizer.zero_grad()
        (student(inputs) - targets).square().mean().backward()
        optimizer.step()
    index = record.origins["0.weight"].axes[0].index
    first = torch.tensor([int((index == unit).nonzero()[0]) for unit in index])
    apart = (student[0].weight - student[0].weight[first]).abs().amax(1)[first != torch.arange(20)]
    assert (apart < 1e-12).all() if split == "equal" else (apart > 1e-6).all()


def test_random_pad_keeps_the_teachers_corner_and_nothing_else() -> None:
    torch.manual_seed(0)
    teacher, student, fresh = (
        nn.Sequential(nn.Conv2d(3, n, 3, bias=False), nn.BatchNorm2d(n), nn.ReLU(), nn.Flatten(), nn.Linear(n * 12, 5))
        for n in (4, 9, 9)
    )
    randomise(teacher, torch.randn(8, 3, 5, 6))
    fresh.load_state_dict(student.state_dict())
    net2net.random_pad(teacher, student, torch.randn(2, 3, 5, 6))
    assert torch.equal(student[0].weight[:4], teacher[0].weight)
    assert torch.equal(student[0].weight[4:], fresh[0].weight[4:])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(student[1], name)[:4], getattr(teacher[1], name))
        assert torch.equal(getattr(student[1], name)[4:], getattr(fresh[1], name)[4:])
    assert torch.equal(student[4].weight[:, :48], teacher[4].weight)  # units come first in the flattened map
    assert torch.equal(student[4].weight[:, 48:], fresh[4].weight[:, 48:])
    assert torch.equal(student[4].bias, teacher[4].bias)


def test_random_pad_of_a_deeper_student_keeps_the_teachers_layers() -> None:
    torch.manual_seed(0)
    teacher, student = randomise(inception(), torch.randn(8, 3, 32, 32)), inception(extra_pairs=1)
    fresh = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    net2net.random_pad(teacher, student, torch.randn(2, 3, 32, 32))
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs.get(name, fresh[name])), name


def linear(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (lambda: linear(3, 8, 2), lambda: linear(3, 5, 2), r"0\.weight has 5 units, the teacher's 8, 3 too few"),
        (
            lambda: linear(3, 8, 2),
            lambda: linear(3, 8, 4),
            r"2\.weight cannot grow from 2 to 4 units: it is the network's output",
        ),
        (lambda: linear(3, 8, 8, 2), lambda: linear(3, 8, 2), r"no counterpart of the teacher's 4\.weight"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name_before_anything_is_written(teacher, student, message) -> None:
    torch.manual_seed(0)
    student = student()
    before = [tensor.clone() for tensor in student.state_dict().values()]
    with pytest.raises(net2net.TransferError, match=message):
        net2net.transfer(teacher(), student, torch.randn(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, student.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 2, padding="same"), "kernel .* is even"),
        (lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1), "stride is"),
        (lambda: nn.Conv2d(4, 4, 3), "does not keep the size"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()), "not idempotent"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the very case that is tested
def test_a_new_layer_that_cannot_be_an_identity_is_refused(layer, message) -> None:
    torch.manual_seed(0)

    def network(extra: nn.Module) -> nn.Module:
        parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "act": nn.ReLU(), "extra": extra, "pool": nn.AdaptiveAvgPool2d(1)}
        return Named(parts | {"flat": nn.Flatten(), "fc": nn.Linear(4, 2)})

    with pytest.raises(net2net.TransferError, match=message):
        net2net.transfer(network(nn.Identity()), network(layer()), torch.randn(2, 3, 8, 8))


class Named(nn.ModuleDict):
    """Its modules in order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.values():
            x = layer(x)
        return x
