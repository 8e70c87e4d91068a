"""The record predicts the student's gradients to 1e-12, and carries the optimizer's state by the same rule."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import BAR, change_axes, refused, state, trained, unchanged
from networks import Net, attention, chain, conv, grouped, images, mlp, positions, residual, rows, tied
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop, Rprop
from torchvision.ops import SqueezeExcitation

from net2net import Blend, Transfer, load_record, save_record, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def gradients(model: nn.Module, x: Tensor, weighting: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs all outputs, in eval mode (batch norm's statistics stay what they are)."""
    model.zero_grad()
    (model.eval()(x) * weighting + model(x).square() / 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(record: Transfer, teacher: nn.Module, student: nn.Module, x: Tensor) -> list[float]:
    """For every tensor how far the prediction is from the gradient, over its largest entry; NaN where there is none."""
    weighting = torch.randn_like(teacher(x))
    theirs, mine = (gradients(model, x, weighting) for model in (teacher, student))
    predicted = record.gradients(theirs)
    assert predicted.keys() >= {name for name in mine if record.origins[name].how == "shared"}
    least, found = 1e-6 * max(g.abs().max() for g in mine.values()), []
    for name, guess in predicted.items():
        assert guess.shape == mine[name].shape
        known = ~guess.isnan()
        difference = (guess - mine[name])[known].abs().max() if known.any() else torch.nan
        found.append(float(difference / max(mine[name].abs().max(), least)))
    return found


# -- gradients ----------------------------------------------------------------------------------------------------


def kernels(size: int, n: int = 4) -> nn.Module:
    pad = size // 2
    return nn.Sequential(
        nn.Conv2d(3, n, size, 2, pad), nn.ReLU(), nn.Conv2d(n, n, size, 1, pad), nn.Flatten(), nn.Linear(12 * n, 4)
    )


def placed(n: int) -> Net:
    """More positions than the example has."""
    parts = {"e": nn.Linear(3, n), "pos": nn.Parameter(torch.randn(1, 9, n)), "o": nn.Linear(n, 2)}
    return Net(parts, lambda net, x: net.o((net.e(x) + net.pos[:, : x.shape[1]]).tanh()))


def recurrent(kind: type[nn.RNNBase], n: int) -> Net:
    return Net({"r": kind(3, n), "o": nn.Linear(n, 2)}, lambda net, x: net.o(net.r(x)[0]))


def gated(width: int, gate: bool) -> Net:
    """A new gate, a half of every unit, which the layer behind it reads doubly."""
    parts = {"a": conv(3, width, bias=True), "gate": SqueezeExcitation(width, 2) if gate else nn.Identity()}
    return Net(parts | {"b": conv(width, 4)}, lambda net, x: net.b(net.gate(F.relu(net.a(x)))).mean((2, 3)))


def words(n: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, n), nn.RMSNorm(n, eps=1e-6), nn.Flatten(), nn.Linear(5 * n, 4))


# name -> (network, the teacher's widths, the student's, inputs)
CASES = {
    "convolution, batch norm": (chain, (3, 4), (7, 13), images),
    "seven times": (chain, (3, 4), (21, 28), images),
    "deeper": (lambda new, *widths: chain(*widths, new=new), (0, 3, 4), (1, 7, 9), images),
    "linear": (mlp, (3, 4, 5, 2), (3, 9, 13, 2), rows),
    "groups that grow": (grouped, (2, 4, 4), (2, 8, 8), images),
    "more groups": (grouped, (2, 4, 4), (4, 4, 4), images),
    "groups in fewer, larger ones": (grouped, (3, 2, 3), (2, 4, 6), images),
    "depthwise, a gate": (residual, (4,), (8,), images),
    "a new gate": (gated, (4, False), (7, True), images),
    "a slope of every unit": (lambda n: mlp(3, n, 2, act=lambda: nn.PReLU(n)), (4,), (9,), rows),
    "a scalar": (lambda n: mlp(3, n, 2, act=lambda: Blend(torch.tanh)), (4,), (9,), rows),
    "tied": (tied, (4,), (8,), images),
    "tied, uneven counts": (tied, (4,), (11,), images),
    "more heads": (attention, (2,), (4, 16), positions),
    "wider heads": (attention, (2,), (2, 16), positions),
    "layer norm doubled": (attention, (2,), (2, 8, 16, 30), positions),
    "all of it": (attention, (2,), (4, 16, 24, 24), positions),
    "embedding, rms norm": (words, (4,), (12,), lambda: torch.randint(7, (3, 5))),
    "kernels": (kernels, (3,), (5, 7), images),
    "positions": (placed, (4,), (8,), positions),
    **{kind.__name__: (recurrent, (kind, 4), (kind, 8), positions) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_gradients_are_autograds(name: str) -> None:
    make, narrow, wide, inputs = CASES[name]
    for seed in range(3):
        teacher, student = look_trained(make(*narrow), seed=seed), look_trained(make(*wide), seed=seed + 9)
        record = transfer(teacher, student, inputs(), split="equal", generator=torch.Generator().manual_seed(seed))
        assert all(wrong <= BAR for wrong in errors(record, teacher, student, inputs()))


@pytest.mark.parametrize("name", ["convolution, batch norm", "more groups", "more heads", "layer norm doubled"])
def test_without_the_share_the_prediction_is_wrong(name: str) -> None:
    make, narrow, wide, inputs = CASES[name]
    teacher, student = trained(make(*narrow), make(*wide))
    record = transfer(teacher, student, inputs(), split="equal")
    spoilt = change_axes(record, lambda axis: replace(axis, share=torch.ones_like(axis.share)))
    assert max(errors(spoilt, teacher, student, inputs())) > 0.1


def test_what_the_teachers_gradient_does_not_say_is_not_a_number() -> None:
    teacher, student = kernels(3), kernels(5)
    predicted = transfer(teacher, student, images(), split="equal").gradients(
        gradients(teacher, images(), torch.ones(4, 4))
    )
    inside = torch.zeros(5, 5, dtype=torch.bool)
    inside[1:4, 1:4] = True
    assert torch.equal(~predicted["0.weight"].isnan(), inside.expand(4, 3, 5, 5))
    assert not predicted["4.weight"].isnan().any()


def test_padding_of_a_layer_norm_is_not_predicted_as_if_it_were_a_copy() -> None:
    """What is predicted at all is right also where the width is no multiple of the teacher's."""
    x, (teacher, student) = rows(), trained(*(mlp(3, n, n, 4, act=lambda n=n: nn.LayerNorm(n)) for n in (8, 12)))
    record = transfer(teacher, student, x, split="equal")
    assert record.eps
    assert not any(wrong > BAR for wrong in errors(record, teacher, student, x))


# -- state --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD, momentum": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "SGD, Nesterov, dampening": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD": lambda p: SGD(p, lr=0.01),
    "Adam": lambda p: Adam(p, lr=1e-3),
    "Adam, amsgrad": lambda p: Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=1e-3, weight_decay=0.1),
    "NAdam": lambda p: NAdam(p, lr=1e-3),
    "RMSprop": lambda p: RMSprop(p, lr=1e-3),
    "RMSprop, centred": lambda p: RMSprop(p, lr=1e-3, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=1e-3),
    "RMSprop, momentum": lambda p: RMSprop(p, lr=1e-3, momentum=0.9, eps=1e-30),
}


def take_steps(teacher: nn.Module, optimizer: Optimizer, steps: int = 1) -> list[dict[str, Tensor]]:
    """Train the teacher, and give the gradients of every step."""
    history = []
    for _ in range(steps):
        history.append(gradients(teacher, images(), torch.randn(4, 5)))
        optimizer.step()
    return history


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_that_of_a_student_that_had_been_there_all_the_time(kind: str) -> None:
    """A second optimizer is given the predicted gradients of every step that the teacher took."""
    teacher, student = trained(chain(3, 4), chain(7, 9))
    old = OPTIMIZERS[kind](teacher.parameters())
    history = take_steps(teacher, old, 4)
    record = transfer(teacher, student, images(), split="equal")
    before = state(student)
    new = OPTIMIZERS[kind](student.parameters())
    record.optimizer_state(old, new)
    assert unchanged(student, before)
    twin = chain(7, 9)
    by_hand = OPTIMIZERS[kind](twin.parameters())
    for theirs in history:
        predicted = record.gradients(theirs)
        for name, p in twin.named_parameters():
            p.grad = predicted[name]
        by_hand.step()
    for mine, p in zip(student.parameters(), twin.parameters(), strict=True):
        assert new.state[mine].keys() == by_hand.state[p].keys()
        for key, expected in by_hand.state[p].items():
            value = new.state[mine][key]
            if isinstance(expected, Tensor):
                assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())), key
            else:
                assert value == expected
    take_steps(student, new)


@pytest.mark.parametrize("name", CASES)
def test_the_moments_are_those_of_the_predicted_gradient(name: str) -> None:
    """After one step of Adam they are the gradient and its square, times numbers."""
    make, narrow, wide, inputs = CASES[name]
    teacher, student = trained(make(*narrow), make(*wide))
    record, x = transfer(teacher, student, inputs(), split="equal"), inputs()
    old, new = (Adam(model.parameters(), betas=(0.5, 0.75)) for model in (teacher, student))
    theirs = gradients(teacher, x, torch.ones_like(teacher(x)))
    old.step()
    record.optimizer_state(old, new)
    mine = dict(student.named_parameters())
    for key, gradient in record.gradients(theirs).items():
        moments, known = new.state[mine[key]], gradient.nan_to_num()
        assert torch.allclose(moments["exp_avg"], known / 2, rtol=1e-12, atol=0), key
        assert torch.allclose(moments["exp_avg_sq"], known.square() / 4, rtol=1e-12, atol=0), key


def test_muon_keeps_its_momentum_which_is_a_mean_of_gradients() -> None:
    teacher, student = trained(nn.Linear(3, 4, bias=False), nn.Linear(3, 7, bias=False))
    teacher, student = (nn.Sequential(each, nn.Linear(len(each.weight), 2, bias=False)) for each in (teacher, student))
    record, x = transfer(teacher, student, torch.randn(5, 3), split="equal"), torch.randn(5, 3)
    old, new = (torch.optim.Muon(model.parameters()) for model in (teacher, student))
    theirs = gradients(teacher, x, torch.ones(5, 2))
    old.step()
    record.optimizer_state(old, new)
    share = old.state[teacher[0].weight]["momentum_buffer"] / theirs["0.weight"]  # of the gradient
    for name, gradient in record.gradients(theirs).items():
        momentum = new.state[student.get_parameter(name)]["momentum_buffer"]
        assert torch.allclose(momentum, gradient * share.mean(), rtol=1e-12, atol=0)


def test_new_layers_start_without_a_state() -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9, new=1))
    old, new = Adam(teacher.parameters()), Adam(student.parameters())
    take_steps(teacher, old)
    transfer(teacher, student, images(), split="equal").optimizer_state(old, new)
    assert {name for name, p in student.named_parameters() if p not in new.state} == {
        f"{layer}{k}_1.{role}" for layer in ("conv", "norm") for k in range(2) for role in ("weight", "bias")
    } - {"conv0_1.bias", "conv1_1.bias"}
    take_steps(student, new)


def test_the_new_optimizer_keeps_its_groups_with_their_rates_and_names() -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9, new=1))
    old = AdamW(teacher.named_parameters(), lr=0.1)
    for _ in range(3):
        take_steps(teacher, old)
    flat, other = ([one for one in student.named_parameters() if (one[1].dim() == 1) == is_flat] for is_flat in (1, 0))
    new = AdamW([{"params": other, "lr": 0.3}, {"params": flat, "weight_decay": 0.0}], lr=0.2)
    transfer(teacher, student, images(), split="equal").optimizer_state(old, new)
    assert [(group["lr"], group["weight_decay"]) for group in new.param_groups] == [(0.3, 0.01), (0.2, 0.0)]
    for group, expected in zip(new.param_groups, (other, flat), strict=True):
        assert list(zip(group["param_names"], map(id, group["params"]), strict=True)) == [
            (name, id(parameter)) for name, parameter in expected
        ]
    assert {float(state["step"]) for state in new.state.values()} == {3.0}
    assert old.param_groups[0]["lr"] == 0.1


def test_the_old_groups_are_divided_by_where_parameters_come_from() -> None:
    teacher, student = trained(chain(3, 4), chain(7, 4, new=1))
    flat, other = ([p for p in teacher.parameters() if (p.dim() == 1) == is_flat] for is_flat in (True, False))
    old = AdamW([{"params": other, "lr": torch.tensor(0.1)}, {"params": flat, "weight_decay": 0.0}])
    student.fc.bias.requires_grad_(False)
    groups = transfer(teacher, student, images(), split="equal").parameter_groups(old)
    names = {id(p): name for name, p in student.named_parameters()}
    found = {
        (float(group["lr"]), group["weight_decay"], group["origin"]): {names[id(p)] for p in group["params"]}
        for group in groups
    }
    theirs = dict(teacher.named_parameters())
    assert len(found) == len(groups) == 6
    for (rate, decay, origin), inside in found.items():
        for name in inside:
            parameter = student.get_parameter(name)
            expected = "new" if name not in theirs else "copied" if theirs[name].shape == parameter.shape else "grown"
            assert origin == expected
            assert (rate, decay) == (pytest.approx(0.1 if parameter.dim() > 1 else 1e-3), 0.01 * (parameter.dim() > 1))
    trained_names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert set().union(*found.values()) == trained_names and sum(map(len, found.values())) == len(trained_names)
    groups[0]["lr"].mul_(0.1)  # a rate that is a tensor is not shared
    assert float(old.param_groups[0]["lr"]) == pytest.approx(0.1)
    take_steps(student, AdamW(groups))


def test_with_fresh_new_only_the_first_copy_of_a_unit_keeps_its_momentum() -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9))
    old = Adam(teacher.parameters())
    take_steps(teacher, old, 3)
    record = transfer(teacher, student, images(), split="equal")
    kept, fresh = Adam(student.parameters()), Adam(student.parameters())
    record.optimizer_state(old, kept)
    record.optimizer_state(old, fresh, fresh_new=True)
    zeroed = 0
    for name, parameter in student.named_parameters():
        mask = torch.ones_like(parameter)
        for dim, axis in record.origins[name].axes.items():
            shape = [-1 if place == dim else 1 for place in range(parameter.dim())]
            mask = mask * axis.first.to(parameter).reshape(shape)
        assert torch.equal(fresh.state[parameter]["exp_avg"], kept.state[parameter]["exp_avg"] * mask), name
        assert torch.equal(fresh.state[parameter]["exp_avg_sq"], kept.state[parameter]["exp_avg_sq"]), name
        zeroed += int((mask == 0).sum())
    assert zeroed > 100


def test_frozen_parameters_that_no_optimizer_holds_stay_outside() -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9))
    for model in (teacher, student):
        model.conv0.weight.requires_grad_(False)
    old, new = (Adam([p for p in model.parameters() if p.requires_grad]) for model in (teacher, student))
    take_steps(teacher, old)
    transfer(teacher, student, images(), split="equal").optimizer_state(old, new)
    assert student.conv0.weight not in new.state
    assert all(p is not student.conv0.weight for group in new.param_groups for p in group["params"])


def test_a_record_from_a_file_must_be_told_its_networks(tmp_path) -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9))
    old, new = Adam(teacher.parameters()), Adam(student.parameters())
    (theirs,) = take_steps(teacher, old)
    record = transfer(teacher, student, images(), split="equal")
    save_record(record, tmp_path / "record.json")
    loaded = load_record(tmp_path / "record.json")
    for call in (lambda: loaded.optimizer_state(old, new), lambda: loaded.gradients(theirs)):
        with refused(r"record\.of\(teacher, student\)"):
            call()
    loaded = loaded.of(teacher, student)
    expected = record.gradients(theirs)
    assert all(torch.equal(g, expected[name]) for name, g in loaded.gradients(theirs).items())
    loaded.optimizer_state(old, new)
    assert new.state[student.conv0.weight]["exp_avg"].any()


@pytest.mark.parametrize(
    ("kinds", "models", "message"),
    [
        ((SGD, Adam), "ts", "SGD means nothing to Adam"),
        ((Adam, Adam), "ss", "not the teacher's"),
        ((Adam, Adam), "tt", "not the student's"),
        ((Rprop, Rprop), "ts", "'prev'.*Rprop"),
        ((Adamax, Adamax), "ts", "'exp_inf'.*Adamax"),
        ((LBFGS, LBFGS), "ts", "LBFGS"),
        ((Adafactor, Adafactor), "ts", "Adafactor"),
    ],
)
def test_wrong_optimizers_are_refused(kinds: tuple, models: str, message: str) -> None:
    teacher, student = chain(3, 4), chain(7, 9)
    record = transfer(teacher, student, images(), split="equal")
    weights = [{"t": teacher, "s": student}[which].fc.weight for which in models]
    old, new = (kind([weight], lr=0.1) for kind, weight in zip(kinds, weights, strict=True))
    weights[0].grad = torch.ones_like(weights[0])
    old.step(lambda: torch.tensor(1.0))
    with refused(message):
        record.optimizer_state(old, new)
