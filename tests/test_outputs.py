"""outputs=: the caller says what of a network's result counts; the rest pins nothing and is not compared."""

from dataclasses import dataclass

import pytest
import torch
from checks import refused
from networks import rows
from torch import Tensor, nn

from net2net import certify, deepen, describe, equivalence, random_pad, transfer, verify, widen
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor


class Model(nn.Module):
    """Returns its hidden units beside its logits, as many language models do."""

    def __init__(self, width: int = 4, kind: str = "dataclass") -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(3, width), nn.Linear(width, 2), kind

    def forward(self, x: Tensor) -> object:
        hidden = self.a(x).relu()
        results = {"logits": self.b(hidden), "hidden": hidden}
        return {"dict": results, "tuple": tuple(results.values()), "dataclass": Result(**results)}[self.kind]


CHOICES = {
    "a function": ("dataclass", lambda result: result.logits),
    "an index": ("tuple", lambda result: result[0]),
    "a name": ("dataclass", "logits"),
    "a key": ("dict", "logits"),
    "names": ("dict", ["logits", "loss"]),  # what is absent, as a loss without labels, is passed over
}


@pytest.mark.parametrize(("kind", "outputs"), CHOICES.values(), ids=CHOICES)
def test_what_does_not_count_pins_nothing(kind: str, outputs) -> None:
    model, x = look_trained(Model(kind=kind)), rows()
    with refused("a cannot grow from 4 units: it is among the network's outputs"):
        widen(model, x, {"a": 6})
    assert describe(model, x, outputs=outputs).groups[0].state == "free"
    wider = widen(model, x, {"a": 6}, outputs=outputs)
    assert equivalence(model, wider, rows(), outputs=outputs).max_abs < 1e-12
    for mode in ("eval", "train"):
        assert equivalence(model, wider, x, mode=mode, outputs=outputs).max_abs < 1e-12
    assert random_pad(model, Model(6, kind), x, outputs=outputs).split == "pad"
    certificate = certify(wider.growth, model, wider, x, outputs=outputs)
    assert verify(certificate, model, wider, x, outputs=outputs).startswith("The teacher and the student are those")


def test_what_counts_is_still_compared() -> None:
    teacher, student = look_trained(Model()), Model(6)
    transfer(teacher, student, rows(), outputs="logits")
    with torch.no_grad():
        student.b.bias[0] += 1
    assert equivalence(teacher, student, rows(), outputs="logits").max_abs == pytest.approx(1)


def test_a_deeper_network_may_return_more() -> None:
    class Stack(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers, self.end = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            hidden = [x]
            for layer in self.layers:
                hidden.append(hidden[-1] + layer(hidden[-1]).tanh())
            return self.end(hidden[-1]), hidden

    teacher, student = look_trained(Stack(1)), Stack(3)
    with refused("The outputs differ in shape"):
        transfer(teacher, Stack(3), rows())
    transfer(teacher, student, rows(), outputs=lambda result: result[0])
    x = rows()
    assert torch.equal(teacher(x)[0], student(x)[0])
    deeper = deepen(teacher, rows(), "end", outputs=lambda result: result[0])
    assert equivalence(teacher, deeper, rows(), outputs=lambda result: result[0]).max_abs < 1e-12


@pytest.mark.parametrize("outputs", ["logit", ["logit"], lambda result: None])
def test_a_choice_of_nothing_is_refused(outputs) -> None:
    with refused("chooses no tensor of the result, a Result"):
        widen(look_trained(Model()), rows(), 2.0, outputs=outputs)
