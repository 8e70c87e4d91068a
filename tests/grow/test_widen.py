"""Surgery without a second constructor: widen and deepen are exact to 1e-10 on inputs that they have not seen."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Net, chain, conv, mlp, randomise, state, unchanged
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torchvision import models

import net2net
from net2net import Blend, TransferError, deepen, equivalence, load_record, replay, save_record, widen
from net2net.fill import gather as filling

BAR = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 3, 6, 8)))


def assert_same(model: nn.Module, grown: nn.Module, inputs, mode: str = "eval") -> None:
    measured = equivalence(model, grown, inputs, mode=mode)
    assert measured.max_relative <= BAR, (mode, str(measured))


def assert_wider(model: nn.Module, make: Callable, widths, modes: tuple[str, ...] = ("eval", "train"), **options):
    """Widen on inputs of `make`, compare on others; return the copy. The model is left as it was."""
    before, mode = state(model), model.training
    grown = widen(model, make(), widths, **options)
    assert unchanged(model, before) and model.training == mode
    assert type(grown) is type(model) and grown.state_dict().keys() == before.keys()
    assert any(tensor.shape != before[name].shape for name, tensor in grown.state_dict().items())
    for each in modes:
        assert_same(model, grown, make(), each)
    return grown


def size(model: nn.Module, *names: str) -> list[int]:
    """The first axis of the weights of these layers."""
    return [len(model.get_parameter(f"{name}.weight")) for name in names]


# -- widths, small networks ---------------------------------------------------------------------------------------


def residual() -> Net:
    """Two branches in a stream, one of them depthwise separable, and a gate."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.n0(net.stem(x)))
        x = x + net.n2(net.point(F.relu6(net.n1(net.depth(net.up(x))))))
        gate = torch.sigmoid(net.open(F.silu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return net.fc((x * gate).mean((2, 3)))

    parts = {"stem": conv(3, 4), "up": conv(4, 9, 1), "depth": conv(9, 9, groups=9), "point": conv(9, 4, 1)}
    parts |= {"squeeze": nn.Conv2d(4, 2, 1), "open": nn.Conv2d(2, 4, 1), "fc": nn.Linear(4, 5)}
    return Net(parts | {f"n{k}": nn.BatchNorm2d(n) for k, n in enumerate((4, 9, 4))}, how)


def tied() -> Net:
    net = Net(
        {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "fc": nn.Linear(4, 5)},
        lambda net, x: net.fc(F.relu(net.c(F.relu(net.b(F.relu(net.a(x.mean((2, 3)))))))).sqrt()),
    )
    net.c.weight = net.b.weight
    return net


def dense() -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        for k in range(3):
            x = torch.cat([x, getattr(net, f"c{k}")(F.relu(getattr(net, f"n{k}")(x)))], 1)
        return net.fc(F.adaptive_max_pool2d(x, (2, 3)).flatten(1))

    parts = {f"n{k}": nn.BatchNorm2d(3 + 4 * k) for k in range(3)}
    return Net(parts | {f"c{k}": conv(3 + 4 * k, 4) for k in range(3)} | {"fc": nn.Linear(90, 5)}, how)


def grouped(groups: int, per: int, behind: int) -> Net:
    """A grouped convolution with `per` units a group in, and `behind` out."""
    return Net(
        {
            "a": conv(3, groups * per),
            "n": nn.BatchNorm2d(groups * per),
            "g": conv(groups * per, groups * behind, groups=groups, bias=True),
            "fc": nn.Linear(groups * behind, 5),
        },
        lambda net, x: net.fc(F.relu(net.g(F.relu(net.n(net.a(x))))).mean((2, 3))),
    )


def block() -> Net:
    """A transformer block of one's own: layer norms, heads, GELU."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        q, k, v = (
            t.reshape(*x.shape[:2], 2, -1).transpose(1, 2) for t in (f(net.n1(x)) for f in (net.q, net.k, net.v))
        )
        x = x + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return net.head((x + net.down(F.gelu(net.up(net.n2(x))))).mean(1))

    parts = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")} | {
        "up": nn.Linear(8, 12),
        "down": nn.Linear(12, 8),
    }
    return Net(
        {"embed": nn.Linear(3, 8), "n1": nn.LayerNorm(8), "n2": nn.LayerNorm(8), "head": nn.Linear(8, 5), **parts}, how
    )


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Made when the default is float64."""
    return lambda: nn.Sequential(*copy.deepcopy(layers)).double()


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(11, shape)


CASES = {
    "chain": (lambda: chain(4, 5), images, 1.5),
    "a unit more": (lambda: chain(4, 5), images, {"conv0": 5}),
    "seven times": (lambda: chain(3, 4), images, 7.0),
    "a unit more in every layer": (lambda: chain(8, 8), images, 1.125),
    "one layer, one not": (lambda: chain(4, 5, 6), images, {"conv0": 1.5, "conv2": 13}),
    "two patterns, one layer": (lambda: chain(4, 5), images, {"conv*": 1.25, "conv1": 11}),
    "a linear": (lambda: mlp(3, 4, 5, 2), lambda: images(6, 3), {"0": 9, "2": 1.2}),
    "residual, depthwise, gate": (residual, images, 1.5),
    "the stream alone": (residual, images, {"stem": 2.0}),
    "between depthwise and pointwise": (residual, images, {"up": 20}),
    "tied": (tied, images, 2.0),
    "concatenated": (dense, images, 1.75),
    "groups": (lambda: grouped(3, 2, 4), images, 1.5),
    "groups read one unit, give several": (lambda: grouped(4, 1, 3), images, 1.5),
    "groups read several, give one": (lambda: grouped(4, 3, 1), images, {"a": 2.0}),
    "a transformer block": (block, lambda: images(2, 5, 3), {"up": 1.5}),
    "its stream": (block, lambda: images(2, 5, 3), {"embed": 2.0}),
    "embedding": (words, tokens(3, 4), 1.5),
    "one dimension, transposed": (
        sequential(
            nn.Conv1d(3, 4, 3),
            nn.BatchNorm1d(4),
            nn.PReLU(4),
            nn.ConvTranspose1d(4, 5, 3, 2),
            nn.ReLU(),
            nn.Conv1d(5, 2, 1),
        ),
        lambda: images(3, 3, 8),
        1.6,
    ),
    "three dimensions": (
        sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.ReLU(), nn.Conv3d(4, 2, 2)),
        lambda: images(2, 3, 4, 5, 6),
        1.5,
    ),
    "weight norm": (
        sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 2))),
        lambda: images(6, 3),
        1.5,
    ),
    "in a module in a module": (
        lambda: nn.ModuleDict({"net": nn.Sequential(chain(4, 5))}).net,
        images,
        {"0.conv?": 1.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_small_network_is_widened_exactly(name: str) -> None:
    make, inputs, widths = CASES[name]
    for seed, split in enumerate(("equal", "uneven", "paired")):
        model = randomise(make(), seed)
        generator = torch.Generator().manual_seed(seed)
        grown = assert_wider(model, inputs, widths, split=split, generator=generator)
        assert_trains(model, grown, inputs())


def assert_trains(model: nn.Module, grown: nn.Module, inputs) -> None:
    """The copy's parameters are alive: as trainable as the model's, of its own, and a step changes the function."""
    mine, theirs = dict(grown.named_parameters()), dict(model.named_parameters())
    assert not {id(p) for p in mine.values()} & {id(p) for p in theirs.values()}
    assert {name: p.requires_grad for name, p in mine.items()} == {name: p.requires_grad for name, p in theirs.items()}
    before = model(inputs).detach()
    optimizer = torch.optim.SGD(mine.values(), lr=0.1)
    output = grown(inputs)
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in mine.items():
        theirs_lack = parameter.grad is None or not bool(parameter.grad.any())
        assert not theirs_lack or name in IDLE, name
    optimizer.step()
    assert not torch.allclose(grown(inputs), before) and torch.equal(model(inputs), before)


IDLE = {"k.bias"}  # softmax ignores what all keys have in common


def test_only_what_was_named_grows() -> None:
    model = randomise(chain(4, 5, 6))
    grown = assert_wider(model, images, {"conv1": 9})
    assert size(grown, "conv0", "conv1", "norm1", "conv2", "fc") == [4, 9, 9, 6, 5]
    assert grown.conv2.weight.shape == (6, 9, 3, 3)


@pytest.mark.parametrize("name", ["depth", "n1", "again"])
def test_a_depthwise_layer_or_a_norm_names_the_units_that_it_carries(name: str) -> None:
    model = randomise(residual())
    model.again = model.up  # the same module by a second name
    grown = assert_wider(model, images, {name: 20})
    assert size(grown, "up", "depth", "n1", "point") == [20, 20, 20, 4]


def test_modules_know_their_new_widths() -> None:
    grown = assert_wider(randomise(residual()), images, 2.0)
    assert (grown.depth.groups, grown.depth.in_channels, grown.depth.out_channels) == (18, 18, 18)
    assert (grown.stem.in_channels, grown.stem.out_channels, grown.n0.num_features) == (3, 8, 8)
    assert (grown.fc.in_features, grown.fc.out_features) == (8, 5)
    transposed = widen(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.PReLU(4), nn.Conv2d(4, 2, 1)), images(), 2.0)
    assert (transposed[0].in_channels, transposed[0].out_channels, transposed[1].num_parameters) == (3, 8, 8)
    table = widen(nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 2)), tokens(3, 4)(), {"0": 2.0})
    assert (table[0].num_embeddings, table[0].embedding_dim, table[1].normalized_shape) == (11, 8, (8,))
    assert repr(table[2]) == repr(nn.Linear(8, 2))


# -- widths, torchvision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pixels", "widths"),
    [
        ("resnet18", 32, 1.5),
        ("resnet18", 32, {"layer2.*": 1.5, "layer3.?.conv1": 260}),
        ("mobilenet_v2", 32, 1.5),
        ("mobilenet_v2", 32, {"features.3.*": 1.3}),
        ("mobilenet_v3_small", 32, 1.25),
        ("squeezenet1_1", 64, 1.5),
        ("regnet_y_400mf", 32, {"trunk_output.block2.*": 1.5}),
    ],
)
def test_torchvisions_networks(name: str, pixels: int, widths) -> None:
    model = randomise(models.get_model(name, num_classes=5), 1, images(4, 3, pixels, pixels))
    assert_wider(model, lambda: images(2, 3, pixels, pixels), widths, modes=("eval",))


def test_a_small_densenet() -> None:
    model = randomise(models.DenseNet(4, (2, 3), 8, num_classes=5), 1, images(4, 3, 32, 32))
    grown = assert_wider(model, lambda: images(2, 3, 32, 32), 1.5)
    assert size(grown, "features.conv0", "features.denseblock2.denselayer3.conv2") == [12, 6]


# -- what is kept -------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied() -> None:
    grown = assert_wider(randomise(tied()), images, 2.0)
    assert grown.b.weight is grown.c.weight and grown.b.bias is not grown.c.bias


@pytest.mark.parametrize("grow", [lambda m: widen(m, images(), {"conv0": 6}), lambda m: deepen(m, images(), ["conv1"])])
def test_tags_on_parameters_are_kept(grow: Callable[[nn.Module], nn.Module]) -> None:
    model = randomise(chain(4, 5))
    model.conv0.weight.no_weight_decay = model.fc.bias.no_weight_decay = True
    tagged = [name for name, p in grow(model).named_parameters() if hasattr(p, "no_weight_decay")]
    assert tagged == ["conv0.weight", "fc.bias"]


def test_modes_frozen_layers_and_buffers_are_kept() -> None:
    model = randomise(chain(4, 5))
    model.conv0.weight.requires_grad_(False)
    model.register_buffer("table", torch.arange(3), persistent=False)
    model.norm1.num_batches_tracked.fill_(7)
    model.norm1.train()
    grown = widen(model, images(), 1.5)
    assert [name for name, p in grown.named_parameters() if not p.requires_grad] == ["conv0.weight"]
    assert grown.norm1.num_batches_tracked == 7 and torch.equal(grown.table, model.table)
    assert [m.training for m in grown.modules()] == [m.training for m in model.modules()]
    assert_same(model, grown, images())


def test_the_memory_format_and_the_dtype_are_kept() -> None:
    model = randomise(chain(4, 5)).to(memory_format=torch.channels_last)
    grown = assert_wider(model, images, 1.5)
    assert grown.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not grown.conv1.weight.is_contiguous()
    half = widen(model.to(torch.bfloat16), images().to(torch.bfloat16), 1.5)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_model_may_be_its_own_class_with_state_of_its_own() -> None:
    """Whatever else a module holds is copied, not built anew: no constructor is called."""

    class Own(nn.Module):
        def __init__(self, never_again: list[int]) -> None:
            super().__init__()
            never_again.append(1)
            self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
            self.note = "kept"

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x).relu())

    calls: list[int] = []
    grown = assert_wider(Own(calls), lambda: images(6, 3), 2.0)
    assert calls == [1] and grown.note == "kept"


def test_a_wrapped_model_gives_a_plain_one() -> None:
    model = randomise(chain(4, 5))
    grown = widen(nn.DataParallel(model), images(), 1.5)
    assert isinstance(grown, Net)
    assert_same(model, grown, images())


def test_noise_changes_the_function_and_a_generator_decides_the_copies() -> None:
    model, example = randomise(chain(4, 5)), images()
    assert equivalence(model, widen(model, example, 1.5, noise=0.1), example).max_relative > 1e-4
    same, again, other = (
        state(widen(model, example, 1.6, generator=torch.Generator().manual_seed(seed))) for seed in (3, 3, 4)
    )
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not all(torch.equal(same[name], other[name]) for name in same)


def test_the_growth_is_a_record_that_is_saved_and_replayed(tmp_path) -> None:
    model, example = randomise(chain(4, 5)), images()
    grown = widen(model, example, 1.5, split="uneven")
    other = copy.deepcopy(grown)
    nn.init.normal_(other.conv1.weight)
    save_record(grown.growth, tmp_path / "growth.json")
    replay(load_record(tmp_path / "growth.json"), model, other)
    assert unchanged(grown, state(other))


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "inputs", "widths", "message"),
    [
        (lambda: chain(4, 5), images, {"conv7": 1.5}, r"No layer is called 'conv7'.*conv0"),
        (lambda: chain(4, 5), images, {"conv0": 0.5}, r"conv0 has 4 units: it cannot shrink to 0\.5"),
        (lambda: chain(4, 5), images, {"conv1": 3}, r"conv1 has 5 units: it cannot shrink to 3"),
        (lambda: chain(4, 5), images, {"fc": 2.0}, r"fc cannot grow from 5 units: it is the network's output"),
        (lambda: chain(4, 5), images, 0.5, r"No width of Net is free to grow by 0\.5"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), lambda: images(4, 3), 2.0, r"No width of Sequential is free to grow"),
        (lambda: nn.Sequential(nn.ReLU()), images, 2.0, r"it has no layers"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), images, 2.0, r"The forward pass of Sequential on inputs"),
        (
            sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)),
            lambda: images(4, 3),
            {"0": 2.0},
            r"0\.weight cannot grow in this way.*softmax in 1 mixes them",
        ),
        (
            lambda: Net({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}, lambda net, x: net.b(net.a(x).view(-1, 4))),
            lambda: images(4, 3),
            {"a": 6},
            r"The forward pass of Net on inputs \(4, 3\) fails",
        ),
    ],
)
def test_what_cannot_grow_is_refused_with_a_sentence(make, inputs, widths, message: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises(TransferError, match=message):
        widen(model, inputs(), widths)
    assert unchanged(model, before)


def test_a_factor_for_all_leaves_what_does_not_grow() -> None:
    """One path has its width written into the forward pass: the others grow nevertheless."""
    net = Net(
        {name: nn.Linear(3, 4) for name in "abc"} | {name.upper(): nn.Linear(4, 5) for name in "abc"},
        lambda net, x: net.A(net.a(x)) + net.B(net.b(x).view(-1, 4)) + net.C(net.c(x).tanh()),
    )
    grown = assert_wider(net, lambda: images(6, 3), 1.5)
    assert size(grown, "a", "b", "c") == [6, 4, 6]


class Numbers(nn.Module):
    """Has its widths as numbers: one, several, and one that may merely equal a width."""

    def __init__(self, equal: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 12), nn.Linear(4, 6), nn.Linear(8, 6), nn.Linear(6, 5)
        self.width, self.parts, self.equal = 4, (4, 8), equal

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.a(x).split(self.parts, -1)
        return self.d(self.b(small[..., : self.width]).tanh() + self.c(large.tanh()) / self.equal)


def test_numbers_that_modules_hold_follow_their_widths() -> None:
    grown = assert_wider(Numbers(), lambda: images(6, 3), {"b": 1.5})
    assert (grown.width, grown.parts, grown.equal) == (4, (4, 8), 3)  # nothing fails: no number moves
    grown = assert_wider(Numbers(), lambda: images(6, 3), 1.5)
    assert size(grown, "a", "b", "c") == [18, 9, 9] and (grown.width, grown.parts, grown.equal) == (6, (6, 12), 3)


def test_a_number_that_merely_equals_a_width_stays() -> None:
    grown = assert_wider(Numbers(equal=12), lambda: images(6, 3), {"a": 1.5})
    assert (grown.width, grown.parts, grown.equal) == (6, (6, 12), 12)


def test_a_model_keeps_its_numbers_and_tensors_whatever_is_tried() -> None:
    model = Numbers(equal=12)
    before, numbers = state(model), (model.width, model.parts, model.equal)
    widen(model, images(6, 3), 1.5)
    assert unchanged(model, before) and (model.width, model.parts, model.equal) == numbers


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_parametrisation_of_fixed_shape_is_refused() -> None:
    net = nn.Sequential(orthogonal(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TransferError, match="parametrisation"):
        widen(net, images(6, 3), {"0": 6})


def test_a_spectral_norm_is_refused() -> None:
    net = nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TransferError, match="spectral norm"):
        widen(net, images(6, 3), {"0": 6})


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (float("nan"), "nan is no width for the layers"),
        ({"0": float("nan")}, "nan is no width for '0'"),
        ({"0": float("inf")}, "inf is no width for '0'"),
        ({"0": "wide"}, "'wide' is no width for '0'"),
    ],
)
def test_a_width_that_is_no_number_is_refused(widths, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        widen(mlp(3, 4, 2), images(6, 3), widths)


@pytest.mark.parametrize("widths", [1.01, {"0": 1.01}, {}])
def test_that_nothing_grows_is_told(widths) -> None:
    with pytest.raises(TransferError):
        widen(mlp(3, 4, 2), images(6, 3), widths)


def test_without_shares_it_would_be_refused(monkeypatch) -> None:
    monkeypatch.setattr(filling, "share_out", lambda axis, value, *rest: value)
    with pytest.raises(TransferError, match="does not compute its teacher's function"):
        widen(randomise(chain(4, 5)), images(), 1.5)


# -- depth --------------------------------------------------------------------------------------------------------


def blocks() -> nn.Module:
    """Blocks as torchvision's: each a nn.Sequential, and a residual one that is a module of its own."""
    return nn.Sequential(
        nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.SiLU()),
        residual_block(4),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Linear(24, 6),
        nn.GELU(),
        nn.Linear(6, 5),
    )


def residual_block(n: int) -> Net:
    parts = {"a": conv(n, 7), "n": nn.BatchNorm2d(7), "b": conv(7, n)}
    return Net(parts, lambda net, x: F.gelu(x + net.b(F.gelu(net.n(net.a(x))))))


def assert_deeper(model: nn.Module, inputs: Callable, after: list[str], **options) -> nn.Module:
    before = state(model)
    grown = deepen(model, inputs(), after, **options)
    assert unchanged(model, before) and type(grown) is type(model)
    assert before.keys() < grown.state_dict().keys()
    assert all(torch.equal(grown.state_dict()[name], tensor) for name, tensor in before.items()) or "depth" in options
    assert_same(model, grown, inputs())
    return grown


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU])
@pytest.mark.parametrize("after", [["0"], ["1"], ["1.b"], ["4"], ["5"], ["0.0"], ["0", "1", "1.a", "4"]])
def test_a_new_layer_computes_the_same(activation: Callable[[], nn.Module], after: list[str]) -> None:
    model = randomise(blocks())
    grown = assert_deeper(model, images, after, activation=activation)
    new = {name for name, module in grown.named_modules() if isinstance(module, Blend)}
    assert new == {f"{name}.deeper.1" for name in after}
    grown(images()).square().sum().backward()
    for name in new:
        amount, weight = (grown.get_parameter(f"{name.removesuffix('.1')}.{each}") for each in ("1.amount", "0.weight"))
        assert amount == 0 and amount.grad.any() and weight.grad.flatten(1).any(1).all()
    torch.optim.SGD(grown.parameters(), lr=0.01).step()
    assert equivalence(model, grown, images()).max_relative > 1e-6


def test_a_deeper_network_is_copied_saved_and_loaded() -> None:
    model, x = randomise(blocks()), images()
    grown = deepen(model, x, ["0", "1", "4"], activation=nn.GELU)
    nn.init.normal_(grown.get_parameter("1.deeper.0.weight"))
    twin = copy.deepcopy(grown)
    assert torch.equal(twin(x), grown(x)) and not torch.allclose(grown(x), model(x))
    nn.init.normal_(twin.get_parameter("1.deeper.0.weight"))
    assert not torch.allclose(twin(x), grown(x)), "the copy runs through a layer of its own"


def test_the_state_of_a_deeper_network_goes_through_a_file(tmp_path) -> None:
    model, x = randomise(blocks()), images()
    grown = deepen(model, x, ["0", "1", "4"], activation=nn.GELU)
    nn.init.normal_(grown.get_parameter("1.deeper.0.weight"))
    torch.save(grown.state_dict(), tmp_path / "state.pt")
    other = deepen(randomise(blocks(), 5), x, ["0", "1", "4"], activation=nn.GELU)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), grown(x))
    old = deepen(randomise(blocks(), 5), x, ["1"])  # what was there before has its old names
    old.load_state_dict(model.state_dict(), strict=False)
    assert_same(model, old, x)


@pytest.mark.parametrize("after", [["0.0"], ["1.a"], ["4"], ["1.b", "0.0"]])
def test_dense_depth_is_exact_and_no_identity(after: list[str]) -> None:
    model = randomise(
        nn.Sequential(
            nn.Sequential(conv(3, 4), conv(4, 6)),
            Net({"a": conv(6, 5), "b": conv(5, 6), "c": conv(6, 6, 1)}, lambda net, x: net.c(net.b(net.a(x)))),
            nn.AdaptiveAvgPool2d((2, 3)),
            nn.Flatten(),
            nn.Linear(36, 6),
            nn.Linear(6, 5),
        )
    )
    grown = assert_deeper(
        model,
        images,
        after,
        depth="dense",
        make=lambda units, dims: nn.Conv2d(units, units, 3, padding=1) if dims else nn.Linear(units, units),
    )
    for name in after:
        weight = grown.get_parameter(f"{name}.deeper.weight").detach()
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        assert (taps - torch.eye(len(taps))).abs().max() > 0.1
        assert (taps != 0).all(), "every new unit reads every old one"


def test_dense_depth_without_a_plain_path_is_an_identity() -> None:
    """An activation between the two layers: no linear map undoes the rotation behind it."""
    grown = assert_deeper(randomise(blocks()), images, ["4"], depth="dense")
    assert torch.equal(grown.get_parameter("4.deeper.0.weight"), torch.eye(6))


def test_a_layer_of_ones_own() -> None:
    def made(kernel: int, *behind: nn.Module) -> Callable[[int, int], nn.Module]:
        return lambda units, dims: nn.Sequential(conv(units, units, kernel), nn.BatchNorm2d(units), *behind)

    model, batches = randomise(chain(4, 5)), images(24, 3, 6, 8)
    grown = assert_deeper(model, images, ["norm0"], make=made(5, Blend(F.gelu)))
    assert grown.norm0.deeper[0].kernel_size == (5, 5)
    assert_deeper(model, images, ["norm0"], make=made(3, nn.ReLU()))  # the network rectifies behind it anyway
    calibrated = deepen(model, images(), ["norm0"], make=made(3), calibrate=batches)
    assert_same(model, calibrated, images())
    passed = model.norm0(model.conv0(batches))
    assert torch.allclose(calibrated.norm0.deeper[1].running_mean, passed.mean((0, 2, 3)))
    with pytest.raises(TransferError, match="not idempotent"):
        deepen(model, images(), ["norm0"], make=made(3, nn.Tanh()))
    with pytest.raises(TransferError, match="is not idempotent"):
        deepen(model, images(), ["fc"], make=lambda units, dims: nn.Sequential(nn.Linear(units, units), nn.ReLU()))


def test_one_and_three_dimensions_and_tokens() -> None:
    for make, inputs, shape in (
        (sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 3)), lambda: images(2, 3, 9), (4, 4, 3)),
        (sequential(nn.Conv3d(3, 4, 2), nn.Tanh(), nn.Conv3d(4, 2, 2)), lambda: images(2, 3, 4, 5, 6), (4, 4, 3, 3, 3)),
        (sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lambda: images(2, 7, 3), (4, 4)),
    ):
        grown = assert_deeper(randomise(make()), inputs, ["0"])
        assert grown.get_parameter("0.deeper.0.weight").shape == shape


class Twice(nn.Sequential):
    """A nn.Sequential with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).tanh()).tanh()


def test_a_sequential_with_a_forward_pass_of_its_own_calls_the_new_layer() -> None:
    grown = assert_deeper(
        nn.Sequential(Twice(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2)), lambda: images(6, 3), ["0"]
    )
    grown(images(6, 3)).sum().backward()
    assert grown.get_parameter("0.deeper.1.amount").grad is not None


def test_a_new_layer_has_the_dtype_of_the_layer_before_it() -> None:
    net = Net({"a": nn.Linear(3, 4).float(), "b": nn.Linear(4, 4)}, lambda net, x: net.b(net.a(x.float()).double()))
    grown = assert_deeper(net, lambda: images(6, 3), ["b"])
    assert grown.get_parameter("b.deeper.0.weight").dtype == torch.float64


def test_the_mode_of_the_model_is_that_of_the_new_layer() -> None:
    for mode in (True, False):
        grown = deepen(randomise(blocks()).train(mode), images(), ["1"])
        assert grown.get_submodule("1.deeper").training is mode


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["9"], r"There is no module '9'"),
        (["0", "stem"], r"There is no module 'stem'"),
    ],
)
def test_wrong_names_are_refused(after: list[str], message: str) -> None:
    model = blocks()
    before = state(model)
    with pytest.raises(TransferError, match=message):
        deepen(model, images(), after)
    assert unchanged(model, before)


def test_a_result_without_one_axis_of_units_is_refused() -> None:
    pair = Net({"a": nn.Linear(3, 4)}, lambda net, x: (net.a(x), net.a(x)))
    net = Net({"pair": pair, "fc": nn.Linear(4, 2)}, lambda net, x: net.fc(sum(net.pair(x))))
    with pytest.raises(TransferError, match="The result of pair is not one tensor with one axis of units"):
        deepen(net, images(6, 3), ["pair"])


@pytest.mark.parametrize("grow", [lambda m, x: widen(m, x, 1.5), lambda m, x: deepen(m, x, ["0"])])
def test_a_grown_network_is_pickled_as_a_whole(grow: Callable, tmp_path) -> None:
    model, x = mlp(3, 4, 2), images(6, 3)
    torch.save(grow(model, x), tmp_path / "network.pt")
    assert_same(model, torch.load(tmp_path / "network.pt", weights_only=False), x)


# -- growth again -------------------------------------------------------------------------------------------------


def test_wider_again_deeper_again_in_any_order() -> None:
    model = randomise(blocks())
    twice = widen(widen(model, images(), 1.5), images(), 1.5, split="uneven")
    wide_then_deep = deepen(widen(model, images(), {"0.0": 7, "4": 1.5}), images(), ["0", "1", "4"], activation=nn.SiLU)
    deep_then_wide = widen(deepen(model, images(), ["0", "1", "4"], activation=nn.SiLU), images(), 1.5)
    deep_twice = deepen(deepen(model, images(), ["1"]), images(), ["1", "1.deeper"], activation=nn.Tanh)
    all_again = widen(deepen(wide_then_deep, images(), ["1"]), images(), {"1.a": 2.0})
    for grown in (twice, wide_then_deep, deep_then_wide, deep_twice, all_again):
        assert_same(model, grown, images())
    assert size(deep_then_wide, "0.0", "0.deeper.0", "4", "4.deeper.0") == [6, 6, 9, 9]
    assert size(twice, "0.0", "1.a", "4") == [9, 17, 14]
    assert net2net.describe(all_again, images()).groups
