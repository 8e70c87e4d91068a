"""Cases and sweeps: which runs a command makes, how many at once, and what a run that fails leaves behind.

A case is a variant of an experiment that runs as an experiment of its own, in a folder below the experiment's. Nothing
here imports torch: a process takes its GPU before torch looks for one.
"""

import copy
import importlib
import itertools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from . import files
from .config import FOLDER, Config, ExperimentError, arm_folders, flatten, nearest, place_of, runs_of
from .run_log import MANIFEST, read_manifest
from .signals import Interrupted

GROUPS = ("data", "scale", "experiment")  # `data=digits` names a file of settings, and none of the settings in it
RESERVED = ("experiment", "case", "cases", "seed", "runs")  # say which run it is, so no case may set them
PLAN = "sweep.json"  # in an experiment's folder: for each seed, the arms that sweeps were asked for, and who runs them
FAILURE = "failure.txt"  # in an arm's folder: why the last job that was to run it has failed
planned: list[Path] = []  # the arms' folders of this process's sweep
places: list[tuple[Path, str]] = []  # where the experiments of this process's sweep are: the runs' folder, and the name
_gpu_locks: list[FileLock] = []  # the lock on this process's GPU, held until the process ends


def resolve_cases(composed: DictConfig, overrides: Iterable[str]) -> list[DictConfig]:
    """Return the configurations to run: one for each case (only `case` if that is set), or the one composed.

    A case does not change the settings that the command line names in `overrides`.
    """
    cases = OmegaConf.to_container(composed.cases)
    assert isinstance(cases, dict)
    if composed.case is not None and not cases:
        raise ExperimentError(f"{composed.experiment} has no cases: leave case= out.")
    if composed.case is not None and composed.case not in cases:
        raise ExperimentError(
            f"{composed.experiment} has no case {composed.case!r}{nearest(composed.case, map(str, cases))}. "
            f"There are: {', '.join(map(str, cases))}."
        )
    named = {word.lstrip("+").partition("=")[0] for word in overrides} - set(GROUPS)
    chosen = {str(name): cases[name] for name in cases if composed.case in (None, name)}
    return [_apply_case(composed, name, changes, named) for name, changes in chosen.items()] or [composed]


def _apply_case(composed: DictConfig, name: str, changes: object, named: set[str]) -> DictConfig:
    """The configuration of one case, whose changes have dotted or nested keys."""
    if not FOLDER.fullmatch(name):
        raise ExperimentError(f"The case {name!r} cannot name a folder: use letters, digits, dots and dashes.")
    if not isinstance(changes, dict):
        raise ExperimentError(f"The case {name} is {changes}: write the settings it changes, as {{growth.noise: 0}}.")
    result = copy.deepcopy(composed)
    for key, value in flatten(changes).items():
        if key.partition(".")[0] in RESERVED:
            raise ExperimentError(
                f"The case {name} sets {key}, which says which run it is: name it on the command line."
            )
        if not any(key == word or key.startswith(f"{word}.") for word in named):
            OmegaConf.update(result, key, value, force_add=True)
    result.cases, result.case = {}, name
    return result


class Plan(Callback):
    """Writes the plan of a sweep. Hydra calls it in the process that starts the sweep, before the first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Add every arm of the sweep to its experiment's plan. Over experiments there is none: no arm is known yet."""
        overrides = list(config.hydra.overrides.task)
        swept = {
            override.key_or_group: list(override.sweep_string_iterator())
            for override in OverridesParser.create().parse_overrides(overrides)
            if override.is_sweep_override()
        }
        forget()
        if "experiment" in swept:
            for name in swept["experiment"]:
                named = OmegaConf.merge(config, {"experiment": name})
                places.append((Path(runs_of(named)), place_of(named)))
            return
        with suppress(ExperimentError, OSError):  # the jobs will report it
            for case in resolve_cases(config, overrides):
                if case.case is None or case.case in swept.get("case", [case.case]):
                    add_to_plan(case, swept)


def forget() -> None:
    """Forget the sweep of the last command."""
    planned.clear()
    places.clear()


def add_to_plan(config: DictConfig, swept: Mapping[str, list[str]]) -> None:
    """Add the seeds and arms of a sweep to its experiment's plan; `swept` has the values of each varied setting."""
    own = [config.arms] if isinstance(config.arms, str) else list(config.arms)
    lists = [arms.strip("[]").replace(" ", "").split(",") for arms in swept.get("arms", ())] or [own]
    folders = [folder for arms in lists for folder in arm_folders(config.students, arms)]
    places.append((Path(runs_of(config)), place_of(config)))
    experiment = Path(*places[-1])
    with files.hold(experiment, lambda owner: None):  # another sweep may add to it at the same moment
        plan = read_plan(experiment)
        for seed in swept.get("seed", [str(config.seed)]):
            plan[seed] = plan.get(seed, {}) | dict.fromkeys(folders, files.name_owner())
            planned.extend(experiment / f"seed{seed}" / folder for folder in folders)
        files.write(experiment / PLAN, (json.dumps(plan) + "\n").encode())
    for folder in planned:
        (folder / FAILURE).unlink(missing_ok=True)


def read_plan(experiment: Path) -> dict[str, dict[str, str]]:
    """Return for each seed the folders of the arms that sweeps were asked for, each with who runs its sweep."""
    try:
        return json.loads((experiment / PLAN).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


@contextmanager
def announce_jobs() -> Iterator[None]:
    """While the block runs, say of jobs that are handed to Slurm what they are called and where to look, at once."""
    submitit: Any = importlib.import_module("submitit")
    number = ""

    class Announcing(submitit.AutoExecutor):
        def map_array(self, *arguments: Any) -> list[Any]:
            nonlocal number
            jobs = super().map_array(*arguments)
            number = jobs[0].job_id.partition("_")[0]
            _hand_over(f"Slurm job {number}")
            print(f"submitted Slurm job {number}: {', '.join(job.job_id for job in jobs)}")
            folder = Path(self.folder).parent  # without the job's number
            print(f"look      python scripts/status.py {places[0][0].absolute()}   or   squeue -j {number}")
            print(f"logs      {folder}/{number}*/*_log.out")
            print(f"stop      scancel {number}   (it goes on without this command)", flush=True)
            return jobs

    own, submitit.AutoExecutor = submitit.AutoExecutor, Announcing  # Hydra's launcher submits and waits in one call
    try:
        yield
    except KeyboardInterrupt:
        if not number:
            raise
        raise Interrupted(signal.SIGINT, f"Slurm job {number} goes on; scancel {number} ends it") from None
    finally:
        submitit.AutoExecutor = own


def _hand_over(owner: str) -> None:
    """Note in the plans that this process's sweep is run by `owner`."""
    for experiment in {folder.parents[1] for folder in planned}:
        with files.hold(experiment, lambda owner: None):
            plan = read_plan(experiment)
            for folder in planned:
                if folder.parents[1] == experiment:
                    plan[folder.parent.name.removeprefix("seed")][folder.name] = owner
            files.write(experiment / PLAN, (json.dumps(plan) + "\n").encode())


def is_alive(owner: str) -> bool:
    """Return whether a sweep goes on: its process lives, or its Slurm job is in the queue; if unknown, True."""
    if owner.startswith("Slurm job "):
        command = ["squeue", "-h", "-o", "%i", "-j", owner.rpartition(" ")[2]]
        with suppress(FileNotFoundError):  # this machine has no Slurm
            return bool(subprocess.run(command, capture_output=True).stdout.strip())
    return files.is_owner_here(owner) is not False


def read_failures() -> Iterator[str]:
    """Yield why jobs of this process's sweep failed."""
    for folder in planned:
        with suppress(FileNotFoundError):
            yield (folder / FAILURE).read_text(encoding="utf-8").strip()


def job_name(config: Config) -> str:
    """Return the name of a job of a sweep."""
    return f"{config.name} seed{config.seed} {' '.join(config.arms)}"


@contextmanager
def note_failure(config: Config, explain: Callable[[Exception], str], new: bool) -> Iterator[None]:
    """If the block fails, note why in the folder of every arm that it leaves unfinished; remove earlier notes.

    Only with `new` are folders made for the notes: a single run that fails at once leaves nothing.
    """
    for folder in _unfinished(config):
        with suppress(OSError):
            (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except files.BusyError:  # the arms are another run's
        raise
    except Exception as error:
        for folder in _unfinished(config):
            if new or folder.exists():
                # The disk may be full, or another process may have begun the arm: the error is raised all the same.
                with suppress(ExperimentError), files.hold(folder):
                    files.write(folder / FAILURE, f"{job_name(config)}: {explain(error)}\n".encode())
        raise


def _unfinished(config: Config) -> list[Path]:
    """The folders of the run's arms that are not complete."""
    seed = Path(config.runs) / config.name / f"seed{config.seed}"
    folders = [seed / arm for arm in arm_folders(config.students, config.arms)]
    return [folder for folder in folders if not (read_manifest(folder / MANIFEST) or {}).get("complete")]


@contextmanager
def open_log(config: Config) -> Iterator[IO[str]]:
    """Open the log of a job that runs beside others; the terminal says where it is, and when the job ends."""
    path = Path(config.runs) / ".multirun" / "logs" / f"{job_name(config).replace(' ', '_').replace('/', '_')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write a line: other jobs write at the same time.
    print(f"{job_name(config)}: begun, log in {path}\n", end="", flush=True)
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        yield log
    print(f"{job_name(config)}: done\n", end="", flush=True)


def runs_at_once(device: str) -> int:
    """Return how many runs this machine makes at once: one for each GPU, or for each core without GPUs."""
    if device not in ("auto", "cpu", "cuda"):
        return 1  # one GPU was named
    if device != "cpu" and (gpus := _gpus()):
        return len(gpus)
    return importlib.import_module("joblib").cpu_count()  # the cores that this process may use; slow to import


def _gpus() -> list[str]:
    """The names of the GPUs that this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def take_gpu() -> None:
    """Show this process one GPU alone, which no other process that calls this takes while there are others.

    Locks say which GPUs are taken, so the order in which processes start and end, and how they end, does not matter.
    """
    gpus = _gpus()
    if _gpu_locks or not gpus:
        return
    for turn in itertools.count():  # more processes than GPUs share them evenly
        for gpu in gpus:
            name = f"net2net-{os.getuid()}-gpu-{gpu.replace('/', '-')}-{turn}.lock"
            lock = FileLock(Path(tempfile.gettempdir()) / name)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _gpu_locks.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                return
