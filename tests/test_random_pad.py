"""The baseline, as carefully as the method: the teacher's corner, the student's own random weights everywhere else."""

from collections.abc import Callable

import pytest
import torch
from checks import assert_same, state, trained, unchanged
from networks import Net, chain, images
from torch import nn

from experiments.models import build
from net2net import equivalence, random_pad, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def small(**changes: float) -> nn.Module:
    return build({"name": "inception", "slim": 0.04, "stem": 8} | changes, 10, 3)


PAIRS = {
    "wider": (lambda: chain(3, 4), lambda: chain(8, 13)),
    "deeper": (lambda: chain(3, 4), lambda: chain(3, 4, new=1)),
    "both": (lambda: chain(3, 4), lambda: chain(8, 13, new=1)),
    "inception": (lambda: small(width=0.5477), lambda: small(extra_pairs=1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_entry_is_the_teachers_or_the_students_own(name: str) -> None:
    """Entry by entry: the corner of the first copies is the teacher's, all else is as the constructor drew it."""
    teacher, student = trained(*(make() for make in PAIRS[name]))
    before, theirs = state(student), state(teacher)
    record = random_pad(teacher, student, images())
    assert record.measured is None and record.split == "pad" and "tensors from the teacher" in str(record)
    corners = 0
    for key, tensor in student.state_dict().items():
        origin, expected = record.origins[key], before[key].clone()
        if origin.teacher is not None:
            source = theirs[origin.teacher]
            for dim in range(source.dim()):
                axis = origin.axes.get(dim)
                index = torch.arange(source.shape[dim]) if axis is None else axis.index[axis.first]
                assert torch.equal(index.sort().values, torch.arange(source.shape[dim]))  # every entry, once
                source = source.index_select(dim, index)
            where = torch.ones(tensor.shape, dtype=torch.bool)
            for dim, axis in origin.axes.items():
                where &= axis.first.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
            expected[where] = source.flatten() if source.dim() else source
            corners += int(where.numel() > where.sum())
        assert torch.equal(tensor, expected), key
    assert (corners > 0) == (name != "deeper")


def test_it_is_not_the_method() -> None:
    """Fault 11: a "random" baseline that was the identity. It must not preserve, wider or deeper."""
    for pair in PAIRS.values():
        teacher, student = trained(*(make() for make in pair))
        random_pad(teacher, student, images())
        assert equivalence(teacher, student, images()).max_relative > 1e-3
        transfer(teacher, student, images())
        assert_same(teacher, student, images())


def test_entries_of_a_float64_teacher_are_rounded_to_a_half_student() -> None:
    """They are rounded once; the entries beside them stay the student's own."""

    def cast(model: nn.Module, dtype: torch.dtype) -> Net:
        return Net({"net": model.to(dtype)}, lambda net, x: net.net(x.to(dtype)))

    teacher, student = map(cast, trained(chain(3, 4), chain(8, 13)), (torch.float64, torch.float16))
    before = state(student)
    random_pad(teacher, student, images())
    corner, source = student.net.conv1.weight[:4, :3], teacher.net.conv1.weight
    assert corner.dtype == torch.float16 and torch.equal(corner, source.half())
    assert not torch.equal(corner.double(), source)
    assert torch.equal(student.net.conv1.weight[4:], before["net.conv1.weight"][4:])


@pytest.mark.parametrize("grow", [random_pad, transfer])
def test_a_student_of_the_same_size_is_a_copy(grow: Callable) -> None:
    teacher, student = trained(chain(3, 4), chain(3, 4))
    grow(teacher, student, images())
    assert unchanged(student, state(teacher))


def test_the_units_that_are_kept_are_those_of_the_method() -> None:
    """Both arms start from the same map, so that they differ by what is written and by nothing else."""
    teacher, padded, grown = look_trained(chain(3, 4), seed=1), chain(8, 13), chain(8, 13)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    pad = random_pad(teacher, padded, images(), generator=generators[0])
    grow = transfer(teacher, grown, images(), generator=generators[1])
    assert pad.origins.keys() == grow.origins.keys()
    for name, origin in pad.origins.items():
        assert all(torch.equal(axis.index, grow.origins[name].axes[dim].index) for dim, axis in origin.axes.items())
