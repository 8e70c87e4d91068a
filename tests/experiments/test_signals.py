"""A signal is obeyed between two steps, after all has been saved; a launcher's own handler is heard."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torture
from loops import Quiet, network, pictures, same, without_seconds

from experiments import checkpoint, training
from experiments.signals import Interrupted, Requests
from experiments.training import Job, train

HEARD = (signal.SIGTERM, signal.SIGUSR2)
Handler = Callable[[int, Any], None]


@pytest.fixture
def launcher() -> Any:
    """Installs a handler of both signals, as a launcher does, for as long as the test runs."""
    before = {number: signal.getsignal(number) for number in HEARD}

    def install(handler: Any) -> None:
        for number in HEARD:
            signal.signal(number, handler)

    yield install
    for number, handler in before.items():
        signal.signal(number, handler)


class Sends(Quiet):
    """Sends this process a signal during a step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__()
        self.number, self.at = number, step

    def advance(self, step: int, loss: float) -> None:
        super().advance(step, loss)
        if step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGINT, 5), (signal.SIGTERM, 4), (signal.SIGUSR2, 12)],
)
def test_without_a_launcher_the_run_ends_and_continues_bit_for_bit(
    job: Job, launcher: Any, tmp_path: Path, number: int, step: int
) -> None:
    launcher(signal.SIG_DFL)
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    with pytest.raises(Interrupted, match=f"arm stopped at step {step} of 12") as stop:
        train(network(), job, Sends(number, step))
    assert stop.value.number == number
    assert checkpoint.load(job.folder)["step"] == step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = network()
    assert without_seconds(train(resumed, job, Quiet())) == without_seconds(rows)
    assert same(resumed, whole)


@pytest.mark.parametrize("number", HEARD)
def test_a_launcher_that_requeues_finds_the_checkpoint_complete(job: Job, launcher: Any, number: int) -> None:
    found = []

    def requeue(received: int, _frame: object) -> None:
        found.append((received, checkpoint.load(job.folder)["step"]))
        os.kill(os.getpid(), number)  # a second one, while the first is being handled: not handled twice
        raise SystemExit(-1)

    launcher(requeue)
    with pytest.raises(SystemExit) as end:
        train(network(), job, Sends(number, 5))
    assert end.value.code == -1
    assert found == [(number, 5)]
    assert signal.getsignal(number) is requeue


def test_a_launcher_that_only_takes_note_lets_the_run_continue(job: Job, launcher: Any, tmp_path: Path) -> None:
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    noted: list[int] = []
    launcher(lambda number, _: noted.append(number))
    net, sender = network(), Sends(signal.SIGTERM, 5)
    assert without_seconds(train(net, job, sender)) == without_seconds(rows)
    assert noted == [signal.SIGTERM] and sender.steps == list(range(1, 13))
    assert same(net, whole)


def test_what_is_ignored_stays_ignored(launcher: Any) -> None:
    launcher(signal.SIG_IGN)
    with Requests() as requests:
        for number in HEARD:
            os.kill(os.getpid(), number)
        requests.raise_if_pending()
        requests.deliver("")
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN


def test_an_evaluation_is_left_for_a_signal_and_done_again(
    job: Job, launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = network()
    rows = train(whole, replace(job, folder=tmp_path / "whole"), Quiet())
    launcher(signal.SIG_DFL)
    evaluate, calls = training.evaluate, 0

    def signalled(*arguments: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 4:  # on the test images at step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", signalled)
    net = network()
    with pytest.raises(Interrupted, match="at step 4 of 12"):
        train(net, job, Quiet())
    state = checkpoint.load(job.folder)
    assert state["step"] == 4 and [row["step"] for row in state["rows"]] == [0]
    assert without_seconds(train(net, job, Quiet())) == without_seconds(rows)
    assert same(net, whole)


def run_in_a_group(settings: list[str], folder: Path, log: Path) -> None:
    os.setpgrp()
    torture.run(settings, folder, log)


@pytest.mark.system
def test_a_whole_job_is_signalled_and_its_workers_are_unharmed(tmp_path: Path) -> None:
    """As Slurm does it: every process of the job gets the signal, the data-loading workers, too."""
    pictures(tmp_path / "tree")
    settings = [
        *[setting for setting in torture.SETTINGS if not setting.startswith(("schedule", "arms", "target"))],
        *("data=imagenet", f"data.root={tmp_path}/tree", "data.size=16", "data.workers=2", "data.holdout=0.1"),
        *("arms=[random_init]", "schedule.batch_size=8", "schedule.epochs=30ep", "schedule.evaluate=30ep"),
    ]
    log, arm = tmp_path / "log", tmp_path / "runs/quickstart/seed0/random_init"
    for times, number in enumerate(HEARD, 1):
        process = torture.context.Process(target=run_in_a_group, args=(settings, tmp_path, log))
        process.start()
        # Until it has an evaluation behind it, from where on the workers are at work.
        while process.is_alive() and (not log.exists() or log.read_text().count("random_init            step") < times):
            process.join(0.05)
        process.join(0.3)
        assert process.is_alive()
        os.killpg(process.pid or 0, number)
        process.join(60)
        said = log.read_text()
        assert process.exitcode == 128 + number, said
        name = signal.Signals(number).name
        assert f"Stopped by {name}. random_init stopped at step " in said
        assert "Traceback" not in said and "Error" not in said
        assert "Run the same command again to continue." in said
    steps = checkpoint.load(arm)["step"]
    assert 0 < steps < 30 * 9
