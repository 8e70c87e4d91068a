"""What training does besides: it decides nothing about the eval mode, and the record says what is kept in each."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, state, unchanged
from networks import Net, chain, images, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from net2net import describe, equivalence, load_record, save_record, transfer, widen
from net2net.record import EXACT_IN_TRAINING
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")
ROWS = torch.randn(6, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def trains(how: Callable, **parts: Callable[[int], nn.Module]) -> Callable[..., Net]:
    """Two layers with `width` units between them. In training, `how(net, h)` changes the first layer's output."""

    def make(width: int, rate: float = 0.25) -> Net:
        layers = {"a": nn.Linear(5, width), "b": nn.Linear(width, 3)}
        net = Net(
            layers | {name: make(width) for name, make in parts.items()},
            lambda net, x: how(net, net.a(x).tanh()) if net.training else net.b(net.a(x).tanh()),
        )
        net.rate = rate
        return look_trained(net, seed=width)

    return make


def drop_by_hand(net: Net, h: Tensor) -> Tensor:
    return net.b(h * (torch.rand_like(h) > net.rate) / (1 - net.rate))


def drop_rows(net: Net, h: Tensor) -> Tensor:
    return net.b(h.div(1 - net.rate) * torch.floor(1 - net.rate + torch.rand(len(h), 1)))


def drop_by_bernoulli(net: Net, h: Tensor) -> Tensor:
    return net.b(h * torch.empty_like(h).bernoulli_(1 - net.rate).div_(1 - net.rate))


def add_noise(net: Net, h: Tensor) -> Tensor:
    return net.b(h + 0.1 * torch.randn_like(h))


def sample(net: Net, h: Tensor) -> Tensor:
    return net.b(h + torch.randn_like(h) * (0.5 * net.c(h)).exp())


def skip_at_random(net: Net, h: Tensor) -> Tensor:
    return net.b(h if torch.rand(()) < net.rate else h + net.c(h))


def compute_again(net: Net, h: Tensor) -> Tensor:
    return checkpoint(net.b, h, use_reentrant=False)


def give_a_second_result(net: Net, h: Tensor) -> tuple[Tensor, Tensor]:
    return net.b(h), net.d(h * (torch.rand_like(h) > net.rate)).square().mean()


def square(width: int) -> nn.Linear:
    return nn.Linear(width, width)


TRAINS = {
    "a mask drawn by hand": trains(drop_by_hand),
    "stochastic depth by hand": trains(drop_rows),
    "a mask of bernoulli's": trains(drop_by_bernoulli),
    "noise": trains(add_noise),
    "a sampled code": trains(sample, c=square),
    "layers that are skipped at random": trains(skip_at_random, c=square),
    "checkpoints": trains(compute_again),
    "a head of its own, and a mask": trains(give_a_second_result, d=lambda width: nn.Linear(width, 2)),
}


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize("name", TRAINS)
def test_what_training_draws_decides_nothing(name: str, split: str) -> None:
    make = TRAINS[name]
    model = make(8)
    before = state(model)
    student = make(13)
    record = transfer(model, student, ROWS, split=split)
    assert_same(model, student, 9 * ROWS)
    assert record.modes == {"eval": "exact", "train": EXACT_IN_TRAINING}
    grown = widen(model, ROWS, 1.5, split=split)
    assert grown.a.out_features == 12
    assert grown.growth.modes == record.modes
    assert_same(model, grown, 9 * ROWS)
    assert unchanged(model, before)
    grown.train()(ROWS)


@pytest.mark.parametrize("name", ["a mask drawn by hand", "stochastic depth by hand", "a mask of bernoulli's"])
def test_another_rate_is_no_reason_to_refuse(name: str) -> None:
    make = TRAINS[name]
    for width in (8, 12):
        teacher, student = make(8), make(width, rate=0.4)
        record = transfer(teacher, student, ROWS)
        assert_same(teacher, student, 9 * ROWS)
        assert "in training mode they differ by" in record.modes["train"]
        assert str(record).endswith("; in train mode not kept")


def test_rates_that_differ_with_depth_are_no_reason_to_refuse() -> None:
    def make(depth: int) -> Net:
        def how(net: Net, x: Tensor) -> Tensor:
            x = net.i(x)
            for k, block in enumerate(net.blocks):
                keep = 1 - 0.2 * k / max(depth - 1, 1)
                branch = block(x)
                x = x + (branch / keep * (torch.rand(len(x), 1) < keep) if net.training else branch)
            return net.o(x)

        blocks = nn.ModuleList(mlp(8, 12, 8, act=nn.GELU) for _ in range(depth))
        return look_trained(Net({"i": nn.Linear(5, 8), "o": nn.Linear(8, 3), "blocks": blocks}, how), seed=depth)

    teacher, student = make(2), make(4)
    transfer(teacher, student, ROWS)
    assert_same(teacher, student, 9 * ROWS)


def with_auxiliary_head(width: int, drops: bool = False) -> Net:
    """A convolution with a head that only training reaches, behind a layer and a norm of its own."""

    def how(net: Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = net.a(x).relu()
        out = net.o(x.mean((2, 3)))
        if not net.training:
            return out
        if drops:
            x = x * (torch.rand_like(x) > 0.1)
        return out, net.head(net.n(net.c(x) + x).relu().mean((2, 3)))

    parts = {"a": nn.Conv2d(3, width, 3), "o": nn.Linear(width, 4), "c": nn.Conv2d(width, width, 1)}
    parts |= {"n": nn.BatchNorm2d(width), "head": nn.Linear(width, 2)}
    return look_trained(Net(parts, how), seed=width)


@pytest.mark.parametrize("drops", [False, True])
def test_a_head_that_only_training_reaches_grows_with_what_it_reads(drops: bool) -> None:
    model = with_auxiliary_head(8, drops)
    before = state(model)
    for width in (12, 13):
        student = with_auxiliary_head(width, drops)
        record = transfer(model, student, images(), split="uneven")
        assert record.modes["train"] == EXACT_IN_TRAINING
        assert_same(model, student, 3 * images(), ("eval",) if drops else ("eval", "train"))
    grown = widen(model, images(), 1.5)
    assert (grown.a.out_channels, grown.c.out_channels, grown.head.out_features) == (12, 12, 2)
    assert_same(model, grown, 3 * images(), ("eval",) if drops else ("eval", "train"))
    assert unchanged(model, before)


def test_units_that_training_adds_up_grow_together() -> None:
    def make(width: int, other: int) -> Net:
        def how(net: Net, x: Tensor) -> Tensor:
            x = net.a(x).tanh()
            y = net.b(x).tanh()
            return net.o(y + x) if net.training else net.o(y)

        layers = {"a": nn.Linear(5, width), "b": nn.Linear(width, other), "o": nn.Linear(other, 3)}
        return look_trained(Net(layers, how), seed=width)

    model = make(4, 4)
    for widths in ({"a": 7}, {"b": 7}, 1.75):
        grown = widen(model, ROWS, widths, split="uneven")
        assert (grown.a.out_features, grown.b.out_features) == (7, 7)
        assert grown.growth.modes["train"] == EXACT_IN_TRAINING
        assert_same(model, grown, 9 * ROWS, ("eval", "train"))
    student = make(7, 5)  # whose training fails
    record = transfer(model, student, ROWS)
    assert_same(model, student, 9 * ROWS)
    assert record.modes["train"].startswith("not kept: The forward pass of Net on inputs (6, 5) fails")


def test_what_training_does_to_all_units_is_told() -> None:
    make = trains(lambda net, h: net.b(h / h.square().sum(1, keepdim=True)))
    teacher, student = make(8), make(12)
    record = transfer(teacher, student, ROWS)
    assert_same(teacher, student, 9 * ROWS)
    assert equivalence(teacher, student, ROWS, mode="train").max_relative > 0.01
    for said in ("in training mode they differ by", "a sum over all units"):
        assert said in record.modes["train"]
    assert "free" in str(describe(teacher, ROWS))


def test_training_that_needs_more_than_the_example_is_not_known() -> None:
    make = trains(lambda net, h: net.b(h + net.target))
    record = transfer(make(8), make(12), ROWS)
    assert record.modes["train"].startswith("not known: The forward pass") and "target" in record.modes["train"]
    assert widen(make(8), ROWS, 1.5).a.out_features == 12


def test_noise_and_new_batch_norms_are_told(tmp_path) -> None:
    deeper = transfer(look_trained(chain(3, 4)), chain(3, 4, new=1), images())
    assert deeper.modes == {"eval": "exact", "train": "close: new batch norms take the statistics of the batch"}
    noisy = transfer(look_trained(chain(3, 4)), chain(6, 8), images(), noise=0.1)
    assert noisy.modes["eval"] == noisy.modes["train"] == "close: there is noise on the copies"
    save_record(deeper, tmp_path / "growth.json")
    assert load_record(tmp_path / "growth.json").modes == deeper.modes


def test_dropout_of_torchs_own_is_off_in_the_comparison() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.r = nn.LSTM(5, 6, 2, batch_first=True, dropout=0.3)
            self.m = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
            self.up, self.down, self.drop = nn.Linear(6, width), nn.Linear(width, 6), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.r(x)
            x = x + self.m(x, x, x, need_weights=False)[0]
            x = x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)
            return x + self.down(self.drop(F.gelu(self.up(x))))

    teacher, student = look_trained(Block(8)), Block(12)
    record = transfer(teacher, student, torch.randn(2, 7, 5))
    assert record.modes == {"eval": "exact", "train": EXACT_IN_TRAINING}


def test_rounding_that_is_measured_in_training_leaves_the_buffers() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        x = net.n(net.a(x)).float()
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        return net.o(x.double() * (1.0 if net.training else 2.0))

    def make(width: int) -> Net:
        return Net({"a": nn.Linear(5, width), "n": nn.BatchNorm1d(width), "o": nn.Linear(width, 3)}, how)

    teacher = look_trained(make(8))
    before = state(teacher)
    record = transfer(teacher, make(24), torch.randn(64, 5), split="uneven")
    assert record.measured is not None and 1.5e-8 < record.measured.max_relative < 1e-6
    assert record.modes["train"] == EXACT_IN_TRAINING
    assert unchanged(teacher, before)


class Named(dict):
    """An output that refuses to be changed, as those of transformers do."""

    def update(self, *_: object) -> None:
        raise TypeError("this result cannot be changed")


def test_what_the_network_returns_is_not_copied() -> None:
    def make(width: int) -> Net:
        layers = {"a": nn.Linear(5, width), "b": nn.Linear(width, 3)}
        return Net(layers, lambda net, x: Named(logits=add_noise(net, net.a(x)) if net.training else net.b(net.a(x))))

    small, large = look_trained(make(4)), look_trained(make(6), seed=1)
    transfer(small, large, ROWS)
    assert_same(small, large, ROWS)
