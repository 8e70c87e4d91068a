"""A grammar of random networks: one program of operations, built narrow (the teacher) and again wide (the student).

`network(Draw(pick))` asks `pick` for every choice, the simplest first, so that hypothesis shrinks a failure to few
operations and small widths; `Draw(random.Random(0).choice)` samples without hypothesis, and `alone` puts one operation
between two layers. An operation takes a value and gives the value that it makes, and a maker of its module for either
network (0: the teacher, 1: the student).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from networks import Net
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from net2net.testing import look_trained

Two = tuple[int, int]  # the teacher's and the student's
Make = Callable[[int], nn.Module]

SPATIAL = {"line": 1, "map": 2, "volume": 3}
PLACED = ("sequence", *SPATIAL)
ROWS = ("vector", "sequence")
KINDS = ("vector", *PLACED)
FLAG = (False, True)


def two(pair: Two) -> str:
    return f"{pair[0]}|{pair[1]}" if pair[0] != pair[1] else str(pair[0])


def plus(*pairs: Two) -> Two:
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)


def times(pair: Two, factor: int) -> Two:
    return pair[0] * factor, pair[1] * factor


@dataclass(frozen=True)
class Value:
    """What passes between operations: a vector (B, C), a sequence (B, N, C); a line, map or volume (B, C, ...)."""

    kind: str
    width: Two
    size: tuple[int, ...] = ()  # of the positions, the same in both networks

    def __str__(self) -> str:
        return f"{self.kind} {two(self.width)}" + f" at {'x'.join(map(str, self.size))}" * bool(self.size)

    @property
    def axis(self) -> int:
        return 1 if self.kind in SPATIAL else -1

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(self.size))) if self.kind in SPATIAL else (1,) * len(self.size)

    def to(self, width: Two) -> "Value":
        return replace(self, width=width)

    def at(self, change: Callable[[int], int]) -> "Value":
        return replace(self, size=tuple(map(change, self.size)))

    def layer(self, name: str, *arguments: Any, **options: Any) -> nn.Module:
        """The layer of that name for this kind: nn.Conv2d for a map."""
        return getattr(nn, f"{name}{SPATIAL.get(self.kind, 1)}d")(*arguments, **options)


@dataclass(frozen=True)
class Operation:
    """`by`: both widths are a multiple of it. `least`: of the teacher's width. `when`: the sizes that it takes.
    `keeps`: kind and positions stay as they are. `nests`: there are operations inside."""

    name: str
    family: str
    kinds: Sequence[str]
    build: Callable[["Draw", Value], tuple[Value, Make]]
    by: int = 1
    least: int = 1
    keeps: bool = True
    nests: bool = False
    when: Callable[[Value], bool] = lambda x: True


class Step(NamedTuple):
    name: str
    out: Value
    make: Make
    choices: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.choices} -> {self.out}"


GROWTHS: dict[str, Callable[["Draw", int], int]] = {
    "own": lambda d, n: d.pick([n, 2 * n, n + 1, (3 * n + 1) // 2, *([7 * n] if n < 4 else [])]),
    "twice": lambda d, n: 2 * n,
    "one more": lambda d, n: n + 1,
}


@dataclass
class Draw:
    """The choices behind a pair, and a note of each for its text."""

    pick: Callable[[Sequence], Any]
    growth: str = "own"
    narrowest: int = 1
    plain: bool = False  # the operations inside operations are layers and activations
    strange: bool = False  # operations are drawn that the package does not promise to carry
    depth: int = 0
    log: list[str] = field(default_factory=list)

    def one(self, name: str, *options: Any) -> Any:
        value = self.pick(options)
        self.log.append(f"{name}={getattr(value, '__name__', value)}")
        return value

    def width(self, name: str = "width", by: int = 1, least: int = 1, options: Sequence[int] = ()) -> Two:
        n = max(self.pick(options or range(self.narrowest, 5)), -(-least // by))
        width = by * n, by * GROWTHS[self.growth](self, n)
        self.log.append(f"{name}={two(width)}")
        return width

    def allows(self, operation: Operation, x: Value, keeps: bool) -> bool:
        promised = self.strange or operation.family != "strange"
        plain = not self.plain or operation.name in ("linear", "conv", "relu")
        fits = x.kind in operation.kinds and operation.keeps >= keeps and self.depth + operation.nests < 3
        return promised and plain and fits and operation.when(x)

    def steps(self, x: Value, operation: Operation | None = None, keeps: bool = False) -> list[Step]:
        """An operation that takes the value (any, if none is given), behind a layer if it wants another width."""
        if operation is None:
            allowed = [o for o in OPERATIONS.values() if self.allows(o, x, keeps)]
            often = ["layer", "strange", "strange"] if self.strange else ["layer"]
            family = self.pick([*often, *dict.fromkeys(o.family for o in allowed)])
            operation = self.pick([o for o in allowed if o.family == family])
        first: list[Step] = []
        if any(n % operation.by for n in x.width) or x.width[0] < operation.least:
            y = x.to(self.width(by=operation.by, least=operation.least))
            first, x = [Step("mix", y, mix(x, y.width))], y
        outer, self.log, self.depth = self.log, [], self.depth + operation.nests
        step = Step(operation.name, *operation.build(self, x), f"({', '.join(self.log)})")
        self.log, self.depth = outer, self.depth - operation.nests
        return [*first, step]

    def body(self, x: Value, y: Two) -> Make:
        """Operations that keep the positions, then a layer to `y` units."""
        steps, last = [], x
        for _ in range(self.pick([0, 1, 2])):
            steps += self.steps(last, keeps=True)
            last = steps[-1].out
        steps.append(Step("mix", last.to(y), mix(last, y)))
        self.log.append(f"[{'; '.join(map(str, steps))}]")
        return lambda i: nn.Sequential(*(step.make(i) for step in steps))


# -- how an operation is written -------------------------------------------------------------------------------------

OPERATIONS: dict[str, Operation] = {}


def op(family: str, kinds: Sequence[str], **limits: Any):
    """The decorated function draws the operation."""

    def register(build):
        OPERATIONS[build.__name__] = Operation(build.__name__, family, kinds, build, **limits)
        return build

    return register


def layer(family: str, name: str, kinds: Sequence[str], make, choices: Mapping[str, Sequence], out=None, **limits: Any):
    """A module `make(x, y, i, *chosen)`; y is the width that it makes, a multiple of `grows` or that of x."""
    grows = limits.pop("grows", 0)

    def build(d: Draw, x: Value) -> tuple[Value, Make]:
        y = x.to(d.width(by=grows)) if grows else x
        chosen = [d.one(name, *options) for name, options in choices.items()]
        return out(y, *chosen) if out else y, lambda i: make(x, y.width, i, *chosen)

    OPERATIONS[name] = Operation(name, family, kinds, build, **limits)


def norm(name: str, kinds: Sequence[str], axis: int, make, choices: Mapping[str, Sequence], **limits: Any):
    """A module `make(x, width, *chosen)` for values with the units in that axis."""
    layer("norm", name, kinds, lambda x, y, i, *c: units_in(axis, x, make(x, x.width[i], *c)), choices, **limits)


def functions(family: str, kinds: Sequence[str], table: Mapping[str, Callable], out=None, **limits: Any):
    """Operations without parameters: `apply(x, tensor)`."""
    for name, apply in table.items():
        layer(family, name, kinds, lambda x, y, i, apply=apply: Net({}, lambda net, v: apply(x, v)), {}, out, **limits)


def net(how: Callable, **parts: Make) -> Make:
    """The maker of a network of these parts: `how(net, value)`."""
    return lambda i: Net({name: part(i) for name, part in parts.items()}, how)


def mix(x: Value, y: Two, kernel: int = 1, **options: Any) -> Make:
    """A linear layer, or a convolution that keeps the positions."""
    if x.kind in ROWS:
        return lambda i: nn.Linear(x.width[i], y[i], **options)
    return lambda i: x.layer("Conv", x.width[i], y[i], kernel, padding=kernel // 2, **options)


def units_in(axis: int, x: Value, module: nn.Module) -> nn.Module:
    return Net({"norm": module}, lambda net, v: net.norm(v.movedim(x.axis, axis)).movedim(axis, x.axis))


def sized(least: int, most: int = 48) -> Callable[[Value], bool]:
    return lambda x: min(x.size) >= least and math.prod(x.size) <= most


def whole(x: Value) -> int:
    return math.prod(x.size)


# fmt: off
# -- layers: the operations are tables, and are set like tables ------------------------------------------------------

def conv(x: Value, y: Two, i: int, kernel: Two, dilation: int, bias: bool, mode: str, groups: Two = (1, 1)):
    reach = times(kernel, dilation)[1] // 2
    same = {"padding": "same"} if mode == "same" or reach >= min(x.size) else {"padding_mode": mode}
    options = {"padding": dilation * (kernel[i] // 2), "dilation": dilation, "bias": bias, "groups": groups[i]} | same
    return x.layer("Conv", x.width[i], y[i], kernel[i], **options)

CONV = {"dilation": (1, 2), "bias": FLAG, "mode": ("zeros", "same", "circular", "reflect", "replicate")}
STRIDES = {"kernel, stride, padding": ((1, 2, 0), (3, 2, 1), (2, 2, 0), (3, 1, 0))}
UPWARDS = {"kernel, stride, padding": ((3, 1, 1), (2, 2, 0), (4, 2, 1))}

layer("layer", "linear", ROWS, lambda x, y, i, bias: mix(x, y, bias=bias)(i), {"bias": FLAG}, grows=1)
layer("layer", "conv", SPATIAL, conv, {"kernel": ((1, 1), (3, 3))} | CONV, grows=1)
layer("depth", "bigger_kernel", SPATIAL, conv, {"kernel": ((1, 3), (3, 5), (1, 5))} | CONV, grows=1)
layer("layer", "strided_conv", SPATIAL, lambda x, y, i, how: x.layer("Conv", x.width[i], y[i], *how), STRIDES,
      lambda y, how: y.at(lambda n: (n + 2 * how[2] - how[0]) // how[1] + 1), grows=1, keeps=False, when=sized(3))
for _groups, _name in ((1, "transposed_conv"), (2, "transposed_grouped")):
    layer("layer", _name, SPATIAL,
          lambda x, y, i, how, g=_groups: x.layer("ConvTranspose", x.width[i], y[i], *how, groups=g), UPWARDS,
          lambda y, how: y.at(lambda n: (n - 1) * how[1] - 2 * how[2] + how[0]),
          grows=_groups, by=_groups, keeps=False, when=sized(1, 12))
layer("shared", "weight_norm", KINDS, lambda x, y, i, dim: parametrizations.weight_norm(mix(x, y)(i), dim=dim),
      {"dim": (0, 1)}, grows=1)
layer("strange", "spectral_norm", KINDS, lambda x, y, i: parametrizations.spectral_norm(mix(x, y)(i)), {}, grows=2)

def grouped(d: Draw, x: Value, groups: Two, y: Two) -> tuple[Value, Make]:
    d.log.append(f"groups={two(groups)}")
    chosen = [d.one(name, *options) for name, options in ({"kernel": ((1, 1), (3, 3), (1, 3))} | CONV).items()]
    return x.to(y), lambda i: conv(x, y, i, *chosen, groups=groups)

@op("layer", SPATIAL)
def depthwise(d: Draw, x: Value):
    return grouped(d, x, x.width, times(x.width, d.one("times", 1, 2, 3)))

@op("layer", SPATIAL, by=2)
def grouped_wider(d: Draw, x: Value):
    return grouped(d, x, (2, 2), d.width(by=2))

@op("layer", SPATIAL, by=2)
def grouped_more(d: Draw, x: Value):
    groups = x.width[0] // 2, x.width[1] // 2
    return grouped(d, x, groups, times(groups, d.one("each", 1, 2, 3)))

def divisors(d: Draw, width: Two) -> Two:
    """Numbers of groups for both, the student's no smaller, that may cut the student's units anywhere."""
    one = d.pick([g for g in range(1, width[0] // 2 + 1) if width[0] % g == 0])
    return one, d.pick([g for g in range(one, width[1] + 1) if width[1] % g == 0])

@op("strange", SPATIAL, least=2)
def grouped_any(d: Draw, x: Value):
    groups = divisors(d, x.width)
    return grouped(d, x, groups, (2 * groups[0], 2 * groups[1] * d.one("more", 1, 2)))

# -- normalisation ---------------------------------------------------------------------------------------------------

norm("batch_norm", KINDS, 1, lambda x, n, momentum, affine: x.layer("BatchNorm", n, 1e-5, momentum, affine),
     {"momentum": (0.1, None), "affine": FLAG})
norm("instance_norm", PLACED, 1, lambda x, n, affine, track: x.layer("InstanceNorm", n, 1e-5, 0.1, affine, track),
     {"affine": FLAG, "track": FLAG}, when=lambda x: whole(x) > 2)
norm("layer_norm", KINDS, -1, lambda x, n, options: nn.LayerNorm(n, **options),
     {"options": ({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.01})}, least=2)
norm("layer_norm_places", PLACED, 1, lambda x, n: nn.LayerNorm((n, *x.size)), {}, least=2)
norm("rms_norm", KINDS, -1, lambda x, n, *c: nn.RMSNorm(n, *c), {"eps": (None, 0.01), "affine": FLAG}, least=2)
norm("group_norm", KINDS, 1, lambda x, n, groups, affine: nn.GroupNorm(groups, n, affine=affine),
     {"groups": (1, 2), "affine": FLAG}, by=2, least=4)
norm("group_norm_more", KINDS, 1, lambda x, n: nn.GroupNorm(n // 2, n), {}, by=2, least=4)

@op("strange", KINDS, least=2)
def group_norm_any(d: Draw, x: Value):
    groups = divisors(d, x.width)
    d.log.append(f"groups={two(groups)}")
    return x, lambda i: units_in(1, x, nn.GroupNorm(groups[i], x.width[i]))

# -- one entry for a unit; pooling -----------------------------------------------------------------------------------

functions("activation", KINDS, {
    "relu": lambda x, v: F.relu(v), "gelu": lambda x, v: F.gelu(v), "silu": lambda x, v: F.silu(v),
    "tanh": lambda x, v: v.tanh(), "hardswish": lambda x, v: F.hardswish(v), "elu": lambda x, v: F.elu(v),
    "abs": lambda x, v: abs(v), "one_minus": lambda x, v: 1 - v, "half_plus_one": lambda x, v: v / 2 + 1,
    "square": lambda x, v: v * v, "clamp": lambda x, v: v.clamp(-1, 1),
    "maximum": lambda x, v: torch.maximum(v, -2 * v), "in_place": lambda x, v: v.clone().mul_(2).relu_(),
    "relu_in_place": lambda x, v: F.relu(v, inplace=True),
})
layer("norm", "prelu", ("vector", *SPATIAL), lambda x, y, i, one: nn.PReLU(1 if one else x.width[i]), {"one": FLAG})

def parameter(x: Value, y: Two, i: int, what: str, lead: tuple[int, ...], product: bool) -> nn.Module:
    """A bias, a layer scale, a temperature, a positional embedding: with leading axes or without."""
    places = x.size if what == "everywhere" else (1,) * len(x.size) if x.kind in SPATIAL else ()
    shape = () if what == "scalar" else (x.width[i], *places) if x.kind in SPATIAL else (*places, x.width[i])
    weight = nn.Parameter(torch.randn((*lead, *shape)))
    return Net({"weight": weight}, lambda net, v: v * net.weight if product else v + net.weight)

layer("norm", "parameter", KINDS, parameter,
      {"what": ("unit", "scalar", "everywhere"), "lead": ((), (1,)), "product": FLAG})
layer("norm", "class_token", ["sequence"], lambda x, y, i: Net(
    {"token": nn.Parameter(torch.randn(1, 1, x.width[i]))},
    lambda net, v: torch.cat([net.token.expand(len(v), -1, -1), v], 1),
), {}, lambda y: y.at(lambda n: n + 1), keeps=False)

layer("norm", "places", ["sequence"], lambda x, y, i: Net(
    {"table": nn.Embedding(x.size[0] + 2, x.width[i])}, lambda net, v: v + net.table(torch.arange(v.shape[1])),
), {})
IN_TRAINING: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda v: v + 0.1 * torch.randn_like(v), "mask": lambda v: v * (torch.rand_like(v) > 0.1) / 0.9,
    "rows": lambda v: v * (torch.rand(len(v)) > 0.1).to(v).reshape(-1, *(1,) * (v.dim() - 1)), "twice": lambda v: 2 * v,
}
layer("norm", "training_alone", KINDS, lambda x, y, i, how: Net(
    {}, lambda net, v: IN_TRAINING[how](v) if net.training else v), {"how": tuple(IN_TRAINING)})

layer("pool", "pool", SPATIAL, lambda x, y, i, name: x.layer(name, *((2, 2) if name == "LPPool" else (2,))),
      {"name": ("MaxPool", "AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool")},
      lambda y, name: y.at(lambda n: 2 if "Adaptive" in name else n // 2), keeps=False, when=sized(2))
layer("pool", "padded_pool", SPATIAL, lambda x, y, i, name: x.layer(name, 3, 1, 1), {"name": ("MaxPool", "AvgPool")},
      when=sized(3))
functions("pool", PLACED, {
    "mean": lambda x, v: v.mean(x.places), "amax": lambda x, v: v.amax(x.places), "sum": lambda x, v: v.sum(x.places),
    "max": lambda x, v: v.movedim(x.axis, 1).flatten(2).max(-1).values,
    "first": lambda x, v: v.movedim(x.axis, -1).flatten(1, -2)[:, 0],
}, lambda x: Value("vector", x.width), keeps=False)

# -- branches --------------------------------------------------------------------------------------------------------

MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "product": torch.mul, "maximum": torch.maximum, "stack": lambda u, v: torch.stack([u, v]).sum(0),
}

@op("branch", KINDS, nests=True)
def residual(d: Draw, x: Value):
    return x, net(lambda net, v: v + net.body(v), body=d.body(x, x.width))

@op("branch", ROWS, nests=True, least=2)
def post_norm(d: Draw, x: Value):
    make = d.one("norm", nn.LayerNorm, nn.RMSNorm)
    return x, net(lambda net, v: net.norm(v + net.body(v)), body=d.body(x, x.width), norm=lambda i: make(x.width[i]))

@op("strange", ROWS)
def experts(d: Draw, x: Value):
    """Some rows go to each of the experts, as a router says; refused where an expert gets no row of the example."""
    inner, y, count, most = d.width("inner"), d.width(), d.one("experts", 2, 3), d.one("for each row", 1, 2)

    def how(net: Net, v: Tensor) -> Tensor:
        rows = v.flatten(0, -2)
        shares, chosen = net.router(rows).softmax(-1).topk(most, -1)
        out = rows.new_zeros(len(rows), net.down0.out_features)
        for expert in range(count):
            at, slot = (chosen == expert).nonzero(as_tuple=True)
            made = getattr(net, f"down{expert}")(F.relu(getattr(net, f"up{expert}")(rows[at])))
            out.index_add_(0, at, made * shares[at, slot, None])
        return out.reshape(*v.shape[:-1], -1)

    layers = {f"up{e}": mix(x, inner) for e in range(count)} | {f"down{e}": mix(x.to(inner), y) for e in range(count)}
    return x.to(y), net(how, router=mix(x, (count, count)), **layers)

@op("branch", KINDS, nests=True)
def branches(d: Draw, x: Value):
    y, meet = d.width(), MEETINGS[d.one("how", *MEETINGS)]
    return x.to(y), net(lambda net, v: meet(net.a(v), net.b(v)), a=d.body(x, y), b=d.body(x, y))

def concatenated(d: Draw, x: Value, order: str) -> tuple[Value, Make]:
    """Branches u and v, the input x, and n, which the student alone has."""
    widths = {"x": x.width, "n": (0, 2)} | {name: d.width(name) for name in "uv" if name in order}
    bodies = {name: d.body(x, widths[name]) for name in "uv" if name in order}
    bodies |= {"n": mix(x, widths["n"])} if "n" in order else {}

    def how(net: Net, v: Tensor) -> Tensor:
        made = {name: getattr(net, name)(v) for name in bodies if hasattr(net, name)} | {"x": v}
        return torch.cat([made[name] for name in order if name in made], x.axis)

    def make(i: int) -> nn.Module:
        return Net({name: body(i) for name, body in bodies.items() if i or name != "n"}, how)

    return x.to(plus(*(widths[name] for name in order))), make

for _name, _family, _orders in (
    ("concat", "branch", ("uv", "uvu", "xu", "uxu", "xx")), ("new_branch", "depth", ("un", "nu", "unv")),
):
    OPERATIONS[_name] = Operation(
        _name, _family, KINDS, lambda d, x, o=_orders: concatenated(d, x, d.one("order", *o)), nests=True)

@op("branch", PLACED)
def squeeze_excite(d: Draw, x: Value):
    inner, gate = d.width(), d.one("gate", torch.sigmoid, F.hardsigmoid)
    return x, net(lambda net, v: v * gate(net.up(F.relu(net.down(v.mean(x.places, keepdim=True))))),
                  down=mix(x, inner), up=mix(x.to(inner), x.width))

GATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "glu": F.glu,
    "chunk": lambda v, axis: (lambda a, b: a * b.sigmoid())(*v.chunk(2, axis)),
    "swiglu": lambda v, axis: (lambda a, b: F.silu(a) * b)(*v.chunk(2, axis)),
}

@op("branch", KINDS)
def glu(d: Draw, x: Value):
    y, gate = d.width(), GATES[d.one("how", *GATES)]
    return x.to(y), net(lambda net, v: gate(net.both(v), x.axis), both=mix(x, times(y, 2)))

@op("branch", KINDS)
def gate_of_one(d: Draw, x: Value):
    """One unit that gates all: spatial attention."""
    return x, net(lambda net, v: v * torch.sigmoid(net.gate(v)), gate=mix(x, (1, 1)))

@op("branch", KINDS, nests=True)
def pad_units(d: Draw, x: Value):
    """The shortcut without parameters: zeros behind the units, or on both sides."""
    first, end = d.width("first") if d.one("front", *FLAG) else (0, 0), d.width("end")
    y, lead = plus(x.width, first, end), (0, 0) * (len(x.size) if x.kind in SPATIAL else 0)
    body = d.body(x, y)
    return x.to(y), lambda i: Net({"body": body(i)}, lambda net, v: F.pad(v, (*lead, first[i], end[i])) + net.body(v))

# -- parts, order and layout of the units ----------------------------------------------------------------------------

HALVES: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "chunk": lambda v: v.chunk(2, 1), "split": lambda v: v.split(v.shape[1] // 2, 1),
    "even and odd": lambda v: (v[:, ::2], v[:, 1::2]), "unbind": lambda v: v.unflatten(1, (2, -1)).unbind(1),
}
ENDS = MEETINGS | {"cat": lambda u, v: torch.cat([u, v], 1), "swap": lambda u, v: torch.cat([v, u], 1)}

@op("branch", KINDS, by=2)
def halves(d: Draw, x: Value):
    """One half goes through a layer and the other past it (ShuffleNet, CSP)."""
    half, part, then = x.to((x.width[0] // 2, x.width[1] // 2)), d.one("how", *HALVES), d.one("then", *ENDS)

    def how(net: Net, v: Tensor) -> Tensor:
        a, b = HALVES[part](v.movedim(x.axis, 1))
        return ENDS[then](net.layer(a.movedim(1, x.axis)).movedim(x.axis, 1), b).movedim(1, x.axis)

    return half if then in MEETINGS else x, net(how, layer=mix(half, half.width))

@op("branch", KINDS)
def unequal_parts(d: Draw, x: Value):
    """One layer's units in two parts of different widths, which go different ways."""
    a, b, y = d.width("first"), d.width("second"), d.width()

    def how(net: Net, v: Tensor) -> Tensor:
        u, v = net.both(v).split([net.first.weight.shape[1], net.second.weight.shape[1]], x.axis)
        return net.first(F.relu(u)) + net.second(torch.tanh(v))

    return x.to(y), net(how, both=mix(x, plus(a, b)), first=mix(x.to(a), y), second=mix(x.to(b), y))

def evens_first(x: Value, v: Tensor) -> Tensor:
    """A constant permutation of the units."""
    return torch.cat([torch.arange(0, v.shape[x.axis], 2), torch.arange(1, v.shape[x.axis], 2)])

functions("order", KINDS, {
    "flip": lambda x, v: v.flip(x.axis), "roll": lambda x, v: v.roll(1, x.axis),
    "index_select": lambda x, v: v.index_select(x.axis, evens_first(x, v)),
    "tensor_index": lambda x, v: v[(slice(None), evens_first(x, v)) if x.axis > 0 else (..., evens_first(x, v))],
    "list_index": lambda x, v: v.movedim(x.axis, 1)[:, evens_first(x, v).tolist()].movedim(1, x.axis),
})
functions("order", KINDS, {"shuffle": lambda x, v: (
    v.movedim(x.axis, -1).unflatten(-1, (2, -1)).mT.flatten(-2).movedim(-1, x.axis))}, by=2)
functions("order", PLACED, {
    "flip_places": lambda x, v: v.flip(x.places), "roll_places": lambda x, v: v.roll(1, x.places[-1]),
})
functions("layout", ["map"], {"turn": lambda x, v: v.mT}, lambda x: replace(x, size=x.size[::-1]), keeps=False)
functions("layout", PLACED, {
    "flatten": lambda x, v: v.flatten(1), "flatten_last": lambda x, v: v.movedim(1, -1).reshape(len(v), -1),
    "flatten_middle": lambda x, v: v.transpose(1, 2).contiguous().view(len(v), -1),
}, lambda x: Value("vector", times(x.width, whole(x))), keeps=False, when=sized(1, 12))
functions("layout", SPATIAL, {
    "to_sequence": lambda x, v: v.flatten(2).mT,
    "permute": lambda x, v: v.movedim(1, -1).reshape(len(v), -1, v.shape[1]),
}, lambda x: Value("sequence", x.width, (whole(x),)), keeps=False, when=sized(1, 12))
functions("layout", ["vector"], {"unsqueeze": lambda x, v: v.unsqueeze(1)},
          lambda x: Value("sequence", x.width, (1,)), keeps=False)
functions("layout", ["sequence"], {"to_map": lambda x, v: v.permute(0, 2, 1).unflatten(2, (1, -1))},
          lambda x: Value("map", x.width, (1, *x.size)), keeps=False)
functions("layout", ["map"], {
    "pixel_unshuffle": lambda x, v: F.pixel_unshuffle(v, 2),
    "to_depth": lambda x, v: torch.cat([v[:, :, a::2, b::2] for b in (0, 1) for a in (0, 1)], 1),
}, lambda x: x.to(times(x.width, 4)).at(lambda n: n // 2), keeps=False, when=lambda x: not any(n % 2 for n in x.size))
functions("layout", ["map"], {"unfold": lambda x, v: F.unfold(v, 2)},
          lambda x: Value("line", times(x.width, 4), (whole(x.at(lambda n: n - 1)),)), keeps=False, when=sized(2))
layer("layout", "pixel_shuffle", ["map"],
      lambda x, y, i: nn.Sequential(mix(x, times(y, 4))(i), nn.PixelShuffle(2)), {},
      lambda y: y.at(lambda n: 2 * n), grows=1, keeps=False, when=sized(1, 16))
layer("layout", "unflatten", ["vector"],  # a layer whose units are laid out as a map, or as positions of a sequence
      lambda x, y, i, how: nn.Sequential(mix(x, times(y, 4))(i), nn.Unflatten(1, how[2])),
      {"layout": (("map", (2, 2), (-1, 2, 2)), ("sequence", (4,), (4, -1)))},
      lambda y, how: Value(how[0], y.width, how[1]), grows=1, keeps=False)

SMOOTH = {"line": "linear", "map": "bilinear", "volume": "trilinear"}
functions("layout", SPATIAL, {
    "pad": lambda x, v: F.pad(v, (1, 0) * len(x.size)),
    "pad_half": lambda x, v: F.pad(v, (1, 0) * len(x.size), value=0.5),
    "pad_reflect": lambda x, v: F.pad(v, (1, 0) * len(x.size), "reflect"),
    "pad_replicate": lambda x, v: F.pad(v, (1, 0) * len(x.size), "replicate"),
    "pad_circular": lambda x, v: F.pad(v, (1, 0) * len(x.size), "circular"),
    "interpolate": lambda x, v: F.interpolate(v, [n + 1 for n in x.size]),
    "interpolate_area": lambda x, v: F.interpolate(v, [n + 1 for n in x.size], mode="area"),
    "interpolate_smooth": lambda x, v: F.interpolate(v, [n + 1 for n in x.size], mode=SMOOTH[x.kind]),
}, lambda x: x.at(lambda n: n + 1), keeps=False, when=sized(2, 16))

# -- attention -------------------------------------------------------------------------------------------------------

# From a layer's units (B, N, 3 H d), in one of several layouts, to queries, keys and values (B, H, N, d).
LAYOUTS: dict[str, Callable[[Tensor, int], Sequence[Tensor]]] = {
    "3 H d": lambda v, h: v.reshape(*v.shape[:2], 3, h, -1).permute(2, 0, 3, 1, 4).unbind(0),
    "chunk": lambda v, h: [part.unflatten(-1, (h, -1)).transpose(1, 2) for part in v.chunk(3, -1)],
    "H 3 d": lambda v, h: v.view(*v.shape[:2], h, 3, -1).transpose(1, 2).unbind(3),
    "H 3d": lambda v, h: v.view(*v.shape[:2], h, -1).permute(0, 2, 1, 3).chunk(3, -1),
}

@op("attention", ["sequence"])
def attention(d: Draw, x: Value):
    """Self-attention by hand or by torch's function, with one layer or three for queries, keys and values."""
    h, e, y = d.width("heads", options=(1, 2)), d.width("head"), d.width()
    how, layout = d.one("how", "function", "scale", "scaled queries", "sqrt"), d.one("layout", "separate", *LAYOUTS)
    bias, mask, count = d.one("bias", *FLAG), d.one("mask", "none", "relative", "causal"), x.size[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, relative: Tensor | None) -> Tensor:
        if how == "function":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=relative, is_causal=mask == "causal")
        logits = (q * scale) @ k.mT if how == "scaled queries" else q @ k.mT
        logits = logits * scale if how == "scale" else logits / math.sqrt(q.shape[-1]) if how == "sqrt" else logits
        logits = logits if relative is None else logits + relative
        if mask == "causal":
            logits = logits.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
        return logits.softmax(-1) @ v

    def make(i: int) -> nn.Module:
        scale, inner = e[i] ** -0.5, h[i] * e[i]

        def forward(net: Net, v: Tensor) -> Tensor:
            if layout == "separate":
                q, k, v = (part(v).view(len(v), count, h[i], e[i]).transpose(1, 2) for part in (net.q, net.k, net.v))
            else:
                q, k, v = LAYOUTS[layout](net.qkv(v), h[i])
            return net.out(attend(q, k, v, scale, getattr(net, "relative", None)).transpose(1, 2).flatten(2))

        widths = {"q": inner, "k": inner, "v": inner} if layout == "separate" else {"qkv": 3 * inner}
        parts: dict[str, Any] = {name: nn.Linear(x.width[i], width, bias) for name, width in widths.items()}
        parts |= {"relative": nn.Parameter(torch.randn(h[i], count, count))} if mask == "relative" else {}
        return Net(parts | {"out": nn.Linear(inner, y[i])}, forward)

    return x.to(y), make

SHARED: dict[str, Callable[..., Tensor]] = {
    "repeat": lambda q, k, v, n: F.scaled_dot_product_attention(q, *(u.repeat_interleave(n, 1) for u in (k, v))),
    "expand": lambda q, k, v, n: F.scaled_dot_product_attention(
        q, *(u[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2) for u in (k, v))),
    "function": lambda q, k, v, n: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "broadcast": lambda q, k, v, n: F.scaled_dot_product_attention(
        q.unflatten(1, (-1, n)), k[:, :, None], v[:, :, None]).flatten(1, 2),
}

def turned(v: Tensor) -> Tensor:
    """Rotary positions, with a table that is made here."""
    half = v.shape[-1] // 2
    at = torch.outer(torch.arange(v.shape[-2], dtype=v.dtype), 10.0 ** -torch.arange(half, dtype=v.dtype))
    return v * at.cos().repeat(1, 2) + torch.cat([-v[..., half:], v[..., :half]], -1) * at.sin().repeat(1, 2)

@op("attention", ["sequence"])
def shared_keys(d: Draw, x: Value):
    """Several query heads for each key head, with rotary positions or without."""
    keys, each, y = d.width("key heads", options=(1, 2)), d.width("queries for each", options=(1, 2, 3)), d.width()
    turns, attend = d.one("turns", *FLAG), SHARED[d.one("how", *SHARED)]
    e = times((1, 1), 2 * d.one("pairs", 1, 2)) if turns else d.width("head")

    def make(i: int) -> nn.Module:
        def forward(net: Net, u: Tensor) -> Tensor:
            q, k, v = (part(u).unflatten(-1, (-1, e[i])).transpose(1, 2) for part in (net.q, net.k, net.v))
            q, k = (turned(q), turned(k)) if turns else (q, k)
            return net.out(attend(q, k, v, each[i]).transpose(1, 2).flatten(2))

        widths = {"q": keys[i] * each[i] * e[i], "k": keys[i] * e[i], "v": keys[i] * e[i]}
        parts = {name: nn.Linear(x.width[i], width) for name, width in widths.items()}
        return Net(parts | {"out": nn.Linear(widths["q"], y[i])}, forward)

    return x.to(y), make

@op("attention", ["sequence"])
def multihead(d: Draw, x: Value):
    """nn.MultiheadAttention to the value itself, or to another of another width."""
    h, e, cross = d.width("heads", options=(1, 2)), d.width("head"), d.one("cross", *FLAG)
    first, bias, weights = d.one("batch_first", *FLAG), d.one("bias", *FLAG), d.one("need_weights", *FLAG)
    y = h[0] * e[0], h[1] * e[1]
    memory = plus(y, d.width("memory's more"))  # torch has other parameters where the widths agree

    def how(net: Net, v: Tensor) -> Tensor:
        q, other = net.enter(v), net.memory(v).flip(1) if cross else None
        q, other = (u if first or u is None else u.transpose(0, 1) for u in (q, other))
        out = net.attention(q, *((q, q) if other is None else (other, other)), need_weights=weights)[0]
        return out if first else out.transpose(0, 1)

    def make(i: int) -> nn.Module:
        parts = {"enter": mix(x, y)(i)} | ({"memory": mix(x, memory)(i)} if cross else {})
        dims = {"kdim": memory[i], "vdim": memory[i]} if cross else {}
        return Net(parts | {"attention": nn.MultiheadAttention(y[i], h[i], bias=bias, batch_first=first, **dims)}, how)

    return x.to(y), make

# -- torch's own recurrence --------------------------------------------------------------------------------------------

@op("recurrent", ["sequence"], keeps=False)
def recurrence(d: Draw, x: Value):
    """nn.LSTM, nn.GRU or nn.RNN on the sequence, padded or packed; every position, or the last state."""
    kind = d.one("kind", nn.GRU, nn.LSTM, nn.RNN)
    layers, both, bias, first = d.one("layers", 1, 2), *(d.one(k, *FLAG) for k in ("both", "bias", "batch_first"))
    learned, packed, last = (d.one(k, *FLAG) for k in ("learned start", "packed", "last"))
    y, bend = d.width(least=2 if kind is nn.LSTM else 1), d.one("bend", "tanh", "relu") if kind is nn.RNN else ""
    project = d.one("projected", *FLAG) if kind is nn.LSTM and d.growth != "one more" else False
    shown = (y[0] // 2, y[1] // 2) if project else y
    ways, given = 2 if both else 1, "hc"[: 2 if kind is nn.LSTM else 1] if learned else ""

    def how(net: Net, v: Tensor) -> Tensor:
        v = v if first else v.transpose(0, 1)
        rows, count = v.shape[0 if first else 1], v.shape[1 if first else 0]
        start = [getattr(net, key).expand(-1, rows, -1).contiguous() for key in given]
        lengths = [count - row % count for row in range(rows)]
        if packed:
            v = nn.utils.rnn.pack_padded_sequence(v, lengths, batch_first=first, enforce_sorted=False)
        out, state = net.r(v, *([tuple(start) if kind is nn.LSTM else start[0]] if start else []))
        if last:
            state = state[0] if kind is nn.LSTM else state
            return torch.cat([state[-1], state[-2]], -1) if both else state[-1]
        out = nn.utils.rnn.pad_packed_sequence(out, batch_first=first)[0] if packed else out
        return out if first else out.transpose(0, 1)

    def make(i: int) -> nn.Module:
        own = {"proj_size": shown[i]} if project else {"nonlinearity": bend} if kind is nn.RNN else {}
        options = {"num_layers": layers, "bias": bias, "batch_first": first, "bidirectional": both} | own
        starts = {key: nn.Parameter(torch.randn(layers * ways, 1, {"h": shown, "c": y}[key][i])) for key in given}
        return Net({"r": kind(x.width[i], y[i], **options)} | starts, how)

    return (Value("vector", times(shown, ways)) if last else x.to(times(shown, ways))), make

@op("recurrent", ["sequence"], keeps=False)
def recurrent_cell(d: Draw, x: Value):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell along the sequence."""
    kind, bias, y = d.one("kind", nn.GRUCell, nn.LSTMCell, nn.RNNCell), d.one("bias", *FLAG), d.width()

    def how(net: Net, v: Tensor) -> Tensor:
        state = None
        for t in range(v.shape[1]):
            state = net.r(v[:, t], state)
        return state[0] if kind is nn.LSTMCell else state

    return Value("vector", y), lambda i: Net({"r": kind(x.width[i], y[i], bias)}, how)

# -- depth: layers that the student alone has ------------------------------------------------------------------------

def in_sequence(d: Draw, x: Value, *more: int) -> tuple[Value, Make]:
    """Layers with ReLU; the student has one more among them, wider by `more` than the one before it."""
    widths = [d.width() for _ in range(d.one("layers", 1, 2))]
    place, normed, kernel = d.one("new behind", *range(len(widths))), d.one("norm", *FLAG), d.one("kernel", 1, 3)
    new = max(widths[place][0], widths[place][1] + d.one("more", *more))
    chains = [w[0] for w in widths], [w[1] for w in widths]
    chains[1].insert(place + 1, new)

    def make(i: int) -> nn.Module:
        layers, n = [], x.width[i]
        for y in chains[i]:
            norms = [units_in(1, x, x.layer("BatchNorm", y))] if normed else []
            layers += [mix(x.to((n, n)), (y, y), kernel)(i), *norms, nn.ReLU()]
            n = y
        return nn.Sequential(*layers)

    return x.to((chains[0][-1], chains[1][-1])), make

for _name, _more in (("sequential", (0,)), ("sequential_other_width", (1, -1))):
    OPERATIONS[_name] = Operation(_name, "depth", KINDS, lambda d, x, m=_more: in_sequence(d, x, *m))

@op("depth", KINDS)
def stage(d: Draw, x: Value):
    """Residual blocks; the student has more of them."""
    inner, more = [d.width() for _ in range(d.one("blocks", 1, 2))], d.one("more", 1, 2)
    act, normed = d.one("activation", nn.ReLU, nn.GELU, nn.SiLU), d.one("norm", "no", "before", "after")

    def block(y: Two, i: int) -> nn.Module:
        norms = {normed: units_in(1, x, x.layer("BatchNorm", x.width[i]))}
        parts = [norms.get("before"), mix(x, y)(i), act(), mix(x.to(y), x.width)(i), norms.get("after")]
        return Net({"f": nn.Sequential(*(part for part in parts if part))}, lambda net, v: v + net.f(v))

    return x, lambda i: nn.Sequential(*(block(y, i) for y in inner + inner[-1:] * more * i))

def deeper(act: Callable[[Tensor], Tensor], more: Callable, meet=lambda v, new: new) -> Callable:
    """A layer and its activation, and behind it in the student something more."""

    def build(d: Draw, x: Value) -> tuple[Value, Make]:
        y = x.to(d.width())

        def how(net: Net, v: Tensor) -> Tensor:
            v = act(net.layer(v))
            return meet(v, act(net.new(v))) if hasattr(net, "new") else v

        return y, lambda i: Net({"layer": mix(x, y.width)(i)} | ({"new": more(y, i)} if i else {}), how)

    return build

for _name, _family, _act, _more, *_meet in (
    ("deeper_relu", "depth", F.relu, lambda y, i: mix(y, y.width, 3)(i)),
    ("deeper_relu6", "depth", F.relu6, lambda y, i: mix(y, y.width, 3)(i)),
    ("deeper_linear", "depth", lambda v: v, lambda y, i: mix(y, y.width, 3)(i)),
    ("new_norm", "depth", F.relu, lambda y, i: units_in(1, y, y.layer("BatchNorm", y.width[i]))),
    ("deeper_gelu", "strange", F.gelu, lambda y, i: mix(y, y.width)(i)),
    ("deeper_tanh", "strange", F.tanh, lambda y, i: mix(y, y.width)(i)),
    ("new_gate", "strange", torch.sigmoid, lambda y, i: mix(y, y.width)(i), torch.mul),
):
    OPERATIONS[_name] = Operation(_name, _family, KINDS, deeper(_act, _more, *_meet))

@op("strange", ["map"])
def spatial_attention(d: Draw, x: Value):
    """A gate on every position, of the mean and the extremes over all units (CBAM)."""
    few = x.to((3, 3))

    def how(net: Net, v: Tensor) -> Tensor:
        return v * torch.sigmoid(net.f(torch.stack([v.mean(1), v.amax(1), v.min(1)[0]], 1)))

    return x, net(how, f=mix(few, (1, 1), 3))

# -- one module in several places ------------------------------------------------------------------------------------

layer("shared", "twice", KINDS, lambda x, y, i: net(
    lambda net, v: net.f(net.f(net.a(v)).relu()), a=mix(x, y), f=mix(x.to(y), y, 3))(i), {}, grows=1)

@op("shared", KINDS)
def siamese(d: Draw, x: Value):
    y, meet = d.width(), MEETINGS[d.one("how", *MEETINGS)]
    return x.to(y), net(lambda net, v: meet(net.f(v), net.f(v.abs())), f=mix(x, y, 3))

@op("shared", KINDS)
def tied(d: Draw, x: Value):
    """Two layers with one weight."""
    y = d.width()

    def make(i: int) -> nn.Module:
        a, b = mix(x, y)(i), mix(x, y)(i)
        b.weight = a.weight
        return Net({"a": a, "b": b}, lambda net, v: torch.cat([net.a(v), net.b(v.tanh())], x.axis))

    return x.to(times(y, 2)), make

@op("strange", ROWS)
def tied_transposed(d: Draw, x: Value):
    """A layer and its transpose, as of an autoencoder."""
    return x, net(lambda net, v: F.linear(F.relu(net.f(v)), net.f.weight.mT), f=mix(x, d.width()))

@op("shared", ["sequence"], keeps=False)
def recurrent(d: Draw, x: Value):
    y, start = d.width(), d.one("start", "first", "zeros", "ones")

    def how(net: Net, v: Tensor) -> Tensor:
        first = start == "first"
        state = torch.tanh(net.a(v[:, 0])) if first else getattr(torch, start)(len(v), net.b.in_features).to(v)
        for t in range(first, v.shape[1]):
            state = torch.tanh(net.a(v[:, t]) + net.b(state))
        return state

    return Value("vector", y), net(how, a=mix(x, y), b=mix(x.to(y), y))

# -- what a forward pass may do besides, with the units in the last axis ---------------------------------------------

STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda v: v.softmax(-1), "cumsum": lambda v: v.cumsum(-1), "sort": lambda v: v.sort(-1).values,
    "unit_length": lambda v: F.normalize(v, dim=-1), "minus_mean": lambda v: v - v.mean(-1, keepdim=True),
    "gate_of_max": lambda v: v * v.amax(-1, keepdim=True).sigmoid(), "fft": lambda v: torch.fft.fft(v).real,
    "gate_of_sum": lambda v: v * v.sum(-1, keepdim=True).sigmoid(), "times_width": lambda v: v * v.shape[-1],
    "log_softmax": lambda v: v - v.logsumexp(-1, keepdim=True), "over_largest": lambda v: v / (1 + v.abs().max()),
    "rms_by_hand": lambda v: v * (v.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "norm_by_hand": lambda v: (v - v.mean(-1, True)) / (v.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
    "std": lambda v: v / (1 + v.std(-1, keepdim=True)), "difference": lambda v: v - v.roll(1, -1),
    "first_zeroed": lambda v: torch.cat([0 * v[..., :1], v[..., 1:]], -1),
    "first_written": lambda v: (u := v.clone(), u[..., 0].mul_(2))[0],
    "first_scattered": lambda v: v.scatter(-1, torch.zeros_like(v[..., :1], dtype=torch.long), 1.0),
    "plus_index": lambda v: v + torch.arange(v.shape[-1]) / v.shape[-1], "gram": lambda v: v @ (v.mT @ v),
    "plus_argmax": lambda v: v + v.argmax(-1, keepdim=True), "top_one": lambda v: v * (v >= v.topk(1, -1).values),
    "units_conv": lambda v: F.conv1d(v.reshape(-1, 1, v.shape[-1]), v.new_ones(1, 1, 3), padding=1).reshape(v.shape),
    "outer": lambda v: (v.unsqueeze(-1) * v.unsqueeze(-2)).sum(-1), "minus_batch": lambda v: v - v.mean(0),
    "constant_matrix": lambda v: v @ torch.eye(v.shape[-1]).to(v).flip(0),
    "einsum": lambda v: torch.einsum("...c,...c->...c", v, v),
}
functions("strange", KINDS, {
    name: lambda x, v, f=f: f(v.movedim(x.axis, -1)).movedim(-1, x.axis) for name, f in STRANGE.items()
}, least=2)

# fmt: on
# -- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    logits: Tensor
    others: list[Tensor]


FORMS: dict[str, Callable] = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits, aux: (logits, aux),
    "dict": lambda logits, aux: {"logits": logits, "others": [aux]},
    "dataclass": lambda logits, aux: Outputs(logits, [aux]),
}
SIZES = {"vector": [()], "sequence": [(4,), (3,)], "line": [(6,), (5,)], "map": [(3, 4), (4, 4)]}
SIZES |= {"volume": [(2, 3, 2), (3, 3, 3)], "words": [(4,)]}
WORDS = 7


class Program(nn.Module):
    """The steps one after the other, a head for the last value, and for some forms one for an earlier value."""

    def __init__(self, stem: nn.Module, steps: dict[str, nn.Module], heads: Sequence[nn.Module], aux: int, form: str):
        super().__init__()
        self.stem, self.steps, self.heads = stem, nn.ModuleDict(steps), nn.ModuleList(heads)
        self.aux, self.form = aux, form

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        values = [self.stem(x) if other is None else self.stem(x, other)]
        for step in self.steps.values():
            values.append(step(values[-1]))
        return FORMS[self.form](*(head(values[k]) for head, k in zip(self.heads, (-1, self.aux), strict=False)))


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, `inputs(rows, seed)` for both, the program as a text, and the names of its operations."""

    teacher: nn.Module
    student: nn.Module
    inputs: Callable[[int, int], Any]
    text: str
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # how hypothesis prints a failure
        printer.text(self.text)


def network(d: Draw, lengths: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> Pair:
    """A pair of that many operations in a row."""
    d.growth, d.strange = d.one("growth", "twice", "own"), d.one("strange", False, False, True)
    inputs, start = _start(d)
    steps = [start]
    for _ in range(d.one("operations", *lengths)):
        steps += d.steps(steps[-1].out)
    form, aux = d.one("form", *FORMS), d.one("auxiliary head behind", *range(len(steps)))
    words = inputs[0].kind == "words" and d.one("tied", *FLAG)
    heads = [_head(d, steps[-1].out, start.out.width if words else None)]
    heads += [_head(d, steps[aux].out)] if form != "tensor" else []
    return _pair(d, inputs, steps, heads, (aux, form), words)


def alone(name: str, growth: str, seed: int) -> Pair:
    """One operation between two layers, with every width grown in one way."""
    d, o = Draw(random.Random(f"{name} {seed}").choice, growth, 2, plain=True), OPERATIONS[name]
    x = d.pick([x for kind in o.kinds for size in SIZES[kind] if o.when(x := Value(kind, (3, 3), size))])
    y = x.to(d.width(by=o.by, least=o.least))
    steps = [Step("mix", y, mix(x, y.width, 3)), *d.steps(y, o)]
    return _pair(d, [x], steps, [_head(d, steps[-1].out)], (0, "tensor"))


def _start(d: Draw) -> tuple[list[Value], Step]:
    """The inputs, and what makes the first value of them."""
    kind, y = d.one("input", *KINDS, "map", "words"), d.width()
    x = Value(kind, (3, 3), d.one("size", *SIZES[kind]))
    if kind == "words":
        embedding = Step("embedding", Value("sequence", y, x.size), lambda i: nn.Embedding(WORDS, y[i]))
        return [x.to((WORDS, WORDS))], embedding
    how = d.one("start", "mix", "nothing", "sum", "shared", "cat", "film")
    if how == "nothing":
        return [x], Step(how, x, lambda i: nn.Identity())
    if how == "mix":
        return [x], Step(how, x.to(y), mix(x, y, 3))
    z = {"cat": d.width(), "film": times(y, 2)}.get(how, y)

    def meet(net: Net, v: Tensor, w: Tensor) -> Tensor:
        v, w = net.a(v), (net.a if how == "shared" else net.b)(w)
        if how == "film":
            scale, shift = w.chunk(2, x.axis)
            return v * (1 + scale) + shift
        return torch.cat([v, w], x.axis) if how == "cat" else v + w

    out = x.to(plus(y, z) if how == "cat" else y)
    parts = {"a": mix(x, y, 3)} | ({} if how == "shared" else {"b": mix(x, z)})
    return [x, x], Step(how, out, net(meet, **parts), " of two inputs")


def _head(d: Draw, x: Value, words: Two | None = None) -> Make:
    """A layer to three outputs, at every position, of their mean or of all of them; or to the words, of that width."""
    how = d.one("head", "each", *(("mean", "flatten") if x.size else ()))
    y = {"each": x, "mean": Value("vector", x.width)}.get(how, Value("vector", times(x.width, whole(x))))
    shaped = {"each": lambda v: v, "mean": lambda v: v.mean(x.places), "flatten": lambda v: v.flatten(1)}[how]
    if words is None or y.kind in SPATIAL:
        return net(lambda net, v: net.out(shaped(v)), out=mix(y, (3, 3)))
    narrow, out = mix(y, words), mix(y.to(words), (WORDS, WORDS), bias=False)
    return net(lambda net, v: net.out(net.narrow(shaped(v))), narrow=narrow, out=out)


def _pair(
    d: Draw, inputs: list[Value], steps: list[Step], heads: list[Make], ends: tuple[int, str], words: bool = False
) -> Pair:
    named, seed = d.one("inputs by name", *FLAG), d.pick(range(1000))

    def make(i: int, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            stem, *parts = (step.make(i) for step in steps)
            names = [f"{k}_{step.name}" for k, step in enumerate(steps)][1:]
            program = Program(stem, dict(zip(names, parts, strict=True)), [head(i) for head in heads], *ends)
            if words and hasattr(program.heads[0], "narrow"):
                program.heads[0].out.weight = program.stem.weight
            return trained(program.double(), seed)

    def draw(rows: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        if inputs[0].kind == "words":
            return torch.randint(WORDS, (rows, *inputs[0].size), generator=generator)
        shapes = [(x.width[0], *x.size) if x.kind in SPATIAL else (*x.size, x.width[0]) for x in inputs]
        every = [torch.randn(rows, *shape, generator=generator, dtype=torch.double) for shape in shapes]
        return dict(zip(("x", "other"), every, strict=False)) if named else tuple(every) if every[1:] else every[0]

    teacher = next((net for k in range(10) if alive(net := make(0, seed + k), draw)), None) or make(0, seed)
    text = "\n".join([", ".join(d.log), *map(str, inputs), *map(str, steps)])
    return Pair(teacher, make(1, seed + 1000), draw, text, tuple(step.name for step in steps))


@torch.no_grad()
def trained(model: nn.Module, seed: int) -> nn.Module:
    """The network as if trained: no tensor is constant, and signals keep their size. In eval mode."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= 1.7
    return look_trained(model, seed=seed)


def run(model: nn.Module, inputs: Any, gradients: bool = False) -> list[Tensor]:
    """The outputs in order, on a copy of the inputs."""
    named = inputs if isinstance(inputs, dict) else {}
    arguments = inputs if isinstance(inputs, tuple) else () if named else (inputs,)
    with torch.set_grad_enabled(gradients):
        out = model(*(x.clone() for x in arguments), **{key: x.clone() for key, x in named.items()})
    return tree_leaves(vars(out) if is_dataclass(out) else out)


def alive(model: nn.Module, inputs: Callable[[int, int], Any]) -> bool:
    """Every output is finite and depends on the input."""
    return all(
        bool(y.isfinite().all()) and bool((y - y.mean(0)).abs().max() > 1e-3 * y.abs().max().clamp(min=1e-6))
        for y in run(model, inputs(4, 0))
    )
