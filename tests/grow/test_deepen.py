"""deepen: deeper without a second constructor, exact to 1e-10 on inputs that it has not seen."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, refused, state, unchanged
from networks import Net, chain, conv, images, mlp, rows
from torch import Tensor, nn

from net2net import Blend, deepen, describe, equivalence, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def trained(seed: int = 0) -> nn.Module:
    """Blocks as torchvision's: each a nn.Sequential, and a residual one that is a module of its own."""
    parts = {"a": conv(4, 7), "n": nn.BatchNorm2d(7), "b": conv(7, 4)}
    residual = Net(parts, lambda net, x: F.gelu(x + net.b(F.gelu(net.n(net.a(x))))))
    first = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.SiLU())
    last = nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 6), nn.GELU(), nn.Linear(6, 5)
    return look_trained(nn.Sequential(first, residual, *last), seed=seed)


def assert_deeper(model: nn.Module, inputs: Callable, after: list[str], **options) -> nn.Module:
    """Deepen on inputs of `inputs`, compare on others, and return the copy. What was there before is unchanged."""
    before = state(model)
    grown = deepen(model, inputs(), after, **options)
    assert unchanged(model, before) and type(grown) is type(model)
    assert before.keys() < grown.state_dict().keys()
    assert all(torch.equal(grown.state_dict()[name], tensor) for name, tensor in before.items()) or "depth" in options
    assert_same(model, grown, inputs(), bar=1e-10)
    return grown


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU])
@pytest.mark.parametrize("after", [["0"], ["1"], ["1.b"], ["4"], ["5"], ["0.0"], ["0", "1", "1.a", "4"]])
def test_a_new_layer_computes_the_same_and_learns(activation: Callable[[], nn.Module], after: list[str]) -> None:
    model = trained()
    grown = assert_deeper(model, images, after, activation=activation)
    new = {name for name, module in grown.named_modules() if isinstance(module, Blend)}
    assert new == {f"{name}.deeper.1" for name in after}
    grown(images()).square().sum().backward()
    for name in new:
        amount, weight = (grown.get_parameter(f"{name.removesuffix('.1')}.{each}") for each in ("1.amount", "0.weight"))
        assert amount == 0 and amount.grad.any() and weight.grad.flatten(1).any(1).all()
    torch.optim.SGD(grown.parameters(), lr=0.01).step()
    assert equivalence(model, grown, images()).max_relative > 1e-6


def test_a_deeper_network_is_copied_and_its_state_goes_through_a_file(tmp_path) -> None:
    model, x = trained(), images()
    grown = deepen(model, x, ["0", "1", "4"], activation=nn.GELU)
    nn.init.normal_(grown.get_parameter("1.deeper.0.weight"))
    twin = copy.deepcopy(grown)
    assert torch.equal(twin(x), grown(x)) and not torch.allclose(grown(x), model(x))
    nn.init.normal_(twin.get_parameter("1.deeper.0.weight"))
    assert not torch.allclose(twin(x), grown(x)), "the copy runs through a layer of its own"
    torch.save(grown.state_dict(), tmp_path / "state.pt")
    other = deepen(trained(5), x, ["0", "1", "4"], activation=nn.GELU)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), grown(x))
    old = deepen(trained(5), x, ["1"])  # what was there before has its old names
    old.load_state_dict(model.state_dict(), strict=False)
    assert_same(model, old, x)


@pytest.mark.parametrize("grow", [lambda m, x: widen(m, x, 1.5), lambda m, x: deepen(m, x, ["0"])])
def test_a_grown_network_is_pickled_as_a_whole(grow: Callable, tmp_path) -> None:
    model, x = mlp(3, 4, 2), rows()
    torch.save(grow(model, x), tmp_path / "network.pt")
    assert_same(model, torch.load(tmp_path / "network.pt", weights_only=False), x)


@pytest.mark.parametrize("after", [["0.0"], ["1.a"], ["4"], ["1.b", "0.0"]])
def test_dense_depth_is_exact_and_no_identity(after: list[str]) -> None:
    three = Net({"a": conv(6, 5), "b": conv(5, 6), "c": conv(6, 6, 1)}, lambda net, x: net.c(net.b(net.a(x))))
    last = nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(36, 6), nn.Linear(6, 5)
    model = look_trained(nn.Sequential(nn.Sequential(conv(3, 4), conv(4, 6)), three, *last))

    def make(units: int, dims: int) -> nn.Module:
        return nn.Conv2d(units, units, 3, padding=1) if dims else nn.Linear(units, units)

    grown = assert_deeper(model, images, after, depth="dense", make=make)
    for name in after:
        weight = grown.get_parameter(f"{name}.deeper.weight").detach()
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        assert (taps - torch.eye(len(taps))).abs().max() > 0.1
        assert (taps != 0).all(), "every new unit reads every old one"


def test_dense_depth_without_a_plain_path_is_an_identity() -> None:
    """An activation between the two layers: no linear map undoes the rotation behind it."""
    grown = assert_deeper(trained(), images, ["4"], depth="dense")
    assert torch.equal(grown.get_parameter("4.deeper.0.weight"), torch.eye(6))


def test_a_layer_of_ones_own() -> None:
    def made(kernel: int, *behind: nn.Module) -> Callable[[int, int], nn.Module]:
        return lambda units, dims: nn.Sequential(conv(units, units, kernel), nn.BatchNorm2d(units), *behind)

    model, batches = look_trained(chain(4, 5)), images(24, 3, 6, 8)
    grown = assert_deeper(model, images, ["norm0"], make=made(5, Blend(F.gelu)))
    assert grown.norm0.deeper[0].kernel_size == (5, 5)
    assert_deeper(model, images, ["norm0"], make=made(3, nn.ReLU()))  # the network rectifies behind it anyway
    calibrated = deepen(model, images(), ["norm0"], make=made(3), calibrate=batches)
    assert_same(model, calibrated, images())
    passed = model.norm0(model.conv0(batches))
    assert torch.allclose(calibrated.norm0.deeper[1].running_mean, passed.mean((0, 2, 3)))
    with refused("not idempotent", model):
        deepen(model, images(), ["norm0"], make=made(3, nn.Tanh()))
    with refused("not idempotent", model):
        deepen(model, images(), ["fc"], make=lambda units, dims: nn.Sequential(nn.Linear(units, units), nn.ReLU()))


@pytest.mark.parametrize(
    ("first", "last", "inputs", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.Conv1d(4, 2, 3), (2, 3, 9), (4, 4, 3)),
        (nn.Conv3d(3, 4, 2), nn.Conv3d(4, 2, 2), (2, 3, 4, 5, 6), (4, 4, 3, 3, 3)),
        (nn.Linear(3, 4), nn.Linear(4, 2), (2, 7, 3), (4, 4)),
    ],
    ids=["one dimension", "three dimensions", "tokens"],
)
def test_a_new_layer_is_of_the_kind_before_it(first, last, inputs: tuple, shape: tuple) -> None:
    model = look_trained(nn.Sequential(first, nn.Tanh(), last).double())
    grown = assert_deeper(model, lambda: images(*inputs), ["0"])
    assert grown.get_parameter("0.deeper.0.weight").shape == shape


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).tanh()).tanh()


def test_a_sequential_with_a_forward_pass_of_its_own_calls_the_new_layer() -> None:
    model = nn.Sequential(Twice(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    grown = assert_deeper(model, rows, ["0"])
    grown(rows()).sum().backward()
    assert grown.get_parameter("0.deeper.1.amount").grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("after", [["1"], ["0"], ["1", "1"]])
def test_a_deeper_network_is_scripted(after: list[str]) -> None:
    model = look_trained(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)))
    grown = assert_deeper(model, images, after, activation=nn.GELU)
    nn.init.constant_(next(p for name, p in grown.named_parameters() if "amount" in name), 0.3)
    x = images()
    assert torch.equal(torch.jit.script(grown)(x), grown(x))


def test_a_layer_behind_the_last_new_one() -> None:
    model = trained()
    grown = deepen(deepen(model, images(), ["0", "1.a"]), images(), ["0", "1.a"])
    assert {"0.deeper.deeper.0", "1.a.deeper.deeper.0"} < {name for name, _ in grown.named_modules()}
    assert_same(model, grown, images(), bar=1e-10)
    own = Net({"deeper": nn.Linear(3, 4)}, lambda net, x: net.deeper(x))
    with refused("own has a 'deeper' of its own", own):
        deepen(Net({"own": own, "fc": nn.Linear(4, 2)}, lambda net, x: net.fc(net.own(x))), rows(), "own")


def test_a_new_layer_has_the_dtype_of_the_layer_before_it() -> None:
    net = Net({"a": nn.Linear(3, 4).float(), "b": nn.Linear(4, 4)}, lambda net, x: net.b(net.a(x.float()).double()))
    grown = assert_deeper(net, rows, ["b"])
    assert grown.get_parameter("b.deeper.0.weight").dtype == torch.float64


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_model_is_that_of_the_new_layer(mode: bool) -> None:
    assert deepen(trained().train(mode), images(), ["1"]).get_submodule("1.deeper").training is mode


def test_a_number_in_front_of_a_new_layer_is_undone_once() -> None:
    """A GELU by hand begins with 0.5 x: the new layer passes it on, and the next does not undo it again."""
    act = Net({}, lambda net, x: 0.5 * x * (1.0 + torch.tanh(0.8 * x)))
    net = Net({"a": nn.Linear(3, 4), "act": act, "b": nn.Linear(4, 2)}, lambda net, x: net.b(net.act(net.a(x))))
    grown = assert_deeper(net, rows, ["act"])
    assert_same(net, deepen(grown, rows(), ["act"]), rows())


@pytest.mark.parametrize(("after", "message"), [(["9"], r"no module '9'"), (["0", "stem"], r"no module 'stem'")])
def test_wrong_names_are_refused(after: list[str], message: str) -> None:
    model = trained()
    with refused(message, model):
        deepen(model, images(), after)


@dataclass(frozen=True)
class Result:
    hidden: Tensor
    attention: object = None


CONTAINERS = {
    "tuple": (lambda h: (h, h.mean()), lambda result: result[0]),
    "list": (lambda h: [None, h, h.detach()], lambda result: result[1]),
    "dict": (lambda h: {"hidden": h, "all": (h,)}, lambda result: result["hidden"]),
    "dataclass": (lambda h: Result(h, (h.detach(),)), lambda result: result.hidden),
}


@pytest.mark.parametrize(("pack", "take"), CONTAINERS.values(), ids=CONTAINERS)
def test_of_several_results_the_first_goes_through_the_new_layer(pack: Callable, take: Callable) -> None:
    block = Net({"a": nn.Linear(3, 4)}, lambda net, x: pack(net.a(x).relu()))
    model = look_trained(Net({"block": block, "fc": nn.Linear(4, 2)}, lambda net, x: net.fc(take(net.block(x)))))
    deeper = assert_deeper(model, rows, ["block"])
    assert_deeper(deeper, rows, ["block"])  # behind the layer that is new
    with torch.no_grad():
        deeper.block.deeper[0].weight.add_(1)
        deeper.block.deeper[1].amount.add_(1)
    assert equivalence(model, deeper, rows()).max_abs > 0.01


def test_a_result_without_one_axis_of_units_is_refused() -> None:
    pair = Net({"a": nn.Linear(3, 4)}, lambda net, x: net.a(x).sum())
    net = Net({"pair": pair, "fc": nn.Linear(4, 2)}, lambda net, x: net.fc(net.pair(x) + x.new_zeros(1, 4)))
    with refused("pair is no tensor with one axis of units"):
        deepen(net, rows(), ["pair"])


def test_wider_again_deeper_again_in_any_order() -> None:
    model, places = trained(), ["0", "1", "4"]
    twice = widen(widen(model, images(), 1.5), images(), 1.5, split="uneven")
    wide_then_deep = deepen(widen(model, images(), {"0.0": 7, "4": 1.5}), images(), places, activation=nn.SiLU)
    deep_then_wide = widen(deepen(model, images(), places, activation=nn.SiLU), images(), 1.5)
    deep_twice = deepen(deepen(model, images(), ["1"]), images(), ["1", "1.deeper"], activation=nn.Tanh)
    all_again = widen(deepen(wide_then_deep, images(), ["1"]), images(), {"1.a": 2.0})
    for grown in (twice, wide_then_deep, deep_then_wide, deep_twice, all_again):
        assert_same(model, grown, images(), bar=1e-10)
    widths = [len(deep_then_wide.get_parameter(f"{name}.weight")) for name in ("0.0", "0.deeper.0", "4", "4.deeper.0")]
    assert widths == [6, 6, 9, 9]
    assert describe(all_again, images()).groups


def test_names_may_come_from_an_iterator() -> None:
    model, x = mlp(3, 4, 2), rows()
    deeper = deepen(model, x, (name for name in ["0"]), make=lambda units, dim: nn.Linear(units, units))
    assert len(deeper.state_dict()) == len(model.state_dict()) + 2
    assert "new layers stand behind 0" in str(deeper.growth)
