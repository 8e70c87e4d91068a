"""The edges of what people write by hand: masks of other shapes, rare rows, means over mixed positions, and losses."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import BAR, assert_same, change_axes, error, refused, shift_index, trained
from networks import Net, images, rows
from torch import Tensor, nn

from net2net import transfer, widen

pytestmark = pytest.mark.usefixtures("float64")


def mask(*shape: int) -> Tensor:
    return (torch.rand(shape) > 0.4).double()


def masked(n: int, kind: str) -> Net:
    """A layer whose weight a mask multiplies; the mask has the weight's shape, or is one number along its units."""
    groups = {"depthwise": n, "groups": 2}.get(kind, 1)
    make, function = nn.Conv2d, F.conv2d
    if kind == "transposed":
        make, function = nn.ConvTranspose2d, F.conv_transpose2d
    layer = make(n, n, 3, groups=groups, bias=False)

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(function(F.relu(net.a(x)), net.b.weight * net.mask, groups=groups))
        return net.fc(x.mean((2, 3)))

    net = Net({"a": nn.Conv2d(3, n, 3, padding=1), "b": layer, "fc": nn.Linear(n, 4)}, how)
    net.register_buffer("mask", mask(1, 1, 3, 3) if kind == "one kernel" else mask(*layer.weight.shape))
    return net


def words(n: int) -> Net:
    """A table that a mask multiplies."""
    parts = {"table": nn.Embedding(9, n), "fc": nn.Linear(n, 3)}
    net = Net(parts, lambda net, x: net.fc(F.embedding(x, net.table.weight * net.mask)))
    net.register_buffer("mask", mask(9, n))
    return net


def row(n: int) -> Net:
    """A kernel over all units of one row."""
    parts = {"a": nn.Linear(3, n), "b": nn.Conv1d(1, n, n), "fc": nn.Linear(n, 3)}
    return Net(parts, lambda net, x: net.fc(F.relu(net.b(net.a(x)[:, None])).flatten(1)))


def column(n: int) -> Net:
    """A kernel over all units that stand along the first of its axes."""
    parts = {"a": nn.Linear(3, n), "b": nn.Conv2d(1, 5, (n, 2)), "fc": nn.Linear(5, 3)}
    return Net(parts, lambda net, x: net.fc(F.relu(net.b(net.a(x).mT[:, None])).amax((2, 3))))


def mixed(hidden: int, kind: str) -> Net:
    """A norm or a mean over what a layer makes of the positions."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.mix(net.a(x).mT)
        return net.fc(torch.tanh(net.back(net.norm(x))).mean(-1) if kind == "norm" else torch.tanh(x).mean(-1))

    parts = {"a": nn.Linear(3, 4), "mix": nn.Linear(7, hidden), "fc": nn.Linear(4, 3)}
    return Net(parts | ({"norm": nn.LayerNorm(hidden), "back": nn.Linear(hidden, 7)} if kind == "norm" else {}), how)


CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int], Callable[[], Tensor]]] = {
    "a mask of one kernel": (lambda n: masked(n, "one kernel"), (4, 7), images),
    "a mask of a depthwise layer": (lambda n: masked(n, "depthwise"), (4, 7), images),
    "a mask of a layer with groups": (lambda n: masked(n, "groups"), (4, 8), images),
    "a mask of a transposed layer": (lambda n: masked(n, "transposed"), (4, 7), images),
    "a mask of a table": (words, (4, 7), lambda: torch.randint(9, (6, 5))),
    "a kernel over a row": (row, (4, 7), rows),
    "a kernel over a column": (column, (4, 7), lambda: images(4, 6, 3)),
    "a norm over mixed positions": (lambda n: mixed(n, "norm"), (5, 10), lambda: images(4, 7, 3)),
}


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@pytest.mark.parametrize("name", CASES)
def test_wider_is_exact(name: str, split: str) -> None:
    make, widths, draw = CASES[name]
    teacher, student = trained(*map(make, widths))
    record = transfer(teacher, student, draw(), split=split)
    assert_same(teacher, student, draw())
    assert error(change_axes(record, shift_index), teacher, student, draw()) > 1e-4


@pytest.mark.parametrize("kind", ["one kernel", "depthwise", "groups"])
def test_a_masked_layer_that_keeps_its_width_is_no_obstacle(kind: str) -> None:
    def before(n: int) -> Net:
        net = masked(4, kind)
        net.fc = nn.Sequential(nn.Linear(4, n), nn.Tanh(), nn.Linear(n, 2))
        return net

    teacher, student = trained(before(3), before(5))
    transfer(teacher, student, images())
    assert_same(teacher, student, images())


def test_a_mean_over_hidden_positions_takes_each_equally_often() -> None:
    teacher, student, other = trained(mixed(5, "mean"), mixed(15, "mean"), mixed(8, "mean"))
    transfer(teacher, student, images(4, 7, 3))
    assert_same(teacher, student, images(4, 7, 3))
    assert widen(teacher, images(4, 7, 3), 2.0).mix.out_features == 10  # they need not be named
    with refused("stays the same only if each is copied equally often", teacher):
        transfer(teacher, other, images(4, 7, 3))


RARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda x, rare: x.masked_fill(rare[:, None], 1.0),
    "where": lambda x, rare: torch.where(rare[:, None], torch.ones_like(x), x),
    "add": lambda x, rare: x + rare[:, None].double(),
    "maximum": lambda x, rare: torch.maximum(x, rare[:, None].double() * 2 - 1),
    "setitem": lambda x, rare: _written(x, rare),
}


def _written(x: Tensor, rare: Tensor) -> Tensor:
    x = x.clone()
    x[rare] = 1.0
    return x


@pytest.mark.parametrize("name", RARE)
def test_zeros_that_rare_rows_overwrite_are_no_padding(name: str) -> None:
    def normed(n: int) -> Net:
        parts = {"a": nn.Linear(3, n), "norm": nn.RMSNorm(n), "fc": nn.Linear(n, 2)}
        return Net(parts, lambda net, x: net.fc(net.norm(RARE[name](torch.tanh(net.a(x)), x[:, 0] > 9))))

    teacher, uneven, even = trained(normed(4), normed(6), normed(8))
    with refused("zeros are added: but .* may make other numbers of them", teacher):
        transfer(teacher, uneven, rows())
    transfer(teacher, even, rows())
    assert_same(teacher, even, 20 * rows())


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_zeros_behind_a_gate_are_padding(gate: str) -> None:
    def normed(n: int) -> Net:
        parts = {"a": nn.Linear(3, n), "g": nn.Linear(3, n), "norm": nn.RMSNorm(n), "fc": nn.Linear(n, 2)}
        return Net(parts, lambda net, x: net.fc(net.norm(net.a(x) * getattr(F, gate)(net.g(x)))))

    teacher, student = trained(normed(4), normed(6))
    transfer(teacher, student, rows())
    assert_same(teacher, student, 20 * rows())


def test_the_gradient_of_sums_of_heads_is_predicted() -> None:
    def scores(heads: int) -> Net:
        parts = {"a": nn.Linear(3, heads * 3), "w": nn.Parameter(torch.randn(heads, 3)), "fc": nn.Linear(heads, 2)}
        return Net(parts, lambda net, x: net.fc((torch.tanh(net.a(x)).unflatten(-1, (-1, 3)) * net.w).sum(-1)))

    teacher, student = trained(scores(2), scores(4))
    x = rows()
    with pytest.warns(UserWarning, match="never part"):
        record = transfer(teacher, student, x, split="equal")
    for net in (teacher, student):
        net(x).square().sum().backward()
    predicted = record.gradients({name: p.grad for name, p in teacher.named_parameters()})
    for name, parameter in student.named_parameters():
        assert (predicted[name] - parameter.grad).abs().max() < BAR


@pytest.mark.parametrize("kind", ["weight", "reduce"])
def test_a_loss_with_a_weight_or_an_old_argument_is_not_followed(kind: str) -> None:
    def loss(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        if kind == "weight":
            return net.fc(F.mse_loss(a, b, reduction="none", weight=net.w.expand_as(a)))
        with pytest.warns(UserWarning, match="reduc"):
            return net.fc(F.mse_loss(a, b, None, False))

    def make(n: int) -> Net:
        parts = {"a": nn.Linear(3, n), "b": nn.Linear(3, n), "fc": nn.Linear(n, 2)}
        return Net(parts | ({"w": nn.Parameter(torch.rand(n))} if kind == "weight" else {}), loss)

    teacher, student = trained(make(4), make(6))
    with refused("mse_loss .* has no rule for units", teacher):
        transfer(teacher, student, rows())
