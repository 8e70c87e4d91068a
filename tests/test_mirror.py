"""The mirror may be absent, offline or broken: training goes on, and the ledger is whole."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from experiments import mirror
from experiments.config import Config

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
    assert folder.name.endswith("quickstart-seed0-random_init")
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
