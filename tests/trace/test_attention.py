"""Heads: query heads that share keys, rotary and relative positions, and the weights of attention as a result.

Query heads h with key heads k(h) give the sum over h of W_h softmax(q_h k_k(h)) v_k(h). A copy h' of h has the same
term if its key head copies k(h), and the copies share W_h. So any map of heads serves in which each query head stays
with copies of its key head, and each of the teacher's has a copy.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, change_axes, drop_shares, error, grow, refused, shift_index, trained
from networks import Net, positions
from torch import Tensor, nn

from net2net import transfer, widen

pytestmark = pytest.mark.usefixtures("float64")

HeadsOf = Callable[[Tensor, int], Tensor]
REPEATS: dict[str, HeadsOf] = {  # keys or values (rows, heads, positions, units), each head once for `times` queries
    "repeat_interleave": lambda v, times: v.repeat_interleave(times, 1),
    "expand": lambda v, times: v[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2),
    "index": lambda v, times: v[:, torch.arange(times * v.shape[1]) // times],
}


def shared_keys(queries: int, keys: int, width: int = 2, how: str = "repeat_interleave", turn=None) -> Net:
    """Attention on (rows, positions, 3) in which queries / keys heads share each key head."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, width)).transpose(1, 2) for y in (net.q(x), net.k(x), net.v(x)))
        keys, times = k.shape[1], q.shape[1] // k.shape[1]
        q, k = (q, k) if turn is None else (turn(net, q), turn(net, k))
        if how == "function":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif how == "broadcast":
            a = q.unflatten(1, (keys, times)) @ k[:, :, None].mT * width**-0.5
            y = (a.softmax(-1) @ v[:, :, None]).flatten(1, 2)
        elif how == "einsum":
            a = torch.einsum("bkgtc,bksc->bkgts", [q.unflatten(1, (keys, times)), k]) * width**-0.5
            y = torch.einsum("bkgts,bksc->bkgtc", a.softmax(-1), v).flatten(1, 2)
        else:
            y = F.scaled_dot_product_attention(q, REPEATS[how](k, times), REPEATS[how](v, times))
        return net.out(y.transpose(1, 2).flatten(2))

    made = {"q": queries, "k": keys, "v": keys}
    parts = {name: nn.Linear(3, heads * width) for name, heads in made.items()}
    return Net(parts | {"out": nn.Linear(queries * width, 4)}, forward)


GROWTHS = [  # query heads and key heads of the teacher and of the student
    ((4, 2), (8, 2)), ((4, 2), (6, 3)), ((4, 2), (4, 4)), ((4, 2), (12, 3)), ((4, 1), (6, 1)), ((4, 1), (4, 2)),
    ((4, 1), (6, 2)), ((4, 1), (4, 4)), ((4, 4), (8, 4)), ((1, 1), (4, 2)), ((6, 2), (12, 6)), ((8, 2), (8, 4)),
]  # fmt: skip


@pytest.mark.parametrize("wide", [2, 3])
@pytest.mark.parametrize(("few", "many"), GROWTHS)
def test_queries_and_keys_grow_as_many_as_they_like(few: tuple[int, int], many: tuple[int, int], wide: int) -> None:
    for split in ("equal", "uneven", "fresh"):
        grow(shared_keys(*few), shared_keys(*many, wide), positions(), split=split)


@pytest.mark.parametrize("how", ["expand", "index", "function", "broadcast", "einsum"])
@pytest.mark.parametrize("many", [(8, 2), (6, 3), (4, 4)])
def test_however_they_share_keys(many: tuple[int, int], how: str) -> None:
    grow(shared_keys(4, 2, how=how), shared_keys(*many, how=how), positions())


@pytest.mark.parametrize("many", [(8, 2), (6, 3), (4, 4)])
def test_queries_and_keys_that_are_normalised(many: tuple[int, int]) -> None:
    def norm(_net: Net, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=0.1) * torch.arange(1.0, 1 + x.shape[-1])

    grow(shared_keys(4, 2, turn=norm), shared_keys(*many, turn=norm), positions())


def test_query_heads_that_are_copied_wrongly_are_noticed() -> None:
    teacher, student = shared_keys(4, 2), shared_keys(8, 2)
    record = grow(teacher, student, positions())
    for spoil in (drop_shares, shift_index):
        assert error(change_axes(record, spoil), teacher, student, positions()) > 1e-2


def test_too_few_key_heads_are_refused() -> None:
    """Each key head serves three queries: both of the teacher's, which serve four, need two, and there are three."""
    with refused("q.weight has no room for 1 of its teacher's units"):
        transfer(shared_keys(8, 2), shared_keys(9, 3), positions())


@pytest.mark.parametrize("widths", [{"q": 2.0}, {"q": 1.5, "k": 1.5, "v": 1.5}, {"k": 2.0, "v": 2.0}])
def test_widen_adds_heads(widths: dict[str, float]) -> None:
    (teacher,) = trained(shared_keys(4, 2))
    grown = widen(teacher, positions(), widths)
    for name, factor in ({"q": 1.0, "k": 1.0, "v": 1.0} | widths).items():
        old, new = teacher.get_submodule(name), grown.get_submodule(name)
        assert new.out_features == factor * old.out_features
    assert_same(teacher, grown, positions())


# -- rotary positions --------------------------------------------------------------------------------------------------


def angles(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), 10.0 ** -torch.arange(half, dtype=x.dtype))


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


def turn_by_attribute(net: Net, x: Tensor) -> Tensor:
    if "table" not in vars(net):
        net.table = (angles(x).cos(), angles(x).sin())
    return turn_halves(x, *net.table)


def turn_pairs(_net: Net, x: Tensor) -> Tensor:
    by = torch.polar(torch.ones_like(angles(x)), angles(x))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * by).flatten(-2)


def turn_by_buffer(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "rate"):
        net.register_buffer("rate", 10.0 ** -torch.arange(x.shape[-1] // 2, dtype=x.dtype))
    at = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), net.rate)
    return turn_halves(x, at.cos(), at.sin())


ROTARY = {
    "computed": lambda net, x: turn_halves(x, angles(x).cos(), angles(x).sin()),
    "an attribute": turn_by_attribute,
    "a buffer": turn_by_buffer,
    "complex numbers": turn_pairs,
    "every second": lambda net, x: torch.stack(
        [
            x[..., ::2] * angles(x).cos() - x[..., 1::2] * angles(x).sin(),
            x[..., ::2] * angles(x).sin() + x[..., 1::2] * angles(x).cos(),
        ],
        -1,
    ).flatten(-2),
}


@pytest.mark.parametrize("turn", ROTARY)
def test_heads_with_rotary_positions(turn: str) -> None:
    for few, many in (((2, 2), (4, 4)), ((1, 1), (3, 3)), ((4, 2), (8, 2)), ((4, 2), (6, 3))):
        nets = [shared_keys(*heads, 4, turn=ROTARY[turn]) for heads in (few, many)]
        for net in nets:
            net(positions())
        grow(*nets, positions())


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", [tuple, torch.stack])
def test_heads_with_a_rotary_table_that_the_first_pass_keeps(kind: Callable, ran: bool) -> None:
    """A teacher may have run before; its student has not."""

    def turn(net: Net, x: Tensor) -> Tensor:
        if net.table is None:
            at = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), net.rate)
            net.table = kind([at.cos(), at.sin()])
        return turn_halves(x, *net.table)

    nets = [shared_keys(*heads, 4, turn=turn) for heads in ((2, 2), (4, 4))]
    for net in nets:
        net.table = None
        net.register_buffer("rate", torch.tensor([1.0, 0.1]))
    if ran:
        nets[0](positions())
    grow(*nets, positions())


def test_heads_keep_the_width_of_their_rotary_table() -> None:
    """The teacher's logits are waves of its own frequencies in the distance, and the student's table has others."""
    with refused("cannot grow from 4 to 6 units: mul .* constant of its own width"):
        transfer(*(shared_keys(2, 2, width, turn=ROTARY["computed"]) for width in (4, 6)), positions())
    nets = [shared_keys(2, 2, width, turn=ROTARY["a buffer"]) for width in (4, 8)]
    for net in nets:
        net(positions())
    with refused("rate .* 4 entries that each head meets.*: keep the width of a head .* and take more heads"):
        transfer(*nets, positions())


@pytest.mark.parametrize("turn", ["computed", "every second"])
def test_heads_with_rotary_positions_in_one_part_grow_wider(turn: str) -> None:
    """The further queries are zero, and all of them are multiplied by the root of the growth, the turned ones too."""

    def turn_four(net: Net, x: Tensor) -> Tensor:
        return torch.cat([ROTARY[turn](net, x[..., :4]), x[..., 4:]], -1)

    grow(*(shared_keys(2, 2, width, turn=turn_four) for width in (6, 9)), positions())


def joint(width: int) -> Net:
    """Attention of two sequences in one, each with layers of its own."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (torch.cat([net.get_submodule(f"{name}{k}")(x[:, 2 * k :]) for k in range(2)], 1) for name in "qkv")
        q, k, v = (y.unflatten(-1, (2, width)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return net.out0(y[:, :5]), net.out1(y[:, 5:])

    layers = {f"{name}{k}": nn.Linear(3, 2 * width) for k in range(2) for name in "qkv"}
    return Net(layers | {f"out{k}": nn.Linear(2 * width, 4) for k in range(2)}, forward)


def test_wider_heads_of_two_sequences_in_one() -> None:
    grow(joint(2), joint(3), positions())


# -- relative positions ------------------------------------------------------------------------------------------------

PLACES = torch.arange(5)[:, None] - torch.arange(5) + 4


def alibi(width: int) -> Net:
    """Attention of two heads, each with a slope that grows with the distance, and a mask behind it, as in Bloom."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(-1, (3, 2, width)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        far = (PLACES - 4).abs() * torch.tensor([-0.5, -0.25])[:, None, None]
        a = far.repeat(2, 1, 1).baddbmm(q, k.mT, alpha=width**-0.5).view(2, 2, 5, 5)
        a = (a + torch.full((5, 5), -1e9).triu(1)).softmax(-1)
        return net.out((a @ v.view(2, 2, 5, width)).transpose(1, 2).flatten(2))

    return Net({"qkv": nn.Linear(3, 6 * width), "out": nn.Linear(2 * width, 4)}, forward)


def test_wider_heads_with_slopes() -> None:
    grow(alibi(2), alibi(3), positions())


def relative(heads: int, kind: str, width: int = 2) -> Net:
    """Attention with relative positions: as numbers for each head, or as vectors that all heads multiply."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        a, scale = q @ k.mT, width**-0.5
        if kind == "T5":
            a = a * scale + net.table(PLACES).movedim(-1, 0)
        elif kind == "Swin":
            a = a * scale + net.table[PLACES.flatten()].unflatten(0, (5, 5)).movedim(-1, 0)
        elif kind == "BERT":
            a = a * scale + torch.einsum("bhtc,tsc->bhts", q, net.table(PLACES))
        elif kind == "Music Transformer":
            a = a * scale + q @ net.table[:5].mT
        elif kind == "SAM":
            q, a = q.flatten(0, 1), a.flatten(0, 1) * scale
            a = (a + torch.einsum("btc,tsc->bts", q, net.table[PLACES])).unflatten(0, (-1, heads))
        else:
            by = q.permute(2, 0, 1, 3).flatten(1, 2) @ net.table[PLACES].mT
            a = (a + by.unflatten(1, (-1, heads)).movedim(0, 2)) * scale
        y = a.softmax(-1)
        more = torch.einsum("bhts,tsc->bhtc", y, net.values[PLACES]) if kind == "Shaw" else 0
        return net.out((y @ v + more).transpose(1, 2).flatten(2))

    size = heads if kind in ("T5", "Swin") else width
    table = nn.Embedding(9, size) if kind in ("T5", "BERT") else nn.Parameter(torch.randn(9, size))
    parts = {"qkv": nn.Linear(3, 3 * heads * width), "out": nn.Linear(heads * width, 4), "table": table}
    return Net(parts | ({"values": nn.Parameter(torch.randn(9, width))} if kind == "Shaw" else {}), forward)


@pytest.mark.parametrize("kind", ["T5", "Swin", "BERT", "SAM", "Shaw", "Music Transformer"])
def test_heads_with_relative_positions(kind: str) -> None:
    for few, many in ((2, 4), (2, 3), (1, 3)):
        grow(relative(few, kind), relative(many, kind), positions())
    if kind in ("T5", "Swin"):  # the scale is another one, the numbers that are added are not
        grow(relative(2, kind), relative(3, kind, width=3), positions())


def gated(heads: int, width: int) -> Net:
    """Heads with a mask and a gate that layers compute."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        mask, gate = (net.by(x).unflatten(-1, (2, heads))[..., each, :].mT for each in (0, 1))
        y = (q @ k.mT * width**-0.5 + mask[:, :, None]).softmax(-1) @ v
        return net.out((y * gate.sigmoid()[..., None]).transpose(1, 2).flatten(2))

    widths = {"qkv": 3 * heads * width, "by": 2 * heads}
    return Net({k: nn.Linear(3, n) for k, n in widths.items()} | {"out": nn.Linear(heads * width, 4)}, forward)


def test_wider_heads_with_a_learned_mask_and_a_gate() -> None:
    for heads, width in ((2, 3), (3, 4)):
        grow(gated(2, 2), gated(heads, width), positions())


# -- weights of attention as a result ----------------------------------------------------------------------------------


def returning(heads: int, average: bool = True, read: bool = True, **options: bool) -> Net:
    def forward(net: Net, x: Tensor):
        x = net.enter(x)
        y, weights = net.attention(x, x, x, average_attn_weights=average)
        return (net.out(y), weights) if read else net.out(y)

    attention = nn.MultiheadAttention(2 * heads, heads, batch_first=True, **options)
    return Net({"enter": nn.Linear(3, 2 * heads), "attention": attention, "out": nn.Linear(2 * heads, 4)}, forward)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_the_mean_of_the_weights_wants_equally_many_copies(options: dict[str, bool]) -> None:
    grow(returning(2, **options), returning(4, **options), positions())
    with refused("The mean attention has 3 units and its teacher 2"):
        transfer(returning(2, **options), returning(3, **options), positions())
    grow(returning(2, read=False, **options), returning(3, read=False, **options), positions())


def test_weights_that_are_returned_for_each_head_hold_their_number() -> None:
    grow(returning(2, average=False, read=False), returning(3, average=False, read=False), positions())
    with refused("output"):
        transfer(returning(2, average=False), returning(3, average=False), positions())


def test_a_learned_mask_for_every_head() -> None:
    def masked(heads: int) -> Net:
        def forward(net: Net, x: Tensor) -> Tensor:
            x = net.enter(x)
            mask = net.mask.expand(len(x), -1, -1, -1).flatten(0, 1)
            return net.out(net.attention(x, x, x, attn_mask=mask)[0])

        return Net(dict(returning(heads).named_children()) | {"mask": nn.Parameter(torch.randn(heads, 5, 5))}, forward)

    grow(masked(2), masked(3), positions())
