"""A certificate says which networks a growth was of and how far they differ, and whatever differs later is named."""

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import modes, refused, state, trained, unchanged
from networks import chain, images
from test_record import CASES, grow
from torch import Tensor, nn

import net2net

pytestmark = pytest.mark.usefixtures("float64")


def certified(name: str = "wider", **options: Any) -> tuple[nn.Module, nn.Module, Any, dict[str, Any]]:
    """A teacher, its student, inputs of both, and the certificate, read from JSON."""
    teacher, student, _, record, x = grow(name, "uneven", **options)
    return teacher, student, x, json.loads(json.dumps(net2net.certify(record, teacher, student, x)))


@pytest.mark.parametrize("name", CASES)
def test_what_is_certified_is_found_again_and_nothing_is_changed(name: str) -> None:
    teacher, student, _, record, x = grow(name, "uneven")
    before, was = [state(model) for model in (teacher, student)], modes(teacher, student)
    random = torch.random.get_rng_state()
    certificate = json.loads(json.dumps(net2net.certify(record, teacher, student, x)))
    found = net2net.verify(certificate, teacher, student, x)
    assert found.startswith("The teacher and the student are those of the certificate. Their largest difference is ")
    assert found.endswith(" in train mode.")
    assert net2net.verify(certificate, teacher, student).endswith(
        " No inputs were given, so their difference was not measured."
    )
    assert unchanged(teacher, before[0]) and unchanged(student, before[1]) and modes(teacher, student) == was
    assert torch.equal(torch.random.get_rng_state(), random)


def test_it_says_what_was_done() -> None:
    *_, certificate = certified("wider")
    assert certificate["operator"] == "wider" and certificate["settings"] == {"split": "uneven", "noise": 0.0}
    assert certificate["layers"] == {
        "conv0.weight": "wider, 3x3x3x3 to 7x3x3x3",
        "conv1.weight": "wider, 4x3x3x3 to 13x7x3x3",
        "fc.weight": "wider, 5x24 to 5x78",
    }
    assert certificate["pinned"] == {"fc": "it is the network's output"}
    *_, certificate = certified("deeper")
    assert certificate["operator"] == "wider and deeper"
    assert {text.partition(",")[0] for text in certificate["layers"].values()} == {"wider", "identity"}
    teacher, student = trained(chain(3, 4), chain(7, 9, new=1))
    record = net2net.random_pad(teacher, student, images())
    certificate = net2net.certify(record, teacher, student, images(), {"shrink": 0.5})
    assert certificate["operator"] == "random_pad"
    assert certificate["settings"] == {"split": "pad", "noise": 0.0, "shrink": 0.5}
    assert certificate["difference"]["eval"]["max_relative"] > 1e-3
    same = copy.deepcopy(teacher)
    record = net2net.transfer(teacher, same, images())
    certificate = net2net.certify(record, teacher, same, images())
    assert (certificate["operator"], certificate["layers"]) == ("copy", {})
    assert certificate["teacher"] == certificate["student"]


def test_the_difference_is_the_measured_one_in_both_modes() -> None:
    teacher, student, x, certificate = certified("wider", noise=0.1)
    for mode, stated in certificate["difference"].items():
        measured = net2net.equivalence(teacher, student, x, mode=mode)
        assert stated == {"max_abs": measured.max_abs, "max_relative": measured.max_relative}
        assert stated["max_relative"] > 1e-3


def test_hashes_are_of_names_shapes_dtypes_and_values_alone() -> None:
    teacher, student, x, certificate = certified()
    net2net.verify(certificate, nn.DataParallel(teacher), student.to(memory_format=torch.channels_last), x)
    for other in (copy.deepcopy(teacher).float(), chain(3, 4), chain(3, 5), nn.Sequential(teacher)):
        with pytest.raises(net2net.TransferError, match=r"^The teacher is another"):
            net2net.verify(certificate, other, student)


def change(tensor: Tensor) -> None:
    """Change one number by as little as possible."""
    flat = tensor.detach().view(-1)
    flat[0] = torch.nextafter(flat[0], flat[0] + 1)


def drop_out(model: nn.Module, _: Any, output: Tensor) -> Tensor:
    return F.dropout(output, 0.5, model.training)


CHANGES: list[tuple[Callable[[nn.Module, nn.Module, Tensor], object], str]] = [
    (lambda teacher, student, x: change(teacher.conv1.weight), "The teacher is another: a name, shape, dtype or value"),
    (lambda teacher, student, x: change(student.fc.bias), "The student is another, or has been trained since: a name"),
    (lambda teacher, student, x: student.norm1.num_batches_tracked.add_(1), "The student is another, or has been trai"),
    (lambda teacher, student, x: change(x), "The inputs are others than those on which the difference was measured."),
    (lambda teacher, student, x: setattr(student.norm0, "eps", 0.1), "The difference in eval mode is "),
    (
        lambda teacher, student, x: student.register_forward_hook(drop_out),
        "The difference in train mode is not measu",
    ),
]


@pytest.mark.parametrize(("do", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_what_differs_is_named(do: Callable, message: str) -> None:
    teacher, student, x, certificate = certified()
    do(teacher, student, x)
    with pytest.raises(net2net.TransferError) as error:
        net2net.verify(certificate, teacher, student, x)
    assert str(error.value).startswith(message)


def test_everything_that_differs_is_named() -> None:
    teacher, student, x, certificate = certified()
    for tensor in (teacher.conv0.weight, student.conv0.weight, x):
        change(tensor)
    with pytest.raises(net2net.TransferError, match=r"The teacher is .* The student is .* The inputs are "):
        net2net.verify(certificate, teacher, student, x)


def seal(certificate: dict[str, Any]) -> None:
    """Give a certificate the checksum of what it holds, as anybody could."""
    content = {key: value for key, value in certificate.items() if key != "sha256"}
    certificate["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    "key", ["operator", "settings", "teacher", "student", "inputs", "difference", "layers", "pinned"]
)
def test_a_certificate_that_was_changed_is_refused(key: str) -> None:
    teacher, student, x, certificate = certified()
    certificate[key] = "another"
    with pytest.raises(net2net.TransferError, match=r"^The certificate was changed after it was written"):
        net2net.verify(certificate, teacher, student, x)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("key", ["max_abs", "max_relative"])
def test_a_difference_that_was_changed_is_found_by_measuring(mode: str, key: str) -> None:
    teacher, student, x, certificate = certified()
    certificate["difference"][mode][key] += 1e-6
    seal(certificate)
    with pytest.raises(
        net2net.TransferError, match=rf"^The difference in {mode} mode is .*, and .* by the certificate"
    ):
        net2net.verify(certificate, teacher, student, x)
    certificate["difference"][mode][key] -= 1e-6  # rounding is no difference
    seal(certificate)
    net2net.verify(certificate, teacher, student, x)


@pytest.mark.parametrize("broken", [None, [], {}, {"format": 1}, "a certificate"])
def test_what_is_no_certificate_is_refused(broken: Any) -> None:
    teacher, student, _, certificate = certified()
    for one in (broken, certificate | {"format": 2}, certificate | {"more": 1}):
        with refused("This is no certificate of a growth", teacher, student):
            net2net.verify(one, teacher, student)


def test_a_record_of_other_networks_is_not_certified() -> None:
    teacher, student, _, record, x = grow("wider")
    with refused("The record is of another student", teacher, student):
        net2net.certify(record, teacher, chain(7, 14), x)
    with refused("The record is of another teacher", teacher, student):
        net2net.certify(record, student, student, x)
    with refused("no difference to certify in eval mode: The outputs are not finite", teacher, student):
        net2net.certify(record, teacher, student, x * torch.inf)


@pytest.mark.parametrize("batch", [1, 4])
def test_where_train_mode_cannot_be_compared_it_says_so(batch: int) -> None:
    """Dropout is random there, and a batch norm after pooling refuses a single example."""

    def net(width: int) -> nn.Module:
        last = nn.Dropout(0.5) if batch > 1 else nn.BatchNorm1d(width)
        return nn.Sequential(nn.Linear(3, width), last, nn.ReLU(), nn.Linear(width, 2))

    teacher, student = trained(net(4), net(6))
    x = torch.randn(batch, 3)
    record = net2net.transfer(teacher, student, x)
    certificate = net2net.certify(record, teacher, student, x)
    said = "is random" if batch > 1 else "on inputs (1, 3) fails: Expected more than 1 value per channel"
    reason = certificate["difference"]["train"]
    assert reason.startswith(f"The forward pass of Sequential {said}")
    assert net2net.verify(certificate, teacher, student, x).endswith(f"not measured ({reason}) in train mode.")


def test_outputs_that_differ_in_train_mode_alone_are_no_difference() -> None:
    """Networks with auxiliary heads have such outputs."""
    teacher, student, _, record, x = grow("wider")
    student.register_forward_hook(lambda model, _, output: (output, output) if model.training else None)
    certificate = net2net.certify(record, teacher, student, x)
    assert certificate["difference"]["train"].startswith("The outputs differ in shape: the teacher's are [(4, 5)], ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_inputs_and_precisions_are_certified(dtype: torch.dtype) -> None:
    def net(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(10, width), nn.ReLU(), nn.Linear(width, 2)).to(dtype)

    teacher, student = trained(net(4), net(6))
    words = torch.randint(10, (3, 5))
    record = net2net.transfer(teacher, student, words)
    certificate = net2net.certify(record, teacher, student, (words,))
    net2net.verify(certificate, teacher, student, {"input": words})
    with pytest.raises(net2net.TransferError, match=r"^The inputs are others"):
        net2net.verify(certificate, teacher, student, words.int())
