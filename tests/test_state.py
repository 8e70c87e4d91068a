"""Everything that a network is besides its units: dtypes, flags, wrappers, several inputs, outputs of any kind."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from checks import BAR, assert_same, grow, modes, refused, state, trained, unchanged
from networks import Net, chain, conv, images, mlp
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

from net2net import TransferError, describe, equivalence, transfer, widen
from net2net.trace.tracer import IS_OUTPUT

pytestmark = pytest.mark.usefixtures("float64")


def pair() -> tuple[nn.Module, ...]:
    return trained(chain(4, 5), chain(13, 11))


# -- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-6), (torch.float64, BAR)]
)
def test_a_dtype_is_as_exact_as_its_rounding(dtype: torch.dtype, bar: float, split: str) -> None:
    teacher, student = (model.to(dtype) for model in pair())
    transfer(teacher, student, images().to(dtype), split=split)
    assert_same(teacher, student, images().to(dtype), bar=bar)
    assert {t.dtype for t in student.state_dict().values() if t.is_floating_point()} == {dtype}


def test_shares_of_low_precision_are_rounded_once() -> None:
    teacher, student = (model.to(torch.bfloat16) for model in pair())
    record = transfer(teacher, student, images().to(torch.bfloat16), split="equal")
    axes = record.origins["conv1.weight"].axes
    exact = teacher.conv1.weight.double()[axes[0].index][:, axes[1].index] * axes[1].share[:, None, None]
    once = exact.float().bfloat16()
    assert (axes[1].share == 1 / 3).any() and torch.equal(student.conv1.weight, once)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_teacher_and_student_of_different_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Both take the input in a dtype of their own."""

    def cast(model: nn.Module, dtype: torch.dtype) -> Net:
        return Net({"net": model.to(dtype)}, lambda net, x: net.net(x.to(dtype)))

    teacher, student = map(cast, pair(), dtypes)
    transfer(teacher, student, images())
    assert_same(teacher, student, images(), bar=max(torch.finfo(dtype).eps for dtype in dtypes) * 4)


def test_layers_of_different_dtypes() -> None:
    def make(n: int) -> Net:
        parts = {"a": nn.Linear(3, n).bfloat16(), "b": nn.Linear(n, n + 1).float(), "c": nn.Linear(n + 1, 4)}
        return Net(parts, lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x.bfloat16())).float())).double()))

    teacher, student = make(4), make(8)
    transfer(teacher, student, images(6, 3))
    assert [p.dtype for p in student.parameters()][::2] == [torch.bfloat16, torch.float32, torch.float64]
    assert_same(teacher, student, images(6, 3), bar=1e-6)  # copies alone are exact in bfloat16
    grown = widen(teacher, images(6, 3), 1.5)
    assert [p.dtype for p in grown.parameters()][::2] == [torch.bfloat16, torch.float32, torch.float64]


def test_complex_numbers() -> None:
    def make(n: int) -> Net:
        parts = {name: nn.Linear(*shape, dtype=torch.complex128) for name, shape in (("a", (3, n)), ("b", (n, 2)))}
        return Net(parts, lambda net, x: net.b(net.a(x.to(torch.complex128))))

    teacher, student = make(4), make(9)
    transfer(teacher, student, images(6, 3))
    assert_same(teacher, student, images(6, 3))


# -- what is left as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_flags_tags_modes_hooks_and_memory_of_the_student_are_kept(context: Callable) -> None:
    teacher, student = pair()
    student.to(memory_format=torch.channels_last).train()
    student.norm0.eval()
    student.conv0.weight.requires_grad_(False)
    student.conv1.weight.no_weight_decay = True
    student.norm1.momentum, calls = 0.3, []
    student.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in student.named_parameters()}
    was, theirs = modes(student), state(teacher)
    with context():
        transfer(teacher, student, images())
        assert_same(teacher, student, images())
    assert before == {n: (id(p), p.data_ptr(), p.stride(), p.requires_grad) for n, p in student.named_parameters()}
    assert student.conv1.weight.no_weight_decay and student.norm1.momentum == 0.3 and calls
    assert modes(student) == was and unchanged(teacher, theirs)
    assert all(p.grad is None for p in (*teacher.parameters(), *student.parameters()))
    assert not student.conv0._forward_hooks and len(student.conv1._forward_hooks) == 1


def test_parameters_that_are_views_of_one_buffer_stay_views() -> None:
    teacher, student = pair()
    sizes = [parameter.numel() for parameter in student.parameters()]
    flat = torch.zeros(sum(sizes))
    for parameter, place in zip(student.parameters(), flat.split(sizes), strict=True):
        parameter.data = place.view_as(parameter)
    transfer(teacher, student, images())
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in student.parameters()])) and flat.any()
    assert_same(teacher, student, images())


def test_frozen_layers_and_counters_of_the_teacher() -> None:
    teacher, student = pair()
    teacher.requires_grad_(False)
    teacher.norm0.num_batches_tracked.fill_(2**24 + 1)  # beyond what single precision holds
    transfer(teacher, student, images())
    assert student.norm0.num_batches_tracked == 2**24 + 1 and all(p.requires_grad for p in student.parameters())


# -- wrappers -----------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Net:
    """What torch.compile makes of a network, as far as names go."""
    return Net({"_orig_mod": model}, lambda net, *inputs: net._orig_mod(*inputs))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": AveragedModel,
    "both": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_looked_through(name: str) -> None:
    wrap = WRAPPERS[name]
    for which in (0, 1, 2):
        teacher, student = pair()
        outer = wrap(teacher) if which != 1 else teacher, wrap(student) if which else student
        record = transfer(*outer, images())
        assert "conv0.weight" in record.origins
        assert_same(*outer, images())
    assert str(describe(wrap(teacher), images())) == str(describe(teacher, images()))
    grown = widen(wrap(teacher), images(), 1.5)
    assert type(grown) is Net and grown.state_dict().keys() == teacher.state_dict().keys()


class Sharded(Tensor):
    """A tensor of a class of its own."""


def sharded() -> nn.Module:
    model = mlp(3, 4, 2)
    model.register_buffer("part", torch.ones(3).as_subclass(Sharded))
    return model


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp(3, 4, 2).float(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.trace(mlp(3, 4, 2), images(6, 3)), "is a ScriptModule"),
        (quantised, "quantised"),
        (sharded, "part is a Sharded"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "0.weight has no shape yet"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), "has no shape yet"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_networks_without_plain_parameters_are_refused(make: Callable, message: str, side: int) -> None:
    plain, odd = mlp(3, 4, 2), make()
    for call in (
        lambda: transfer(*((odd, plain) if side == 0 else (plain, odd)), images(6, 3)),
        lambda: widen(odd, images(6, 3), 1.5),
        lambda: describe(odd, images(6, 3)),
    ):
        with refused(message):
            call()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("original_parameters", [True, False])
def test_a_sharded_network_is_refused_by_name(original_parameters: bool) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            mlp(3, 4, 2), device_id=torch.device("cpu"), use_orig_params=original_parameters
        )
        with pytest.raises(TransferError, match="is sharded by FullyShardedDataParallel: gather its weights"):
            widen(model, images(6, 3), 2.0)
    finally:
        distributed.destroy_process_group()


# -- inputs and outputs -------------------------------------------------------------------------------------------


@dataclass
class Result:
    logits: Tensor
    hidden: dict[str, Tensor]
    loss: Tensor | None = None


Pair = namedtuple("Pair", "first second")


def two_inputs(n: int, give: Callable) -> Net:
    def how(net: Net, words: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> object:
        x = net.table(words)
        x = x if mask is None else x * mask.unsqueeze(-1)
        x = torch.tanh(net.a(x)).mean(1) * scale
        return give(net.b(x), net.c(x))

    parts = {"table": nn.Embedding(9, n), "a": nn.Linear(n, n + 1), "b": nn.Linear(n + 1, 2), "c": nn.Linear(n + 1, 3)}
    return Net(parts, how)


def ids(*shape: int) -> Tensor:
    return torch.randint(9, shape)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: ids(4, 5),
        lambda: (ids(4, 5), images(4, 5)),
        lambda: {"words": ids(4, 5), "mask": images(4, 5), "scale": 0.3},
        lambda: {"mask": None, "words": ids(4, 5)},
        lambda: (ids(4, 5), None),
    ],
)
@pytest.mark.parametrize(
    "give",
    [
        lambda b, c: (b, c),
        lambda b, c: {"b": b, "more": [c, (b, None, "text", 3)]},
        lambda b, c: Result(b, {"c": c}),
        Pair,
        lambda b, c: torch.cat([b, c], 1),
    ],
)
def test_inputs_and_outputs_of_any_kind(inputs: Callable, give: Callable) -> None:
    teacher, student = two_inputs(4, give), two_inputs(9, give)
    transfer(teacher, student, inputs())
    assert_same(teacher, student, inputs())
    states = {g.state for g in describe(teacher, inputs()).groups if set(g.layers) & {"b", "c"}}
    assert len(states) == 1 and states <= {f"pinned: {why}" for why in IS_OUTPUT}


@pytest.mark.parametrize("example", [None, 3, "x", (), {}, [1.0], {"words": 3}])
def test_an_example_without_tensors_is_refused(example: object) -> None:
    with refused("example must be a tensor"):
        transfer(*(two_inputs(n, Pair) for n in (4, 9)), example)  # type: ignore[arg-type]


# -- auxiliary heads ----------------------------------------------------------------------------------------------


def branched(n: int, hidden: int) -> Net:
    """A network with an auxiliary head, as GoogLeNet's: in training mode alone it is called."""

    def how(net: Net, x: Tensor) -> object:
        x = F.relu(net.na(net.a(x)))
        result = net.fc(F.relu(net.nb(net.b(x))).mean((2, 3)))
        return (result, net.aux(x)) if net.training else result

    parts = {"a": conv(3, n), "na": nn.BatchNorm2d(n), "b": conv(n, n + 1), "nb": nn.BatchNorm2d(n + 1)}
    parts["aux"] = nn.Sequential(nn.Conv2d(n, hidden, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * hidden, 5))
    return Net(parts | {"fc": nn.Linear(n + 1, 5)}, how)


@pytest.mark.parametrize("split", ["equal", "uneven"])
def test_an_auxiliary_head_is_grown_though_eval_mode_does_not_reach_it(split: str) -> None:
    teacher, student = branched(4, 3), branched(9, 7)
    grow(teacher, student, modes=("eval", "train"), split=split)
    grown = widen(teacher, images(), {"aux.0": 2.0, "a": 1.5}, split=split)
    assert grown.aux[0].weight.shape == (6, 6, 1, 1)
    assert_same(teacher, grown, images(), ("eval", "train"))
    nn.init.ones_(student.aux[0].bias)
    assert_same(teacher, student, images())
    assert equivalence(teacher, student, images(), mode="train").max_relative > 1e-3


def test_a_state_dict_and_a_missing_example_get_the_way_out() -> None:
    net, x = mlp(3, 4, 2), images(6, 3)
    weights = net.state_dict()
    for call in (lambda: describe(weights, x), lambda: widen(weights, x, 2.0), lambda: transfer(net, weights, x)):
        with refused("a state dict, which has no forward pass: build the network, load its weights"):
            call()
    for call in (lambda: describe(net), lambda: widen(net, widths=2.0), lambda: transfer(net, mlp(3, 8, 2))):
        with refused(r"missing 1 required .* The example of net2net.* is an input of the network: a tensor"):
            call()


def test_unused_parameters_of_one_shape_are_copied() -> None:
    teacher, student = pair()
    for model in (teacher, student):
        model.unused = nn.Linear(2, 2)
    transfer(teacher, student, images())
    assert torch.equal(teacher.unused.weight, student.unused.weight)
    student.unused = nn.Linear(3, 3)
    with refused("unused"):
        transfer(teacher, student, images())


def test_a_student_that_is_its_teacher_is_refused() -> None:
    teacher, _ = pair()
    twin = copy.deepcopy(teacher)
    twin.conv0 = teacher.conv0
    for student in (teacher, nn.DataParallel(twin)):
        with refused("share parameters", teacher):
            transfer(teacher, student, images())


# -- compiled, and patched forward passes -----------------------------------------------------------------------------


class Doubled(nn.Module):
    """A forward pass with a part of its own in it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("how", ["in place", "a part", "a function"])
def test_compiled_parts_run_as_they_were_written(how: str) -> None:
    counted: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        counted.append(graph)
        return graph.forward

    compiled_relu = torch.compile(nn.ReLU() if how == "a part" else torch.relu, backend=backend)
    model = trained(Doubled(torch.relu if how == "in place" else compiled_relu))[0]
    if how == "in place":
        model.compile(backend=backend)
    x = torch.randn(5, 3)
    wider = widen(model, x, {"a": 6})
    assert equivalence(model, wider, x).max_abs < 1e-12 and not counted
    with torch.no_grad():
        model(x)
    assert counted  # and are compiled again when the caller runs them


def test_a_forward_pass_that_a_function_replaced_is_not_shared_with_the_copy() -> None:
    model, x = trained(mlp(3, 4, 2))[0], torch.randn(5, 3)
    model[0].forward = MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), model[0])
    assert equivalence(model, widen(model, x, {"0": 6}), x).max_abs < 1e-12
    before = model[0].forward
    model[0].forward = lambda x: before(x)
    with refused("The forward pass of 0 was replaced by a function, which a copy would share", model):
        widen(model, x, {"0": 6})
