"""Forward passes as people write them, checked on inputs that are unlike the example: exact there, too, or refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, grow, refused
from networks import Net
from torch import Tensor, nn

from net2net import Transfer, equivalence, transfer, widen

pytestmark = pytest.mark.usefixtures("float64")
WORDS, LONGER = torch.randint(0, 11, (3, 4)), torch.randint(0, 11, (3, 12))
ROWS, TOKENS, MAPS, SQUARE = (torch.randn(*s, dtype=torch.double) for s in ((6, 5), (3, 4, 6), (2, 3, 8, 8), (6, 6)))
CLASSES = torch.tensor([0, 1, 2, 3, 1, 2])


def rows(how: Callable, **parts: Callable[[int], Any]) -> Callable[[int], Net]:
    """Five numbers to some units, what `how` makes of those, three numbers."""
    return lambda w: Net(
        {"a": nn.Linear(5, w), "o": nn.Linear(w, 3), **{name: make(w) for name, make in parts.items()}},
        lambda net, x, *more: net.o(how(net, net.a(x), *more)),
    )


def words(how: Callable, **parts: Callable[[int], Any]) -> Callable[[int], Net]:
    """Words as some units, what `how` makes of those, three numbers a word."""
    return lambda w: Net(
        {"e": nn.Embedding(11, w), "o": nn.Linear(w, 3), **{name: make(w) for name, make in parts.items()}},
        lambda net, x: net.o(how(net, net.e(x), x).tanh()),
    )


def table(*shape: int) -> Callable[[int], nn.Parameter]:
    """A parameter of this shape, with the units on its last axis."""
    return lambda w: nn.Parameter(torch.randn(*shape, w))


def square(w: int) -> nn.Linear:
    return nn.Linear(w, w)


def dropped(w: int) -> nn.Dropout:
    return nn.Dropout(0.1)


def add_positions(net: Net, x: Tensor, words: Tensor) -> Tensor:
    return x + net.pos[:, : words.shape[1]]


def scale_and_add_positions(net: Net, x: Tensor, words: Tensor) -> Tensor:
    x = x * net.e.embedding_dim**0.5 + net.pos[:, : words.shape[1]]
    return x + net.l(net.n(x))


def filter_all_alike(w: int) -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        filters = net.blur.expand(net.a.out_channels, -1, -1, -1)
        return net.o(F.conv2d(net.a(x), filters, padding=1, groups=net.a.out_channels))

    net = Net({"a": nn.Conv2d(3, w, 1), "o": nn.Conv2d(w, 2, 1)}, how)
    net.register_buffer("blur", torch.rand(1, 1, 3, 3))
    return net


def scale_by_width(net: Net, x: Tensor) -> Tensor:
    return x.tanh() + net.l(x) * net.l.in_features**-0.5 + net.m(x) / net.l.in_features


def add_constants(net: Net, x: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x)) + torch.full((len(x), net.a.out_features), 0.3)


def drop_branches(net: Net, x: Tensor) -> Tensor:
    """A residual branch that is dropped at random in training."""
    branch = net.l(x)
    if net.training:
        branch = branch * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.8) / 0.8
    return net.n(x + branch)


def give_the_loss(w: int) -> Net:
    return Net(
        {"a": nn.Linear(5, w), "o": nn.Linear(w, 3)},
        lambda net, x, y: (net.o(net.a(x)), F.cross_entropy(net.o(net.a(x)), y)),
    )


# name -> network by width, an example and other inputs: those of ROWS and 9 * ROWS where none are named
CODE = {
    "positions beyond the example's": (words(add_positions, pos=table(1, 16)), (WORDS,), (LONGER,)),
    "a part of a table that a module takes whole": (
        words(lambda net, x, words: x + net.drop(net.pos)[:, : words.shape[1]], pos=table(1, 16), drop=dropped),
        *((WORDS,), (LONGER,)),
    ),
    "a part of two tables in one": (
        words(
            lambda net, x, words: x + torch.cat([net.one, net.pos], 1)[:, : len(words[0])],
            one=table(1, 1),
            pos=table(1, 16),
        ),
        *((WORDS,), (LONGER,)),
    ),
    "a table without rows": (
        words(
            lambda net, x, words: torch.cat([net.none.expand(len(x), -1, -1), x + net.pos], 1),
            none=table(1, 0),
            pos=table(1),
        ),
        *((WORDS,), (LONGER,)),
    ),
    "the root of the width before positions are added": (
        words(scale_and_add_positions, pos=table(1, 16), l=square, n=nn.LayerNorm),
        *((WORDS,), (LONGER,)),
    ),
    "branches scaled by the width": (rows(scale_by_width, l=square, m=square),),
    "rows of other classes": (
        rows(lambda net, x, y: (x + net.c[y]).tanh(), c=table(10)),
        *((ROWS, CLASSES), (ROWS, CLASSES + 4)),
    ),
    "scales and shifts of other domains": (
        rows(lambda net, x, y: (x * net.s[y, 0] + net.s[y, 1]).tanh(), s=table(5, 2)),
        *((ROWS, torch.tensor([1] * 6)), (ROWS, torch.tensor([4] * 6))),
    ),
    "a stream with branches that are dropped": (rows(drop_branches, l=square, n=nn.LayerNorm),),
    "a comparison": (rows(lambda net, x: x * (x > 0)), (ROWS,), (-9 * ROWS,)),
    "where": (rows(lambda net, x: torch.where(x > 0, x, 0.1 * x)), (ROWS,), (-9 * ROWS,)),
    "the maximum of two": (rows(lambda net, x: torch.max(x, -x)),),
    "the largest unit": (rows(lambda net, x: x * x.amax(1, keepdim=True)),),
    "a check of all units": (rows(lambda net, x: x if bool((x < 1e9).all()) else -x),),
    "constants that are the same for all units": (rows(add_constants),),
    "zeros that a layer reads": (rows(lambda net, x: net.l(torch.zeros_like(x)) * x, l=square),),
    "another dtype and back": (rows(lambda net, x: x.type(torch.float32).type(torch.float64)), (ROWS,), (ROWS + 1,)),
    "einsum without a sum": (rows(lambda net, x: torch.einsum("bc,c->bc", x, net.g), g=table()),),
    "an outer product by einsum": (rows(lambda net, x: x * torch.einsum("i,j->ij", torch.arange(6.0), torch.ones(1))),),
    "one filter for all channels": (filter_all_alike, (MAPS,), (9 * MAPS,)),
    "a sparse graph": (
        rows(lambda net, x, graph: graph @ x),
        *((ROWS, torch.eye(6, dtype=torch.double).to_sparse()), (ROWS, SQUARE.round().to_sparse())),
    ),
    "the loss beside it": (give_the_loss, (ROWS, CLASSES % 3), (9 * ROWS, CLASSES % 2)),
}
NORMED = ("the root of the width before positions are added", "a stream with branches that are dropped")


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("name", CODE)
def test_is_exact_on_inputs_unlike_the_example(name: str, width: int) -> None:
    make, *inputs = CODE[name]
    example, others = inputs or ((ROWS,), (9 * ROWS,))
    teacher, student = make(4).eval(), make(width).eval()
    transfer(teacher, student, example)
    assert_same(teacher, student, example)
    assert_same(teacher, student, others)
    if name not in NORMED:  # a norm sees all units: widen does not grow them to any width
        assert_same(teacher, widen(teacher, example, 2.0), others)


class Block(nn.Module):
    """A block of a language model, written by hand as most people do, with a causal mask from a buffer."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.width = heads, width
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.size()
        q, k, v = self.qkv(self.norm1(x)).split(self.width, dim=2)
        q, k, v = (y.view(count, length, self.heads, width // self.heads).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        weights = weights.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        y = weights.softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).contiguous().view(count, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Language(nn.Module):
    """Predicts the next word; the table of words is the last layer, too."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(Block(width, heads, 16) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, 11, bias=False)
        self.words.weight = self.head.weight

    def forward(self, words: Tensor, next_: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.blocks(self.words(words) + self.places(torch.arange(words.shape[1])))
        found = self.head(self.norm(x))
        return found, None if next_ is None else F.cross_entropy(found.flatten(0, 1), next_.flatten())


@pytest.mark.parametrize(("width", "heads", "depth"), [(8, 2, 1), (6, 2, 1), (6, 3, 2), (8, 4, 3)])
def test_a_language_model_written_by_hand(width: int, heads: int, depth: int) -> None:
    teacher, student = Language(4, 2, 1), Language(width, heads, depth)
    transfer(teacher, student, (WORDS, WORDS))
    assert_same(teacher, student, (LONGER, LONGER))


def test_positions_keep_their_number() -> None:
    assert widen(words(add_positions, pos=table(1, 16))(4), WORDS, 2.0).pos.shape == (1, 16, 8)


def when_training(how: Callable) -> Callable[[int], Net]:
    """Whose training mode does `how`, and whose eval mode a linear layer alone."""
    return lambda w: Net(
        {"a": nn.Linear(5, w), "o": nn.Linear(w, 3)},
        lambda net, x: how(net, net.a(x)) if net.training else net.o(net.a(x)),
    )


def test_what_the_training_mode_does_besides_is_exact_there() -> None:
    make = when_training(lambda net, x: net.o(F.dropout(x, 0.0)))
    teacher, student = make(4), make(7)
    transfer(teacher, student, ROWS)
    assert_same(teacher, student, ROWS, ("train",))


def layers(new: Callable[[], nn.Module] | None, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), between, *([] if new is None else [nn.Linear(8, 8), new()]), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("between", "new", "exact"),
    [
        (nn.ReLU(), nn.ReLU, True),
        (nn.ReLU6(), nn.ReLU6, True),
        (nn.ReLU6(), nn.ReLU, True),
        (nn.Sigmoid(), nn.ReLU, True),
        (nn.ReLU(), nn.ReLU6, False),
        (nn.ReLU(), lambda: nn.Hardtanh(0, 10), False),
        (nn.ReLU(), lambda: nn.ReLU6(inplace=True), False),
        (nn.Identity(), nn.ReLU, False),
        (nn.LeakyReLU(0.01), nn.ReLU, False),
    ],
)
def test_an_activation_is_idempotent_on_all_that_may_come(between: nn.Module, new: Callable, exact: bool) -> None:
    # The example shows small positive activations alone, which all of these leave as they are.
    teacher, student = layers(None, between), layers(new, between)
    with torch.no_grad():
        teacher[0].weight.mul_(0.01)
        teacher[0].bias.fill_(2.0)
    if exact:
        transfer(teacher, student, ROWS)
        assert_same(teacher, student, 1e4 * ROWS)
    else:
        with refused(r"2\.weight.*not idempotent"):
            transfer(teacher, student, ROWS)


@pytest.mark.parametrize("pad", [nn.ReflectionPad2d, nn.ZeroPad2d, nn.ReplicationPad2d])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_kernels_grow_behind_padding_of_another_module(pad: type, scale: float) -> None:
    # At a small scale a kernel beside its place would pass for rounding.
    def make(kernel: int) -> Net:
        parts = {"p": pad(kernel // 2), "c": nn.Conv2d(3, 4, kernel), "g": nn.Parameter(torch.full((1, 1, 1), scale))}
        return Net(parts, lambda net, x: 1 + net.g * net.c(net.p(x)))

    teacher, student, wrong = make(3), make(5), make(5)
    transfer(teacher, student, MAPS)
    with torch.no_grad():
        teacher.g.fill_(1.0), student.g.fill_(1.0)
    assert_same(teacher, student, MAPS)
    wrong.p = pad(1)
    with refused("does not look at every place"):
        transfer(teacher, wrong, MAPS)


def test_an_attribute_called_growth_is_the_users() -> None:
    model = rows(lambda net, x: x * net.growth)(4)
    model.growth = 3
    grown = widen(model, ROWS, 2.0)
    for network in (grown, widen(grown, ROWS, 2.0)):
        assert network.growth == 3 and isinstance(network.growth_, Transfer)
        assert not hasattr(network, "growth__")


def test_a_number_that_equals_a_width_by_chance_does_not_follow() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        return net.o(torch.relu(net.a(x[:, : net.longest])).view(-1, net.width)).view(len(x), -1, 3).mean(1)

    model = Net({"a": nn.Linear(6, 8), "o": nn.Linear(8, 3)}, how)
    model.width = model.longest = 8
    grown = widen(model, TOKENS, {"a": 12})
    assert (grown.width, grown.longest) == (12, 8)
    assert_same(model, grown, torch.randn(3, 14, 6))


def limited(w: int) -> Net:
    net = words(lambda net, x, i: x)(w)
    net.e.max_norm = 1.0
    return net


def raising(w: int) -> Net:
    net = rows(lambda net, x: x)(w)
    net.a.register_forward_pre_hook(lambda *_: int("the user's own reason"))
    return net


REFUSED = {
    "max_norm": (limited, WORDS, "shortens its rows"),
    "bilinear": (rows(lambda net, x: net.b(x, x), b=lambda w: nn.Bilinear(w, w, w)), ROWS, "bilinear in b has no rule"),
    "an error of the user's": (raising, ROWS, "the user's own reason"),
    "units along an axis of which the example uses a part": (
        rows(lambda net, x: x * net.g[: x.shape[1]], g=lambda w: nn.Parameter(torch.randn(9 + w))),
        *(ROWS, "only 8 of the 17 elements of g"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name: str) -> None:
    make, example, message = REFUSED[name]
    with refused(message):
        transfer(make(4), make(8), example)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda net, x: net.o(x / x.abs().sum(1, keepdim=True)), "sum in the network mixes"),
        (lambda net, x: (net.o(x), x), "it is among the network's outputs"),
    ],
    ids=["a sum", "an output"],
)
def test_what_training_alone_pins_is_exact_in_eval_mode_and_told(how: Callable, reason: str) -> None:
    teacher, student = when_training(how)(4), when_training(how)(8)
    record = transfer(teacher, student, ROWS)
    assert_same(teacher, student, 9 * ROWS)
    assert record.modes["train"].startswith("not kept: ") and reason in record.modes["train"]


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    locked = rows(lambda net, x: x)(4)
    locked.lock = threading.Lock()
    with refused("cannot be copied"):
        widen(locked, ROWS, 2.0)


def test_a_number_that_nothing_behind_can_undo_is_told() -> None:
    # So small a branch that the difference would pass for rounding in float32.
    def once(net: Net, x: Tensor) -> Tensor:
        return x.tanh() + 1e-6 * net.l(F.gelu(x + net.a.out_features**-0.5 * net.m(x.tanh())))

    def twice(net: Net, x: Tensor) -> Tensor:
        y = net.m(x.tanh())
        return x.tanh() + 1e-6 * net.l(F.gelu(x + net.a.out_features**-0.5 * y) + y)

    teacher, student = (rows(once, l=square, m=square)(w).float() for w in (4, 8))
    transfer(teacher, student, ROWS.float())  # into the weights of m
    assert equivalence(teacher.double(), student.double(), ROWS).max_relative < 1e-6
    teacher, student = (rows(twice, l=square, m=square)(w).float() for w in (4, 8))
    with refused(r"add in the network.* 0\.3536 here and.* 0\.5"):
        transfer(teacher, student, ROWS.float())


def normed_in_halves(net: Net, x: Tensor) -> Tensor:
    if not net.training:
        return net.n(net.a(x)) + 0.0 * net.b(x)
    return torch.cat([net.n(net.a(half)) for half in x.chunk(2)]) + 0.0 * net.b(x)


WHOLE_BATCHES = {  # networks that a part of a batch does not show whole
    "a layer for bright maps alone": lambda net, x: net.a(x) + (net.b(x) if bool(x.max() > 50) else 0.0),
    "a batch of two clips": lambda net, x: net.a(x) + net.b(x.view(2, 3, *x.shape[1:]).mean(1)).repeat(3, 1, 1, 1),
    "units added in large batches alone": lambda net, x: net.a(x) + (net.b(x) if len(x) > 2 else 0.0),
    "channels reversed in large batches alone": lambda net, x: net.a(x) + net.b(x.flip(1) if len(x) > 2 else x),
    "a norm of each half, in training": normed_in_halves,
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("how", WHOLE_BATCHES.values(), ids=WHOLE_BATCHES)
def test_a_network_is_traced_on_the_whole_example(how: Callable, mode: str) -> None:
    def make(width: int) -> Net:
        layers = {"a": nn.Conv2d(3, width, 1), "b": nn.Conv2d(3, width, 1), "o": nn.Conv2d(width, 2, 1)}
        if how is normed_in_halves:
            layers["n"] = nn.BatchNorm2d(width)
        return Net(layers, lambda net, x: net.o(how(net, x).relu()))

    teacher, student = make(4), make(8)
    maps = MAPS.repeat(3, 1, 1, 1)
    maps[-1, 0, 0, 0] = 100.0
    transfer(teacher, student, maps)
    for model in (teacher, student):
        model.train(mode == "train")
    assert (teacher(maps) - student(maps)).abs().max() < 1e-12


class Skipping(nn.Module):
    """In training it adds a skip, in large batches alone; every layer is used without it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x)
        return self.o(y + x if self.training and len(x) > 2 else y)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_skip_that_only_large_batches_take_in_training_ties_its_units(mode: str) -> None:
    teacher, student = Skipping(4), Skipping(7)
    maps = MAPS.repeat(3, 1, 1, 1)
    transfer(teacher, student, maps, split="uneven")
    for model in (teacher, student):
        model.train(mode == "train")
    assert (teacher(maps) - student(maps)).abs().max() < 1e-12


def test_weights_in_another_type_are_weights() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(F.linear(x.type(torch.double), net.fc.weight.type(torch.double)).relu())

    grow(*(Net({"fc": nn.Linear(5, n, bias=False), "out": nn.Linear(n, 2)}, forward) for n in (4, 6)), ROWS)
