"""The announced time is the time that a run takes, by a clock that moves only where this file says."""

import time

import pytest
from rich.console import Console

import net2net
from experiments import checkpoint, estimate, evaluation, experiment, training

STEP, SAVE, GROWTH = 0.5, 0.25, 7.0  # seconds of a step, of a checkpoint, and of a growth or its certificate
IMAGE, PAIR = 0.01, 0.03  # seconds in which an image is evaluated, and in which two networks are compared on one
LONG = ("schedule.epochs=100it", "schedule.teacher_epochs=170it", "schedule.evaluate=30it")


class Clock:
    """A clock, and the estimates that were made, each with the time that it was made at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.estimates: list[tuple[float, float]] = []

    def charge(self, function, seconds):
        """Return the function, which moves the clock when it is called: by seconds, or by those of its arguments."""

        def charged(*arguments, **named):
            self.now += seconds(arguments) if callable(seconds) else seconds
            return function(*arguments, **named)

        return charged

    def charge_batches(self, function):
        """Return the evaluation, which moves the clock for every image that it takes."""

        def follow(batches):
            for images, labels in batches:
                self.now += IMAGE * len(labels)
                yield images, labels

        return lambda network, batches, layout: function(network, follow(batches), layout)

    def note(self, function):
        """Return the estimate, which is noted."""

        def noted(*arguments):
            self.estimates.append((function(*arguments), self.now))
            return self.estimates[-1][0]

        return noted


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of the runs of a test."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    for place, name, seconds in (
        (training, "train_step", STEP),
        (checkpoint, "save", SAVE),
        (net2net, "transfer", GROWTH),
        (net2net, "certify", GROWTH),
        (net2net, "equivalence", lambda arguments: PAIR * len(arguments[2])),
    ):
        monkeypatch.setattr(place, name, clock.charge(getattr(place, name), seconds))
    monkeypatch.setattr(evaluation, "_sum_over", clock.charge_batches(evaluation._sum_over))  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(experiment, "estimate", clock.note(experiment.estimate))
    monkeypatch.setattr(estimate, "FIGURE", 0.0)
    return clock


@pytest.mark.slow
def test_a_run_takes_as_long_as_it_announces_teacher_growths_and_evaluations_included(tiny, clock):
    config = tiny(*LONG, "arms=[net2net,random_init,teacher_continued]")
    experiment.run_experiment(config, Console(quiet=True))
    ((said, at),) = clock.estimates
    assert said == pytest.approx(clock.now - at, rel=0.02)
    assert said > 170 * STEP + 2 * 100 * STEP + 2 * GROWTH + 2 * PAIR * 359  # the steps alone would be 185 s


@pytest.mark.slow
def test_what_a_stopped_run_has_done_is_not_announced_again(tiny, clock, monkeypatch):
    config = tiny(*LONG, "arms=[random_init]")
    step = training.train_step
    calls = iter(range(10**9))

    def stop_late(*arguments, **named):
        if clock.estimates and next(calls) == 70:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    with monkeypatch.context() as stopped:
        stopped.setattr(training, "train_step", stop_late)
        with pytest.raises(KeyboardInterrupt):
            experiment.run_experiment(config, Console(quiet=True))
    experiment.run_experiment(config, Console(quiet=True))
    (whole, _), (rest, at) = clock.estimates
    assert rest == pytest.approx(clock.now - at, rel=0.02)
    assert whole - rest > 60 * STEP / 2
