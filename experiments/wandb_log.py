"""Mirror curves to Weights & Biases. The CSV on disk is the truth: losing the mirror loses nothing.

W&B is imported only where it is used. Whatever goes wrong in it is reported once and stops no training.
"""

import hashlib
import importlib
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import TEACHER, Config

REPORT = "report"  # the run that holds what compares the arms of a seed
DESCRIPTION = ("settings", "parameters", "forward_flops", "commit", "hardware", "certificate")  # keys of a manifest
TIMEOUT = 10  # seconds that a run waits for W&B's server, at its beginning and at its end


def mode() -> str:
    """Return `WANDB_MODE` if it is set; else online for a user who is logged in, offline for anybody else."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return os.environ.get("WANDB_MODE") or "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].strip("/")
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def describe(config: Config) -> str:
    """Return one line for the terminal: where the mirror is, how to look at it and how to upload it."""
    if config.logger == "none" or mode() == "disabled":
        return "not mirrored to W&B"
    if mode() == "online":
        return "mirrored to W&B (project net2net); logger=none turns it off"
    return (
        f"W&B offline in {config.runs}/wandb: look with `wandb leet {config.runs}/wandb`, "
        f"upload with `wandb sync {config.runs}/wandb/offline-run-*`; logger=none turns it off"
    )


@dataclass
class Mirror:
    """A run in W&B, or nothing at all (`run` is None), to which a stage sends what it finds."""

    run: Any
    name: str
    console: Console
    last_step: int = -1  # rows up to it are there already

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row of the curve."""
        if self.run is not None and row["step"] > self.last_step:
            cells = {key: value for key, value in row.items() if key != "step"}
            _attempt(lambda: self.run.log(cells, step=int(row["step"])), self.console)

    def summarise(self, numbers: Mapping[str, Any]) -> None:
        """Put numbers into the run's summary."""
        if self.run is not None:
            _attempt(lambda: self.run.summary.update(dict(numbers)), self.console)

    def keep(self, kind: str, *files: Path) -> None:
        """Keep copies of files as an artifact of this kind."""
        if self.run is not None:
            _attempt(lambda: self._keep(kind, files), self.console)

    def _keep(self, kind: str, files: tuple[Path, ...]) -> None:
        artifact = importlib.import_module("wandb").Artifact(f"{kind}-{self.name}", kind)
        for path in files:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)


@contextmanager
def mirror(
    config: Config, name: str, manifest: Mapping[str, Any], console: Console, last_step: int = -1
) -> Iterator[Mirror]:
    """Yield the mirror of a stage while the block runs.

    Runs are grouped by experiment, with the arm as job type. A stage that continues after an interruption continues
    in W&B, where rows up to `last_step` are already.
    """
    swept = name in (TEACHER, REPORT) and "WANDB_SWEEP_ID" in os.environ  # W&B's sweep gives its identity to the arm
    if config.logger == "none" or mode() == "disabled" or swept:
        yield Mirror(None, name, console)
        return
    run = _attempt(lambda: _start(config, name, manifest), console)
    try:
        yield Mirror(run, _name(config, name), console, last_step)
    finally:
        _attempt(lambda: run.finish(), console)


def _name(config: Config, name: str) -> str:
    """The name of a stage among those of all experiments; W&B allows no slash in it."""
    return f"{config.name.replace('/', '-')}-seed{config.seed}-{name}"


def _attempt(action: Callable[[], Any], console: Console) -> Any:
    """Call W&B. A failure is reported, and this process does without W&B from then on."""
    if mode() == "disabled":
        return None
    try:
        return action()
    except Exception as error:  # whatever a service makes its client raise
        os.environ["WANDB_MODE"] = "disabled"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text = f"W&B fails ({reason}). Training continues without it; every curve is on disk."
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _start(config: Config, name: str, manifest: Mapping[str, Any]) -> Any:
    """Begin the run in W&B, or continue it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry waits at exit for a silent server
    # Artifacts wait for their upload here, not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", os.path.abspath(f"{config.runs}/wandb"))
    wandb = importlib.import_module("wandb")
    os.makedirs(config.runs, exist_ok=True)
    began = str(manifest["processes"][0]["started"])  # a stage that is run anew is another run
    run = wandb.init(
        project="net2net",
        id=f"{_name(config, name)}-{hashlib.sha256(began.encode()).hexdigest()[:8]}",
        name=_name(config, name),
        group=config.name.replace("/", "-"),
        job_type=name,
        tags=[name, f"seed{config.seed}", *([config.case] if config.case else [])],
        resume="allow",
        mode=mode(),
        dir=config.runs,
        config={key: manifest[key] for key in DESCRIPTION if key in manifest},
        settings=wandb.Settings(
            **{"console": "off", "silent": True, "disable_git": True, "disable_code": True},
            **{"init_timeout": TIMEOUT, "finish_timeout": TIMEOUT, "finish_timeout_raises": True},
        ),
    )
    for part in ("train", "holdout", "test"):  # examples, flops and seconds are logged, too: a panel may take them
        run.define_metric(f"{part}_*", step_metric="epoch")
    return run
