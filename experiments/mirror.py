"""Weights & Biases, as a mirror of the ledger: losing it loses nothing, and without it it is not even imported."""

import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import Config

Log = Callable[[Mapping[str, float]], None]


def mode() -> str:
    """`WANDB_MODE` if it is set; else online for a user who is logged in, offline for anybody else."""
    named = os.environ.get("WANDB_MODE")
    return named or ("online" if _logged_in() else "offline")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def note(config: Config) -> str:
    """One line for the terminal: where the mirror is, how to look at it and how to upload it."""
    if config.logger == "none" or mode() == "disabled":
        return "not mirrored to W&B"
    if mode() == "online":
        return "mirrored to W&B (project net2net); logger=none turns it off"
    return (
        f"W&B offline in {config.runs}/wandb: look with `wandb leet {config.runs}/wandb`, "
        f"upload with `wandb sync {config.runs}/wandb/offline-run-*`; logger=none turns it off"
    )


@contextmanager
def mirror(config: Config, name: str, manifest: Mapping[str, Any], console: Console) -> Iterator[Log]:
    """A function that mirrors rows of the curve, grouped by experiment with the arm as job type, while the block runs.

    Rows that were mirrored before an interruption are not repeated: every row carries its step. Whatever goes wrong
    in W&B is said once, and the run goes on without it.
    """
    if config.logger == "none" or mode() == "disabled":
        yield lambda row: None
        return
    lost = False

    def attempt(action: Callable[[], Any]) -> Any:
        nonlocal lost
        if lost:
            return None
        try:
            return action()
        except Exception as error:  # whatever a service makes its client raise
            lost = True
            text = f"W&B fails ({type(error).__name__}: {error}). {name} goes on without it; its curve is on disk."
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    run = attempt(lambda: _start(config, name, manifest))
    try:
        yield lambda row: attempt(
            lambda: run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
        )
    finally:
        attempt(lambda: run.finish())


def _start(config: Config, name: str, manifest: Mapping[str, Any]) -> Any:
    import wandb

    Path(config.runs).mkdir(parents=True, exist_ok=True)
    group = config.name.replace("/", "-")  # which W&B does not allow in an identity
    identity = f"{group}-seed{config.seed}-{name}"
    return wandb.init(
        project="net2net",
        id=identity,
        name=identity,
        group=group,
        job_type=name,
        resume="allow",
        mode=mode(),  # type: ignore[arg-type]
        dir=config.runs,
        config={key: manifest[key] for key in ("settings", "parameters", "forward_flops", "commit", "hardware")},
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
    )
