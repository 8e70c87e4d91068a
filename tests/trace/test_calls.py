"""Calls as people write them: arguments by keyword, places that values choose. And crashes, told as what they are."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, grow, refused
from networks import Net, mlp, rows
from torch import Tensor, nn

from net2net import describe, transfer, widen
from net2net.plan.names import candidates
from net2net.testing import look_trained
from net2net.trace.rules import Call, Trace, registry

pytestmark = pytest.mark.usefixtures("float64")
DRAW = torch.Generator().manual_seed(0)
TOKENS, OTHERS, MANY = (torch.randn(*s, 5, dtype=torch.double, generator=DRAW) for s in ((3, 4), (2, 7), (4, 16)))
GRAPH = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
DENSER = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 0, 2]])


def network(how: Callable, *, b: bool = True, **parts: nn.Module) -> nn.Module:
    """Five numbers to eight units, what `how` makes of those, perhaps with a layer `b`, three numbers."""
    parts = {"a": nn.Linear(5, 8), "o": nn.Linear(8, 3)} | parts | ({"b": nn.Linear(8, 8)} if b else {})
    return look_trained(Net(parts, lambda net, x, *more: net.o(how(net, net.a(x), *more))))


KEYWORDS = {
    "linear": lambda net, x: F.linear(input=x, weight=net.b.weight, bias=net.b.bias),
    "softmax over positions": lambda net, x: torch.softmax(input=x, dim=1) * x,
    "numpy's names": lambda net, x: torch.multiply(x1=x, x2=net.b(x).mean(axis=1, keepdims=True)),
    "the other": lambda net, x: torch.add(input=x, other=net.b(x), alpha=0.5) + torch.mul(x, other=2.0),
    "where": lambda net, x: torch.where(condition=x > 0, input=x, other=net.b(x)),
    "a method": lambda net, x: x.where(condition=x > 0, other=net.b(x)),
    "the maximum of two": lambda net, x: torch.max(input=x, other=net.b(x)),
    "cat and chunk": lambda net, x: torch.add(*torch.cat(tensors=[x, net.b(x)], dim=-1).chunk(chunks=2, dim=-1)),
    "index_select": lambda net, x: x.index_select(dim=1, index=torch.tensor([2, 0, 1, 1])),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword_are_in_their_places(name: str) -> None:
    model = network(KEYWORDS[name], b=name not in ("softmax over positions", "index_select"))
    assert_same(model, widen(model, TOKENS, {"a": 12}, split="uneven"), OTHERS)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.3), (1, 1), (0.7, 0)])
def test_queries_by_keys_in_one_call_with_factors(alpha: float, beta: float) -> None:
    """A factor that is the root of the width: the queries undo what it changes in front of the softmax."""

    def make(width: int) -> nn.Module:
        def how(net: Net, x: Tensor) -> Tensor:
            start, scale = x.new_ones(1, 1, x.shape[1]).expand(len(x), 1, x.shape[1]), net.k.out_features**-0.5
            products = {"batch1": net.q(x), "batch2": net.k(x).mT}
            return torch.baddbmm(start, **products, beta=beta, alpha=alpha * scale).softmax(-1) @ net.b(x)

        return network(how, q=nn.Linear(8, width), k=nn.Linear(8, width))

    teacher, student = make(4), make(7)
    transfer(teacher, student, TOKENS)
    assert_same(teacher, student, OTHERS)


def mixture(net: Net, x: Tensor) -> Tensor:
    """The two likeliest of three experts, each run on the tokens that go to it."""
    x = x.flatten(0, 1)
    weights, experts = net.router(x).softmax(-1).topk(2)
    weights, result = weights / weights.sum(-1, keepdim=True), torch.zeros_like(x)
    for expert, chosen in enumerate(F.one_hot(experts, 3).permute(2, 1, 0)):
        place, token = torch.where(chosen)
        result.index_add_(0, token, net.experts[expert](x[token]) * weights[token, place, None])
    return result + x


def graph(how: Callable) -> Callable:
    """Messages along the edges of a graph, gathered by `how` in the nodes."""
    return lambda net, x, edges: (x + how(torch.zeros_like(x), edges[1], net.b(x.relu())[edges[0]])).relu()


def by_attention(net: Net, x: Tensor, edges: Tensor) -> Tensor:
    x = x.relu()
    weight = net.score(x)[edges[0], 0].exp()
    total = torch.zeros(len(x)).index_add(0, edges[1], weight)[edges[1]]
    return x + torch.zeros_like(x).index_add(0, edges[1], net.b(x)[edges[0]] * (weight / total)[:, None])


PLACES = {
    "two masks": (lambda net, x: x.relu() * ((x > -1) & (x < 1)), (TOKENS,), (OTHERS,)),
    "rows that a mask of one unit chooses": (lambda net, x: x[torch.where(x[:, 0, 0] > -9)[0]], (TOKENS,), (OTHERS,)),
    "sums into nodes": (
        graph(lambda zeros, to, rows: zeros.index_add_(0, to, rows)),
        *((TOKENS[0], GRAPH), (OTHERS[0], DENSER)),
    ),
    "means in nodes, on average with themselves": (
        graph(lambda zeros, to, rows: zeros.scatter_reduce(0, to[:, None].expand_as(rows), rows, "mean")),
        *((TOKENS[0], GRAPH), (OTHERS[0], DENSER)),
    ),
    "sums by scatter_add": (
        graph(lambda zeros, to, rows: zeros.scatter_add_(0, to[:, None].expand_as(rows), rows)),
        *((TOKENS[0], GRAPH), (OTHERS[0], DENSER)),
    ),
    "attention along edges": (by_attention, (TOKENS[0], GRAPH), (OTHERS[0], DENSER)),
}


@pytest.mark.parametrize("name", PLACES)
def test_units_stay_where_values_choose_among_rows(name: str) -> None:
    how, example, others = PLACES[name]
    score = {"score": nn.Linear(8, 1)} if how is by_attention else {}
    model = network(how, b="mask" not in name, **score)
    grown = widen(model, example, {"a": 12}, split="uneven")
    assert_same(model, grown, example)
    assert_same(model, grown, others)


def test_experts_that_are_chosen_by_value() -> None:
    def make(width: int) -> nn.Module:
        experts = nn.ModuleList(mlp(8, width, 8, act=nn.GELU) for _ in range(3))
        return network(mixture, b=False, router=nn.Linear(8, 3, bias=False), experts=experts)

    model, student = make(6), make(11)
    wider = widen(model, MANY, {"a": 12, "experts.*.0": 9}, split="uneven")
    assert wider.router.in_features == 12 and wider.experts[2][0].out_features == 9
    transfer(model, student, MANY, split="uneven")
    for grown in (wider, student):
        assert_same(model, grown, torch.randn(4, 9, 5))
        assert_same(model, grown, torch.randn(1, 1, 5))  # one expert gets nothing
    with refused("works on an empty tensor, which shows no units: give an example that fills it", model):
        widen(model, MANY[:1, :1], {"a": 12})


HELD = {
    "units chosen by value": (lambda net, x: x.gather(2, x.argsort(2)), "argsort in the network mixes"),
    "places of units": (lambda net, x: x + torch.nonzero(x > 9).sum(), "nonzero in the network chooses among units"),
    "rows added to units": (
        lambda net, x: x.index_add(2, x[0, 0, :8].argsort(), net.b(x)),
        "index_add in the network chooses among units",
    ),
    "an expert without a token": (
        lambda net, x: x.index_add(1, torch.where(x[0, :, 0] > 99)[0], net.b(x[:, torch.where(x[0, :, 0] > 99)[0]])),
        "works on an empty tensor",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_units_that_values_choose_among_are_held(name: str) -> None:
    how, reason = HELD[name]
    model = network(how, b=name not in ("units chosen by value", "places of units"))
    with refused(reason, model):
        widen(model, TOKENS, {"a": 12})


def sum_of(parts: Callable) -> Callable:
    return lambda net, x: x.relu() + parts(torch.fft.fft(net.b(x)).real)


@pytest.mark.parametrize(("parts", "held"), [(torch.tanh, True), (lambda y: y.mean(-1, keepdim=True), False)])
def test_units_that_meet_a_result_without_a_rule_are_held_if_it_has_their_width(parts: Callable, held: bool) -> None:
    model = network(sum_of(parts))
    state = {group.layers: group.state for group in describe(model, TOKENS).groups}
    assert ("fft_fft in the network has no rule" in state["a",]) == held
    if held:
        with refused("a cannot grow from 8 units: fft_fft in the network"):
            widen(model, TOKENS, {"a": 12})
    else:
        assert_same(model, widen(model, TOKENS, {"a": 12}), OTHERS)


@pytest.fixture
def broken_rule(monkeypatch) -> None:
    def break_down(trace: Trace, call: Call) -> None:
        raise IndexError("out of range")

    monkeypatch.setitem(registry.RULES, "tanh", break_down)
    monkeypatch.setitem(registry.REWRITES, "glu", lambda x, dim: x.chunk(3, dim)[9])


@pytest.mark.usefixtures("broken_rule")
@pytest.mark.parametrize("how", [torch.tanh, lambda x: F.glu(torch.cat([x, x], -1))], ids=["a rule", "a rewrite"])
def test_a_crash_in_a_rule_pins_and_names_rule_and_function(how: Callable) -> None:
    model = network(lambda net, x: net.b(how(x)))
    with refused(r"a cannot grow from 8 units: the rule .* fails on (tanh|glu) in the network \(.*Error: .*range"):
        widen(model, TOKENS, {"a": 12})
    assert_same(model, widen(model, TOKENS, {"b": 12}), OTHERS)


class Watched(nn.Module):
    """It runs, unless somebody watches its calls."""

    def forward(self, x: Tensor) -> Tensor:
        if len(torch.overrides._get_current_function_mode_stack()):
            raise ValueError("I am watched")
        return x


def test_a_network_that_fails_only_while_it_is_followed_is_told_apart_from_one_that_fails() -> None:
    with refused("Net runs, but not while its calls are followed: linear in a fails with ValueError: I am watched"):
        widen(network(lambda net, x: net.w(x), b=False, w=Watched()), TOKENS, 1.5)
    with refused("The forward pass of Net on inputs .* fails: mat1 and mat2"):
        widen(network(lambda net, x: x[..., :3], b=False), TOKENS, 1.5)


@pytest.mark.parametrize("call", [lambda t, s: transfer(t, s, TOKENS), lambda t, s: widen(t, TOKENS, {"a": 12})])
def test_no_other_error_leaves_the_package(call: Callable, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("net2net.plan.plan.map_units", fail)
    teacher, student = (network(lambda net, x: x, b=False) for _ in range(2))
    with refused(r"stopped at net2net/plan/plan\.py, line \d+: KeyError: 'lost'.* please report it", teacher, student):
        call(teacher, student)


def test_an_attempt_that_crashes_leaves_the_others(monkeypatch) -> None:
    """By equal names the new layer is the last one; in order it is the second."""
    teacher, student = mlp(5, 8, 3), mlp(5, 8, 8, 3)
    first, *_ = candidates(teacher, student)
    module = sys.modules["net2net.transfer"]  # net2net.transfer is the function
    plan = module.make_plan

    def fail(pair, rename, *rest):
        if rename == first:
            raise KeyError("lost")
        return plan(pair, rename, *rest)

    monkeypatch.setattr(module, "make_plan", fail)
    transfer(teacher, student, TOKENS)
    assert_same(teacher, student, OTHERS)


ENTRY_BY_ENTRY = {
    "torch.absolute": torch.absolute,
    "+x": lambda x: +x,
    "special.expit": torch.special.expit,
    "atan": torch.atan,
    "log2": lambda x: torch.log2(x.abs() + 1),
    "sgn and frac": lambda x: x.sgn() * x.frac(),
    "xlogy": lambda x: torch.special.xlogy(x, x.abs() + 1),
    "hypot": lambda x: torch.hypot(x, x.tanh()),
    "exclusive or": lambda x: x * torch.logical_xor(x > 0, x < 1),
    "cpu": lambda x: x.cpu(),
    "a norm over positions": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    "a running maximum over positions": lambda x: torch.cummax(x, 1)[0],
    "a median over positions": lambda x: x - torch.median(x, dim=1, keepdim=True)[0],
    "a sum over positions": lambda x: x - torch.nansum(x, dim=1, keepdim=True),
}


@pytest.mark.parametrize("how", ENTRY_BY_ENTRY.values(), ids=ENTRY_BY_ENTRY)
def test_functions_of_one_entry_or_of_positions_keep_units(how: Callable) -> None:
    model = network(lambda net, x: how(x), b=False)
    assert_same(model, widen(model, TOKENS, {"a": 12}, split="uneven"), OTHERS)


def test_an_empty_part_of_the_units_of_a_head_is_no_obstacle() -> None:
    """A rotation of a part of every head that, here, is the whole: what passes beside it is empty."""

    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.b(torch.cat([h[..., : net.turned].sin(), h[..., net.turned :]], -1))

    def make(width: int) -> Net:
        net = Net({"a": nn.Linear(3, width), "b": nn.Linear(width, 2)}, how)
        net.turned = width
        return net

    grow(make(4), make(7), rows())


def test_a_whole_state_is_overwritten_a_part_is_held() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        h, state = net.a(x), torch.zeros(len(x), net.width)
        (state if net.whole else state[:1]).copy_(h if net.whole else h[:1])
        return net.b(state)

    def make(width: int, whole: bool) -> Net:
        net = Net({"a": nn.Linear(3, width), "b": nn.Linear(width, 2)}, how)
        net.width, net.whole = width, whole
        return net

    grow(make(4, True), make(7, True), rows())
    with refused("such axes keep their size"):
        transfer(make(4, False), make(7, False), rows())


def test_places_in_a_table_may_be_held_as_numbers_in_a_buffer() -> None:
    def make(width: int) -> Net:
        parts = {"e": nn.Embedding(9, width), "p": nn.Embedding(8, width), "b": nn.Linear(width, 2)}
        net = Net(parts, lambda net, x: net.b(net.e(x) + net.p(net.places[: x.shape[1]].long())))
        net.register_buffer("places", torch.arange(8, dtype=torch.int32))
        return net

    grow(make(4), make(7), torch.randint(9, (3, 5)))


def test_experts_are_one_tensor_of_which_values_choose_a_matrix() -> None:
    """As in mixtures of experts: every chosen expert's rows go through its own part of two stacks of weights."""

    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        weights, chosen = net.router(h).softmax(-1).topk(2)
        out, mask = torch.zeros_like(h), F.one_hot(chosen, 3).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero():
            place, token = torch.where(mask[expert[0]])
            gate, up = F.linear(h[token], net.up[expert[0]]).chunk(2, -1)
            rows = F.linear(F.silu(gate) * up, net.down[expert[0]]) + net.shift[expert[0]]
            out.index_add_(0, token, rows * weights[token, place, None])
        return net.b(h + out)

    def make(stream: int, inner: int, experts: int = 3) -> Net:
        stacks = {"up": nn.Parameter(torch.randn(experts, 2 * inner, stream))}
        stacks["down"] = nn.Parameter(torch.randn(experts, stream, inner))
        stacks["shift"] = nn.Parameter(torch.randn(experts, stream))
        layers = {"a": nn.Linear(3, stream), "router": nn.Linear(stream, 3), "b": nn.Linear(stream, 2)}
        return Net(layers | stacks, how)

    tokens = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    grow(make(4, 5), make(8, 9), tokens)
    wider = widen(look_trained(make(4, 5)), tokens, {"down": 6, "up": 1.5})
    assert wider.up.shape == (3, 16, 6) and wider.down.shape == (3, 6, 8)
    with refused("shape", make(4, 5, 4)):
        transfer(make(4, 5), make(4, 5, 4), tokens)


def test_a_new_branch_that_ends_in_a_row_of_a_table_of_shifts_is_silent() -> None:
    class Branch(nn.Module):
        def __init__(self, stream: int) -> None:
            super().__init__()
            self.l, self.shifts = nn.Linear(stream, stream), nn.Parameter(torch.randn(3, stream))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.l(x.tanh()) + self.shifts[1]

    def make(stream: int, depth: int) -> Net:
        layers = {"a": nn.Linear(3, stream), "branches": nn.Sequential(*(Branch(stream) for _ in range(depth)))}
        return Net(layers | {"b": nn.Linear(stream, 2)}, lambda net, x: net.b(net.branches(net.a(x))))

    grow(make(4, 1), make(7, 2), torch.randn(5, 3))


def test_two_stacks_of_one_module_go_by_their_own_names() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for expert in range(3):
                at = (chosen == expert).nonzero().flatten()
                out.index_add_(0, at, F.linear(F.relu(F.linear(x[at], self.up[expert])), self.down[expert]))
            return out

    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.b(h + net.experts(h, torch.arange(len(x)) % 3))

    layers = {"a": nn.Linear(3, 4), "experts": Experts(), "b": nn.Linear(4, 2)}
    model, x = look_trained(Net(layers, how)), torch.randn(30, 3)
    assert "experts.up" in str(describe(model, x))
    wider = widen(model, x, {"experts.up": 1.6})
    assert wider.experts.up.shape == (3, 8, 4) and wider.experts.down.shape == (3, 4, 8)
    assert_same(model, wider, torch.randn(20, 3))


def test_a_mask_may_be_written_where_values_say() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        best = net.score(h).squeeze(-1).argmax(-1)
        kept = torch.zeros(x.shape[:2])
        kept[torch.arange(len(x)), best] = 1.0
        return net.b(h * kept[..., None])

    def make(width: int) -> Net:
        return Net({"a": nn.Linear(3, width), "score": nn.Linear(width, 1), "b": nn.Linear(width, 2)}, how)

    grow(make(4), make(7), torch.randn(5, 4, 3))


def test_rows_sorted_by_expert_go_through_a_stack_of_matrices() -> None:
    """As transformers computes experts; the function takes no double numbers."""

    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        weights, chosen = net.router(h).softmax(-1).topk(2)
        experts, order = chosen.reshape(-1).sort()
        ends = torch.histc(experts.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(h[order // 2], net.up.transpose(-2, -1), offs=ends).relu()
        rows = F.grouped_mm(rows, net.down, offs=ends) * weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return net.b(h + rows[back].view(len(x), 2, -1).sum(1))

    def make(stream: int, inner: int) -> Net:
        stacks = {
            "up": nn.Parameter(torch.randn(3, inner, stream)),
            "down": nn.Parameter(torch.randn(3, inner, stream)),
        }
        layers = {"a": nn.Linear(3, stream), "router": nn.Linear(stream, 3), "b": nn.Linear(stream, 2)}
        return look_trained(Net(layers | stacks, how).float(), seed=stream)

    tokens, others = torch.randn(2, 30, 3).float()
    teacher, student = make(4, 8), make(8, 12)
    transfer(teacher, student, tokens)
    assert_same(teacher, student, others, bar=1e-5)
    assert_same(teacher, widen(teacher, tokens, {"up": 12}), others, bar=1e-5)
