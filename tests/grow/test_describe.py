"""The table of unit groups says what moves together, how wide it is, and what holds it."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, refused, state, unchanged
from networks import Net, attention, chain, images, mlp, residual, rows
from torch import Tensor, nn
from torchvision import models

from net2net import describe, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def heads() -> Net:
    """Attention with a layer each for queries, keys and values."""

    def how(net: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Net({name: nn.Linear(3, 8) for name in "qkv"} | {"out": nn.Linear(8, 5)}, how)


PINNED = "pinned: it is the network's output"
# network, its input, and of every group: layers, readers, width, state (or how it begins)
TABLES = {
    "mlp": (lambda: mlp(3, 4, 2), (5, 3), [(("0",), ("2",), 4, "free"), (("2",), (), 2, PINNED)]),
    "chain": (
        lambda: chain(4, 5),
        (),
        [(("conv0",), ("conv1",), 4, "free"), (("conv1",), ("fc",), 5, "free"), (("fc",), (), 5, PINNED)],
    ),
    "residual": (
        lambda: residual(4),
        (),
        [
            (("stem", "point", "open"), ("up", "squeeze", "fc"), 4, "free"),
            (("up",), ("point",), 9, "free"),
            (("squeeze",), ("open",), 2, "free"),
            (("fc",), (), 5, PINNED),
        ],
    ),
    "attention": (
        lambda: attention(2),
        (2, 5, 3),
        [
            (("embed", "out", "down"), ("qkv", "up", "head"), 8, "seen by the norm n1 and 1 more"),
            (("qkv",), ("out",), 24, "as a whole: the units of a head, queries by keys"),
            (("up",), ("down",), 12, "free"),
            (("head",), (), 4, PINNED),
        ],
    ),
    "heads": (
        heads,
        (2, 5, 3),
        [
            (("q", "k"), (), 8, "as a whole: the units of a head, queries by keys"),
            (("v",), ("out",), 8, "as a whole: the units of a head, values"),
            (("out",), (), 5, PINNED),
        ],
    ),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)),
        (5, 3),
        [(("0",), ("2",), 4, "as a whole: softmax in 1 mixes them"), (("2",), (), 2, PINNED)],
    ),
    "lstm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)),
        (2, 5, 3),
        [(("0",), ("1",), 4, "free"), (("1",), ("1",), 2, "pinned: it is among the network's outputs")],
    ),
    "gate": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)),
        (5, 3),
        [(("0",), ("2",), 8, "in steps of 2: each unit has 2 entries"), (("2",), (), 2, PINNED)],
    ),
    "no rule": (
        lambda: Net({"a": nn.Linear(3, 4), "b": nn.Bilinear(4, 4, 2)}, lambda net, x: net.b(net.a(x), net.a(x))),
        (5, 3),
        [
            (("a",), (), 4, "pinned: bilinear in b has no rule for units"),
            (("b",), (), 2, "pinned: bilinear in b has no rule for units"),
        ],
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
        (6, 3),
        [(("0",), ("2",), 4, "seen by the norm 1"), (("2",), (), 2, PINNED)],
    ),
    "nothing": (lambda: nn.Sequential(nn.ReLU()), (), []),
}


@pytest.mark.parametrize("name", TABLES)
def test_groups_are_layers_that_move_together(name: str) -> None:
    make, shape, expected = TABLES[name]
    model = make().train()
    before = state(model)
    groups = describe(model, images(*shape)).groups
    assert [(g.layers, tuple(dict.fromkeys(g.readers)), g.width) for g in groups] == [row[:3] for row in expected]
    for group, (*_, why) in zip(groups, expected, strict=True):
        assert group.state.startswith(why)
    assert unchanged(model, before) and model.training
    assert [g.free for g in groups] == [row[-1] == "free" for row in expected]
    for group in groups:
        assert len(group.units) <= group.width and len(torch.unique(group.units)) == len(group.units)


def test_the_table_has_a_head_a_row_for_every_group_and_a_sum() -> None:
    head, *lines, foot = str(describe(residual(4), images())).splitlines()
    assert head.split() == ["width", "layers", "read", "by", "growth"]
    assert lines[0].split("  ")[-1] == "free" and lines[0].lstrip().startswith("4  stem, point, open")
    assert len({row.index("free") for row in lines[:3]} | {lines[3].index("pinned"), head.index("growth")}) == 1
    assert foot == "4 groups of units, 3 of them free to grow to any width"


def test_long_lists_of_layers_are_cut() -> None:
    table = str(describe(models.resnet18(num_classes=5), images(1, 3, 32, 32)))
    assert "layer1.0.conv1, layer1.1.conv1, layer2.0.conv1 +1" in table
    assert table.endswith("13 groups of units, 12 of them free to grow to any width")


def test_what_is_called_free_grows_and_nothing_else_with_it() -> None:
    model = look_trained(residual(4))
    for group in describe(model, images()).groups:
        if group.free:
            grown = widen(model, images(), {group.layers[-1]: 2.0})
            assert_same(model, grown, images())
            layers = {name: m for name, m in grown.named_modules() if hasattr(m, "weight")}
            wider = {n for n, m in layers.items() if len(m.weight) > len(model.get_parameter(f"{n}.weight"))}
            assert wider == {*group.layers, *group.carriers}


def product_of_two() -> Net:
    return Net({"a": nn.Bilinear(3, 3, 6), "b": nn.Linear(6, 2)}, lambda net, x: net.b(net.a(x, x)))


def made_in_forward() -> Net:
    net = Net({"w": nn.Parameter(torch.randn(4, 3)), "b": nn.Linear(4, 2)}, None)
    net.how = lambda net, x: net.b(F.linear(x, net.w.softmax(1)))
    return net


def old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "name", "width", "why"),
    [
        (old_weight_norm, "0", 4, "the weight of linear in 0 is not a parameter"),
        (product_of_two, "a", 6, "bilinear in a has no rule"),
        (made_in_forward, "w", 4, "the weight of linear in the network is not a parameter"),
    ],
)
def test_layers_that_are_not_followed_are_listed_with_the_reason(make, name: str, width: int, why: str) -> None:
    model, x = make().eval(), rows()
    held = describe(model, x).groups[-1]
    assert (held.layers, held.width, held.free) == ((name,), width, False)
    with refused(f"{name} cannot grow from {width} units: {why}", model):
        widen(model, x, {name: 12})
    with refused(f"No width .*{name}: pinned: {why}", model):
        widen(model, x, 1.5)


def test_a_forward_pass_that_fails_is_refused() -> None:
    with refused(r"Sequential on inputs \(2, 4\) fails"):
        describe(mlp(3, 4, 2), images(2, 4))
