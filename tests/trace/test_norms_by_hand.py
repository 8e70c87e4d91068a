"""Norms by what they compute: written by hand, in any order of steps, with or without a weight."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, error, refused, state, trained
from networks import Net
from torch import Tensor, nn

from net2net import equivalence, random_pad, transfer, widen

pytestmark = pytest.mark.usefixtures("float64")
Compute = Callable[[nn.Module, Tensor], Tensor]


class ByHand(nn.Module):
    """A norm that computes what it is given; its eps is an attribute of any name."""

    def __init__(self, width: int, compute: Compute, tensors: str = "weight", eps: str = "eps") -> None:
        super().__init__()
        for name in tensors.split():
            setattr(self, name, nn.Parameter(torch.ones(width)))
        self.compute = compute
        setattr(self, eps, 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def tokens() -> Tensor:
    rows = torch.randn(12, 7, 6, generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, rows * 0.05])  # eps counts


def square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def one_more(net: nn.Module, x: Tensor) -> Tensor:
    return (x * torch.rsqrt(square(x) + net.variance_epsilon)) * (1.0 + net.weight.to(torch.float64))


def cast(net: nn.Module, x: Tensor) -> Tensor:
    return net.weight * (x * torch.rsqrt(square(x.to(torch.float64)) + net.variance_epsilon)).to(x.dtype)


NORMS: dict[str, tuple[Compute, str]] = {
    "rsqrt": (lambda net, x: net.weight * (x * torch.rsqrt(square(x) + net.eps)), "eps"),
    "sqrt, another name": (lambda net, x: x / torch.sqrt((x * x).mean(-1, True) + net.epsilon) * net.weight, "epsilon"),
    "a power": (lambda net, x: net.weight * (x * (x.square().mean(-1, True) + net.eps) ** -0.5), "eps"),
    "of a cast": (cast, "variance_epsilon"),
    "unsqueeze": (lambda net, x: net.weight * (x / (x.pow(2).mean(-1).unsqueeze(-1) + net.eps).sqrt()), "eps"),
    "weight first": (lambda net, x: net.weight * x / (square(x) + net.eps).sqrt(), "eps"),
    "eps beside the root": (lambda net, x: net.weight * (x / (square(x).sqrt() + net.eps)), "eps"),
    "a sum": (lambda net, x: net.weight * (x / (x.pow(2).sum(-1, keepdim=True) + net.eps).sqrt()), "eps"),
    "a length": (lambda net, x: net.weight * (x / (x.norm(dim=-1, keepdim=True) + net.eps)), "eps"),
    "a length by the root of the width": (
        lambda net, x: net.weight * (x / (x.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5 + net.eps)),
        "eps",
    ),
    "normalize": (lambda net, x: F.normalize(x, dim=-1, eps=net.eps) * x.shape[-1] ** 0.5 * net.weight, "eps"),
    "layer norm": (
        lambda net, x: centred(x) * torch.rsqrt(square(centred(x)) + net.eps) * net.weight + net.bias,
        "eps",
    ),
    "layer norm by var": (
        lambda net, x: (
            centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + net.eps) * net.weight + net.bias
        ),
        "eps",
    ),
    "layer norm by std": (
        lambda net, x: net.weight * centred(x) / (x.std(-1, keepdim=True) + net.eps) + net.bias,
        "eps",
    ),
    "1 + weight": (one_more, "variance_epsilon"),
    "torch's, and a weight": (lambda net, x: F.rms_norm(x, x.shape[-1:], eps=net.eps) * net.weight, "eps"),
    "torch's layer norm, and a weight from one": (
        lambda net, x: F.layer_norm(x, x.shape[-1:], eps=net.eps) * (net.weight + 1.0) + net.bias,
        "eps",
    ),
    "torch's layer norm with a weight from one": (
        lambda net, x: F.layer_norm(x, x.shape[-1:], net.weight + 1.0, net.bias, net.eps),
        "eps",
    ),
}
BARE: dict[str, Compute] = {
    "rms norm": lambda net, x: x * torch.rsqrt(square(x) + net.eps),
    "layer norm": lambda net, x: centred(x) / torch.sqrt(square(centred(x)) + net.eps),
    "normalize": lambda net, x: F.normalize(x, dim=-1, eps=net.eps),
    "torch's layer norm": lambda net, x: F.layer_norm(x, x.shape[-1:], eps=net.eps),
}


def between(width: int, norm: nn.Module, act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), norm, act or nn.Identity(), nn.Linear(width, 5))


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_by_hand_grows_to_any_width(name: str, width: int) -> None:
    compute, eps = NORMS[name]
    tensors = "weight bias" if "layer" in name else "weight"
    teacher, student = trained(*(between(n, ByHand(n, compute, tensors, eps), nn.Tanh()) for n in (8, width)))
    if name == "normalize":  # the root of the width is a number in front of tanh
        teacher[2], student[2] = nn.Identity(), nn.Identity()
    record = transfer(teacher, student, tokens()[:2])
    assert_same(teacher, student, tokens())
    if record.eps:
        setattr(student[1], eps, 1e-2)
        assert error(replace(record, eps={}), teacher, student, tokens()) > 1e-4


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("name", BARE)
def test_a_norm_without_a_weight_is_undone_by_what_reads_it(name: str, width: int) -> None:
    teacher, student = trained(*(between(n, ByHand(n, BARE[name], tensors="")) for n in (8, width)))
    transfer(teacher, student, tokens()[:2])
    assert_same(teacher, student, tokens())
    if width == 12 and name != "normalize":
        teacher, student = trained(*(between(n, ByHand(n, BARE[name], tensors=""), nn.GELU()) for n in (8, width)))
        with refused(r"has no weight to undo.*3\.weight cannot", student):
            transfer(teacher, student, tokens()[:2])


def test_a_number_as_eps_serves_multiples_alone() -> None:
    def make(width: int) -> nn.Module:
        return between(width, ByHand(width, lambda net, x: net.weight * (x / (square(x) + 1e-5).sqrt()), eps="e"))

    teacher, double, more = trained(make(8), make(16), make(12))
    transfer(teacher, double, tokens()[:2])
    assert_same(teacher, double, tokens())
    with refused("its eps is the number 1e-05", more):
        transfer(teacher, more, tokens()[:2])


class TwoNorms(nn.Module):
    """Two norms in one module, each with an eps of its own, or the second with a number."""

    def __init__(self, width: int, number: float | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 5)
        self.g, self.h = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.eps = self.eps_behind = 1e-4
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(torch.tanh(self.g * (x * torch.rsqrt(square(x) + self.eps))))
        eps = self.eps_behind if self.number is None else 1e-4
        return self.c(torch.tanh(self.h * (x * torch.rsqrt(square(x) + eps))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_eps_of_one_value_are_told_apart(dtype: torch.dtype) -> None:
    x = tokens().to(dtype) * 0.01
    teacher, student, other = (net.to(dtype) for net in trained(TwoNorms(8), TwoNorms(11), TwoNorms(11, 1e-4)))
    record = transfer(teacher, student, x[:2])
    assert record.eps.keys() == {"", "eps_behind"} and teacher.eps == teacher.eps_behind == 1e-4
    assert equivalence(teacher.double(), student.double(), x.double()).max_relative < 1e-6
    student.eps_behind = 1e-4
    assert equivalence(teacher, student, x.double()).max_relative > 1e-6
    teacher = trained(TwoNorms(8, 1e-4))[0].to(dtype)
    with refused("its eps is the number 0.0001", other):
        transfer(teacher, other, x[:2])


def test_norms_that_share_an_eps_need_the_same() -> None:
    def make(width: int) -> nn.Module:
        parts = {"a": nn.Linear(6, width), "b": nn.Linear(width, 9), "c": nn.Linear(9, 3)}
        net = Net(parts, lambda net, x: net.c(scaled(net, net.b(scaled(net, net.a(x), "v")), "w")))
        net.v, net.w, net.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(9)), 1e-5
        return net

    def scaled(net: nn.Module, x: Tensor, name: str) -> Tensor:
        return getattr(net, name) * (x * torch.rsqrt(square(x) + net.eps))

    teacher, double, more = trained(make(8), make(16), make(12))
    transfer(teacher, double, tokens()[:2])
    assert_same(teacher, double, tokens())
    with refused("used elsewhere", more):
        transfer(teacher, more, tokens()[:2])


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a logarithm": lambda net, x: torch.log(x.abs() + net.norm.eps),
    "a bound": lambda net, x: x.clamp(min=net.norm.eps),
    "an addend": lambda net, x: torch.add(x, net.norm.eps),
    "a list": lambda net, x: x + torch.tensor([net.norm.eps]),
    "a batch norm": lambda net, x: F.batch_norm(x[:, 0], torch.zeros(3), torch.ones(3), eps=net.norm.eps),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("norm", ["by hand", "torch"])
def test_an_eps_that_is_no_norms_alone_stays(use: str, norm: str) -> None:
    def make(width: int, use: Callable[[nn.Module, Tensor], Tensor] | None) -> nn.Module:
        own = nn.RMSNorm(width, eps=1e-2) if norm == "torch" else ByHand(width, NORMS["rsqrt"][0])
        parts = {"a": nn.Linear(6, width), "norm": own, "c": nn.Linear(width, 3)}

        def forward(net: Net, x: Tensor) -> Tensor:
            y = net.c(torch.tanh(net.norm(net.a(x))))
            return y if use is None else use(net, y)

        return Net(parts, forward)

    teacher, double, more = trained(*(make(n, USES[use]) for n in (8, 16, 12)))
    assert transfer(teacher, double, tokens()[:2]).eps == {}
    assert_same(teacher, double, tokens())
    with refused(r"would need the eps 0.00667, but its eps \(norm\) is also used elsewhere", more):
        transfer(teacher, more, tokens()[:2])
    teacher, more = trained(make(8, None), make(12, None))
    assert transfer(teacher, more, tokens()[:2]).eps.keys() == {"norm"}
    assert_same(teacher, more, tokens())


class OfClass(nn.Module):
    """Its eps is the class's; it divides by the norm of its input, too, which is no less than the eps."""

    eps = 1e-2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.c, self.w = nn.Linear(6, width), nn.Linear(width, 3), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.c(torch.tanh(y * torch.rsqrt(square(y) + self.eps) * self.w))
        return y / x.norm(dim=-1, keepdim=True).clamp(min=self.eps)


class Own(OfClass):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.eps = 1e-2


@pytest.mark.parametrize("kind", [OfClass, Own])
def test_the_eps_of_the_network_itself_or_of_its_class_counts(kind: type[OfClass]) -> None:
    teacher, double, more = trained(kind(8), kind(16), kind(12))
    transfer(teacher, double, tokens()[:2])
    assert_same(teacher, double, tokens())
    with refused("but its eps is also used elsewhere", more):
        transfer(teacher, more, tokens()[:2])


def test_two_roots_of_one_variance_are_both_the_norms() -> None:
    def make(width: int) -> nn.Module:
        def forward(net: Net, x: Tensor) -> Tensor:
            x = net.a(x)
            v = square(x)
            x = x * torch.rsqrt(v + net.eps) * net.w + (x * torch.rsqrt(v + net.eps) * net.w).flip(0)
            return net.c(torch.tanh(x))

        net = Net({"a": nn.Linear(6, width), "c": nn.Linear(width, 3)}, forward)
        net.w, net.eps = nn.Parameter(torch.ones(width)), 1e-2
        return net

    teacher, student = trained(make(8), make(12))
    transfer(teacher, student, tokens()[:2])
    assert_same(teacher, student, tokens())


def test_a_norm_that_leaves_its_eps_unread_is_refused() -> None:
    class Deaf(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)

    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), Deaf(width), nn.Linear(width, 3))

    teacher, student = trained(make(8), make(12))
    with refused("its eps is the number 1e-05 in the forward pass", student):
        transfer(teacher, student, tokens()[:2])


def test_numbers_of_other_types_stay_the_users() -> None:
    class Steps(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.c, self.timesteps = nn.Linear(6, width), nn.Linear(width, 3), np.float64(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.a(x))) * self.timesteps.item()

    teacher, student = trained(Steps(8), Steps(12))
    transfer(teacher, student, tokens()[:2])
    assert type(teacher.timesteps) is np.float64
    assert_same(teacher, student, tokens())


@pytest.mark.parametrize("kind", [torch.int32, torch.long])
def test_a_cast_to_whole_numbers_is_not_linear(kind: torch.dtype) -> None:
    def make(width: int) -> nn.Module:
        parts = {"a": nn.Linear(6, width), "n": nn.LayerNorm(width, eps=0.1), "c": nn.Linear(width, 3)}
        net = Net(parts, lambda net, x: net.c(net.n((net.scale * net.a(x)).type(kind).type(torch.double))))
        net.scale = 0.01
        return net

    teacher, student = trained(make(8), make(12))
    with refused("The norm n has 12 units and its teacher 8", student):
        transfer(teacher, student, tokens()[:2])


def test_a_layer_norm_over_channels_of_images() -> None:
    def compute(net: nn.Module, x: Tensor) -> Tensor:
        away = x - x.mean(1, keepdim=True)
        x = away / torch.sqrt(away.pow(2).mean(1, keepdim=True) + net.eps)
        return net.weight[:, None, None] * x + net.bias[:, None, None]

    x = torch.randn(4, 3, 6, 6)
    teacher, student = trained(
        *(
            nn.Sequential(nn.Conv2d(3, n, 3), ByHand(n, compute, "weight bias"), nn.ReLU(), nn.Conv2d(n, 4, 1))
            for n in (8, 11)
        )
    )
    transfer(teacher, student, x)
    assert_same(teacher, student, x)


def language_model(width: int, layers: int = 1, compute: Compute = cast) -> nn.Module:
    """Post-norm blocks with norms by hand behind a table that is tied to the last layer."""
    norms = [ByHand(width, compute, eps="variance_epsilon") for _ in range(layers)]
    branches = [nn.Sequential(nn.Linear(width, 9), nn.SiLU(), nn.Linear(9, width)) for _ in norms]
    parts = {"table": nn.Embedding(20, width), "norms": nn.ModuleList(norms), "branches": nn.ModuleList(branches)}
    parts["head"] = nn.Linear(width, 20, bias=False)

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.table(x)
        for branch, norm in zip(net.branches, net.norms, strict=True):
            x = norm(x + branch(x))
        return net.head(x)

    net = Net(parts, how)
    net.head.weight = net.table.weight
    return net


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize(("width", "layers"), [(16, 1), (12, 1), (16, 3), (12, 3)])
@pytest.mark.parametrize("compute", [cast, one_more])
def test_a_tied_table_behind_a_norm_by_hand(compute: Compute, width: int, layers: int, split: str) -> None:
    words = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    teacher, student = trained(language_model(8, 1, compute), language_model(width, layers, compute))
    record = transfer(teacher, student, words, split=split)
    assert_same(teacher, student, words)
    if compute is one_more:
        spoiled = {name: replace(origin, offset=0.0) for name, origin in record.origins.items()}
        assert error(replace(record, origins=spoiled), teacher, student, words) > 1e-3


def test_random_pad_puts_weights_that_count_from_one_where_the_teacher_has_them() -> None:
    words = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    teacher, student = trained(language_model(8, 1, one_more), language_model(16, 1, one_more))
    before = state(student)
    origins = {name: origin for name, origin in random_pad(teacher, student, words).origins.items() if origin.offset}
    assert origins
    for name, origin in origins.items():
        axis, expected = origin.axes[0], before[name]
        first = axis.first & (axis.index >= 0)
        expected[first] = teacher.state_dict()[origin.teacher][axis.index[first]]
        assert torch.allclose(student.state_dict()[name], expected, rtol=1e-14)


def test_widen_gives_norms_without_affine_the_new_width() -> None:
    for norm in (nn.LayerNorm, nn.RMSNorm):
        (teacher,) = trained(between(8, norm(8, elementwise_affine=False)))
        wider = widen(teacher, tokens()[:2], {"0": 12})
        assert wider[1].normalized_shape == (12,)
        assert equivalence(teacher, wider, tokens()).max_relative < 1e-12
