"""Rules that users register with `net2net.rule` for functions of their own (docs/rules.md runs a custom_op)."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from checks import refused
from networks import Net
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import net2net
from net2net.trace.rules import Call, CannotFollow, Labels, Trace, first_labels, pointwise, registry, spread

pytestmark = pytest.mark.usefixtures("float64", "no_rules_left")
X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

OPERATORS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    # elementwise
    "soft_root": ("(Tensor x, float scale) -> Tensor", lambda x, s: s * x.sign() * ((1 + x.abs()).sqrt() - 1)),
    # the mean over the inner positions of a map
    "centre": ("(Tensor x) -> Tensor", lambda x: x[:, :, 1:-1, 1:-1].mean((2, 3))),
    # the name is that of a torch function, but it turns the channels around
    "relu": ("(Tensor x) -> Tensor", lambda x: x.flip(1)),
}
for _name, (_schema, _compute) in OPERATORS.items():
    torch.library.define(f"net2net_tests::{_name}", _schema)
    torch.library.impl(f"net2net_tests::{_name}", "cpu", _compute)
soft_root, centre = torch.ops.net2net_tests.soft_root, torch.ops.net2net_tests.centre


class Average(torch.autograd.Function):
    """The mean over positions, in numpy: the pass cannot look inside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().mean((2, 3)))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * x


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
    return net2net.transfer(teacher, student, X).measured.max_abs


def keep_channels(trace: Trace, call: Call, shift: int = 0) -> None:
    """A rule: positions are averaged, channels stay (or are shifted, which would be wrong)."""
    labels = first_labels(trace, call)
    units = trace.units.units_along(labels.units, 1, f"{call} averages over positions").roll(shift)
    trace.label(call.out, Labels.of(spread(units, 1, call.out.shape), labels))


def test_an_operator_with_a_rule_grows_and_one_without_is_refused() -> None:
    with refused(r"net2net_tests::centre in the network has no rule.*net2net\.rule"):
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
    with refused(r"test_user_rules\.pool in the network has no rule"):
        grow(pool)
    net2net.rule(pool)(keep_channels)
    assert grow(pool) < 1e-14


def test_a_wrong_rule_is_caught() -> None:
    """The negative control: a rule that shifts channels, though the function keeps them."""
    net2net.rule("net2net_tests::centre")(partial(keep_channels, shift=1))
    with refused("does not compute"):
        grow(centre)


def test_labels_that_an_autograd_function_loses_are_refused() -> None:
    with refused(r"fc\.weight .* does not carry units that the forward pass can follow"):
        grow(Average.apply)


def test_labels_lost_before_a_sum_over_units_are_caught_by_the_check() -> None:
    """No axis behind the lost labels grows: only the numbers show what is wrong."""
    with refused("does not compute"):
        grow(lambda x: Average.apply(x).sum(1, keepdim=True), reads=1)


def test_functions_inside_an_autograd_function_are_followed() -> None:
    assert grow(lambda x: Square.apply(x).mean((2, 3))) < 1e-14


def test_a_rule_says_why_it_cannot_follow() -> None:
    @net2net.rule("net2net_tests::centre")
    def refuse(trace: Trace, call: Call) -> None:
        raise CannotFollow(f"{call} sorts its channels")

    with refused("centre in the network sorts its channels"):
        grow(centre)


def test_a_second_rule_needs_replace() -> None:
    for name in ("conv2d", "add_", "glu"):
        with pytest.raises(ValueError, match=f"{name} has a rule already"):
            net2net.rule(name)(keep_channels)
    net2net.rule("net2net_tests::centre")(pointwise)
    net2net.rule("net2net_tests::centre", replace=True)(keep_channels)
    assert grow(centre) < 1e-14


def test_an_operator_by_the_name_of_a_torch_function_does_not_get_its_rule() -> None:
    with refused("net2net_tests::relu in the network has no rule"):
        grow(lambda x: torch.ops.net2net_tests.relu(x).mean((2, 3)))
