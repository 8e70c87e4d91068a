"""What people write by hand: mixers, masked weights, scores, experts that rows choose, kernels over a whole axis."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, change_axes, drop_shares, error, refused, shift_index, trained
from networks import Net, images, rows
from torch import Tensor, nn
from torch.nn.utils import prune

from net2net import transfer, widen

pytestmark = pytest.mark.usefixtures("float64")


def mixer(n: int, hidden: int = 5, positions: int = 7, kind: str = "linear") -> Net:
    """A layer mixes the positions of every unit, and another what the first one made, as in an MLP mixer."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        y = net.norm(x) if kind == "convolution" else net.norm(x).transpose(1, 2)
        y = net.back(F.gelu(net.mix(y)))
        x = x + (y if kind == "convolution" else y.transpose(1, 2))
        return net.head(torch.tanh(net.up(x)).mean(1))

    layer = (lambda a, b: nn.Conv1d(a, b, 1)) if kind == "convolution" else nn.Linear
    parts = {"embed": nn.Linear(3, n), "norm": nn.LayerNorm(n), "mix": layer(positions, hidden)}
    return Net({**parts, "back": layer(hidden, positions), "up": nn.Linear(n, n), "head": nn.Linear(n, 4)}, how)


def masked(n: int, kind: str = "functional") -> Net:
    """Convolutions whose filters a mask cuts, as PixelCNN's; the mask may say more than where."""

    def cut(net: Net, name: str) -> Tensor:
        layer, mask = getattr(net, name), getattr(net, f"mask_{name}")
        if kind == "in place":
            layer.weight.data *= mask
            return layer.weight
        return layer.weight * mask

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, cut(net, "a"), net.a.bias, padding=1))
        return net.fc(F.relu(F.conv2d(x, cut(net, "b"), padding=1)).mean((2, 3)))

    net = Net({"a": nn.Conv2d(3, n, 3), "b": nn.Conv2d(n, n, 3, bias=False), "fc": nn.Linear(n, 4)}, how)
    for name in "ab":
        net.register_buffer(f"mask_{name}", (torch.rand(getattr(net, name).weight.shape) > 0.4).double())
    return net


def pruned(n: int) -> nn.Module:
    """A layer that torch has pruned, whose weight is made anew in each forward pass."""
    return nn.Sequential(nn.Linear(3, n), nn.Tanh(), prune.random_unstructured(nn.Linear(n, 4), "weight", 0.5))


def scores(n: int, heads: int = 2) -> Net:
    """Each head's units, times a parameter, are summed to a score that gates them, as in graph attention."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = torch.tanh(net.a(x)).unflatten(-1, (heads, -1))
        return net.fc((x * (x * net.score).sum(-1, keepdim=True).sigmoid()).flatten(-2))

    score = nn.Parameter(torch.randn(1, heads, n))
    return Net({"a": nn.Linear(3, heads * n), "score": score, "fc": nn.Linear(heads * n, 4)}, how)


def numbers(n: int) -> Net:
    """Each number of the input has a row of its own that it multiplies, as in a transformer of tables."""

    def how(net: Net, x: Tensor) -> Tensor:
        return net.fc(F.gelu(net.a(net.norm(net.table * x[:, :, None] + net.shift))).mean(1))

    table, shift = nn.Parameter(torch.randn(3, n)), nn.Parameter(torch.randn(3, n))
    return Net(
        {"table": table, "shift": shift, "norm": nn.LayerNorm(n), "a": nn.Linear(n, n), "fc": nn.Linear(n, 4)}, how
    )


def experts(n: int) -> Net:
    """Rows choose experts, and each expert adds to its rows."""

    def how(net: Net, x: Tensor) -> Tensor:
        chosen = net.gate(x).argmax(-1)
        x = net.a(x)
        out = torch.zeros_like(x)
        for k, expert in enumerate(net.experts):
            places = torch.where(chosen == k)[0]
            out[places] += torch.tanh(expert(x[places]))
        return net.fc(F.relu(x + out))

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(n, n) for _ in range(2))
    return Net({"gate": nn.Linear(3, 2), "a": nn.Linear(3, n), "experts": layers, "fc": nn.Linear(n, 4)}, how)


def sentence(n: int) -> Net:
    """A kernel that covers all units of a word, as in a convolutional network for text."""
    parts = {"a": nn.Linear(3, n), "b": nn.Conv2d(1, 4, (2, n)), "fc": nn.Linear(4, 3)}
    return Net(parts, lambda net, x: net.fc(F.relu(net.b(net.a(x)[:, None])).flatten(2).amax(-1)))


def borrowed(n: int) -> Net:
    """A linear layer's weight as the filter of a convolution, and a vector of frequencies as a matrix of one row."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.a(x) + net.c(torch.sin(x[..., :1] @ net.frequencies[None]))
        return net.fc(F.conv1d(x.transpose(1, 2), net.b.weight[..., None]).tanh().mean(-1))

    parts = {"a": nn.Linear(3, n), "b": nn.Linear(n, n, bias=False), "c": nn.Linear(5, n), "fc": nn.Linear(n, 3)}
    return Net({**parts, "frequencies": nn.Parameter(torch.randn(5))}, how)


def bag(n: int, mode: str = "mean") -> nn.Module:
    """The rows of several words, summed."""
    return nn.Sequential(nn.EmbeddingBag(11, n, mode=mode), nn.Linear(n, 3))


def scan(n: int) -> Net:
    """Three factors in one product, as in a scan of states."""

    def how(net: Net, x: Tensor) -> Tensor:
        u, b = net.a(x), net.b(x)
        return net.fc(torch.einsum("btd,btn,btd->bd", u.sigmoid(), b, u))

    return Net({"a": nn.Linear(3, n), "b": nn.Linear(3, 4), "fc": nn.Linear(n, 3)}, how)


def latents(n: int) -> Net:
    """A norm of a parameter, which a query of latents begins with."""

    def how(net: Net, x: Tensor) -> Tensor:
        z = net.z.expand(len(x), -1, -1)
        z = z + torch.tanh(net.q(net.norm(z)) + net.a(x).mean(1, keepdim=True))
        return net.fc(z.mean(1))

    parts = {"z": nn.Parameter(torch.randn(1, 4, n)), "norm": nn.LayerNorm(n), "q": nn.Linear(n, n)}
    return Net({**parts, "a": nn.Linear(3, n), "fc": nn.Linear(n, 3)}, how)


def flow(n: int) -> Net:
    """A matrix whose determinant counts, too, in front of coupled layers."""

    def how(net: Net, x: Tensor) -> list[Tensor]:
        x = x @ net.w
        a, b = x.chunk(2, -1)
        return [torch.cat([a, b + net.back(F.relu(net.a(a)))], -1), torch.slogdet(net.w)[1]]

    return Net({"w": nn.Parameter(torch.randn(4, 4)), "a": nn.Linear(2, n), "back": nn.Linear(n, 2)}, how)


def spectral(n: int, layers: int = 1) -> Net:
    """Matrices of their own for each frequency, as in a Fourier neural operator."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).transpose(1, 2)
        for weight in net.frequencies:
            seen = torch.fft.rfft(x)
            made = torch.zeros_like(seen)
            made[:, :, :2] = torch.einsum("bix,iox->box", seen[:, :, :2], weight)
            x = x + torch.tanh(torch.fft.irfft(made, n=x.shape[-1]))
        return net.fc(x.mean(-1))

    weights = (nn.Parameter(torch.randn(n, n, 2, dtype=torch.complex128) / n) for _ in range(layers))
    return Net({"a": nn.Linear(3, n), "frequencies": nn.ParameterList(weights), "fc": nn.Linear(n, 3)}, how)


def shuffled(n: int, groups: int = 2) -> Net:
    """Two grouped convolutions with a shuffle between them, as in a ShuffleNet."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.b(x.flatten(2).mean(-1)))
        x = F.relu(net.c(x[..., None])).unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
        return net.fc(net.d(x).flatten(1))

    parts = {"b": nn.Linear(3, n), "c": nn.Conv1d(n, n, 1, groups=groups), "d": nn.Conv1d(n, n, 1, groups=groups)}
    return Net({**parts, "fc": nn.Linear(n, 3)}, how)


CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int], Callable[[], Tensor]]] = {
    "mixer": (mixer, (4, 8), lambda: images(4, 7, 3)),
    "mixer of as many positions as units": (lambda n: mixer(n, positions=4), (4, 8), lambda: images(4, 4, 3)),
    "mixer with more hidden positions": (lambda n: mixer(4, hidden=n), (5, 9), lambda: images(4, 7, 3)),
    "mixer with convolutions": (lambda n: mixer(n, kind="convolution"), (4, 12), lambda: images(4, 7, 3)),
    "masked weights": (masked, (4, 7), images),
    "weights masked in place": (lambda n: masked(n, "in place"), (4, 7), images),
    "a pruned layer": (pruned, (5, 9), rows),
    "scores of units": (scores, (3, 5), rows),
    "scores in more heads": (lambda n: scores(3, n), (2, 4), rows),
    "a table of numbers": (numbers, (4, 8), rows),
    "rows written by values": (experts, (4, 7), lambda: images(20, 3)),
    "a kernel over all units": (sentence, (4, 7), lambda: images(4, 6, 3)),
    "a weight as a filter, a vector as a matrix": (borrowed, (4, 7), lambda: images(4, 6, 3)),
    "bags of words": (bag, (4, 7), lambda: torch.randint(11, (6, 5))),
    "the largest of words": (lambda n: bag(n, "max"), (4, 7), lambda: torch.randint(11, (6, 5))),
    "three factors": (scan, (4, 7), lambda: images(4, 6, 3)),
    "a norm of a parameter": (latents, (4, 8), lambda: images(4, 6, 3)),
    "a determinant": (flow, (4, 7), lambda: images(4, 4)),
    "a matrix for each frequency": (spectral, (4, 7), lambda: images(4, 6, 3)),
    "groups behind a shuffle": (shuffled, (8, 16), images),
    "groups behind a shuffle, 1.5 times as wide": (shuffled, (8, 12), images),
}


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@pytest.mark.parametrize("name", CASES)
def test_wider_is_exact(name: str, split: str) -> None:
    make, widths, draw = CASES[name]
    teacher, student = trained(*map(make, widths))
    x = draw()
    record = transfer(teacher, student, x, split=split)
    assert_same(teacher, student, draw())
    for spoil in (drop_shares, shift_index) if split == "equal" else (shift_index,):
        assert error(change_axes(record, spoil), teacher, student, draw()) > 1e-4


def test_other_numbers_of_groups_behind_a_shuffle_are_exact() -> None:
    teacher, student = trained(shuffled(6, 3), shuffled(20, 5))
    transfer(teacher, student, images())
    assert_same(teacher, student, images())


def test_a_mask_is_copied_with_its_weight() -> None:
    teacher, student = trained(masked(4), masked(7))
    transfer(teacher, student, images())
    student.mask_b[:, 4:] = 1 - student.mask_b[:, 4:]
    with pytest.raises(AssertionError):
        assert_same(teacher, student, images())


def test_a_new_stack_of_matrices_is_no_identity() -> None:
    def stacks(count: int) -> Net:
        def how(net: Net, x: Tensor) -> Tensor:
            x = F.relu(net.a(x))
            for matrices in net.stacks:
                x = F.relu(torch.einsum("bti,tio->bto", x, matrices))
            return net.fc(x.mean(1))

        matrices = nn.ParameterList(nn.Parameter(torch.randn(6, 4, 4)) for _ in range(count))
        return Net({"a": nn.Linear(3, 4), "stacks": matrices, "fc": nn.Linear(4, 2)}, how)

    teacher, student = trained(stacks(1), stacks(2))
    with refused("its weight is a stack of matrices", teacher):
        transfer(teacher, student, images(4, 6, 3))


def test_a_new_layer_with_a_weight_norm_may_add_zeros() -> None:
    def deep(count: int) -> Net:
        normed = nn.utils.parametrizations.weight_norm
        branches = nn.ModuleList(nn.Sequential(normed(nn.Linear(4, 4)), nn.ReLU()) for _ in range(count))

        def how(net: Net, x: Tensor) -> Tensor:
            x = F.relu(net.a(x))
            for branch in net.branches:
                x = F.relu(x + branch(x))
            return net.fc(x)

        return Net({"a": nn.Linear(3, 4), "branches": branches, "fc": nn.Linear(4, 2)}, how)

    teacher, student = trained(deep(1), deep(2))
    transfer(teacher, student, rows())
    assert_same(teacher, student, rows())
    student(rows()).sum().backward()
    lengths = student.branches[1][0].parametrizations.weight.original0
    assert not lengths.any()
    assert lengths.grad.isfinite().all()


def test_a_function_that_holds_the_network_is_copied_with_it() -> None:
    net = Net(
        {"table": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)}, lambda net, x: net.read(net.fc(net.table(x).tanh()))
    )
    net.read = lambda x: x @ net.table.weight.T
    x = torch.randint(9, (5, 3))
    (net,) = trained(net)
    grown = widen(net, x, {"fc": 2.0, "table": 2.0})
    assert_same(net, grown, x)
    with torch.no_grad():
        grown.table.weight.zero_()
    assert not grown(x).any()
    assert net(x).any()


def test_weighted_sums_of_one_network_only_are_named() -> None:
    def plain(n: int) -> Net:
        net = scores(n)
        net.how = lambda net, x: net.fc((torch.tanh(net.a(x)).unflatten(-1, (2, -1)) * net.score).flatten(-2))
        return net

    teacher, student = trained(scores(3), plain(3))
    with refused("uses score differently", teacher):
        transfer(teacher, student, rows())


def test_all_that_is_free_in_a_mixer_grows() -> None:
    (net,) = trained(mixer(4))
    grown = widen(net, images(4, 7, 3), 2.0)
    assert_same(net, grown, images(4, 7, 3))
    assert (len(grown.mix.weight), len(grown.back.weight)) == (10, 7)
