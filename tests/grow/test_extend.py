"""widen(..., new=...): more outputs, rows and input channels, exact on those that were there."""

import pytest
import torch
from checks import refused, state, unchanged
from networks import images, mlp, rows
from torch import Tensor, nn
from torchvision import models

from net2net import equivalence, load_record, replay, save_record, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


class GPT(nn.Module):
    """A table that is tied to the last layer, and one of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 4), nn.Embedding(5, 4)
        self.mlp, self.norm, self.head = mlp(4, 6, 4), nn.LayerNorm(4), nn.Linear(4, 11)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(x + self.mlp(x)))


def keeps(wider: nn.Module, model: nn.Module, x: Tensor) -> bool:
    """Tell whether the old results are there, up to rounding."""
    theirs = model(x)
    return bool((wider(x)[..., : theirs.shape[-1]] - theirs).abs().max() < 1e-12)


def tokens() -> Tensor:
    return torch.randint(11, (3, 4))


@pytest.mark.parametrize("new", ["zero", "mean", torch.ones(3, 5)])
def test_more_classes(new) -> None:
    model, x = look_trained(mlp(3, 5, 4)), rows()
    before = state(model)
    wider = widen(model, x, {"2": 7}, new=new)
    assert unchanged(model, before) and wider[2].out_features == 7
    assert keeps(wider, model, x)
    expected = {"zero": torch.zeros(3, 5), "mean": model[2].weight.mean(0).expand(3, 5)}
    assert torch.equal(wider[2].weight[4:], new if isinstance(new, Tensor) else expected[new])
    assert torch.equal(wider[2].bias[4:], model[2].bias.mean().expand(3) if new == "mean" else torch.zeros(3))
    assert "exact on what was there" in wider.growth.modes["eval"]


class Biased(nn.Module):
    """Numbers that stand beside the last layer belong to the outputs, whether they are trained or not."""

    def __init__(self, shape: tuple[int, ...], trained: bool) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)
        if trained:
            self.prior = nn.Parameter(torch.randn(shape))
        else:
            self.register_buffer("prior", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.prior


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("new", ["mean", torch.ones(3, 5)])
def test_a_vector_beside_the_outputs_grows_with_them(shape, trained: bool, new) -> None:
    model, x = look_trained(Biased(shape, trained)), torch.randn(3, 5)
    wider = widen(model, x, {"head": 7}, new=new)
    assert wider.prior.shape == (*shape[:-1], 7) and wider(x).shape == (3, 7)
    assert keeps(wider, model, x)
    expected = model.prior.mean() if new == "mean" else torch.zeros(())
    assert torch.equal(wider.prior[..., 4:], expected.expand_as(wider.prior[..., 4:]))


@pytest.mark.parametrize("name", ["tokens", "head"])
def test_a_larger_vocabulary_of_a_tied_table(name: str) -> None:
    model, x = look_trained(GPT()), tokens()
    wider = widen(model, x, {name: 13}, new="mean")
    assert wider.head.weight is wider.tokens.weight and wider.tokens.num_embeddings == wider.head.out_features == 13
    assert keeps(wider, model, x)
    assert wider(torch.full((1, 2), 12)).shape == (1, 2, 13)


def test_more_positions_and_a_larger_vocabulary_at_once() -> None:
    model, x = look_trained(GPT()), tokens()
    wider = widen(model, x, {"tokens": 13, "places": 2.0}, new="zero")
    assert keeps(wider, model, x)
    assert wider(torch.randint(13, (2, 10))).shape == (2, 10, 13)


def test_two_tables_apart_are_named_both() -> None:
    model, x = look_trained(nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 11, bias=False))), tokens()
    wider = widen(model, x, {"0": 12, "2": 12}, new="mean")
    assert keeps(wider, model, x) and wider(torch.full((1, 1), 11)).shape == (1, 1, 12)


def test_more_channels_of_the_input() -> None:
    model, x = look_trained(models.resnet18(num_classes=5)), images(2, 3, 32, 32)
    wider = widen(model, x, {"conv1": 4}, new="zero")
    assert wider.conv1.in_channels == 4
    for last in (torch.zeros(2, 1, 32, 32), torch.randn(2, 1, 32, 32)):
        assert torch.allclose(wider.eval()(torch.cat([x, last], 1)), model.eval()(x), atol=1e-12)


def test_the_result_grows_on_by_copies_and_its_record_is_kept(tmp_path) -> None:
    model, x = look_trained(mlp(3, 5, 4)), rows()
    wider = widen(model, x, {"2": 7}, new="mean")
    save_record(wider.growth, tmp_path / "growth.json")
    again = widen(model, x, {"2": 7}, new="zero")
    replay(load_record(tmp_path / "growth.json"), model, again)
    assert torch.equal(again(x)[:, :4], wider(x)[:, :4])
    assert equivalence(wider, widen(wider, x, {"0": 8}), x).max_abs < 1e-12


def test_the_optimizer_goes_along() -> None:
    model, x = look_trained(mlp(3, 5, 4)), rows()
    old = torch.optim.AdamW(model.parameters())
    model(x).square().sum().backward()
    old.step()
    wider = widen(model, x, {"2": 7}, new="mean")
    new = torch.optim.AdamW(wider.parameters())
    wider.growth.optimizer_state(old, new)
    moment = new.state[wider[2].weight]["exp_avg"]
    assert torch.equal(moment[:4], old.state[model[2].weight]["exp_avg"]) and not moment[4:].any()


REFUSALS = {
    "a softmax": (
        lambda: nn.Sequential(mlp(3, 4), nn.Softmax(1)),
        {"0.0": 6},
        "zero",
        "mixes all entries, as a softmax",
    ),
    "a hidden layer": (lambda: mlp(3, 5, 4), {"0": 7}, "mean", "say new='zero'"),
    "inside": (lambda: mlp(3, 5, 6, 4), {"2": 7}, "mean", "2 makes no output of the network"),
    "fewer": (lambda: mlp(3, 5, 4), {"2": 2}, "zero", "2 has 4 entries: it cannot shrink to 2"),
    "a word": (lambda: mlp(3, 5, 4), {"2": 6}, "zeros", "new='zeros' is no way to begin"),
    "a shape": (lambda: mlp(3, 5, 4), {"2": 6}, torch.ones(3, 5), r"the new entries of 2.weight have \[2, 5\]"),
    "no name": (lambda: mlp(3, 5, 4), {"fc": 6}, "zero", "No layer is called 'fc'"),
    "no dictionary": (lambda: mlp(3, 5, 4), 2.0, "zero", "give `widths` as a dictionary"),
}


@pytest.mark.parametrize(("make", "widths", "new", "why"), REFUSALS.values(), ids=REFUSALS)
def test_what_new_entries_cannot_do_is_refused(make, widths, new, why: str) -> None:
    model = look_trained(make())
    with refused(why, model):
        widen(model, rows(), widths, new=new)


def test_a_refusal_to_copy_outputs_says_how_to_add_some() -> None:
    with refused("it is the network's output. More outputs are no copies: say new='zero' or new='mean'"):
        widen(mlp(3, 5, 4), rows(), {"2": 6})
