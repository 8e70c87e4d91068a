"""Several ways to pair and fill two networks: which is tried first, what a refusal leaves behind, and which reasons are
kept."""

import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checks import refused
from networks import Net, mlp
from torch import Tensor, nn

from net2net import TransferError, transfer
from net2net.attempts import Attempt, first_that_serves, list_attempts, restore_on_refusal
from net2net.errors import Fault
from net2net.plan.names import Unpaired
from net2net.record import Record

pytestmark = pytest.mark.usefixtures("float64")
tanh_layers = partial(mlp, act=nn.Tanh)


def refusal(teacher: nn.Module, student: nn.Module, **options) -> TransferError:
    with pytest.raises(TransferError) as caught:
        transfer(teacher, student, torch.randn(6, 3), **options)
    return caught.value


def test_every_reason_is_kept_the_likeliest_first() -> None:
    """By their numbers the last layers do not fit; in order, the new layer has an activation that is not idempotent."""
    error = refusal(tanh_layers(3, 4, 4, 2), tanh_layers(3, 4, 4, 4, 2))
    assert str(error) == error.reasons[0] and "not idempotent" in error.reasons[0]
    assert any("4.weight cannot grow from 2 to 4 units" in reason for reason in error.reasons[1:])
    assert len(set(error.reasons)) == len(error.reasons)
    assert isinstance(error.__cause__, ExceptionGroup)
    assert {str(each) for each in error.__cause__.exceptions} == set(error.reasons)
    assert all(each.__traceback__ is not None for each in error.__cause__.exceptions)


def test_one_attempt_has_one_reason_and_the_error_is_its_own() -> None:
    error = refusal(tanh_layers(3, 4, 2), tanh_layers(3, 3, 2))
    assert error.reasons == (str(error),) and error.__cause__ is None


def test_a_fault_in_one_attempt_is_told_first() -> None:
    attempts = [Attempt(None), Attempt(None, passing_all=True), Attempt(None, in_pairs=True)]

    def grow(attempt: Attempt) -> None:
        if attempt.passing_all:
            raise ZeroDivisionError("no share")
        raise TransferError(f"refused {attempt.in_pairs}")

    with pytest.raises(Fault, match="ZeroDivisionError: no share") as caught:
        first_that_serves(grow, attempts, torch.Generator())
    assert caught.value.reasons[1:] == ("refused False", "refused True")


def test_reasons_survive_pickling() -> None:
    error = TransferError("first", ["second", "first"])
    assert error.reasons == ("first", "second")
    assert pickle.loads(pickle.dumps(error)).reasons == error.reasons


def test_renumbered_layers_are_tried_in_order_and_new_ways_only_for_deeper_students() -> None:
    teacher = tanh_layers(3, 4, 4, 2)
    assert [a.rename for a in list_attempts(teacher, tanh_layers(3, 5, 5, 2), None)] == [{}]
    ways = list_attempts(teacher, tanh_layers(3, 4, 4, 4, 2), None)
    assert ways[0] == Attempt({}) and ways[1].rename
    assert [a.passing_all for a in ways[:: len(ways) // 3]] == [False, True, False]
    assert [a.in_pairs for a in ways[:: len(ways) // 3]] == [False, False, True]
    again = list_attempts(teacher, tanh_layers(3, 4, 4, 4, 2), {}, absorb=True)
    assert [a.absorb for a in again] == [False] * 3 + [True] * 3


def test_attempts_begin_from_one_random_state_and_stop_at_the_first_that_serves() -> None:
    generator, drawn = torch.Generator().manual_seed(3), []

    def grow(attempt: Attempt) -> float:
        drawn.append(torch.rand((), generator=generator).item())
        if attempt.absorb:
            return drawn[-1]
        raise TransferError("no")

    attempts = [Attempt({}), Attempt({}, absorb=True), Attempt({}, in_pairs=True)]
    assert first_that_serves(grow, attempts, generator) == drawn[0] == drawn[1] and len(drawn) == 2


def test_a_search_in_vain_has_an_end_and_says_so(monkeypatch) -> None:
    clock, seconds, tried = [0.0], [20.0, 30.0, 30.0], []
    monkeypatch.setattr("net2net.attempts.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def grow(attempt: Attempt) -> None:
        clock[0] += seconds[len(tried)]
        tried.append(attempt)
        raise TransferError(f"reason {len(tried)}")

    attempts = [Attempt({}, absorb=absorb, in_pairs=pairs) for absorb in (False, True) for pairs in (False, True)]
    with pytest.raises(TransferError) as caught:  # after three times 20 seconds
        first_that_serves(grow, attempts, torch.Generator())
    assert str(caught.value) == "reason 1 (3 of 4 ways to pair the layers were tried, in 80 s.)"
    assert caught.value.reasons[1:] == ("reason 2", "reason 3")


def test_that_a_layer_has_no_counterpart_by_name_tells_least() -> None:
    errors = iter([Unpaired("by name"), TransferError("in order"), TransferError("closest"), Unpaired("by name")])

    def grow(_: Attempt) -> None:
        raise next(errors)

    attempts = [Attempt({}), Attempt({"1": "0"}), Attempt({"2": "0"}), Attempt({}, in_pairs=True)]
    with pytest.raises(TransferError) as caught:
        first_that_serves(grow, attempts, torch.Generator())
    assert caught.value.reasons == ("closest", "in order", "by name")


def test_a_refusal_restores_tensors_buffers_and_eps() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with refused("in vain", student), restore_on_refusal(student, Record({}, "equal", 0.0, {"1": 1e-5})):
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.detach().fill_(7)
        student[1].eps = 1.0
        raise TransferError("in vain")


def test_a_softmax_in_a_renamed_module_is_found() -> None:
    """The queries undo the other number in front of the softmax, whatever the module is called."""

    def attend(net: Net, x: Tensor) -> Tensor:
        logits = net.q(x) @ net.k(x).mT * net.q.out_features**-0.5
        return logits.softmax(-1) @ net.v(x)

    teacher, student = nn.Sequential(), nn.Sequential()
    for model, name, n in ((teacher, "old", 4), (student, "new", 7)):
        model.add_module("stem", nn.Linear(3, 6))
        model.add_module(name, Net({"q": nn.Linear(6, n), "k": nn.Linear(6, n), "v": nn.Linear(6, 6)}, attend))
    record = transfer(teacher, student, torch.randn(2, 5, 3), rename={"new": "old"})
    assert record.measured.max_relative < 1e-12
    assert record.origins["new.q.weight"].rows is not None
