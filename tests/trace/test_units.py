"""Which units a tensor carries: layouts where an index kept by hand goes wrong are exact, or refused with a reason.

Most layouts are operations of the random networks; here are those that the grammar does not have.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import grow, refused
from networks import Net, conv, images
from torch import Tensor, nn

from net2net import transfer

pytestmark = pytest.mark.usefixtures("float64")


def one(body, reads=lambda n: n, **parts):
    """A convolution of n units with batch norm, `body`, and a linear layer that reads `reads(n)`."""

    def make(n: int) -> Net:
        stem = {"conv": conv(3, n), "norm": nn.BatchNorm2d(n), "fc": nn.Linear(reads(n), 4)}
        own = {name: part(n) for name, part in parts.items()}
        return Net(stem | own, lambda net, x: net.fc(body(net, net.norm(net.conv(x)))))

    return make


def subtract_means_of_halves(_net: Net, x: Tensor) -> Tensor:
    halves = x.unflatten(1, (2, -1))
    return (halves - halves.mean(2, keepdim=True)).flatten(1, 2).mean((2, 3))


def normalise_by_hand(_net: Net, x: Tensor) -> Tensor:
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


def change_in_place(n: int) -> Net:
    """The input, too."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.conv(x.mul_(2)).relu_()
        return net.fc(x.add_(x).mul_(0.5).mean((2, 3), keepdim=True).squeeze_(3).squeeze_(2))

    return Net({"conv": conv(3, n), "fc": nn.Linear(n, 4)}, how)


def norm(**options):
    """A batch norm of these options behind the stem's."""
    return one(lambda net, x: F.relu(net.plain(x)).mean((2, 3)), plain=lambda n: nn.BatchNorm2d(n, **options))


def sum_of_parts(whole_first: bool):
    """A concatenation that meets a layer as wide as both of its parts."""

    def body(net: Net, x: Tensor) -> Tensor:
        terms = torch.cat([net.a(x), net.b(x)], 1), net.c(x)
        return F.relu(terms[whole_first] + terms[not whole_first]).mean((2, 3))

    return one(body, lambda n: 2 * n, a=lambda n: conv(n, n), b=lambda n: conv(n, n), c=lambda n: conv(n, 2 * n))


LAYOUTS = {
    "pooled and flat": one(lambda net, x: torch.cat([x.mean((2, 3)), x.flatten(1)], 1), lambda n: 49 * n),
    "two faces": one(lambda net, x: torch.cat([F.relu(x), -x * x], 1).flatten(1), lambda n: 96 * n),
    "as another": one(lambda net, x: x.flatten(2).reshape_as(x).type_as(x).mean((2, 3))),
    "spread": one(lambda net, x: x[:, :, :1, :1].expand_as(x).flatten(1).to(x), lambda n: 48 * n),
    "mirror image added": one(lambda net, x: F.relu(x + x.flip(1)).mean((2, 3))),
    "windows of the map": one(lambda net, x: x.unfold(2, 2, 2).unfold(3, 2, 1).amax((4, 5)).mean((2, 3))),
    "windows beside the units": one(lambda net, x: x.unfold(3, 3, 1).flatten(1), lambda n: 108 * n),
    "windows of units": one(lambda net, x: x.mean((2, 3)).unfold(1, 2, 2).flatten(1)),
    "functions alone": functions_alone,
    "parameters as the left factor": parameters_on_the_left,
    "sum of a concatenation": sum_of_parts(False),
    "sum of a concatenation, whole first": sum_of_parts(True),
    "in place": change_in_place,
    "norm without tensors": norm(affine=False, track_running_stats=False),
    "norm without affine": norm(affine=False),
    "norm without statistics": norm(track_running_stats=False),
    "a norm that is called twice": one(lambda net, x: net.norm(F.relu(x)).mean((2, 3))),
}
EQUALLY = {  # every unit needs as many copies as every other
    "means and extremes over units": one(attend_to_means_and_extremes, gate=lambda n: conv(3, 1)),
    "a layer norm by hand": one(normalise_by_hand, lambda n: 48 * n),
    "means over halves": one(subtract_means_of_halves),
}


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize("name", [*LAYOUTS, *EQUALLY])
def test_a_layout_is_exact_in_eval_and_in_train_mode(name: str, split: str) -> None:
    make, wide = (LAYOUTS | EQUALLY)[name], 12 if name in EQUALLY else 10
    grow(make(4), make(wide), modes=("eval", "train"), split=split)


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
    with refused(message):
        transfer(make(3), make(5), images())


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
    teacher = windows(4)
    grow(teacher, windows(4), images(3, 7, 3))
    with refused(None):  # the windows share heads out otherwise: no mapping is right for both filters
        transfer(teacher, windows(3), images(2, 7, 3))
