"""Calibration: new batch norms take the statistics of what they read, and undo them."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same, modes
from networks import Net, chain, images
from torch import Tensor, nn

from net2net import TransferError, equivalence, transfer
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    """A teacher whose statistics are its data's, as a trained network's are, a deeper student, and the data."""
    x = 2 + 3 * images(64, 3, 6, 8)
    teacher = look_trained(chain(4, 5), seed=1)
    for norm in (teacher.norm0, teacher.norm1):
        norm.momentum = 1.0
    with torch.no_grad():
        teacher.train()(x)
    return teacher.eval(), look_trained(chain(9, 10, new=1), seed=2), x


def test_calibration_brings_train_mode_close_and_keeps_eval_mode_exact() -> None:
    teacher, student, x = pair()
    transfer(teacher, student, x[:2])
    before = equivalence(teacher, student, x, mode="train").max_relative
    transfer(teacher, student, x[:2], calibrate=x)
    assert equivalence(teacher, student, x, mode="train").max_relative < 1e-3 < 0.1 < before
    assert_same(teacher, student, x)


def test_it_measures_the_unbiased_statistics_of_what_the_norm_reads() -> None:
    teacher, student, x = pair()
    transfer(teacher, student, x[:2], calibrate=x)
    read = {}
    student.norm0_1.register_forward_hook(lambda _, inputs, __: read.update(x=inputs[0]))
    with torch.no_grad():
        student(x)
    assert torch.allclose(student.norm0_1.running_mean, read["x"].mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(student.norm0_1.running_var, read["x"].var((0, 2, 3), correction=1), rtol=1e-12)


def test_it_averages_batches_and_puts_momentum_and_modes_back() -> None:
    """Fault 14: the momentum of the calibration stayed."""
    teacher, student, x = pair()
    student.norm0_1.momentum, student.norm1_1.momentum = 0.3, None
    student.norm1.train()
    was = modes(student)
    transfer(teacher, student, x[:2], calibrate=(x[k : k + 16] for k in (0, 16, 32)))
    together = student.norm0_1.running_mean.clone()
    assert student.norm0_1.momentum == 0.3 and student.norm1_1.momentum is None
    assert modes(student) == was and student.norm0_1.num_batches_tracked == 0
    alone = []
    for k in (0, 16, 32):
        transfer(teacher, student, x[:2], calibrate=x[k : k + 16])
        alone.append(student.norm0_1.running_mean.clone())
    assert torch.allclose(together, torch.stack(alone).mean(0), rtol=1e-12)
    assert not torch.allclose(together, alone[-1], rtol=1e-3)


def test_it_takes_several_arguments_and_says_if_a_batch_is_too_small() -> None:
    def make(extra: bool) -> Net:
        return Net(
            {"a": nn.Linear(3, 4), "b": nn.Linear(2, 4), "n": nn.BatchNorm1d(4) if extra else nn.Identity()},
            lambda net, x, y: F.relu(net.n(net.a(x) + net.b(y))),
        )

    teacher, student, batch = make(False), make(True), (images(500, 3), images(500, 2))
    transfer(teacher, student, batch, calibrate=[batch])
    assert equivalence(teacher, student, batch, mode="train").max_relative < 1e-2
    with pytest.raises(TransferError, match="more than 1 value per channel"):
        transfer(teacher, student, batch, calibrate=[tuple(x[:1] for x in batch)])
