"""The work of a growth is linear in the number of layers, and leaves out values that are about to be overwritten."""

from collections.abc import Callable
from cProfile import Profile
from functools import partial
from pstats import Stats
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from net2net import describe, transfer, widen
from net2net.network import tensors_in
from net2net.plan import traces
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


class Norm(nn.Module):
    """An RMS norm that is written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Block(nn.Module):
    """Attention in two heads, and a gated perceptron."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.n1, self.n2 = Norm(width), Norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def language_model(blocks: int, width: int = 8, inner: int = 12) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(10, width), *(Block(width, inner) for _ in range(blocks)), Norm(width), nn.Linear(width, 10)
    )


class Numbers(TorchDispatchMode):
    """Counts the numbers that torch's functions return."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tensors_in(out))
        return out


def work(do: Callable[[], object]) -> tuple[int, int]:
    """Return how many functions are called, and how many numbers computed."""
    profile = Profile()
    with Numbers() as numbers:
        profile.runcall(do)
    return Stats(profile).total_calls, numbers.count


@pytest.mark.parametrize("what", ["describe", "transfer"])
def test_work_is_linear_in_the_number_of_layers(what: str) -> None:
    tokens = torch.arange(6).reshape(2, 3)

    def grow(blocks: int) -> None:
        teacher = look_trained(language_model(blocks))
        if what == "describe":
            describe(teacher, tokens)
        else:
            transfer(teacher, language_model(blocks, inner=18), tokens)

    grow(1)  # what is kept from one call to the next
    few, many = (work(partial(grow, blocks)) for blocks in (3, 12))
    assert all(b / a < 5 for a, b in zip(few, many, strict=True)), (few, many)


def passes(model: nn.Module) -> list[bool]:
    """Return a list that gets for every forward pass from here on whether it computes values."""
    ran: list[bool] = []
    model.register_forward_pre_hook(lambda _, args: ran.append(not isinstance(args[0], FakeTensor)))
    return ran


class Remembers(nn.Module):
    """A layer that keeps its last result, and may look at it."""

    def __init__(self, width: int, looks: bool) -> None:
        super().__init__()
        self.first, self.second, self.looks = nn.Linear(3, width), nn.Linear(width, 2), looks
        self.last: Tensor | None = None
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = hidden = self.first(x)
        out = self.second(hidden.relu() if not self.looks or hidden.max() > -1e9 else hidden)
        self.mean = out.mean()
        return out


@pytest.mark.parametrize(("looks", "expected"), [(False, [False] * 2), (True, [False, False, True, True])])
def test_a_students_values_are_computed_after_it_is_filled(
    looks: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "LARGE", 0)
    teacher, student, x = look_trained(Remembers(4, looks)), Remembers(7, looks), torch.randn(5, 3)
    by_teacher, by_student = passes(teacher), passes(student)
    transfer(teacher, student, x)
    # Each is followed twice, because the first pass fills what it keeps.
    assert (by_teacher, by_student) == ([True] * 3, [*expected, True, True])
    assert not any(isinstance(value, FakeTensor) for value in (student.last, student.mean))
    assert_same(teacher, student, x)


@pytest.mark.slow
def test_a_chain_of_1100_layers_grows() -> None:
    def chain(layers: int) -> nn.Module:
        return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))

    teacher, student, deeper, x = chain(1), chain(1100), chain(1100), torch.rand(3, 4)
    assert len(describe(student, x).groups) == 1101
    assert_same(student, widen(student, x, {"0": 6}), x)
    transfer(teacher, deeper, x)
    assert_same(teacher, deeper, x)
