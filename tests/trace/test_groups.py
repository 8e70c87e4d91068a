"""Whole groups of a grouped convolution in fewer, larger ones, whatever their numbers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Net, randomise
from torch import Tensor, nn

from net2net import TransferError, equivalence, load_record, replay, save_record, transfer
from net2net.fill import gather as filling

BAR = 1e-12
Shape = tuple[int, int, int]  # groups, units that one reads, units that one gives


pytestmark = pytest.mark.usefixtures("float64")


def images() -> Tensor:
    return torch.randn(3, 3, 7, 6)


def grouped(shape: Shape, transposed: bool = False, behind: Shape | None = None) -> Net:
    """A grouped convolution between two that are not; with `behind` one in other groups follows it at once."""
    groups, inside, outside = shape
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    parts: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, groups * inside, 3),
        "norm": nn.BatchNorm2d(groups * inside),
        "grouped": kind(groups * inside, groups * outside, 3, groups=groups),
    }
    width = groups * outside
    if behind is not None:
        parts["again"] = nn.Conv2d(width, behind[0] * behind[2], 1, groups=behind[0])
        width = behind[0] * behind[2]

    def how(net: Net, x: Tensor) -> Tensor:
        x = F.silu(net.grouped(F.relu(net.norm(net.stem(x)))))
        return net.fc((F.silu(net.again(x)) if behind is not None else x).mean((2, 3)))

    return randomise(Net({**parts, "fc": nn.Linear(width, 5)}, how))


PACKED = {
    "three in two": ((3, 2, 3), (2, 4, 6)),
    "three in two with room left": ((3, 2, 3), (2, 5, 9)),
    "eleven in six": ((11, 2, 1), (6, 4, 3)),
    "five in two": ((5, 1, 2), (2, 3, 7)),
    "seven in six, one of which is copied": ((7, 2, 2), (6, 5, 4)),
    "four in two": ((4, 2, 2), (2, 5, 4)),
    "three in one": ((3, 2, 2), (1, 8, 7)),
}


@pytest.mark.parametrize("split", ["equal", "uneven", "paired"])
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("name", PACKED)
def test_groups_in_fewer_larger_ones_are_exact(name: str, transposed: bool, split: str) -> None:
    teacher, student = (grouped(shape, transposed) for shape in PACKED[name])
    transfer(teacher, student, images(), split=split)
    assert equivalence(teacher, student, images()).max_relative < BAR


def test_one_grouped_convolution_behind_another() -> None:
    teacher, student = grouped((3, 2, 4), behind=(3, 4, 2)), grouped((2, 4, 9), behind=(2, 9, 4))
    transfer(teacher, student, images())
    assert equivalence(teacher, student, images()).max_relative < BAR


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
def test_without_the_zeros_between_them_is_refused(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = (grouped(shape, transposed) for shape in PACKED["three in two"])
    monkeypatch.setattr(filling, "merge_groups", lambda w, _, times: w if times == 1 else w.repeat(1, times, 1, 1))
    with pytest.raises(TransferError, match="does not compute its teacher's function"):
        transfer(teacher, student, images())


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 9, 5)], ids=["too few are read", "too few are given"])
def test_groups_that_do_not_fit_are_refused(shape: Shape) -> None:
    student = grouped(shape)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(TransferError):
        transfer(grouped((3, 2, 3)), student, images())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_the_record_of_a_packing_is_replayed(tmp_path: Path) -> None:
    teacher, student, again = (grouped(shape) for shape in ((3, 2, 3), (2, 5, 9), (2, 5, 9)))
    record = transfer(teacher, student, images())
    save_record(record, tmp_path / "record.json")
    replay(load_record(tmp_path / "record.json"), teacher, again)
    assert equivalence(teacher, again, images()).max_relative < BAR


def test_the_gradient_of_a_packing_is_the_teachers() -> None:
    teacher, student, x = grouped((3, 2, 3)), grouped((2, 4, 6)), images()  # two and one: the third group twice as wide
    record = transfer(teacher, student, x)
    for model in (teacher, student):
        model.double()(x).square().sum().backward()
    theirs = {name: p.grad for name, p in teacher.named_parameters() if p.grad is not None}
    predicted = record.gradients(theirs)
    for name, parameter in student.named_parameters():
        known = ~predicted[name].isnan()
        assert known.any()
        assert (predicted[name] - parameter.grad)[known].abs().max() < 1e-12 * max(parameter.grad.abs().max(), 1)
