"""Which units a tensor carries: layouts where an index kept by hand goes wrong are exact, or refused with a reason."""

import pytest
import torch
import torch.nn.functional as F
from networks import BAR, Net, assert_same, chain, conv, dense, grouped, images, residual, tied, trunk
from torch import Tensor, nn

from net2net import TransferError, equivalence, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def one(body, reads=lambda n: n, **parts):
    """A convolution of n units with batch norm, `body`, and a linear layer that reads `reads(n)`."""

    def make(n: int) -> Net:
        stem = {"conv": conv(3, n), "norm": nn.BatchNorm2d(n), "fc": nn.Linear(reads(n), 4)}
        own = {name: part(n) for name, part in parts.items()}
        return Net(stem | own, lambda net, x: net.fc(body(net, net.norm(net.conv(x)))))

    return make


def two(body, reads=lambda a, b: a):
    """Two convolutions of a and b units, of which `body` makes what a linear layer reads."""

    def make(a: int, b: int) -> Net:
        stem = {"first": conv(3, a), "norm": nn.BatchNorm2d(a), "second": conv(3, b, bias=True)}
        return Net(
            {**stem, "fc": nn.Linear(reads(a, b), 4)},
            lambda net, x: net.fc(body(F.relu(net.norm(net.first(x))), F.relu(net.second(x)))),
        )

    return make


def subtract_means_of_halves(x: Tensor) -> Tensor:
    halves = x.unflatten(1, (2, -1))
    return (halves - halves.mean(2, keepdim=True)).flatten(1, 2).mean((2, 3))


def normalise_by_hand(x: Tensor) -> Tensor:
    return ((x - x.mean(1, keepdim=True)) / (x.pow(2).mean(1, keepdim=True) + 1).sqrt()).flatten(1)


def attend_to_means_and_extremes(net: Net, x: Tensor) -> Tensor:
    return (x * net.gate(torch.stack([x.mean(1), x.amax(1), x.min(1)[0]], 1)).sigmoid()).mean((2, 3))


def functions_alone(n: int) -> Net:
    """Nothing but parameters and functions, some called with keywords alone."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=net.w1, padding=1)
        x = F.relu(input=F.batch_norm(x, net.mean, net.var, net.gamma, net.beta))
        return F.linear(torch.cat(tensors=(x, x.neg()), dim=1).mean(axis=(2, 3)), net.w2, bias=net.b2)

    shapes = {"w1": (n, 3, 3, 3), "gamma": (n,), "beta": (n,), "mean": (n,), "var": (n,), "w2": (4, 2 * n), "b2": (4,)}
    return Net({name: nn.Parameter(torch.rand(shape)) for name, shape in shapes.items()}, how)


def parameters_on_the_left(n: int) -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu((net.b.weight @ F.relu(net.a(x.mean((2, 3)))).mT).mT)
        return torch.einsum("oh,bh->bo", net.fc.weight, x)

    parts = {"a": nn.Linear(3, n), "b": nn.Linear(n, n, bias=False), "fc": nn.Linear(n, 4, bias=False)}
    return Net(parts, how)


def change_in_place(_net: Net, x: Tensor) -> Tensor:
    return x.relu_().add_(x).mul_(0.5).mean((2, 3), keepdim=True).squeeze_(3).squeeze_(2)


def norm(**options):
    """A batch norm of these options behind the stem's."""
    return one(lambda net, x: F.relu(net.plain(x)).mean((2, 3)), plain=lambda n: nn.BatchNorm2d(n, **options))


def sum_of_parts(whole_first: bool):
    """A concatenation that meets a layer as wide as both of its parts."""

    def body(net: Net, x: Tensor) -> Tensor:
        terms = torch.cat([net.a(x), net.b(x)], 1), net.c(x)
        return F.relu(terms[whole_first] + terms[not whole_first]).mean((2, 3))

    return one(body, lambda n: 2 * n, a=lambda n: conv(n, n), b=lambda n: conv(n, n), c=lambda n: conv(n, 2 * n))


# name -> (network of the widths, the teacher's widths, the student's)
A, B = (3, 4), (7, 6)
LAYOUTS = {
    "flatten": (two(lambda u, v: torch.cat([u, v], 1).flatten(1), lambda a, b: 48 * (a + b)), A, B),
    "pooled and flat": (two(lambda u, v: torch.cat([u.mean((2, 3)), u.flatten(1)], 1), lambda a, b: 49 * a), A, B),
    "twice": (two(lambda u, v: torch.cat([u, v, u], 1).mean((2, 3)), lambda a, b: 2 * a + b), A, B),
    "itself": (two(lambda u, v: torch.cat([u, u], 1).mean((2, 3)), lambda a, b: 2 * a), A, B),
    "two faces": (two(lambda u, v: torch.cat([u, -u * u], 1).mean((2, 3)), lambda a, b: 2 * a), A, B),
    "as another": (two(lambda u, v: u.flatten(2).reshape_as(u).type_as(v).mean((2, 3))), A, B),
    "spread": (two(lambda u, v: u[:, :, :1, :1].expand_as(u).flatten(1).to(v), lambda a, b: 48 * a), A, B),
    "concatenated both ways and added": (
        two(lambda u, v: (torch.cat([u, v], 1) + torch.cat([v, u], 1)).mean((2, 3)), lambda a, b: 2 * a),
        (3, 3),
        (11, 11),
    ),
    "chain": (lambda n: chain(n, n + 1, n), (3,), (22,)),
    "one unit more": (lambda n: chain(n, n, n), (4,), (5,)),
    "one unit only": (lambda n: chain(n, n), (1,), (6,)),
    "the same width": (lambda n: chain(n, n), (4,), (4,)),
    "seven times": (lambda n: chain(n, n), (3,), (21,)),
    "residual, depthwise, gate": (residual, (4,), (9,)),
    "dense": (dense, (2,), (5,)),
    "tied weights": (tied, (3,), (8,)),
    "groups that grow": (lambda n: grouped(2, n, n), (3,), (7,)),
    "functions alone": (functions_alone, (3,), (8,)),
    "parameters as the left factor": (parameters_on_the_left, (3,), (8,)),
    "means and extremes over units": (one(attend_to_means_and_extremes, gate=lambda n: conv(3, 1)), (4,), (12,)),
    "a layer norm by hand": (one(lambda net, x: normalise_by_hand(x), lambda n: 48 * n), (3,), (9,)),
    "means over halves": (one(lambda net, x: subtract_means_of_halves(x)), (4,), (8,)),
    "concatenated rectifiers": (
        one(lambda net, x: torch.cat([F.relu(x), F.relu(-x)], 1).flatten(1), lambda n: 96 * n),
        (3,),
        (7,),
    ),
    "mirror image added": (one(lambda net, x: F.relu(x + x.flip(1)).mean((2, 3))), (4,), (10,)),
    "transposed attribute": (
        one(lambda net, x: net.fc2(x.flatten(2).mT).mT.flatten(1), lambda n: 48 * n, fc2=lambda n: nn.Linear(n, n)),
        (3,),
        (8,),
    ),
    "sum of a concatenation": (sum_of_parts(False), (3,), (8,)),
    "sum of a concatenation, whole first": (sum_of_parts(True), (3,), (8,)),
    "in place": (one(change_in_place), (3,), (8,)),
    "in place on its input": (
        lambda n: Net({"a": conv(3, n), "fc": nn.Linear(n, 4)}, lambda net, x: net.fc(net.a(x.mul_(2)).mean((2, 3)))),
        (3,),
        (8,),
    ),
    "norm without tensors": (norm(affine=False, track_running_stats=False), (3,), (8,)),
    "norm without affine": (norm(affine=False), (3,), (8,)),
    "norm without statistics": (norm(track_running_stats=False), (3,), (8,)),
    "a norm that is called twice": (one(lambda net, x: net.norm(F.relu(x)).mean((2, 3))), (3,), (8,)),
}


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_exact_in_eval_and_in_train_mode(name: str, split: str) -> None:
    make, narrow, wide = LAYOUTS[name]
    teacher, student = look_trained(make(*narrow), seed=1), look_trained(make(*wide), seed=2)
    transfer(teacher, student, images(2, 3, 6, 8), split=split)
    assert_same(teacher, student, images(), ("eval", "train"))


PINS = {
    "softmax": (one(lambda net, x: x.softmax(1).mean((2, 3))), r"conv\.weight cannot grow.*softmax.*mixes"),
    "an operation without a rule": (
        one(lambda net, x: torch.fft.fft(x, dim=1).real.mean((2, 3))),
        r"conv\.weight cannot grow.*fft.*no rule",
    ),
    "a sum": (one(lambda net, x: x.sum(1).flatten(1), lambda n: 48), r"conv\.weight cannot grow.*sum.*mixes"),
    "a mean": (one(lambda net, x: x.mean(1).flatten(1), lambda n: 48), r"mean.*5 units.*equally"),
    "a group norm": (one(lambda net, x: F.group_norm(x, 1).mean((2, 3))), r"5 units.*equally"),
    "a layer norm": (one(lambda net, x: net.ln(x.mean((2, 3))), ln=nn.LayerNorm), r"ln.*5 units.*equally"),
    "a constant": (
        one(lambda net, x: x.mean((2, 3)) * torch.arange(1.0, 1 + x.shape[1])),
        r"conv\.weight cannot grow.*constant of its own width",
    ),
    "the output": (lambda n: nn.Sequential(conv(3, 4), conv(4, n)), r"1\.weight cannot grow from 3 to 5 units.*output"),
}


@pytest.mark.parametrize("name", PINS)
def test_what_mixes_units_pins_them(name: str) -> None:
    make, message = PINS[name]
    with pytest.raises(TransferError, match=message):
        transfer(make(3), make(5), images())


@pytest.mark.parametrize("width", [4, 9])
def test_a_new_layer_on_the_trunk_is_an_identity_and_a_new_branch_is_silent(width: int) -> None:
    teacher, student = trunk(4, False, 1), trunk(width, True, 3)
    record = transfer(teacher, student, images(), split="uneven")
    assert_same(teacher, student, images())
    how = {name: origin.how for name, origin in record.origins.items()}
    assert how["extra.0.weight"] == "identity" and how["branches.0.weight"] == "shared"
    assert how["branches.1.weight"] == how["branches.2.weight"] == "silent"
    assert not student.branches[2].weight.any()


def windows(heads: int) -> Net:
    """Two attentions whose values pass through filters of their own by windows of heads, the same for both."""

    def how(net: Net, x: Tensor) -> Tensor:
        for layer in (net.first, net.second):
            q, k, v = layer(x).unflatten(-1, (3, heads, 2)).permute(2, 0, 3, 1, 4)
            rows = v.transpose(-1, -2).flatten(1, 2)
            parts = zip(net.filters, rows.split([2, rows.shape[1] - 2], 1), strict=True)
            passed = torch.cat([layer(part) for layer, part in parts], 1).unflatten(1, (heads, 2))
            x = (q @ (k.softmax(2).transpose(-1, -2) @ v) + q * passed.transpose(-1, -2)).transpose(1, 2).flatten(2)
        return net.head(x.mean(1))

    width = 2 * heads
    filters = nn.ModuleList(nn.Conv1d(n, n, 3, padding=1, groups=n) for n in (2, width - 2))
    parts = {"first": nn.Linear(3, 3 * width), "second": nn.Linear(width, 3 * width), "head": nn.Linear(width, 5)}
    return Net({**parts, "filters": filters}, how)


def test_units_that_belong_to_each_other_are_one() -> None:
    """Queries meet values twice: in a product of two, and each with the one beside it."""
    teacher, student = windows(4), windows(4)
    transfer(teacher, student, images(2, 7, 3))
    assert equivalence(teacher, student, images(3, 7, 3)).max_relative <= BAR
    with pytest.raises(TransferError):  # the windows share heads out otherwise: no mapping is right for both filters
        transfer(teacher, windows(3), images(2, 7, 3))
