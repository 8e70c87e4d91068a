"""nn.LSTM, nn.GRU, nn.RNN and their cells: what is not left to the random networks, which hold all of their options."""

from typing import Any

import pytest
import torch
from checks import assert_same, change_axes, drop_shares, error, refused, trained
from networks import Net, images
from torch import Tensor, nn

from net2net import describe, transfer, widen
from net2net.trace.rules.registry import REWRITES

pytestmark = pytest.mark.usefixtures("float64")
X = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KINDS = [nn.LSTM, nn.GRU, nn.RNN]


def tagger(kind: type[nn.RNNBase], width: int, inputs: int = 4, **options: Any) -> Net:
    """Sequences to two numbers at every position."""
    parts = {"e": nn.Linear(3, inputs), "r": kind(inputs, width, **options), "o": nn.Linear(width, 2)}
    return Net(parts, lambda net, x: net.o(net.r(net.e(x))[0])).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_is_that_of_the_class(kind: type[nn.RNNBase]) -> None:
    model = tagger(kind, 5)
    groups = describe(model, X).groups[:2]
    assert [(g.layers, g.width, g.free) for g in groups] == [(("e",), 4, True), (("r",), 5, True)]
    grown = widen(model, X, {"r": 8}, split="uneven")
    assert isinstance(grown.r, kind) and (grown.r.input_size, grown.r.hidden_size) == (4, 8)
    assert_same(model, grown, X)
    grown = widen(model, X, 1.5)
    assert (grown.r.input_size, grown.r.hidden_size) == (6, 8)
    assert_same(model, grown, X)


def test_sizes_that_are_equal_by_chance_stay_apart() -> None:
    model = tagger(nn.LSTM, 4)
    cell = Net({"r": nn.LSTMCell(3, 3), "o": nn.Linear(3, 2)}, lambda net, x: net.o(net.r(x[0])[0])).eval()
    for net, widths, sizes in ((model, {"r": 6}, (4, 6)), (model, {"e": 6}, (6, 4)), (cell, {"r": 5}, (3, 5))):
        widened = widen(net, X, widths)
        assert_same(net, widened, X)
        assert (widened.r.input_size, widened.r.hidden_size) == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_read_undivided_is_noticed(kind: type[nn.RNNBase]) -> None:
    teacher, student = tagger(kind, 4), tagger(kind, 8)
    assert error(change_axes(transfer(teacher, student, X, split="equal"), drop_shares), teacher, student, X) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_two_steps_in_other_words_are_two_steps(kind: type[nn.RNNBase], start: float) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, bias=start > 0).eval()  # from nothing, the first of them leaves a bias out
    states = [torch.full((1, 5, 4), start) for _ in range(2 if kind is nn.LSTM else 1)]
    given = tuple(states) if kind is nn.LSTM else states[0]
    name = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn_tanh"}[kind]
    with torch.no_grad():
        shown, ends = layer(X[:2], given)
        mine, *mine_ends = REWRITES[name](X[:2], given, layer._flat_weights, start > 0, 1, 0.0, False, False, False)
    assert mine.shape == shown.shape and torch.allclose(mine[-1], shown[-1], rtol=0, atol=1e-14)
    for a, b in zip(mine_ends, ends if kind is nn.LSTM else (ends,), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_a_first_state_from_outside_keeps_its_width() -> None:
    first = torch.rand(1, 5, 4)
    model = Net({"r": nn.GRU(3, 4), "o": nn.Linear(4, 2)}, lambda net, x, h: net.o(net.r(x, h)[0]))
    with refused("Expected hidden size"):
        widen(model, (X, first), {"r": 6})


class ConvLSTM(nn.Module):
    """Its state begins as zeros, and stands beside the input."""

    def __init__(self, units: int, start: float = 0.0) -> None:
        super().__init__()
        self.units, self.start = units, start
        self.conv, self.out = nn.Conv2d(3 + units, 4 * units, 3, padding=1), nn.Conv2d(units, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.full((len(x), self.units, *x.shape[3:]), self.start)
        cell = torch.zeros_like(state)
        for step in x.unbind(1):
            enter, forget, leave, new = self.conv(torch.cat([step, state], 1)).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * cell.tanh()
        return self.out(state)


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_state_that_begins_as_a_constant_grows(start: float) -> None:
    teacher, student = trained(ConvLSTM(5, start), ConvLSTM(8, start))
    transfer(teacher, student, images(2, 3, 3, 5, 5), split="uneven")
    wider = widen(teacher, images(2, 3, 3, 5, 5), {"conv": 1.4})
    assert wider.units == 7
    assert describe(teacher, images(2, 3, 3, 5, 5)).groups[0].state == "in steps of 4: each unit has 4 entries"
    with refused("from 20 to 22 units, but to 24: its units grow in steps"):
        widen(teacher, images(2, 3, 3, 5, 5), {"conv": 22})
    for grown in (student, wider, widen(teacher, images(2, 3, 3, 5, 5), 1.5)):
        assert_same(teacher, grown, images(2, 6, 3, 4, 4))


def test_a_shift_along_the_sequence_grows() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.o(net.b(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)).tanh() + x)

    (model,) = trained(Net({"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "o": nn.Linear(4, 2)}, how))
    assert_same(model, widen(model, images(2, 5, 3), {"a": 7}, split="uneven"), images(2, 8, 3))


def test_a_second_layer_is_no_identity() -> None:
    with refused(r"r\.weight_ih_l1"):
        transfer(tagger(nn.LSTM, 4), tagger(nn.LSTM, 4, num_layers=2), X)
