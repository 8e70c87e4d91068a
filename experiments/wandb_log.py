"""Weights & Biases, as a mirror of the ledger: losing it loses nothing, and without it it is not even imported."""

import json
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import FIRST, TEACHER, Config
from .files import write

Log = Callable[[Mapping[str, float]], None]
PATIENCE = 10.0  # seconds that a run waits for W&B's server, at its beginning and at its end
TOLD = "wandb.json"  # in an arm's folder: its identity in W&B, and the last step that was mirrored
_unreachable = False  # it let a run of this process wait in vain: the others do not try


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

    A run that goes on after an interruption goes on in W&B, where no row is repeated: the arm's folder keeps its
    identity there and the last step it was told. Whatever goes wrong in W&B is said once, and the run goes on
    without it.
    """
    swept = "WANDB_SWEEP_ID" in os.environ  # a run of a W&B sweep, which gave it its identity: for the arm
    nobodys = name == FIRST or (swept and name == TEACHER)  # what a teacher is grown from is in no seed's folder
    if config.logger == "none" or mode() == "disabled" or nobodys:
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

    def log(row: Mapping[str, float]) -> None:
        if row["step"] > told["step"]:
            run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
            told["step"] = int(row["step"])
            if not swept:
                write(place, json.dumps(told).encode())

    place = Path(config.runs) / config.name / f"seed{config.seed}" / name / TOLD
    told = _told(place, f"{_group(config)}-seed{config.seed}-{name}")
    run = attempt(lambda: _start(config, name, told["id"], manifest, console))
    try:
        yield lambda row: attempt(lambda: log(row))
    finally:
        attempt(lambda: _finish(run, config, console))


def _group(config: Config) -> str:
    return config.name.replace("/", "-")  # which W&B does not allow in an identity


def _told(place: Path, name: str) -> dict[str, Any]:
    """The run's identity in W&B, of its own even if another of the same name was there, and the last step of it."""
    with suppress(OSError, ValueError):
        return json.loads(place.read_bytes())
    return {"id": f"{name}-{secrets.token_hex(4)}", "step": -1}


def _start(config: Config, name: str, identity: str, manifest: Mapping[str, Any], console: Console) -> Any:
    """Begin the run, or go on with it. Where its server does not answer, this and all later runs are kept offline."""
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # or its telemetry waits at exit for a server that is silent
    import wandb

    Path(config.runs).mkdir(parents=True, exist_ok=True)
    patience = {"init_timeout": PATIENCE, "finish_timeout": PATIENCE, "finish_timeout_raises": True}

    def start(mode: str) -> Any:
        return wandb.init(
            project="net2net",
            id=identity,
            name=f"{_group(config)}-seed{config.seed}-{name}",
            group=_group(config),
            job_type=name,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=config.runs,
            config={key: manifest[key] for key in ("settings", "parameters", "forward_flops", "commit", "hardware")},
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, **patience),
        )

    if mode() != "online" or _unreachable:
        return start("offline" if _unreachable else mode())
    try:
        return start("online")
    except wandb.errors.CommError as error:  # pyright: ignore[reportAttributeAccessIssue] (loaded by wandb itself)
        _lose(config, console, error, "What follows is")
        wandb.teardown()  # or the process that W&B started would go on with the run that failed, and write nothing
        return start("offline")


def _finish(run: Any, config: Config, console: Console) -> None:
    """End the run; what its server did not take in time is on disk."""
    try:
        run.finish()
    except TimeoutError as error:
        _lose(config, console, error, "The run is")


def _lose(config: Config, console: Console, error: Exception, what: str) -> None:
    global _unreachable
    _unreachable = True
    reason = " ".join(str(error).split())[:200]
    text = (
        f"W&B does not answer ({reason}). {what} kept in {config.runs}/wandb; `wandb sync --include-online` uploads it."
    )
    console.print(text, highlight=False, soft_wrap=True, markup=False)
