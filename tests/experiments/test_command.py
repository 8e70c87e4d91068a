"""The command line: what is wrong with it is said in one sentence, at once, and nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from loops import error_of

from experiments.command import main
from experiments.config import Config, ExperimentError, check, steps
from experiments.signals import Interrupted
from experiments.words import check_words, quote_values

ROOT = Path(__file__).parents[2]


TYPOS = [  # what is typed, what is answered
    ("experiment=quikstart", "Error: There is no experiment 'quikstart' (did you mean 'quickstart'?). There are abl"),
    ("schedule.epoch=3ep", "(did you mean 'schedule.epochs'?)"),
    ("lr=1", "(did you mean 'schedule.lr'?)"),
    ("+data.sise=8", "There is no setting 'data.sise' (did you mean 'data.size'?)"),
    ("model.widht=2", "The experiment sets no model.widht. To set it all the same, write +model.widht=VALUE."),
    ("rates.net2nt=3", "The experiment sets no rates.net2nt (did you mean 'net2net'?). To set it"),
    ("students.wider.widt=2", "The experiment sets no students.wider.widt (did you mean 'width'?). To set it"),
    ("teacher.width=-0.5", "width=-0.5 multiplies channels: it has to be above 0."),
    ("scale=gpu", "quickstart has one size on every machine, scale=quickstart: leave scale= out."),
    ("+model.widht=2", "The network plain has no argument 'widht' (did you mean 'width'?"),
    ("model.name=inceptin", "There is no network 'inceptin' (did you mean 'inception'?"),
    ("arms=net2ne", "arms: there is no 'net2ne' (did you mean 'net2net'"),
    ("device=gpu", "The device 'gpu' is unknown: use auto, cpu or cuda."),
    ("schedule.optimizer=adamW", "schedule.optimizer: there is no 'adamW' (did you mean 'AdamW'?). There are"),
    ("model.name=ResNet50", "There is no network 'ResNet50' (did you mean 'resnet50'?"),
    ("arms=[Net2Net]", "arms: there is no 'Net2Net' (did you mean 'net2net'?)"),
    ("experiment=Quickstart", "Error: There is no experiment 'Quickstart' (did you mean 'quickstart'?)"),
    ("data.name=svhn", "data.name=svhn is unknown (did you mean 'SVHN'?)"),
    ("data=SVHN", "Those of torchvision are written data=torchvision data.name=NAME."),
    ("data.name=digit", "(did you mean 'digits'?)"),
    ("schedule.epochs=0.001ep", "schedule.epochs is 0.001ep, less than a step: an epoch has 40 steps."),
    ("seed=x", "seed=x: it has to be a whole number."),
    ("schedule.lr=fast", "schedule.lr=fast: it has to be a number."),
    ("foo[", "foo["),
]


@pytest.mark.parametrize(("typed", "said"), TYPOS)
def test_a_wrong_word_is_answered_in_one_sentence(train_py, tmp_path, capsys, typed, said):
    assert train_py(typed) == 1
    assert said in error_of(capsys)
    assert list(tmp_path.rglob("*.*")) == []  # nothing was trained, and no log was written


WRONG: dict[str, tuple[Any, str]] = {  # setting -> a value that no run can have, and the answer
    "target": ("random", "target: there is no 'random' (did you mean 'random_"),
    "schedule.decay": ("cosine", "'cosine' is no duration: write epochs as 5ep, steps as 500it."),
    "precision": ("float16", "precision: there is no 'float16' (did you mean 'bfloat16'?"),
    "schedule.epochs": ("3", "'3' is no duration: write epochs as 5ep, steps as 500it."),
    "arms": ([], "arms is empty"),
    "students": ({}, "names no students"),
    "students.wider": (3, "students.wider=3 is no network"),
    "rates": ({"random_init": 1.0}, "The arm net2net has no rate: set rates.net2net"),
    "rates.net2net": (0.0, "rates.net2net is 0.0: it has to be above 0."),
    "schedule.batch_size": (0, "schedule.batch_size is 0: it has to be 2 or more."),
    "schedule.momentum": (1.0, "schedule.momentum is 1.0: it has to be below 1."),
    "schedule.weight_decay": (float("nan"), "schedule.weight_decay is nan"),
    "schedule.teacher_epochs": ("0it", "schedule.teacher_epochs is 0it"),
    "growth.warmup": ("-1it", "growth.warmup is -1it: '-1it'"),
    "students.a/b": ({}, "The student 'a/b' cannot name a folder of its own"),
    "data.holdout": (1.0, "data.holdout is 1.0: choose a share between 0 and 1"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_no_run_can_have_is_refused(key):
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


@pytest.mark.parametrize(
    ("duration", "expected"), [("6ep", 60), ("0.5ep", 5), ("500it", 500), (" 2.ep", 20), ("0it", 0)]
)
def test_durations(duration, expected):
    assert steps(duration, 10) == expected


LINES = [  # what is typed, and the line to type instead
    ("experiment=quickstart,baseline", "-m experiment=quickstart,baseline"),
    ("experiment=quickstart seed=0,1", "-m experiment=quickstart seed=0,1"),
    ("--experiment quickstart seed=1", "experiment=quickstart seed=1"),
    ("experiment=quickstart --seed=1", "experiment=quickstart seed=1"),
    ("quickstart seed=1", "experiment=quickstart seed=1"),
]


@pytest.mark.parametrize(("typed", "line"), LINES)
def test_words_that_mean_a_setting_get_the_line_to_type(typed, line):
    with pytest.raises(ExperimentError) as error:
        check_words(typed.split())
    assert str(error.value).endswith(f": python train.py {line}")
    check_words(line.split())
    check_words(["-m", "experiment=quickstart", "arms=[net2net,random_pad]", "--cfg", "job"])


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("experiment=quickstart arms=rand", "arms=random_pad"),
        ("experiment=quickstart arms=[net2net,ran", "arms=[net2net,random_pad"),
        ("experiment=ladder_wider case=", "case=20ep"),
        ("rates.", "rates.net2net="),
        ("experiment=quick", "experiment=quickstart"),  # Hydra knows it
    ],
)
def test_tab_offers_arms_cases_and_what_hydra_knows(monkeypatch, capsys, line, offered):
    monkeypatch.setenv("COMP_LINE", f"python train.py {line}")
    monkeypatch.setattr("sys.argv", ["train.py", "-sc", "query=bash"])
    assert main(["-sc", "query=bash"]) == 0
    words = capsys.readouterr().out.split()
    assert offered in words and len(words) < 30


def test_values_that_hydra_cannot_read_are_quoted(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    words = [
        "runs=~/x",
        "runs=/a/lr=1",
        "runs=a#b's",
        "runs='~/x'",
        "runs='~x'",
        "seed=0,1",
        "arms=[a,b]",
        "runs=",
        "-m",
    ]
    quoted = ["runs=/home/a/x", "runs='/a/lr=1'", "runs='a#b\\'s'", "runs='/home/a/x'", *words[4:]]
    assert quote_values(words) == quoted
    read = OverridesParser.create().parse_overrides(quoted[:3])
    assert [override.value() for override in read] == ["/home/a/x", "/a/lr=1", "a#b's"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(encoding):
    program = "import sys, experiments; print('1 – 2'); print('1 – 2', file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr, run.returncode) == ("1 ? 2\n", "1 ? 2\n", 0)


def run_without_torch(*typed: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which fails if it loads torch."""
    program = (
        "import sys, atexit, os; atexit.register(lambda: 'torch' in sys.modules and os._exit(77));"
        "sys.argv = ['train.py', *sys.argv[1:]];"
        "from experiments.command import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", program, *typed], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        ("--help", 0, "wider_inception       Section 4.2"),
        ("--help", 0, "Tab completes settings"),
        ("", 0, "Sizes: scale=cpu, scale=gpu, scale=imagenet."),
        ("--cfg job experiment=quickstart", 0, "batch_size: 32"),
        ("experiment=quickstart schedule.lr=0", 1, "\nError: schedule.lr is 0.0"),
        ("seed=1", 2, "python train.py experiment=quickstart seed=1"),
    ],
)
def test_questions_and_typos_are_answered_before_torch_is_loaded(typed, status, said):
    done = run_without_torch(*typed.split())
    assert done.returncode == status and "Traceback" not in done.stderr
    assert said in done.stdout + done.stderr


def test_a_run_says_what_it_does_and_leaves_one_folder(train_py, tmp_path, capsys):
    fast = ["arms=[random_init]", "schedule.epochs=2it", "schedule.evaluate=2it"]
    assert train_py(*fast) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "to do     random_init: about" in out
    assert out.splitlines()[-2] == "figure    runs/quickstart/figure.png"
    assert out.splitlines()[-1].startswith("verdict   random_init ends at ")
    assert "not mirrored to W&B" in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs/quickstart/seed0").iterdir()] == ["random_init"]  # needs no teacher
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. Run"),
        (Interrupted(signal.SIGINT, "net2net stopped"), 130, "Interrupted. net2net stopped. Run"),
        (Interrupted(signal.SIGTERM, "net2net stopped"), 143, "Stopped by SIGTERM. net2net stopped. Run"),
        (Interrupted(signal.SIGUSR2, "net2net stopped"), 140, "Stopped by SIGUSR2. net2net stopped. Run"),
    ],
)
def test_an_interruption_says_how_to_continue(train_py, capsys, monkeypatch, stop, status, said):
    monkeypatch.setattr("experiments.experiment.load", MagicMock(side_effect=stop))
    assert train_py() == status
    assert capsys.readouterr().err == f"\n{said} the same command again to continue.\n"


def test_without_the_packages_it_says_how_to_get_them():
    done = subprocess.run([sys.executable, "-ES", str(ROOT / "train.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"(hydra|omegaconf) is not installed in this Python: run `make setup`, then `source .*`\.\n", done.stderr
    )
