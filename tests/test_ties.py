"""A tied teacher and a student that has the same tensors apart."""

import pytest
import torch
import torch.nn.functional as F
from checks import refused, state, unchanged
from networks import mlp
from torch import Tensor, nn

from net2net import equivalence, load_record, random_pad, replay, save_record, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


class GPT(nn.Module):
    """Up to three of its tables are one."""

    def __init__(self, width: int, *tied: str) -> None:
        super().__init__()
        self.table, self.more = nn.Embedding(11, width), nn.Embedding(11, width)
        self.mlp, self.norm, self.head = mlp(width, 6, width), nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        for name in tied[1:]:
            self.get_submodule(name).weight = self.get_submodule(tied[0]).weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) + 0.5 * self.more(x.flip(1))
        return self.head(self.norm(x + self.mlp(x)))


TIES = {
    "all apart": (("table", "head"), ()),
    "of three": (("table", "more", "head"), ()),
    "two of three stay": (("table", "more", "head"), ("more", "head")),
    "the other two stay": (("table", "more", "head"), ("table", "head")),
}


@pytest.mark.parametrize("width", [4, 6, 8])
@pytest.mark.parametrize(("theirs", "mine"), TIES.values(), ids=TIES)
def test_a_student_may_have_apart_what_its_teacher_ties(theirs, mine, width: int, tmp_path) -> None:
    teacher, student, again = look_trained(GPT(4, *theirs)), GPT(width, *mine), GPT(width, *mine)
    before, x = state(teacher), torch.randint(11, (3, 5))
    record = transfer(teacher, student, x)
    assert equivalence(teacher, student, torch.randint(11, (5, 7))).max_abs < 1e-12
    assert unchanged(teacher, before) and teacher.head.weight is teacher.table.weight
    save_record(record, tmp_path / "growth.json")
    replay(load_record(tmp_path / "growth.json"), teacher, again)
    assert equivalence(student, again, x).max_abs < 1e-12


def test_a_gradient_that_was_a_sum_of_two_is_not_predicted() -> None:
    teacher, student, x = look_trained(GPT(4, "table", "head")), GPT(4), torch.randint(11, (3, 5))
    record = transfer(teacher, student, x)
    predicted = record.gradients({name: torch.ones_like(p) for name, p in teacher.named_parameters()})
    assert predicted["table.weight"].isnan().all() and predicted["head.weight"].isnan().all()
    assert not predicted["mlp.0.weight"].isnan().any()


def test_random_pad_of_a_tied_teacher() -> None:
    teacher, student = look_trained(GPT(4, "table", "head")), GPT(8)
    random_pad(teacher, student, torch.randint(11, (3, 5)))
    assert torch.equal(student.table.weight[:, :4], teacher.table.weight)
    assert torch.equal(student.head.weight[:, :4], teacher.table.weight)


def test_what_the_teacher_has_apart_cannot_be_tied() -> None:
    with refused("no counterpart of the teacher's head.weight"):
        transfer(look_trained(GPT(4)), GPT(8, "table", "head"), torch.randint(11, (3, 5)))


class Scaled(GPT):
    """Numbers that follow from the width stand behind the table and in front of the layer that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        root = self.table.weight.shape[1] ** 0.5
        x = self.table(x) * (root if self.behind else 1.0) + 0.5 * self.more(x.flip(1))
        return self.head(self.norm(x + self.mlp(x)) / (root if self.before else 1.0))


@pytest.mark.parametrize("width", [4, 6, 8])
@pytest.mark.parametrize(("behind", "before"), [(True, False), (False, True), (True, True)])
def test_a_number_beside_a_tied_table(behind: bool, before: bool, width: int) -> None:
    teacher, student = look_trained(Scaled(4, "table", "head")), Scaled(width, "table", "head")
    for net in (teacher, student):
        net.behind, net.before = behind, before
    transfer(teacher, student, torch.randint(11, (3, 5)))
    assert equivalence(teacher, student, torch.randint(11, (5, 7))).max_abs < 1e-12
    with torch.no_grad():
        student.norm.weight *= 1.01
    assert equivalence(teacher, student, torch.randint(11, (5, 7))).max_abs > 1e-3


@pytest.mark.parametrize("width", [4, 6, 8])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("in_weight", [False, True])
def test_one_number_for_both_uses_of_a_tied_table(in_weight: bool, before: int, width: int) -> None:
    class Both(GPT):
        def forward(self, x: Tensor) -> Tensor:
            root, more = self.table.weight.shape[1] ** 0.5, 0.5 * self.more(x.flip(1))
            x = F.embedding(x, self.table.weight * root) if in_weight else self.table(x) * root
            x = x + more
            x = self.norm(x + self.mlp(x)) / root ** (before - 1)
            return F.linear(x, self.head.weight * root) if in_weight else self.head(x) * root

    teacher, student = look_trained(Both(4, "table", "head")), Both(width, "table", "head")
    transfer(teacher, student, torch.randint(11, (3, 5)))
    assert equivalence(teacher, student, torch.randint(11, (5, 7))).max_abs < 1e-12


class TwoReaders(GPT):
    """The norm before the tied layer is read by another layer, too."""

    def __init__(self, width: int, *tied: str) -> None:
        super().__init__(width, *tied)
        self.other = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.table(x) + self.more(x.flip(1)))
        return self.head(x) + self.other(x) + self.mlp(x).mean()


def test_the_way_out_of_a_refused_tie_serves() -> None:
    teacher, x = look_trained(TwoReaders(4, "table", "head")), torch.randint(11, (3, 5))
    with refused("before no other. A student that has the two apart needs nothing of that"):
        transfer(teacher, TwoReaders(8, "table", "head"), x)
    student = TwoReaders(8)
    transfer(teacher, student, x)
    assert equivalence(teacher, student, torch.randint(11, (5, 7))).max_abs < 1e-12
