"""New norms in a row with a norm of the teacher's: more layers in a post-norm transformer."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import BAR, assert_same, change, error, refused, trained
from networks import Net
from torch import Tensor, nn

from net2net import random_pad, transfer

pytestmark = pytest.mark.usefixtures("float64")
Norm = Callable[[int], nn.Module]


def tokens() -> Tensor:
    rows = torch.randn(12, 7, 6, generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, rows * 1e-4, rows * 0])  # rows of no spread, too


def encoder(layers: int, width: int = 8, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, **options)
    stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, width), stack, nn.Linear(width, 5))


def both_stacks(layers: int) -> nn.Module:
    parts = {"net": nn.Transformer(6, 2, layers, layers, 16, batch_first=True), "fc": nn.Linear(6, 5)}
    return Net(parts, lambda net, x: net.fc(net.net(x, x.flip(1)[:, 2:])))


def post_norm(layers: int, width: int = 8, norm: Norm = nn.RMSNorm, every: bool = False) -> nn.Module:
    """Blocks whose sums are normalised; with `every` all results are summed."""
    branches = [nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width)) for _ in range(layers)]
    parts = {"stem": nn.Linear(6, width), "branches": nn.ModuleList(branches), "fc": nn.Linear(width, 3)}
    parts["norms"] = nn.ModuleList(norm(width) for _ in range(layers))

    def how(net: Net, x: Tensor) -> Tensor:
        x, total = net.stem(x), 0
        for branch, norm in zip(net.branches, net.norms, strict=True):
            x = norm(x + branch(x))
            total = total + x
        return net.fc(total if every else x)

    return Net(parts, how)


def normed(*norms: nn.Module, between: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    """Norms in a row between two layers."""
    parts = {"a": nn.Linear(6, 8), "norms": nn.ModuleList(norms), "fc": nn.Linear(8, 3)}

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.norms[0](net.a(x))
        for norm in net.norms[1:]:
            x = norm(between(x))
        return net.fc(x)

    return Net(parts, how)


DEEPER = {
    "one more": (lambda: encoder(1), lambda: encoder(2)),
    "three more, twice as wide": (lambda: encoder(2), lambda: encoder(5, 16)),
    "norms without a bias": (lambda: encoder(1, bias=False), lambda: encoder(3, bias=False)),
    "an encoder and a decoder, each with a norm at its end": (lambda: both_stacks(1), lambda: both_stacks(3)),
    "rms norms": (lambda: post_norm(2), lambda: post_norm(4)),
    "rms norms that see zeros": (lambda: post_norm(1), lambda: post_norm(3, 12)),
    "group norms": (
        lambda: nn.Sequential(nn.Conv1d(7, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv1d(8, 3, 1)),
        lambda: nn.Sequential(
            nn.Conv1d(7, 16, 3), *[nn.GroupNorm(2, 16) for _ in "123"], nn.ReLU(), nn.Conv1d(16, 3, 1)
        ),
    ),
    "behind a norm without affine": (
        lambda: normed(nn.LayerNorm(8, elementwise_affine=False)),
        lambda: normed(nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8)),
    ),
}


@pytest.mark.parametrize("name", DEEPER)
def test_norms_in_a_row_are_one(name: str) -> None:
    teacher, student = trained(*(make() for make in DEEPER[name]))
    record = transfer(teacher, student, tokens()[:2])
    assert_same(teacher, student, tokens())
    spoilt = change(record, lambda o: replace(o, factor=1.0))
    assert error(spoilt, teacher, student, tokens()) > 1e-3
    assert error(record, teacher, student, tokens()) <= BAR
    assert error(replace(record, eps={}), teacher, student.apply(forget_eps), tokens()) > 1e-3


def forget_eps(module: nn.Module) -> None:
    if hasattr(module, "eps"):
        module.eps = 1e-5


def test_the_gradient_of_the_weight_that_moved_is_the_teachers() -> None:
    teacher, student = trained(encoder(1), encoder(3))
    record, x = transfer(teacher, student, tokens()[:2]), tokens()[:6]
    for model in (teacher, student):
        model(x).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    for name, gradient in predicted.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9)
    assert "1.layers.2.norm2.weight" in predicted and "1.layers.0.norm2.weight" not in predicted


def test_random_pad_moves_them_too() -> None:
    teacher, student = trained(encoder(1), encoder(2))
    random_pad(teacher, student, tokens()[:2])
    assert torch.equal(teacher[1].layers[0].norm2.weight, student[1].layers[1].norm2.weight)


LONE = {
    "in front of an old one whose input is read elsewhere": (
        lambda: post_norm(1, every=True),
        lambda: post_norm(2, every=True),
        r"norms\.1 cannot.*norms\.0.*is read by fc\.weight, too",
    ),
    "of another kind": (
        lambda: normed(nn.LayerNorm(8)),
        lambda: normed(nn.LayerNorm(8), nn.RMSNorm(8)),
        r"norms\.1 cannot.*no norm like norms\.0",
    ),
    "without a place for the weight": (
        lambda: normed(nn.LayerNorm(8)),
        lambda: normed(nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)),
        r"norms\.1.* cannot.*no norm like norms\.0.*lacks a weight or bias",
    ),
    "behind an activation": (
        lambda: normed(nn.LayerNorm(8)),
        lambda: normed(nn.LayerNorm(8), nn.LayerNorm(8), between=torch.tanh),
        r"norms\.1 cannot.*not the result of another norm",
    ),
    "behind a mean over positions": (
        lambda: normed(nn.LayerNorm(8), nn.Identity(), between=lambda x: x.mean(1)),
        lambda: normed(nn.LayerNorm(8), nn.LayerNorm(8), between=lambda x: x.mean(1)),
        "does not compute its teacher's function",
    ),
}


@pytest.mark.parametrize("name", LONE)
def test_a_new_norm_elsewhere_is_refused(name: str) -> None:
    make, make_student, message = LONE[name]
    teacher, student = trained(make(), make_student())
    with refused(message) if "mean" in name else refused(message, student):
        transfer(teacher, student, tokens()[:2])
