"""The command line: what is wrong with it is said in one sentence, at once, and nothing is left behind."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments import command
from experiments.config import Config, ExperimentError, check, steps

ROOT = Path(__file__).parents[2]
Main = Callable[..., int]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr, which has to be all that is there."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    return lines[0]


TYPOS = [  # what is typed, what is answered
    ("experiment=quikstart", "(did you mean 'experiment/quickstart'?)"),
    ("scale=cp", "(did you mean 'scale/cpu'?)"),
    ("data=digit", "(did you mean 'data/digits'?)"),
    ("seeed=1", "(did you mean 'seed'?)"),
    ("schedule.epoch=3ep", "(did you mean 'schedule.epochs'?)"),
    ("lr=1", "(did you mean 'schedule.lr'?)"),
    ("+seeed=1", "There is no setting 'seeed' (did you mean 'seed'?)"),
    ("+data.sise=8", "There is no setting 'data.sise' (did you mean 'data.size'?)"),
    ("model.widht=2", "To append to your config use +model.widht=2"),
    ("+model.widht=2", "The network inception has no argument 'widht' (did you mean 'width'?"),
    ("model.name=inceptin", "There is no network 'inceptin' (did you mean 'inception'?"),
    ("model.stem=7", "stem=7 is none of 224, 32 and 8"),
    ("arms=[net2ne]", "arms: there is no 'net2ne' (did you mean 'net2net'?"),
    ("arms=net2ne", "arms: there is no 'net2ne' (did you mean 'net2net'?"),
    ("arms=net2net,random_init", "use key=[value1,value2]"),
    ("precision=tf32", "precision=tf32 was asked for, but "),
    ("device=gpu", "The device 'gpu' is unknown: use auto, cpu or cuda."),
    ("data.name=digit", "data.name=digit is unknown (did you mean 'digits'?)"),
    ("data.size=9", "set data.size=8"),
    ("schedule.epochs=0.001ep", "schedule.epochs is 0.001ep, less than a step: an epoch has 40 steps."),
    ("schedule.batch_size=5000", "the training split has only"),
    ("seed=x", "Value 'x' of type 'str' could not be converted to Integer"),
    ("data.size=8.5", "Value '8.5'"),
    ("schedule=3", "schedule=3"),
    ("students.wider=3", "students.wider=3 is no network"),
    ("seed", "missing EQUAL"),
    ("foo[", "foo["),
    (
        "teacher.width=2",
        "The student is smaller than its teacher: blocks.3a.entry.0.weight has 4 units, the teacher's 8",
    ),
]


@pytest.mark.parametrize(("typed", "said"), TYPOS)
def test_a_wrong_word_is_answered_in_one_sentence(
    train_py: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    assert train_py(typed) == 1
    assert said in error_of(capsys)
    assert list(tmp_path.rglob("*.*")) == []  # nothing was trained, and no log was written


WRONG: dict[str, tuple[Any, str]] = {  # setting -> a value that no run can have, and the answer
    "target": ("random", "target: there is no 'random' (did you mean 'random_"),
    "logger": ("wandbb", "logger: there is no 'wandbb' (did you mean 'wandb'?"),
    "schedule.optimizer": ("rmspropp", "schedule.optimizer: there is no 'rmspropp' (did you mean 'rmsprop'?"),
    "schedule.decay": ("cosine", "schedule.decay: there is no 'cosine'"),
    "growth.split": ("even", "growth.split: there is no 'even' (did you mean 'uneven'?"),
    "precision": ("float16", "precision: there is no 'float16' (did you mean 'bfloat16'?"),
    "layout": ("channelslast", "layout: there is no 'channelslast' (did you mean 'channels_last'?"),
    "schedule.epochs": ("3", "The duration '3' has no unit: write epochs as 5ep, steps as 500it."),
    "arms": ([], "arms is empty"),
    "students": ({}, "names no students"),
    "seed": (-1, "seed is -1: it has to be 0 or more."),
    "rates": ({"random_init": 1.0}, "The arm net2net has no rate: set rates.net2net"),
    "rates.net2net": (0.0, "rates.net2net is 0.0: it has to be above 0."),
    "schedule.lr": (-0.1, "schedule.lr is -0.1: it has to be above 0."),
    "schedule.batch_size": (0, "schedule.batch_size is 0: it has to be 2 or more."),
    "schedule.momentum": (1.0, "schedule.momentum is 1.0: it has to be below 1."),
    "schedule.weight_decay": (float("nan"), "schedule.weight_decay is nan"),
    "schedule.teacher_epochs": ("0it", "schedule.teacher_epochs is 0it"),
    "schedule.evaluate": ("0it", "schedule.evaluate is 0it"),
    "schedule.warmup": ("-1it", "schedule.warmup is -1it: The duration '-1it'"),
    "growth.warmup": ("5", "growth.warmup is 5: The duration '5' has no unit"),
    "students.a/b": ({}, "The student 'a/b' cannot name a folder of its own"),
    "students.teacher": ({}, "The student 'teacher' cannot name a folder of its own"),
    "growth.noise": (-1.0, "growth.noise is -1.0"),
    "growth.calibrate": (-1, "growth.calibrate is -1"),
    "data.holdout": (1.0, "data.holdout is 1.0: choose a share between 0 and 1"),
    "data.pad": (-1, "data.pad is -1"),
    "data.size": (0, "data.size is 0"),
    "data.workers": (-1, "data.workers is -1"),
    "checkpoint_seconds": (-1.0, "checkpoint_seconds is -1.0"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_no_run_can_have_is_refused(key: str) -> None:
    config = Config(experiment="any", students={"wider": {}})
    check(config)  # the defaults are sound
    value, said = WRONG[key]
    node, _, last = key.rpartition(".")
    parent = getattr(config, node) if node else config
    if is_dataclass(parent):
        setattr(parent, last, value)
    else:
        parent[last] = value
    with pytest.raises(ExperimentError) as error:
        check(config)
    assert said in str(error.value)


def test_a_wrong_value_is_refused_before_the_images_are_loaded(
    train_py: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.experiment.load", lambda config: pytest.fail("loaded"))
    for typed in ("schedule.decay=cosine", "rates.net2net=0", "precision=half", "device=gpu", "arms=[]"):
        assert train_py(typed) == 1
        error_of(capsys)


@pytest.mark.parametrize(
    ("duration", "expected"), [("6ep", 60), ("0.5ep", 5), ("500it", 500), (" 2.ep", 20), ("0it", 0)]
)
def test_durations(duration: str, expected: int) -> None:
    assert steps(duration, 10) == expected


def run_without_torch(*typed: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which fails if it loads torch."""
    program = (
        "import sys, atexit, os; atexit.register(lambda: 'torch' in sys.modules and os._exit(77));"
        "sys.argv = ['train.py', *sys.argv[1:]];"
        "from experiments.command import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", program, *typed], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("typed", ["seeed=1", "schedule.lr=0"])
def test_a_wrong_command_is_answered_without_torch(typed: str) -> None:
    done = run_without_torch("experiment=quickstart", typed)
    assert done.returncode == 1 and done.stderr.startswith("\nError: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--help", "wider_inception       Section 4.2"),
        ("-h", "python train.py experiment=NAME --cfg job"),
        ("--cfg job", "batch_size: 128"),
        ("--help experiment=quickstart", "stem: 8"),
        ("--cfg job experiment=quickstart", "batch_size: 32"),
    ],
)
def test_questions_are_answered_at_once(typed: str, said: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_without_torch(*typed.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout
    # The time of a processor: on a machine that has other work, too, the clock says nothing about us.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_without_arguments_the_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    out = capsys.readouterr().out
    for path in (ROOT / "configs/experiment").glob("*.yaml"):
        assert path.stem in out
    assert "Section 4.2" in out and "Scales: cpu, gpu, imagenet." in out


def test_without_an_experiment_the_command_is_repeated_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["seed=1"]) == 2
    assert "python train.py experiment=quickstart seed=1" in capsys.readouterr().out


def test_cfg_job_shows_the_configuration(train_py: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_py("--cfg", "job") == 0
    out = capsys.readouterr().out
    assert "slim: 0.03" in out and "net2net: 0.1" in out


def test_of_several_runs_one_may_fail_and_the_others_continue(
    train_py: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["arms=[random_init]", "target=random_init", "schedule.epochs=2it", "schedule.evaluate=2it"]
    assert train_py("-m", *fast, "seed=-1,3") == 1
    assert capsys.readouterr().err.count("Error: seed is -1") == 1
    assert (tmp_path / "runs/quickstart/seed3/random_init/curve.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_run_says_what_it_does_and_leaves_one_folder(
    train_py: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["arms=[random_init]", "schedule.epochs=2it", "schedule.evaluate=2it"]
    assert train_py(*fast) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "to do     random_init: about" in out
    assert "figure    runs/quickstart/figure.png" in out
    assert "not mirrored to W&B" in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not list(tmp_path.rglob(".*"))


def test_an_interruption_says_how_to_continue(
    train_py: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.experiment.load", stop)
    assert train_py() == 130
    assert capsys.readouterr().err == "\nInterrupted. Run the same command again to continue.\n"
