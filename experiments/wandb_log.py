"""Mirror curves to Weights & Biases. The CSV on disk is the truth: losing the mirror loses nothing.

W&B is imported only where it is used. Whatever goes wrong in it is reported once and stops no training.
"""

import hashlib
import importlib
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from .config import FIRST, TEACHER, Config

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


@contextmanager
def mirror(
    config: Config, name: str, manifest: Mapping[str, Any], console: Console, last_step: int = -1
) -> Iterator[Callable[[Mapping[str, float]], object]]:
    """Yield a function that mirrors the rows of a stage's curve while the block runs.

    Runs are grouped by experiment, with the arm as job type. A stage that continues after an interruption continues
    in W&B, where rows up to `last_step` are already.
    """
    swept = name == TEACHER and "WANDB_SWEEP_ID" in os.environ  # W&B's sweep gives its identity to the arm
    if config.logger == "none" or mode() == "disabled" or name == FIRST or swept:
        yield lambda row: None
        return
    run = _attempt(lambda: _start(config, name, manifest), console)

    def log(row: Mapping[str, float]) -> None:
        if row["step"] > last_step:
            cells = {key: value for key, value in row.items() if key != "step"}
            _attempt(lambda: run.log(cells, step=int(row["step"])), console)

    try:
        yield log
    finally:
        _attempt(lambda: run.finish(), console)


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
    wandb = importlib.import_module("wandb")
    os.makedirs(config.runs, exist_ok=True)
    group = config.name.replace("/", "-")  # W&B allows no slash in an identity
    began = str(manifest["processes"][0]["started"])  # a stage that is run anew is another run
    run = wandb.init(
        project="net2net",
        id=f"{group}-seed{config.seed}-{name}-{hashlib.sha256(began.encode()).hexdigest()[:8]}",
        name=f"{group}-seed{config.seed}-{name}",
        group=group,
        job_type=name,
        tags=[name, f"seed{config.seed}", *([config.case] if config.case else [])],
        resume="allow",
        mode=mode(),
        dir=config.runs,
        config={key: manifest[key] for key in ("settings", "parameters", "forward_flops", "commit", "hardware")},
        settings=wandb.Settings(
            **{"console": "off", "silent": True, "disable_git": True, "disable_code": True},
            **{"init_timeout": TIMEOUT, "finish_timeout": TIMEOUT, "finish_timeout_raises": True},
        ),
    )
    for part in ("train", "holdout", "test"):  # examples, flops and seconds are logged, too: a panel may take them
        run.define_metric(f"{part}_*", step_metric="epoch")
    return run
