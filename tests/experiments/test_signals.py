"""A signal is obeyed between two steps, after all has been saved; a launcher's own handler is heard."""

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from loops import Quiet, interrupt, network, same, signalled, without_seconds

from experiments import checkpoint
from experiments.signals import Interrupted, Requests
from experiments.training import train

HEARD = (signal.SIGTERM, signal.SIGUSR2)
Handler = Callable[[int, Any], None]


@pytest.fixture
def launcher() -> Any:
    """Installs a handler of both signals, as a launcher does, for as long as the test runs."""
    before = {number: signal.getsignal(number) for number in HEARD}
    yield lambda handler: [signal.signal(number, handler) for number in HEARD]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGINT, 5), (signal.SIGTERM, 4), (signal.SIGUSR2, 12)],
)
def test_without_a_launcher_the_run_ends_and_continues_bit_for_bit(job, launcher, tmp_path, number, step):
    launcher(signal.SIG_DFL)
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    with pytest.raises(Interrupted, match=f"arm stopped at step {step} of 12") as stop:
        train(network(), job, signalled(number, step))
    assert stop.value.number == number
    assert checkpoint.load(job.folder)["step"] == step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = network()
    assert without_seconds(train(resumed, job, Quiet())) == without_seconds(rows)
    assert same(resumed, whole)


@pytest.mark.parametrize("number", HEARD)
def test_a_launcher_that_requeues_finds_the_checkpoint_complete(job, launcher, number):
    found = []

    def requeue(received: int, _frame: object) -> None:
        found.append((received, checkpoint.load(job.folder)["step"]))
        signal.raise_signal(number)  # a second one, while the first is being handled: not handled twice
        raise SystemExit(-1)

    launcher(requeue)
    with pytest.raises(SystemExit) as end:
        train(network(), job, signalled(number, 5))
    assert end.value.code == -1
    assert found == [(number, 5)]
    assert signal.getsignal(number) is requeue


def test_a_launcher_that_only_takes_note_lets_the_run_continue(job, launcher, tmp_path):
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    noted: list[int] = []
    launcher(lambda number, _: noted.append(number))
    net, sender = network(), signalled(signal.SIGTERM, 5)
    assert without_seconds(train(net, job, sender)) == without_seconds(rows)
    assert noted == [signal.SIGTERM] and sender.steps == list(range(1, 13))
    assert same(net, whole)


def test_what_is_ignored_stays_ignored(launcher):
    launcher(signal.SIG_IGN)
    with Requests() as requests:
        for number in HEARD:
            signal.raise_signal(number)
        requests.raise_if_pending()
        requests.deliver("")
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN


def test_an_evaluation_is_left_for_a_signal_and_done_again(job, launcher, tmp_path, monkeypatch):
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    launcher(signal.SIG_DFL)
    interrupt(monkeypatch, "evaluate", {4}, lambda: signal.raise_signal(signal.SIGTERM))  # on the test images at step 4
    net = network()
    with pytest.raises(Interrupted, match="at step 4 of 12"):
        train(net, job, Quiet())
    state = checkpoint.load(job.folder)
    assert state["step"] == 4 and [row["step"] for row in state["rows"]] == [0]
    assert without_seconds(train(net, job, Quiet())) == without_seconds(rows)
    assert same(net, whole)
