"""Sweeps: what is planned, how many runs one machine makes at once, and what a run that fails leaves behind.

Nothing here imports torch: a process takes its GPU before torch looks for one.
"""

import fcntl
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from . import locks
from .cases import resolve
from .config import Config, ExperimentError, arm_folders
from .files import write

PLAN = "plan.json"  # runs/<experiment>/plan.json: of each seed, the arms that sweeps were asked for
FAILURE = "failure.txt"  # in an arm's folder: why the last job that was to run it ended
planned: list[Path] = []  # the arms' folders of this process's sweep
_taken: list[IO[str]] = []  # the lock on this process's GPU, held until the process ends


class Plan(Callback):
    """Hydra calls it in the process that starts a sweep, before the first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Every arm that the sweep is to run stands in its experiment's plan; no failure of before is left.

        But for a sweep over experiments, whose arms are known when they begin.
        """
        overrides = list(config.hydra.overrides.task)
        swept = {
            override.key_or_group: list(override.sweep_string_iterator())
            for override in OverridesParser.create().parse_overrides(overrides)
            if override.is_sweep_override()
        }
        planned.clear()
        if "experiment" in swept:
            return
        with suppress(ExperimentError, OSError):  # its jobs will say it
            for case in resolve(config, overrides):
                if case.case is None or case.case in swept.get("case", [case.case]):
                    _plan(case, swept)


def _plan(config: DictConfig, swept: Mapping[str, list[str]]) -> None:
    lists = [arms.strip("[]").replace(" ", "").split(",") for arms in swept.get("arms", ())] or [_words(config.arms)]
    folders = [folder for arms in lists for folder in arm_folders(config.students, arms)]
    experiment = Path(config.runs, config.experiment, config.case or "")
    with locks.hold(experiment, waiting=lambda _: None):  # another sweep may add to it at the same moment
        plan = read_plan(experiment)
        for seed in swept.get("seed", [str(config.seed)]):
            plan[seed] = list(dict.fromkeys([*plan.get(seed, []), *folders]))
            planned.extend(experiment / f"seed{seed}" / folder for folder in folders)
        write(experiment / PLAN, (json.dumps(plan) + "\n").encode())
    for folder in planned:
        (folder / FAILURE).unlink(missing_ok=True)


def _words(arms: Any) -> list[str]:
    return [arms] if isinstance(arms, str) else list(arms)


def read_plan(experiment: Path) -> dict[str, list[str]]:
    """Seed -> the folders of the arms that sweeps of this experiment were asked for, begun or not."""
    try:
        return json.loads((experiment / PLAN).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def failures() -> Iterator[str]:
    """Why jobs of this process's sweep failed, each sentence once."""
    for folder in planned:
        with suppress(FileNotFoundError):
            yield (folder / FAILURE).read_text().strip()


def name(config: Config) -> str:
    """What a job of a sweep is called."""
    return f"{config.name} seed{config.seed} {' '.join(config.arms)}"


@contextmanager
def noting_failure(config: Config, explain: Callable[[Exception], str], new: bool) -> Iterator[None]:
    """If the block fails, the folder of every arm that the run leaves unfinished says why; if not, none does.

    Without `new`, only folders that are there already: a single run that fails at once leaves nothing.
    """
    for folder in _unfinished(config):
        with suppress(OSError):
            (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except locks.BusyError:  # they are another run's
        raise
    except Exception as error:
        for folder in _unfinished(config):
            if new or folder.exists():
                # A full disk: the sentence is said all the same. Or another process has begun to run it since.
                with suppress(ExperimentError), locks.hold(folder):
                    write(folder / FAILURE, f"{name(config)}: {explain(error)}\n".encode())
        raise


def _unfinished(config: Config) -> list[Path]:
    seed = Path(config.runs) / config.name / f"seed{config.seed}"
    return [seed / arm for arm in arm_folders(config.students, config.arms) if not _is_complete(seed / arm)]


def _is_complete(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_bytes())["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def own_log(config: Config) -> Iterator[IO[str]]:
    """A file for what a job has to say while others say it, too; the terminal is told where it is, and of the end."""
    path = Path(config.runs) / ".multirun" / "logs" / f"{name(config).replace(' ', '_').replace('/', '_')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name(config)}: begun, log in {path}", flush=True)
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        yield log
    print(f"{name(config)}: done", flush=True)


def runs_at_once(device: str) -> int:
    """How many runs this machine makes at once: one a GPU, or one a core where they compute on the CPU."""
    if device not in ("auto", "cpu", "cuda"):
        return 1  # one GPU was named
    if device != "cpu" and (gpus := _gpus()):
        return len(gpus)
    from joblib import cpu_count

    return cpu_count()  # of those that this process may use


def _gpus() -> list[str]:
    """The names of the GPUs that this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def take_gpu() -> None:
    """From now on this process sees one GPU, which no other process that called this sees while there are others.

    A lock tells which are taken, so that it does not matter in which order processes start and end, nor how.
    """
    gpus = _gpus()
    if _taken or not gpus:
        return
    for turn in itertools.count():  # more processes than GPUs share them evenly
        for gpu in gpus:
            name = f"net2net-{os.getuid()}-gpu-{gpu.replace('/', '-')}-{turn}.lock"
            file = open(Path(tempfile.gettempdir()) / name, "w")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _taken.append(file)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return
