"""widen: wider without a second constructor, exact to 1e-12 on inputs that it has not seen."""

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import BAR, assert_same, modes, refused, state, unchanged
from networks import Net, attention, chain, grouped, images, mlp, positions, residual, rows, tied
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torchvision import models

from net2net import TransferError, deepen, describe, equivalence, load_record, replay, save_record, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")
search = sys.modules["net2net.grow.widen"]  # the name is that of the function, too


def assert_wider(model: nn.Module, make: Callable, widths, in_modes=("eval", "train"), **options):
    """Widen on inputs of `make`, compare on others, and return the copy. The model is left as it was."""
    before, mode = state(model), model.training
    grown = widen(model, make(), widths, **options)
    assert unchanged(model, before) and model.training == mode
    assert type(grown) is type(model) and grown.state_dict().keys() == before.keys()
    assert any(tensor.shape != before[name].shape for name, tensor in grown.state_dict().items())
    assert_same(model, grown, make(), in_modes, bar=1e-10)
    return grown


def size(model: nn.Module, *names: str) -> list[int]:
    """The first axis of the weights of these layers."""
    return [len(model.get_parameter(f"{name}.weight")) for name in names]


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Made when the default is float64."""
    return lambda: nn.Sequential(*copy.deepcopy(layers)).double()


def tokens() -> Tensor:
    return torch.randint(11, (3, 4))


CONV1D = (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4), nn.ConvTranspose1d(4, 5, 3, 2), nn.ReLU())
CONV3D = (nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.ReLU(), nn.Conv3d(4, 2, 2))
WORDS = (nn.Embedding(11, 6), nn.Linear(6, 9), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))

# name -> (network, its inputs, the widths)
CASES = {
    "chain": (lambda: chain(4, 5), images, 1.5),
    "a unit more": (lambda: chain(4, 5), images, {"conv0": 5}),
    "seven times": (lambda: chain(3, 4), images, 7.0),
    "a unit more in every layer": (lambda: chain(8, 8), images, 1.125),
    "two patterns, one layer": (lambda: chain(4, 5), images, {"conv*": 1.25, "conv1": 11}),
    "a linear": (lambda: mlp(3, 4, 5, 2), rows, {"0": 9, "2": 1.2}),
    "residual, depthwise, gate": (lambda: residual(4), images, 1.5),
    "the stream alone": (lambda: residual(4), images, {"stem": 2.0}),
    "tied": (lambda: tied(4), images, 2.0),
    "groups": (lambda: grouped(3, 2, 4), images, 1.5),
    "groups read one unit, give several": (lambda: grouped(4, 1, 3), images, 1.5),
    "groups read several, give one": (lambda: grouped(4, 3, 1), images, {"stem": 2.0}),
    "a transformer block": (lambda: attention(2), positions, {"up": 1.5}),
    "its stream": (lambda: attention(2), positions, {"embed": 2.0}),
    "embedding": (sequential(*WORDS), tokens, 1.5),
    "one dimension, transposed": (sequential(*CONV1D, nn.Conv1d(5, 2, 1)), lambda: images(3, 3, 8), 1.6),
    "three dimensions": (sequential(*CONV3D), lambda: images(2, 3, 4, 5, 6), 1.5),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), rows, 1.5),
    "in a module in a module": (lambda: nn.Sequential(chain(4, 5)), images, {"0.conv?": 1.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_small_network_is_widened_exactly(name: str) -> None:
    make, inputs, widths = CASES[name]
    for seed, split in enumerate(("equal", "uneven", "paired")):
        model = look_trained(make(), seed=seed)
        grown = assert_wider(model, inputs, widths, split=split, generator=torch.Generator().manual_seed(seed))
        assert_trains(model, grown, inputs())


def assert_trains(model: nn.Module, grown: nn.Module, inputs) -> None:
    """The copy's parameters are its own, every one has a gradient, and a step changes the function."""
    mine, before = list(grown.parameters()), model(inputs).detach()
    assert not {id(p) for p in mine} & {id(p) for p in model.parameters()}
    output = grown(inputs)
    (output * torch.randn_like(output)).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in mine)
    torch.optim.SGD(mine, lr=0.1).step()
    assert not torch.allclose(grown(inputs), before) and torch.equal(model(inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pixels", "widths"),
    [
        ("resnet18", 32, 1.5),
        ("resnet18", 32, {"layer2.*": 1.5, "layer3.?.conv1": 260}),
        ("mobilenet_v2", 32, {"features.3.*": 1.3}),
        ("mobilenet_v3_small", 32, 1.25),
        ("squeezenet1_1", 64, 1.5),
        ("regnet_y_400mf", 32, {"trunk_output.block2.*": 1.5}),
    ],
)
def test_torchvisions_networks(name: str, pixels: int, widths) -> None:
    model = look_trained(models.get_model(name, num_classes=5), images(4, 3, pixels, pixels), 1)
    assert_wider(model, lambda: images(2, 3, pixels, pixels), widths, in_modes=("eval",))


def test_a_small_densenet() -> None:
    model = look_trained(models.DenseNet(4, (2, 3), 8, num_classes=5), images(4, 3, 32, 32), 1)
    grown = assert_wider(model, lambda: images(2, 3, 32, 32), 1.5)
    assert size(grown, "features.conv0", "features.denseblock2.denselayer3.conv2") == [12, 6]


def test_only_what_was_named_grows() -> None:
    grown = assert_wider(look_trained(chain(4, 5, 6)), images, {"conv1": 9})
    assert size(grown, "conv0", "conv1", "norm1", "conv2", "fc") == [4, 9, 9, 6, 5]
    assert grown.conv2.weight.shape == (6, 9, 3, 3)


@pytest.mark.parametrize("name", ["depth", "n1", "again", "up"])
def test_a_depthwise_layer_or_a_norm_names_the_units_that_it_carries(name: str) -> None:
    model = look_trained(residual(4))
    model.again = model.up  # the same module by a second name
    grown = assert_wider(model, images, {name: 20})
    assert size(grown, "up", "depth", "n1", "point") == [20, 20, 20, 4]


def test_modules_know_their_new_widths() -> None:
    grown = assert_wider(look_trained(residual(4)), images, 2.0)
    assert (grown.depth.groups, grown.depth.in_channels, grown.depth.out_channels) == (18, 18, 18)
    assert (grown.stem.in_channels, grown.stem.out_channels, grown.n0.num_features) == (3, 8, 8)
    transposed = widen(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.PReLU(4), nn.Conv2d(4, 2, 1)), images(), 2.0)
    assert (transposed[0].in_channels, transposed[0].out_channels, transposed[1].num_parameters) == (3, 8, 8)
    table = widen(nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 2)), tokens(), {"0": 2.0})
    assert (table[0].num_embeddings, table[0].embedding_dim, table[1].normalized_shape) == (11, 8, (8,))
    assert repr(table[2]) == repr(nn.Linear(8, 2))


# -- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table", "head"])
def test_a_tied_table_stands_in_the_row_of_its_stream_and_either_name_widens_it(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mlp, self.norm = nn.Embedding(11, 4), mlp(4, 6, 4), nn.LayerNorm(4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.table(x)
            return self.head(self.norm(x + self.mlp(x)))

    model = look_trained(Model())
    assert [group.layers for group in describe(model, tokens()).groups if group.width == 4] == [("table", "mlp.2")]
    grown = assert_wider(model, tokens, {name: 8})
    assert grown.head.weight is grown.table.weight and grown.table.weight.shape == (11, 8)


def test_tied_weights_stay_tied() -> None:
    grown = assert_wider(look_trained(tied(4)), images, 2.0)
    assert grown.b.weight is grown.c.weight and grown.b.bias is not grown.c.bias


@pytest.mark.parametrize("grow", [lambda m: widen(m, images(), {"conv0": 6}), lambda m: deepen(m, images(), ["conv1"])])
def test_tags_on_parameters_are_kept(grow: Callable[[nn.Module], nn.Module]) -> None:
    model = look_trained(chain(4, 5))
    model.conv0.weight.no_weight_decay = model.fc.bias.no_weight_decay = True
    tagged = [name for name, p in grow(model).named_parameters() if hasattr(p, "no_weight_decay")]
    assert tagged == ["conv0.weight", "fc.bias"]


def test_modes_frozen_layers_and_buffers_are_kept() -> None:
    model = look_trained(chain(4, 5))
    model.conv0.weight.requires_grad_(False)
    model.register_buffer("table", torch.arange(3), persistent=False)
    model.norm1.num_batches_tracked.fill_(7)
    model.norm1.train()
    grown = assert_wider(model, images, 1.5, in_modes=("eval",))
    assert [name for name, p in grown.named_parameters() if not p.requires_grad] == ["conv0.weight"]
    assert grown.norm1.num_batches_tracked == 7 and torch.equal(grown.table, model.table)
    assert modes(grown) == modes(model)


def test_the_memory_format_and_the_dtype_are_kept() -> None:
    model = look_trained(chain(4, 5)).to(memory_format=torch.channels_last)
    grown = assert_wider(model, images, 1.5)
    assert grown.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not grown.conv1.weight.is_contiguous()
    half = widen(model.to(torch.bfloat16), images().to(torch.bfloat16), 1.5)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_noise_changes_the_function_and_a_generator_decides_the_copies() -> None:
    model, example = look_trained(chain(4, 5)), images()
    assert equivalence(model, widen(model, example, 1.5, noise=0.1), example).max_relative > 1e-4
    same, again, other = (
        widen(model, example, 1.6, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert unchanged(same, state(again)) and not unchanged(same, state(other))


def test_the_growth_is_a_record_that_is_saved_and_replayed(tmp_path) -> None:
    model, example = look_trained(chain(4, 5)), images()
    grown = widen(model, example, 1.5, split="uneven")
    other = copy.deepcopy(grown)
    nn.init.normal_(other.conv1.weight)
    save_record(grown.growth, tmp_path / "growth.json")
    replay(load_record(tmp_path / "growth.json"), model, other)
    assert unchanged(grown, state(other))


# -- refusals -----------------------------------------------------------------------------------------------------


def written_into_the_pass() -> Net:
    return Net({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}, lambda net, x: net.b(net.a(x).view(-1, 4)))


def branched(times: int) -> Net:
    """Large inputs go another way, which reads every unit of the stem as often."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.other(net.stem(x).relu()).relu()
        return net.c(net.b(x.repeat(1, times)) if x.sum() > 1e6 else net.a(x))

    parts = {"stem": nn.Linear(3, 4), "other": nn.Linear(4, 4), "a": nn.Linear(4, 5), "b": nn.Linear(4 * times, 5)}
    return Net(parts | {"c": nn.Linear(5, 2)}, how)


SOFTMAX = sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2))
REFUSED = [
    (lambda: chain(4, 5), images, {"conv7": 1.5}, r"'conv7'.*conv0"),
    (lambda: chain(4, 5), images, {"conv0": 0.5}, r"conv0 has 4 units.*0\.5"),
    (lambda: chain(4, 5), images, {"conv1": 3}, r"conv1 has 5 units.*3"),
    (lambda: chain(4, 5), images, {"fc": 2.0}, r"fc cannot grow from 5 units.*output"),
    (lambda: chain(4, 5), images, 0.5, r"The factor 0\.5 is below 1"),
    (lambda: nn.Sequential(nn.Linear(3, 2)), rows, 2.0, r"No width of Sequential"),
    (lambda: nn.Sequential(nn.ReLU()), images, 2.0, r"no layers"),
    (lambda: nn.Sequential(nn.Linear(3, 2)), images, 2.0, r"forward pass of Sequential"),
    (SOFTMAX, rows, {"0": 2.0}, r"0\.weight cannot grow.*softmax in 1 mixes"),
    (written_into_the_pass, rows, {"a": 6}, r"forward pass of Net.*\(6, 3\) fails"),
    (written_into_the_pass, rows, {"a": 6}, r"follows from the width of a layer \(a is 4 .*net2net\.transfer"),
    (lambda: mlp(3, 4, 2), rows, {"1": 6}, r"1 has no units to grow: it has no parameters of its own"),
    (lambda: branched(1), rows, {"b": 6}, r"b has no units to grow: .* shows no use of it"),
    (lambda: branched(1), rows, {"stem": 6}, r"shows no use of b\.weight, of shape \(5, 4\).* width that grows \(4\)"),
    (lambda: branched(3), rows, {"stem": 6}, r"shows no use of b\.weight, of shape \(5, 12\).* width that grows \(4\)"),
    (lambda: branched(1), rows, {"a": 6}, r"shows no use of b\.bias, of shape \(5,\)"),
    (lambda: mlp(3, 4, 2), rows, float("nan"), "nan is no width"),
    *(
        (lambda: mlp(3, 4, 2), rows, {"0": w}, f"{w!r} is no width for '0'")
        for w in (float("nan"), float("inf"), "wide")
    ),
    *((lambda: mlp(3, 4, 2), rows, widths, "[Nn]o") for widths in (1.01, {"0": 1.01}, {})),  # nothing grows
]


@pytest.mark.parametrize(("make", "inputs", "widths", "message"), REFUSED)
def test_what_cannot_grow_is_refused_with_a_sentence(make, inputs, widths, message: str) -> None:
    model = make()
    with refused(message, model):
        widen(model, inputs(), widths)


def test_widths_that_an_unreached_layer_does_not_share_grow() -> None:
    model = branched(1)
    model.other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))
    assert size(assert_wider(model, rows, 1.5), "stem", "other.0", "a") == [4, 11, 5]


@pytest.mark.parametrize(("tries", "groups"), [(1, 0), (2, 4), (64, 7)])
def test_a_search_among_groups_has_an_end(monkeypatch, tries: int, groups: int) -> None:
    def grow(factors: dict[int, float]) -> nn.Module:
        if 6 in factors:
            raise TransferError("6 does not grow")
        return nn.Identity()

    monkeypatch.setattr(search, "TRIES", tries)
    wanted = dict.fromkeys(range(8), 1.5)
    if groups:
        assert len(search._grow_most(grow, wanted)[0]) == groups
    else:
        with refused("6 does not grow"):
            search._grow_most(grow, wanted)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_number_of_units_that_every_layer_of_a_module_gets() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.tags = nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.tags(self.lstm(x)[0])

    grown = widen(look_trained(Tagger()), torch.randn(6, 2, 3), {"lstm": 6})
    assert grown.lstm.hidden_size == 6 and grown.tags.in_features == 12


def test_the_record_says_what_grew_and_what_stayed() -> None:
    grew = widen(mlp(3, 4, 5, 2), rows(), {"0": 8}).growth.grew
    assert grew.startswith(
        "53 to 89 parameters; 1 of 3 groups of units grew, others kept their width: 2 (not named), 4 (pin"
    )

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)).view(-1, 6))

    assert "b (free, but a wider copy of it fails), c (pinned" in widen(Written(), rows(), 2.0).growth.grew
    assert "new layers stand behind 0" in str(deepen(mlp(3, 4, 2), rows(), "0").growth)


@pytest.mark.parametrize(("width", "made"), [(17, 16), (18, 20)])
def test_a_number_of_units_that_gates_cannot_have_is_refused(width: int, made: int) -> None:
    """Four gates share their units, so the layer grows by four at a time."""

    def how(net: Net, x: Tensor) -> Tensor:
        i, f, o, g = net.a(x).chunk(4, -1)
        return net.out(o.sigmoid() * torch.tanh(i.sigmoid() * g.tanh() + f.sigmoid()))

    net = look_trained(Net({"a": nn.Linear(3, 16), "out": nn.Linear(4, 2)}, how))
    with refused(f"a cannot grow from 16 to {width} units, but to {made}"):
        widen(net, rows(), {"a": width})
    assert size(assert_wider(net, rows, {"a": 20}), "a") == [20]


def test_a_parametrisation_of_fixed_shape_is_refused() -> None:
    net = nn.Sequential(orthogonal(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with refused("parametrisation", net):
        widen(net, rows(), {"0": 6})


# -- numbers that modules hold ------------------------------------------------------------------------------------


def test_a_factor_for_all_leaves_what_does_not_grow() -> None:
    """One path has its width written into the forward pass: the others grow nevertheless."""
    net = Net(
        {name: nn.Linear(3, 4) for name in "abc"} | {name.upper(): nn.Linear(4, 5) for name in "abc"},
        lambda net, x: net.A(net.a(x)) + net.B(net.b(x).view(-1, 4)) + net.C(net.c(x).tanh()),
    )
    grown = assert_wider(net, rows, 1.5)
    assert size(grown, "a", "b", "c") == [6, 4, 6]


class Size(NamedTuple):
    """How some people keep widths."""

    rows: int
    columns: int


def test_numbers_beside_attributes_of_other_kinds() -> None:
    net = Net({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}, lambda net, x: net.b(net.a(x).view(*net.size) * net.scale))
    net.size, net.scale, net.empty = Size(-1, 4), torch.full((6, 1), 0.5), []
    assert assert_wider(net, rows, {"a": 6}).size == Size(-1, 6)


def numbered(equal: int) -> Net:
    """With its widths as numbers: one, several, and one that may merely equal a width."""

    def how(net: Net, x: Tensor) -> Tensor:
        small, large = net.a(x).split(net.parts, -1)
        return net.d(net.b(small[..., : net.width]).tanh() + net.c(large.tanh()) / net.equal)

    net = Net({"a": nn.Linear(3, 12), "b": nn.Linear(4, 6), "c": nn.Linear(8, 6), "d": nn.Linear(6, 5)}, how)
    net.width, net.parts, net.equal = 4, (4, 8), equal
    return net


@pytest.mark.parametrize(
    ("equal", "widths", "numbers"),
    [
        (3, {"b": 1.5}, (4, (4, 8), 3)),  # nothing fails: no number moves
        (3, 1.5, (6, (6, 12), 3)),
        (12, {"a": 1.5}, (6, (6, 12), 12)),  # merely equals a width
    ],
)
def test_numbers_that_modules_hold_follow_their_widths(equal: int, widths, numbers: tuple) -> None:
    model = numbered(equal)
    grown = assert_wider(model, rows, widths)
    assert (grown.width, grown.parts, grown.equal) == numbers
    assert (model.width, model.parts, model.equal) == (4, (4, 8), equal)


def test_a_layer_of_several_groups_grows_to_the_number_that_is_asked_for() -> None:
    parts = {"a": nn.Embedding(11, 4), "b": nn.LSTM(4, 6, num_layers=2, bidirectional=True), "c": nn.Linear(12, 2)}
    model = look_trained(Net(parts, lambda net, x: net.c(net.b(net.a(x))[0])))
    assert assert_wider(model, tokens, {"b": 8}).b.hidden_size == 8


def test_of_two_equal_widths_only_one_grows() -> None:
    """The stream is as wide as all heads: the number that splits the heads stays, that of the stream follows."""

    def how(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in net.b(h).split(net.split, -1))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return net.d(h + net.c(heads).view(2, 5, net.stream))

    net = Net({"a": nn.Linear(3, 6), "b": nn.Linear(6, 18), "c": nn.Linear(6, 6), "d": nn.Linear(6, 4)}, how)
    net.split, net.stream = 6, 6
    grown = assert_wider(net, positions, {"a": 2.0})
    assert (grown.split, grown.stream, size(grown, "a", "b", "c")) == (6, 12, [12, 18, 12])


class Attends(nn.Module):
    """A stream to which attention of torch's own and a decoder layer add; the keys may be of other widths."""

    def __init__(self, width: int = 8, **options: int) -> None:
        super().__init__()
        self.enter, self.memory = nn.Linear(3, width), nn.Linear(3, 6)
        self.cross = nn.MultiheadAttention(width, 2, **{"batch_first": True, "kdim": 6, "vdim": 6} | options)
        self.layer = nn.TransformerEncoderLayer(width, 2, 12, batch_first=True, norm_first=True)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory, x = self.memory(x).relu(), self.enter(x)
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return self.out(self.norm(self.layer(x)))


@pytest.mark.parametrize(
    ("width", "options"), [(16, {}), (12, {"add_bias_kv": True}), (2.0, {"bias": False, "add_zero_attn": True})]
)
def test_attention_of_torchs_own_grows_with_the_stream_that_it_reads(width: float, options: dict[str, bool]) -> None:
    model, x = look_trained(Attends(**options)), torch.randn(3, 5, 3)
    grown = widen(model, x[:1], {"enter": width})
    assert_same(model, grown, x)
    wide = grown.out.in_features
    for each in (grown.cross, grown.layer.self_attn):
        assert (each.embed_dim, each.head_dim, each.num_heads) == (wide, wide // 2, 2)
    assert (grown.cross.kdim, grown.layer.self_attn.kdim) == (6, wide)
    twice = widen(grown, x[:1], {"memory": 2.0, "layer.linear1": 2.0})
    assert_same(model, twice, x)
    assert (twice.cross.kdim, twice.cross.embed_dim) == (12, wide)
    with torch.no_grad():
        grown.cross.out_proj.weight[0] += 0.1
    assert equivalence(model, grown, x).max_relative > BAR


def test_attention_of_torchs_own_that_reads_what_is_fixed_is_refused() -> None:
    with refused("a wider copy does not run"):
        widen(nn.MultiheadAttention(8, 2, batch_first=True), (torch.randn(2, 5, 8),) * 3, {"in_proj_weight": 2.0})


def test_a_whole_number_that_was_meant_as_a_factor_gets_the_line_to_type() -> None:
    with refused(r"0 has 5 units: it cannot shrink to 2: 2 is a number of units, 2\.0 a factor"):
        widen(mlp(3, 5, 4), rows(), {"0": 2})


def test_heads_grow_with_a_stream_where_the_code_wants_both_equally_wide() -> None:
    """As in nanoGPT: the width of the heads is read off the stream."""

    def how(net: Net, x: torch.Tensor) -> torch.Tensor:
        x = net.embed(x)
        y = net.norm(x)
        q, k, v = (t.view(*y.shape[:2], 2, y.shape[2] // 2).transpose(1, 2) for t in (net.q(y), net.k(y), net.v(y)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape)
        return net.head((x + net.out(y)).mean(1))

    parts = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    net = look_trained(Net({"embed": nn.Linear(3, 8), "norm": nn.LayerNorm(8), **parts, "head": nn.Linear(8, 4)}, how))
    grown = assert_wider(net, positions, {"embed": 2.0})
    assert size(grown, "embed", "q", "k", "v", "out") == [16] * 5
