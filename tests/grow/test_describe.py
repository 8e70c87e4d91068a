"""The table of unit groups says what moves together, how wide it is, and what holds it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Net, chain, conv, mlp, randomise, state, unchanged
from torch import Tensor, nn
from torchvision import models

from net2net import TransferError, describe, equivalence, widen

pytestmark = pytest.mark.usefixtures("float64")


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 8)))


def attention() -> Net:
    """Heads in a stream with layer norms."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (f(net.n1(x)) for f in (net.q, net.k, net.v)))
        x = x + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return net.head((x + net.down(F.gelu(net.up(net.n2(x))))).mean(1))

    parts = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")} | {
        "up": nn.Linear(8, 12),
        "down": nn.Linear(12, 8),
    }
    return Net(
        {"embed": nn.Linear(3, 8), "n1": nn.LayerNorm(8), "n2": nn.LayerNorm(8), "head": nn.Linear(8, 5), **parts}, how
    )


def gated() -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = x + net.b(F.relu(net.a(x)))
        return net.fc((x * torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3)))

    parts = {"stem": conv(3, 4), "a": conv(4, 6), "b": conv(6, 4), "gate": nn.Conv2d(4, 4, 1), "fc": nn.Linear(4, 5)}
    return Net(parts, how)


PINNED = "pinned: it is the network's output"


@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (lambda: mlp(3, 4, 2), lambda: images(5, 3), [(("0",), ("2",), 4, "free"), (("2",), (), 2, PINNED)]),
        (
            lambda: chain(4, 5),
            images,
            [
                (("conv0",), ("conv1",), 4, "free"),
                (("conv1",), ("fc",), 5, "free"),
                (("fc",), (), 5, PINNED),
            ],
        ),
        (
            gated,
            images,
            [
                (("stem", "b", "gate"), ("a", "gate", "fc"), 4, "free"),
                (("a",), ("b",), 6, "free"),
                (("fc",), (), 5, PINNED),
            ],
        ),
        (
            attention,
            lambda: images(2, 5, 3),
            [
                (("embed", "out", "down"), ("q", "k", "v", "up", "head"), 8, "seen by the norm n1 and 1 more"),
                (("q", "k"), (), 8, "as a whole: the units of a head, queries by keys"),
                (("v",), ("out",), 8, "as a whole: the units of a head, values"),
                (("up",), ("down",), 12, "free"),
                (("head",), (), 5, PINNED),
            ],
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)),
            lambda: images(5, 3),
            [(("0",), ("2",), 4, "as a whole: softmax in 1 mixes them"), (("2",), (), 2, PINNED)],
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)),
            lambda: images(2, 5, 3),
            [(("0",), ("1",), 4, "free"), (("1",), ("1",), 2, PINNED)],
        ),
        (
            lambda: Net({"a": nn.Linear(3, 4), "b": nn.Bilinear(4, 4, 2)}, lambda net, x: net.b(net.a(x), net.a(x))),
            lambda: images(5, 3),
            [(("a",), (), 4, "pinned: bilinear in b has no rule for units (net2net.rule adds one)")],
        ),
        (
            lambda: nn.Sequential(nn.Embedding(7, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
            lambda: torch.randint(7, (6,)),
            [(("0",), ("2",), 4, "seen by the norm 1"), (("2",), (), 2, PINNED)],
        ),
        (lambda: nn.Sequential(nn.ReLU()), images, []),
    ],
)
def test_groups(make: Callable[[], nn.Module], inputs: Callable[[], Tensor], expected: list) -> None:
    model = make().train()
    before = state(model)
    groups = describe(model, inputs()).groups
    assert [(g.layers, tuple(dict.fromkeys(g.readers)), g.width, g.state) for g in groups] == expected
    assert unchanged(model, before) and model.training
    assert [g.free for g in groups] == [wanted[-1] == "free" for wanted in expected]
    for group in groups:
        assert len(group.units) <= group.width and len(torch.unique(group.units)) == len(group.units)


def test_the_table() -> None:
    head, *rows, foot = str(describe(gated(), images())).splitlines()
    assert head.split() == ["width", "layers", "read", "by", "growth"]
    assert rows[0].split("  ")[-1] == "free" and rows[0].lstrip().startswith("4  stem, b, gate")
    assert len({row.index("free") for row in rows[:2]} | {rows[2].index("pinned"), head.index("growth")}) == 1
    assert foot == "3 groups of units, 2 of them free to grow to any width"


def test_long_lists_of_layers_are_cut() -> None:
    table = str(describe(models.resnet18(num_classes=5), images(1, 3, 32, 32)))
    assert "layer1.0.conv1, layer1.1.conv1, layer2.0.conv1 +1" in table
    assert table.endswith("13 groups of units, 12 of them free to grow to any width")


def test_layers_that_grow_together_in_one_group_alone() -> None:
    """What describe calls free is what widen grows, and nothing else with it."""
    model = randomise(gated())
    for group in describe(model, images()).groups:
        if group.free:
            grown = widen(model, images(), {group.layers[-1]: 2.0})
            assert equivalence(model, grown, images()).max_relative < 1e-10
            wider = {
                name
                for name, m in grown.named_modules()
                if hasattr(m, "weight") and len(m.weight) > len(model.get_parameter(f"{name}.weight"))
            }
            assert wider == set(group.layers)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_looked_through(wrap: Callable) -> None:
    assert str(describe(wrap(gated()), images())) == str(describe(gated(), images()))


def test_a_forward_pass_that_fails_is_refused() -> None:
    with pytest.raises(TransferError, match=r"The forward pass of Sequential on inputs \(2, 4\) fails"):
        describe(mlp(3, 4, 2), images(2, 4))
