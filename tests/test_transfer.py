"""Transfers between small networks: exact to 1e-12 in float64, or refused with a reason.

Layouts of units are in trace/test_units.py, copies and noise in fill/, several attempts in test_attempts.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, error, grow, modes, refill, refused, state, trained, unchanged
from networks import Net, chain, conv, images, inserted, mlp, tied, trunk
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.shufflenetv2 import ShuffleNetV2

from net2net import TransferError, deepen, equivalence, random_pad, replay, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")

# -- deeper --------------------------------------------------------------------------------------------------------


def plain(norm: bool, n: int = 3) -> Net:
    """Convolutions as in VGG, with batch norm or without; the student's norms are all its own."""
    parts: dict[str, nn.Module] = {"a": nn.Conv2d(3, n, 3), "b": nn.Conv2d(n, n + 1, 3), "fc": nn.Linear(n + 1, 4)}
    for name, width in (("na", n), ("nb", n + 1)):
        parts[name] = nn.BatchNorm2d(width) if norm else nn.Identity()
    return Net(parts, lambda net, x: net.fc(F.relu(net.nb(net.b(F.relu(net.na(net.a(x)))))).mean((2, 3))))


def parts_of_a_sum(n: int, extra: bool) -> Net:
    """A concatenation that meets a wide layer; `extra` is a new layer behind its first half."""

    def how(net: Net, x: Tensor) -> Tensor:
        a = net.extra(net.a(x))
        x = torch.cat([a, net.b(a)], 1)
        return net.fc((x + net.c(x)).mean((2, 3)))

    parts = {"a": conv(3, n), "b": conv(n, n), "c": conv(2 * n, 2 * n), "fc": nn.Linear(2 * n, 4)}
    return Net(parts | {"extra": conv(n, n) if extra else nn.Identity()}, how)


def rectified_otherwise() -> nn.Module:
    return nn.Sequential(conv(4, 4), nn.Threshold(0.0, 0.0))


class Matrix(nn.Module):
    """A layer whose weight is (units read, units produced), with its bias added in one call or by itself."""

    def __init__(self, reads: int, produces: int, together: bool) -> None:
        super().__init__()
        self.together = together
        self.weight, self.bias = nn.Parameter(torch.randn(reads, produces)), nn.Parameter(torch.randn(produces))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight) if self.together else x @ self.weight + self.bias


def of_matrices(branches: int, layers: int, together: bool = True, n: int = 4) -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x.mean((2, 3))))
        for layer in net.layers:
            x = F.relu(layer(x))
        for up, down in zip(net.up, net.down, strict=True):
            x = x + net.gain * down(F.gelu(up(x)))
        return net.fc(x)

    parts = {"a": nn.Linear(3, n), "gain": nn.Parameter(torch.randn(n)), "fc": nn.Linear(n, 5)}
    parts["layers"] = nn.ModuleList(Matrix(n, n, together) for _ in range(layers))
    parts["up"] = nn.ModuleList(Matrix(n, 2 * n, together) for _ in range(branches))
    return Net(parts | {"down": nn.ModuleList(Matrix(2 * n, n, together) for _ in range(branches))}, how)


def shifted(branches: int) -> Net:
    """Branches that end in numbers which are added to each unit, before a factor and by a depthwise layer."""

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        for mix, before, factor, depthwise in zip(net.mix, net.before, net.factor, net.depthwise, strict=True):
            x = x + depthwise((mix(x) + before) * factor)
        return net.fc(x.mean((2, 3)))

    parts = {"stem": conv(3, 4), "mix": nn.ModuleList(conv(4, 4) for _ in range(branches)), "fc": nn.Linear(4, 3)}
    parts["depthwise"] = nn.ModuleList(conv(4, 4, groups=4, bias=True) for _ in range(branches))
    numbers = {each: [torch.randn(4, 1, 1) for _ in range(branches)] for each in ("before", "factor")}
    return Net(parts | {each: nn.ParameterList(tensors) for each, tensors in numbers.items()}, how)


def steps_side_by_side(blocks: int, n: int = 2) -> Net:
    """All steps of a stream, read together (C2f of YOLOv8)."""

    def how(net: Net, x: Tensor) -> Tensor:
        steps = list(F.silu(net.a(x)).chunk(2, 1))
        for block in net.blocks:
            steps.append(steps[-1] + block(steps[-1]))
        return net.fc(net.b(torch.cat(steps, 1)).mean((2, 3)))

    parts = {"a": conv(3, 2 * n), "b": conv((2 + blocks) * n, n), "fc": nn.Linear(n, 4)}
    return Net(parts | {"blocks": nn.ModuleList(conv(n, n) for _ in range(blocks))}, how)


def low_rank(scale: float) -> Net:
    """A layer beside one of low rank, which is multiplied by a number (LoRA)."""
    parts = {"a": nn.Linear(3, 4), "down": nn.Linear(3, 2), "up": nn.Linear(2, 4), "fc": nn.Linear(4, 5)}
    return Net(parts, lambda net, x: net.fc(net.a(x := x.mean((2, 3))) + net.up(net.down(x)) * scale))


@pytest.mark.parametrize("split", ["equal", "uneven", "paired", "fresh"])
def test_the_step_of_a_new_block_is_read_with_zero_weights(split: str) -> None:
    teacher, student = steps_side_by_side(1), steps_side_by_side(3, 5)
    grow(teacher, student, split=split)
    assert not student.b.weight[:2, -10:].any()
    with torch.no_grad():
        student.b.weight[:2, -5] += 0.1  # negative control: the stream is read once more
    assert equivalence(teacher, student, images()).max_relative > 1e-3


@pytest.mark.parametrize(("before", "after"), [(2.0, 0.5), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_a_layer_takes_the_number_that_multiplies_it_for_its_own(before: float, after: float) -> None:
    grow(low_rank(before), low_rank(after))


DEEPER = {
    "blocks of addmm": (lambda: of_matrices(1, 1), lambda: of_matrices(2, 3)),
    "blocks of addmm, wider": (lambda: of_matrices(1, 1), lambda: of_matrices(2, 2, n=7)),
    "blocks of matmul": (lambda: of_matrices(1, 1, False), lambda: of_matrices(3, 2, False)),
    "one layer": (lambda: chain(3, 4), lambda: chain(3, 4, new=1)),
    "several layers": (lambda: chain(3, 4), lambda: chain(3, 4, new=3)),
    "wider and deeper": (lambda: chain(3, 4), lambda: chain(10, 13, new=2)),
    "on the trunk": (lambda: trunk(3, False, 1), lambda: trunk(3, True, 1)),
    "on a wider trunk": (lambda: trunk(3, False, 1), lambda: trunk(10, True, 2)),
    "in a part of a sum": (lambda: parts_of_a_sum(2, False), lambda: parts_of_a_sum(7, True)),
    "norms alone": (lambda: plain(False), lambda: plain(True)),
    "norms alone, wider": (lambda: plain(False), lambda: plain(True, 8)),
    "another rectifier": (lambda: inserted(None), lambda: inserted(rectified_otherwise)),
    "dilated": (lambda: inserted(None), lambda: inserted(lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2))),
    "rectangular": (lambda: inserted(None), lambda: inserted(lambda: nn.Conv2d(4, 4, (1, 5), padding="same"))),
}


def test_numbers_added_at_the_end_of_a_new_branch_are_zero() -> None:
    grow(shifted(1), student := shifted(3))
    assert not student.before[2].any() and not student.depthwise[2].bias.any() and student.factor[2].all()


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize("name", DEEPER)
def test_a_deeper_student_is_exact_and_no_other_identity_serves(name: str, split: str) -> None:
    """Faults 2 and 18 (centre tap, padding) and 4 (ReLU before a trained batch norm) would all show here."""
    teacher, student = (make() for make in DEEPER[name])
    record = grow(teacher, student, split=split)
    passing = [key for key, origin in record.origins.items() if origin.fill == "pass"]
    assert bool(passing) != name.startswith("norms")
    for key in passing:
        weight = student.get_parameter(key)
        with torch.no_grad():
            weight.copy_(weight.roll(1, -1))  # one pixel beside the centre
        assert equivalence(teacher, student, images()).max_relative > 1e-6
        replay(record, teacher, student)


@pytest.mark.parametrize("name", ["one layer", "on a wider trunk", "norms alone"])
def test_a_new_batch_norm_that_does_not_undo_itself_is_noticed(name: str) -> None:
    """Faults 4 and 12: the affine parameters do not undo the statistics."""
    teacher, student = (make() for make in DEEPER[name])
    record = grow(teacher, student)
    for fill in ("deviation", "mean"):
        assert error(refill(record, fill, "one"), teacher, student) > 1e-4


def test_a_fresh_batch_norm_is_exact_too() -> None:
    """Fresh statistics differ from the identity by eps alone: 5e-6, which a loose test takes for nothing."""
    teacher, student = chain(3), chain(3, new=1)
    transfer(teacher, student, images())
    assert_same(teacher, student, images())


def test_a_new_layer_on_the_trunk_is_an_identity_and_a_new_branch_is_silent() -> None:
    student = trunk(9, True, 3)
    how = {name: origin.how for name, origin in grow(trunk(4, False, 1), student, split="uneven").origins.items()}
    assert how["extra.0.weight"] == "identity" and how["branches.0.weight"] == "shared"
    assert how["branches.1.weight"] == how["branches.2.weight"] == "silent"
    assert not student.branches[2].weight.any()


@pytest.mark.parametrize("width", [8, 16], ids=["as wide", "twice as wide"])
def test_new_blocks_of_shuffled_halves(width: int) -> None:
    """New blocks pass their half of the stream on: which layer reads a unit then, the shuffles decide."""
    x = images(3, 3, 32, 32)
    teacher = look_trained(ShuffleNetV2([2, 3, 2], [4, 8, 16, 32, 32], 5), x, 1)
    student = ShuffleNetV2([4, 5, 3], [width // 2, width, 2 * width, 4 * width, 32], 5).eval()
    record = transfer(teacher, student, x)
    assert_same(teacher, student, images(3, 3, 32, 32))
    assert error(refill(record, "pass", "zero"), teacher, student, x) > 1e-3


# -- what is left alone, and what randomness does --------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "grow", [random_pad, lambda *pair: transfer(*pair, noise=0.1, calibrate=pair[-1], split="uneven")]
)
def test_teacher_example_modes_and_random_state_are_untouched(grow: Callable, fails: bool) -> None:
    """Fault 5: noise written into a view of the teacher."""
    teacher, student = trained(chain(3, 4), chain(8, 9, new=1))
    teacher.norm0.train(), student.train(), student.norm1.eval()
    if fails:
        student.fc = nn.Linear(student.fc.in_features, 6)
    x = images()
    before, was, copy, random = state(teacher), modes(teacher, student), x.clone(), torch.get_rng_state()
    try:
        grow(teacher, student, x)
    except TransferError as refusal:
        assert fails and "fc.weight cannot grow from 5 to 6 units" in str(refusal)
    assert unchanged(teacher, before) and torch.equal(x, copy) and torch.equal(random, torch.get_rng_state())
    assert modes(teacher, student) == was
    assert not any(hooks for m in student.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_a_generator_makes_the_map() -> None:
    teacher, maps, weights = look_trained(chain(3, 4), seed=1), [], []
    for seed in (3, 3, 4, None, 0):  # the students' own weights and the global state differ, and have no say
        student, generator = chain(8, 9), None if seed is None else torch.Generator().manual_seed(seed)
        record = transfer(teacher, student, images(), generator=generator, noise=0.1, split="uneven")
        maps.append(record.origins["conv1.weight"].axes[0].index)
        weights.append(student.conv1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(maps[0], maps[2])
    assert torch.equal(weights[3], weights[4])


def test_a_spectral_norm_that_stays_is_only_read() -> None:
    """In training mode every look at its weight would change its buffers."""
    teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    before, x = state(teacher), images(6, 3)
    deeper = deepen(teacher, x, ["0"])
    assert unchanged(teacher, before)
    assert_same(teacher, deeper, x)


# -- refusals --------------------------------------------------------------------------------------------------------


def two(body, reads=1):
    """Two convolutions of n units, which `body` joins, and a linear layer."""
    return lambda n: Net(
        {"a": conv(3, n), "b": conv(3, n), "fc": nn.Linear(reads * n, 4)},
        lambda net, x: net.fc(body(net.a(x), net.b(x))),
    )


def laid_out(n: int, body: Callable[[Tensor], Tensor]) -> Net:
    """A convolution of n units, whose maps `body` lays out, and a linear layer."""
    reads = body(torch.zeros(1, n, 6, 8)).numel()
    return Net({"a": conv(3, n), "fc": nn.Linear(reads, 4)}, lambda net, x: net.fc(body(net.a(x)).flatten(1)))


def pooled(n: int, *size: int) -> Net:
    return laid_out(n, lambda x: F.adaptive_avg_pool2d(x, size))


def first_unused(unused: bool) -> Net:
    return Net({"a": conv(3, 3), "b": conv(3, 3)}, lambda net, x: net.b(x if unused else F.relu(net.a(x))))


def untied(n: int) -> Net:
    net = tied(n)
    net.c.weight = nn.Parameter(torch.randn(n, n))
    return net


def normed(n: int, act: Callable, new: bool) -> Net:
    """A layer norm, whose eps padding changes, and a product that is not its teacher's if `act` is another."""
    parts = {"a": nn.Linear(3, n), "norm": nn.LayerNorm(n), "b": nn.Linear(n, 5), "c": nn.Linear(5, 5)}
    parts["extra"] = nn.Linear(n, n) if new else nn.Identity()

    def how(net: Net, x: Tensor) -> Tensor:
        x = net.a(x.mean((2, 3)))
        return net.c(act(net.b(net.norm(net.extra(x)))) * net.b(x))

    return Net(parts, how)


def spectral(n: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, n, 1), nn.ReLU(), spectral_norm(nn.Conv2d(n, 2, 1)))


ADDED, MULTIPLIED = two(lambda a, b: (a + b).mean((2, 3))), two(lambda a, b: (a * b).mean((2, 3)))
CONCATENATED = two(lambda a, b: torch.cat([a, b], 1).mean((2, 3)), 2)


def functional_norm(n: int) -> Net:
    parts = {"a": nn.Linear(3, n), "fc": nn.Linear(n, 2)}
    return Net(parts, lambda net, x: net.fc(F.rms_norm(net.a(x.mean((2, 3))), (net.a.out_features,))))


def scaled_layers(depth: int) -> Net:
    def how(net: Net, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        for k, layer in enumerate(net.layers):
            x = x + net.s[k] * layer(x.relu())
        return x

    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
    return Net({"layers": layers, "s": nn.Parameter(torch.ones(depth))}, how)


COMPUTES_ELSE = {
    "a product for a sum": (lambda: ADDED(3), lambda: MULTIPLIED(5), "does not compute its teacher's function"),
    "rows for columns": (lambda: laid_out(3, lambda x: x), lambda: laid_out(5, lambda x: x.mT), "layout"),
}
# new layers behind a convolution of 4 units and its ReLU
NO_IDENTITY = {
    "an even kernel": (lambda: nn.Conv2d(4, 4, 2), r"extra\.weight.*kernel.*even"),
    "a stride": (lambda: nn.Conv2d(4, 4, 3, (1, 2), 1), r"extra\.weight.*stride"),
    "padding": (lambda: nn.Conv2d(4, 4, 3, padding=(1, 0)), r"extra\.weight.*padding \(1, 0\)"),
    "a norm across units": (lambda: nn.GroupNorm(1, 4), r"norm extra cannot be an identity: what it normalises"),
    "a norm without affine": (lambda: nn.BatchNorm2d(4, affine=False), r"batch norm extra cannot undo"),
}
REFUSED = {
    "narrower": (lambda: chain(8, 9), lambda: chain(8, 5), r"conv1\.weight has 5 units.*9, 4 too few"),
    "a layer missing": (lambda: chain(3, 4), lambda: chain(3), r"no counterpart of the teacher's conv1\.weight"),
    "more places": (lambda: pooled(3, 3, 2), lambda: pooled(5, 3, 3), r"fc\.weight cannot grow.*9 entries of one unit"),
    "fewer places": (lambda: pooled(3, 3, 2), lambda: pooled(5, 2, 1), r"fc\.weight gets no units for 12 of"),
    "a sum for a concatenation": (lambda: CONCATENATED(3), lambda: ADDED(6), r"a\.weight meet units of another layer"),
    "a sum too narrow": (lambda: CONCATENATED(3), lambda: ADDED(3), r"joins units of b\.weight.*teacher keeps apart"),
    "a layer out of use": (lambda: first_unused(False), lambda: first_unused(True), r"axis 0 of a\.weight"),
    "a new layer too narrow": (
        lambda: inserted(None),
        lambda: inserted(lambda: conv(4, 3), 3),
        r"extra\.weight.* 4 .*1 too few",
    ),
    "an example that does not fit": (lambda: mlp(5, 4, 2), lambda: mlp(5, 8, 2), r"Sequential.*\(4, 3, 6, 8\) fails"),
    "new ties": (lambda: untied(3), lambda: tied(8), r"no counterpart of the teacher's c\.weight"),
    "a spectral norm": (lambda: spectral(4), lambda: spectral(7), r"2\.weight has a spectral norm"),
    "a norm that keeps no eps": (
        lambda: functional_norm(4),
        lambda: functional_norm(6),
        r"its eps is the number .* in the forward pass",
    ),
    "numbers for each layer": (lambda: scaled_layers(2), lambda: scaled_layers(3), r"s has shape .* keep their size"),
    "several attempts": (lambda: normed(8, torch.relu, False), lambda: normed(11, torch.tanh, True), None),
    **{name: (lambda: inserted(None), lambda new=new: inserted(new), why) for name, (new, why) in NO_IDENTITY.items()},
    **COMPUTES_ELSE,  # which shows when the student is filled
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_student_that_cannot_be_grown_is_refused_and_left_as_it_was(name: str) -> None:
    make_teacher, make_student, message = REFUSED[name]
    teacher, student = trained(make_teacher(), make_student())
    with refused(message, teacher, *([] if name in COMPUTES_ELSE else [student])):
        transfer(teacher, student, images())


@pytest.mark.parametrize("name", ["narrower", "a layer missing", "a spectral norm"])
def test_the_baseline_refuses_what_the_method_refuses(name: str) -> None:
    make_teacher, make_student, message = REFUSED[name]
    teacher, student = make_teacher(), make_student()
    with refused(message, teacher, student):
        random_pad(teacher, student, images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "odd"}, "split 'odd' is unknown"),
        ({"depth": "odd"}, "depth 'odd' is unknown"),
        *(({"noise": noise}, f"noise is {noise}") for noise in (-0.1, float("nan"), float("inf"))),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    student = chain(4)
    with refused(message, student):
        transfer(chain(3), student, images(), **options)


# -- tied tables -----------------------------------------------------------------------------------------------------


def words(n: int, norm: type[nn.Module] | None) -> Net:
    """A language model whose head is its table of words."""
    net = Net(
        {"e": nn.Embedding(5, n), "a": nn.Linear(n, 2 * n), "b": nn.Linear(2 * n, n), "head": nn.Linear(n, 5)}
        | ({"norm": norm(n)} if norm else {}),
        lambda net, x: net.head((net.norm if norm else F.relu)(net.e(x) + net.b(F.gelu(net.a(net.e(x)))))),
    )
    net.head.weight = net.e.weight
    return net


@pytest.mark.parametrize("width", [7, 9, 12])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_tied_table_of_words_grows_to_any_width_behind_a_norm(norm: type[nn.Module], width: int) -> None:
    """A padded table holds, for the embedding, what the norm makes zero of before the head reads it."""
    teacher, student = words(6, norm), words(width, norm)
    inputs = torch.arange(20).view(4, 5) % 5
    grow(teacher, student, inputs, modes=("eval", "train"))
    assert student.head.weight is student.e.weight
    with torch.no_grad():
        student.e.weight[:, -1] += 0.1  # negative control: what pads the table matters
    assert equivalence(teacher, student, inputs).max_relative > 1e-3


def test_a_tied_table_that_grows_by_fresh_units_is_refused() -> None:
    """The block's fresh units join the stream: the table cannot be fresh for the one and zero for the other."""
    with refused(r"e\.weight"):
        transfer(words(6, None), words(9, None), torch.arange(5)[None])


def test_the_ties_of_the_teacher_may_be_broken() -> None:
    grow(tied(3), untied(8), split="uneven")
