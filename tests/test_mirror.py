"""The mirror may be absent, offline or broken: training goes on, and the ledger is whole."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_server import Server, serve

from experiments import wandb_log as mirror
from experiments.config import Config, check
from experiments.run_log import COLUMNS

ROOT = Path(__file__).parents[1]
MANIFEST = {"settings": {"seed": 0}, "parameters": 1, "forward_flops": 2, "commit": "abc", "hardware": "a CPU"}
FAST = ("arms=[random_init]", "schedule.epochs=2it", "schedule.evaluate=2it", "logger=wandb")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nobody is logged in to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


class Broken:
    """A W&B of which one call fails."""

    def __init__(self, call: str) -> None:
        self.call, self.calls = call, []
        self.Settings = SimpleNamespace

    def attempt(self, call: str) -> None:
        self.calls.append(call)
        if call == self.call:
            raise RuntimeError("the network\nis [gone]")

    def init(self, **_: Any) -> "Broken":
        self.attempt("init")
        return self

    def log(self, *_: Any, **__: Any) -> None:
        self.attempt("log")

    def finish(self) -> None:
        self.attempt("finish")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Broken]]:
    def make(call: str) -> Broken:
        service = Broken(call)
        monkeypatch.setitem(sys.modules, "wandb", service)  # type: ignore[arg-type]
        return service

    yield make


@pytest.mark.parametrize(
    ("call", "made"),
    [
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("finish", ["init", "log", "log", "finish"]),
        ("", ["init", "log", "log", "finish"]),
    ],
)
def test_a_failure_is_said_once_and_the_run_goes_on(
    broken: Callable[[str], Broken], tmp_path: Path, call: str, made: list[str]
) -> None:
    service, text = broken(call), StringIO()
    config = Config(experiment="any", runs=str(tmp_path))
    with mirror.mirror(config, "net2net", MANIFEST, Console(file=text)) as log:
        log({"step": 0, "test_accuracy": 0.1})
        log({"step": 5, "test_accuracy": 0.2})
    assert service.calls == made
    assert text.getvalue().count("W&B fails (RuntimeError: the network\nis [gone])") == bool(call)


def test_an_error_of_the_run_is_not_taken_for_one_of_the_mirror(
    broken: Callable[[str], Broken], tmp_path: Path
) -> None:
    service = broken("")
    with (
        pytest.raises(ZeroDivisionError),
        mirror.mirror(Config(runs=str(tmp_path)), "net2net", MANIFEST, Console(file=StringIO())),
    ):
        raise ZeroDivisionError
    assert service.calls == ["init", "finish"]


def test_without_wandb_installed_the_experiment_runs(
    train_py: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    assert train_py(*FAST) == 0
    assert "W&B fails (ModuleNotFoundError: " in capsys.readouterr().out
    assert (tmp_path / "runs/quickstart/seed0/random_init/curve.csv").exists()


def test_logger_none_never_imports_wandb(tmp_path: Path) -> None:
    program = (
        "import sys; from experiments.command import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'wandb' in sys.modules)"
    )
    settings = ["experiment=quickstart", "model.slim=0.03", "device=cpu", *FAST, "logger=none", f"runs={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", program, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_offline_a_folder_is_written_and_nothing_is_sent(tmp_path: Path) -> None:
    # In a process of its own, for W&B starts a service; a proxy that nobody answers stands for the missing network.
    program = "import sys; from experiments.command import main; sys.exit(main(sys.argv[1:]))"
    settings = ["experiment=quickstart", "model.slim=0.03", "device=cpu", *FAST, f"runs={tmp_path}/runs"]
    done = subprocess.run(
        [sys.executable, "-c", program, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "W&B fails" not in done.stdout
    assert f"W&B offline in {tmp_path}/runs/wandb: look with `wandb leet" in done.stdout
    (folder,) = (tmp_path / "runs/wandb").glob("offline-run-*")
    assert "quickstart-seed0-random_init" in folder.name
    assert list(folder.glob("*.wandb"))


def test_the_note_says_where_the_mirror_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config(runs="elsewhere")
    assert mirror.note(config).startswith("W&B offline in elsewhere/wandb: look with `wandb leet elsewhere/wandb`, ")
    assert "`wandb sync elsewhere/wandb/offline-run-*`; logger=none turns it off" in mirror.note(config)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mirror.note(config) == "mirrored to W&B (project net2net); logger=none turns it off"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mirror.note(config).startswith("W&B offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror.note(config) == "not mirrored to W&B"
    monkeypatch.delenv("WANDB_MODE")
    assert mirror.note(Config(logger="none")) == "not mirrored to W&B"


def test_a_login_in_netrc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password word\n")
    netrc.chmod(0o600)
    assert mirror.mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mirror.mode() == "offline"
    netrc.write_text("nonsense")
    assert mirror.mode() == "offline"


# A process for each turn of a run, as W&B starts a service in it: rows from one step to another, told in no time but
# for a pause that lets the server fall silent. Says how long the beginning, each row and the end took.
TURN = """
import sys, time
from rich.console import Console
from experiments import mirror
from experiments.config import Config

first, end, pause, mirror.PATIENCE = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 3.0
manifest = {"settings": {"seed": 0}, "parameters": 1, "forward_flops": 2, "commit": "abc", "hardware": "a CPU"}
clock = time.monotonic
for name in sys.argv[4:]:
    marks = [clock()]
    with mirror.mirror(Config(experiment="any", case="one", runs="runs"), name, manifest, Console()) as log:
        marks.append(clock())
        for index in range(first, end):
            if index == pause:
                print("paused", flush=True)
                sys.stdin.readline()
            began = clock()
            log({"step": 10 * index, "epoch": index / 2, "test_accuracy": index / 100})
            marks.append(clock() - began)
        ending = clock()
    print("took", marks[1] - marks[0], max(marks[2:]), clock() - ending, flush=True)
"""
ROWS = [{"_step": 10 * index, "epoch": index / 2, "test_accuracy": index / 100} for index in range(6)]


def wandb_environment(folder: Path, url: str, mode: str) -> dict[str, str]:
    """Where W&B's server is, for somebody who is logged in there."""
    named = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": mode}
    return named | {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}


def turn(folder: Path, url: str, mode: str, *arguments: object, silent: Event | None = None) -> tuple[str, list[float]]:
    """What a turn of a run says, and the longest times of beginning, row and end of its last arm."""
    process = subprocess.Popen(
        [sys.executable, "-c", TURN, *map(str, arguments)],
        cwd=folder,
        env=wandb_environment(folder, url, mode),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    said = ""
    if silent:
        for line in process.stdout:
            said += line
            if line == "paused\n":
                break
        silent.set()
    out, err = process.communicate("\n", timeout=60)
    assert process.returncode == 0, err
    said += out
    return said, [float(word) for word in said.splitlines()[-1].split()[1:]]


def sync(folder: Path, server: Server) -> None:
    """`wandb sync`, as the terminal says."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *sorted(folder.glob("runs/wandb/*run-*"))],
        cwd=folder,
        env=wandb_environment(folder, server.url, "online"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_online_and_offline_with_sync_give_the_same_charts_in_one_turn_or_in_two(tmp_path: Path) -> None:
    for mode in ("online", "offline"):
        for turns in ([(0, 6)], [(0, 3), (2, 6)]):  # a run that goes on tells its last row again
            folder = tmp_path / f"{mode}{len(turns)}"
            folder.mkdir()
            with serve() as server:
                for first, end in turns:
                    turn(folder, server.url, mode, first, end, -1, "net2net")
                if mode == "offline":
                    assert not server.runs
                    sync(folder, server)
                (run,) = server.runs
                assert run.startswith("any-one-seed0-net2net-")
                assert server.runs[run]["groupName"] == "any-one" and server.runs[run]["jobType"] == "net2net"
                assert server.charts(run) == ROWS


@pytest.mark.parametrize("outage", ["refused", "silent"])
def test_a_server_that_does_not_answer_delays_a_process_once_and_loses_nothing(tmp_path: Path, outage: str) -> None:
    with serve() as server:
        if outage == "silent":
            server.silent.set()
        url = "http://127.0.0.1:9" if outage == "refused" else server.url
        said, (begin, row, end) = turn(tmp_path, url, "online", 0, 6, -1, "net2net", "random_init")
        assert said.count("W&B does not answer") == 1
        waited = [float(line.split()[1]) for line in said.splitlines() if line.startswith("took")]
        assert 2.5 < waited[0] < 3 + 3  # the patience of this test, and what W&B's start takes
        assert max(begin, row, end) < 2.5  # the second arm waits for nothing
        server.silent.clear()
        server.runs.clear()
        sync(tmp_path, server)
        assert len(server.runs) == 2
        assert all(server.charts(run) == ROWS for run in server.runs)


def test_a_server_that_falls_silent_delays_the_end_alone_and_loses_nothing(tmp_path: Path) -> None:
    with serve() as server:
        arguments = (0, 6, 3, "net2net")
        said, (_, row, end) = turn(tmp_path, server.url, "online", *arguments, silent=server.silent)
        assert "W&B does not answer (Timed out" in said
        assert row < 0.5 and end < 3 + 2
        server.silent.clear()
        sync(tmp_path, server)
        (run,) = server.runs
        assert server.charts(run) == ROWS


def test_a_stage_that_is_made_anew_is_another_run(tmp_path: Path) -> None:
    for _ in range(2):
        turn(tmp_path, "http://127.0.0.1:9", "offline", 0, 2, -1, "net2net")
        (tmp_path / "runs/any/one/seed0/net2net" / mirror.TOLD).unlink()
    names = {folder.name.rpartition("-")[2] for folder in tmp_path.glob("runs/wandb/offline-run-*")}
    assert len(names) == 2


def test_the_sweep_file_drives_the_command_line(composed: Callable[..., Config]) -> None:
    sweep = yaml.safe_load((ROOT / "configs/wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["metric"]["name"] in COLUMNS
    swept = {key: choice.get("values") or [choice["value"]] for key, choice in sweep["parameters"].items()}
    found = set()
    for values in itertools.product(*swept.values()):
        # As W&B's agent makes a command of the file.
        arguments = create_sweep_command_args(
            {"args": {key: {"value": value} for key, value in zip(swept, values, strict=True)}}
        )
        command = create_sweep_command(list(sweep["command"]))
        assert command == ["${env}", "python", "${program}", "${args_no_hyphens}"]
        config = composed(*arguments["args_no_hyphens"])
        check(config)
        assert len(config.arms) == 1  # a run of the sweep is one curve
        found.add((config.name, config.seed, *config.arms))
    assert len(found) == 15


def test_the_network_that_a_teacher_is_grown_from_is_not_mirrored(
    broken: Callable[[str], Broken], tmp_path: Path
) -> None:
    service = broken("")
    with mirror.mirror(Config(runs=str(tmp_path)), "first", MANIFEST, Console(file=StringIO())) as log:
        log({"step": 0, "test_accuracy": 0.1})
    assert service.calls == [] and not list(tmp_path.iterdir())


def test_in_a_sweep_of_wandb_the_teacher_is_not_mirrored(
    broken: Callable[[str], Broken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = broken("")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    for name, calls in (("teacher", []), ("net2net", ["init", "log", "finish"])):
        with mirror.mirror(Config(runs=str(tmp_path)), name, MANIFEST, Console(file=StringIO())) as log:
            log({"step": 0, "test_accuracy": 0.1})
        assert service.calls == calls
