"""Rules that users register with `net2net.rule` for functions of their own (docs/rules.md runs a custom_op)."""

from collections.abc import Callable, Iterator

import pytest
import torch
from networks import Net
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import net2net
from net2net import TransferError
from net2net.trace.rules import Call, CannotFollow, Labels, Trace, first_labels, pointwise, registry, spread

pytestmark = pytest.mark.usefixtures("float64", "no_rules_left")
X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


torch.library.define("net2net_tests::soft_root", "(Tensor x, float scale) -> Tensor")
torch.library.define("net2net_tests::centre", "(Tensor x) -> Tensor")
torch.library.define("net2net_tests::relu", "(Tensor x) -> Tensor")
soft_root, centre = torch.ops.net2net_tests.soft_root, torch.ops.net2net_tests.centre


@torch.library.impl("net2net_tests::soft_root", "cpu")
def _soft_root(x: Tensor, scale: float) -> Tensor:
    """An elementwise operator."""
    return scale * x.sign() * ((1 + x.abs()).sqrt() - 1)


@torch.library.impl("net2net_tests::centre", "cpu")
def _centre(x: Tensor) -> Tensor:
    """The mean over the inner positions of a map."""
    return x[:, :, 1:-1, 1:-1].mean((2, 3))


@torch.library.impl("net2net_tests::relu", "cpu")
def _relu(x: Tensor) -> Tensor:
    """The name is that of a torch function, but it turns the channels around."""
    return x.flip(1)


class Average(torch.autograd.Function):
    """The mean over positions, in numpy: the pass cannot look inside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().mean((2, 3)))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        raise NotImplementedError


@wrap_torch_function(lambda x: (x,))
def pool(x: Tensor) -> Tensor:
    return Average.apply(x)


@pytest.fixture
def no_rules_left() -> Iterator[None]:
    """Forget the rules of a test behind it."""
    rules, rewrites = dict(registry.RULES), dict(registry.REWRITES)
    yield
    for table, before in ((registry.RULES, rules), (registry.REWRITES, rewrites)):
        table.clear()
        table.update(before)


def grow(between: Callable[[Tensor], Tensor], reads: int | None = None) -> float:
    """Widen a network of four channels to seven, and measure by how much it differs."""
    teacher, student = (
        Net({"conv": nn.Conv2d(3, n, 3), "fc": nn.Linear(reads or n, 4)}, lambda net, x: net.fc(between(net.conv(x))))
        for n in (4, 7)
    )
    measured = net2net.transfer(teacher, student, X).measured
    assert measured is not None
    return measured.max_abs


def keep_channels(trace: Trace, call: Call) -> None:
    """A rule: positions are averaged, channels stay."""
    labels = first_labels(trace, call)
    units = trace.units.units_along(labels.units, 1, f"{call} averages over positions")
    trace.label(call.out, Labels.of(spread(units, 1, call.out.shape), labels))


def test_an_operator_with_a_rule_grows_and_one_without_is_refused() -> None:
    with pytest.raises(TransferError, match=r"net2net_tests::centre in the network has no rule.*net2net\.rule"):
        grow(centre)
    net2net.rule("net2net_tests::centre")(keep_channels)
    assert grow(centre) < 1e-14 and grow(centre.default) < 1e-14


def test_a_rule_of_the_library_serves_an_operator() -> None:
    net2net.rule("net2net_tests::soft_root")(pointwise)
    assert grow(lambda x: soft_root(x, 0.7).mean((2, 3))) < 1e-14


def test_an_operator_is_rewritten_in_functions_that_have_rules() -> None:
    @net2net.rule("net2net_tests::centre", rewrite=True)
    def rewritten(x: Tensor) -> Tensor:
        return x.mean((2, 3))  # the values differ, the units do not

    assert grow(centre) < 1e-14


def test_a_python_function_around_an_autograd_function() -> None:
    with pytest.raises(TransferError, match=r"test_user_rules\.pool in the network has no rule"):
        grow(pool)
    net2net.rule(pool)(keep_channels)
    assert grow(pool) < 1e-14


def test_a_wrong_rule_is_caught() -> None:
    """The negative control: a rule that swaps two channels, though the function keeps them."""

    @net2net.rule("net2net_tests::centre")
    def swapped(trace: Trace, call: Call) -> None:
        labels = first_labels(trace, call)
        units = trace.units.units_along(labels.units, 1, f"{call} averages over positions")
        trace.label(call.out, Labels.of(spread(units.roll(1), 1, call.out.shape), labels))

    with pytest.raises(TransferError, match="does not compute"):
        grow(centre)


def test_labels_that_an_autograd_function_loses_are_refused() -> None:
    with pytest.raises(TransferError, match=r"fc\.weight .* does not carry units that the forward pass can follow"):
        grow(Average.apply)


def test_labels_lost_before_a_sum_over_units_are_caught_by_the_check() -> None:
    """No axis behind the lost labels grows: only the numbers show what is wrong."""
    with pytest.raises(TransferError, match="does not compute"):
        grow(lambda x: Average.apply(x).sum(1, keepdim=True), reads=1)


def test_functions_inside_an_autograd_function_are_followed() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            raise NotImplementedError

    assert grow(lambda x: Square.apply(x).mean((2, 3))) < 1e-14


def test_a_rule_says_why_it_cannot_follow() -> None:
    @net2net.rule("net2net_tests::centre")
    def refuse(trace: Trace, call: Call) -> None:
        raise CannotFollow(f"{call} sorts its channels")

    with pytest.raises(TransferError, match="centre in the network sorts its channels"):
        grow(centre)


def test_a_second_rule_needs_replace() -> None:
    with pytest.raises(ValueError, match="conv2d has a rule already"):
        net2net.rule("conv2d")(keep_channels)
    with pytest.raises(ValueError, match="add_ has a rule already"):
        net2net.rule("add_")(keep_channels)
    with pytest.raises(ValueError, match="glu has a rule already"):
        net2net.rule("glu")(keep_channels)
    net2net.rule("net2net_tests::centre")(pointwise)
    net2net.rule("net2net_tests::centre", replace=True)(keep_channels)
    assert grow(centre) < 1e-14


def test_an_operator_by_the_name_of_a_torch_function_does_not_get_its_rule() -> None:
    with pytest.raises(TransferError, match="net2net_tests::relu in the network has no rule"):
        grow(lambda x: torch.ops.net2net_tests.relu(x).mean((2, 3)))
