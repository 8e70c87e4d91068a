"""The command line: Hydra composes the configuration; whatever is wrong with it is said in one sentence.

Nothing here imports torch: a typo, `--help` and `--cfg job` answer before it is loaded.
"""

import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import sweep
from .cases import resolve
from .config import CONFIGS, Config, ExperimentError, check, flatten, nearest
from .signals import Interrupted

KNOWN = (ExperimentError, HydraException, OmegaConfBaseException)  # what the user can put right
LOST = {  # what launchers raise, by the name of its class
    "TerminatedWorkerError": "A process of the sweep was killed, as happens when memory is short",
    "BrokenProcessPool": "A process of the sweep was killed, as happens when memory is short",
    "UncompletedJobError": "Slurm ended a job; when the others are done",
    "FailedJobError": "Slurm refused the jobs",
}
FREE = ("model", "inception", "teacher", "first", "students", "rates", "cases")  # their keys are not in the schema

HELP = """\
python train.py experiment=NAME [KEY=VALUE ...]        run an experiment, or go on with it
python train.py experiment=NAME [KEY=VALUE ...] -m     every combination of values: seed=0,1,2
python train.py experiment=NAME --cfg job              its settings; experiments/config.py says what they mean
python train.py experiment=NAME --help                 the choices of each group, and its settings
python train.py --hydra-help                           options of the command line itself

{listing}"""


class JobFailed(Exception):
    """A job of a sweep failed, and has said why where it ran."""

    def __init__(self, sentence: str, elsewhere: bool) -> None:
        super().__init__(sentence, elsewhere)
        self.sentence = sentence
        self.elsewhere = elsewhere  # on another machine's terminal, in a log file


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    if not any(a.startswith(("experiment=", "+experiment=")) for a in arguments):
        if {"-h", "--help"} & set(arguments):
            print(HELP.format(listing=listing()))
            return 0
        if {"-c", "--cfg"} & set(arguments):
            arguments = [*arguments, "experiment=[]"]  # the settings that all have in common
    if not any(a.startswith(("experiment=", "-", "+experiment=")) for a in arguments):
        if arguments:
            print("Name an experiment, as in: python train.py experiment=quickstart " + " ".join(arguments) + "\n")
        print(listing())
        return 2 if arguments else 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are, to be said in a sentence
    # Processes that a launcher starts import this package, wherever they are started.
    path = [str(CONFIGS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    # Hydra reads sys.argv, and wants its own options before the settings.
    sys.argv[1:] = sorted(arguments, key=lambda a: "=" in a and not a.startswith("-"))
    register()
    said: set[str] = set()

    def say(sentence: str, shared: bool = False) -> None:
        # Of the processes that torchrun starts, all find what is wrong with the command: one says it.
        if sentence not in said and not (rank() and (shared or "experiments.experiment" not in sys.modules)):
            print(f"\nError: {sentence}", file=sys.stderr)
        said.add(sentence)

    def job(composed: DictConfig) -> None:
        sweeping = HydraConfig.get().mode is RunMode.MULTIRUN
        overrides = list(HydraConfig.get().overrides.task)
        who = ""
        try:
            configs = configurations(composed, overrides)
            if not sweeping:
                run(configs)
                return
            sys.argv = ["train.py", *overrides]  # what the manifest calls its command makes this job alone
            who = f"{sweep.name(configs[0])}: "
            if HydraConfig.get().runtime.choices["hydra/launcher"] == "local":
                sweep.take_gpu()
                with sweep.own_log(configs[0]) as log:
                    run(configs, log)
            else:
                run(configs)
        except Exception as error:
            if not isinstance(error, KNOWN):
                if not sweeping:
                    raise
                traceback.print_exc()
            say(who + explain(error), getattr(error, "shared", False))
            # A launcher has to know what became of its jobs. A single run would only be told once more, by Hydra.
            if sweeping:
                raise JobFailed(who + explain(error), elsewhere="SUBMITIT_EXECUTOR" in os.environ) from None

    try:
        check_launcher(arguments)
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except JobFailed as failed:
        if failed.elsewhere:
            for sentence in (failed.sentence, *sweep.failures()):
                say(sentence)
        return 1
    except KNOWN as error:
        say(explain(error))
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        what = "Interrupted" if number == signal.SIGINT else f"Stopped by {number.name}"
        if not rank():
            print(f"\n{what}. {stop}{'. ' if str(stop) else ''}Run the same command again to go on.", file=sys.stderr)
        return 128 + number
    except Exception as error:
        if type(error).__name__ not in LOST:
            raise
        what = " ".join(str(error).split())[:200]
        say(f"{LOST[type(error).__name__]} ({what}): the same command does what is missing.")
    return 1 if said else 0


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("default_scale", default_scale, replace=True)
    OmegaConf.register_new_resolver("runs_at_once", sweep.runs_at_once, replace=True)


def check_launcher(arguments: list[str]) -> None:
    """Raise ExperimentError for a launcher that would not be used, or cannot be."""
    launchers = [a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")]
    if launchers and not {"-m", "--multirun", "--cfg", "-c"} & set(arguments):
        raise ExperimentError(f"hydra/launcher={launchers[0]} starts the jobs of a sweep: add -m.")
    if "slurm" in launchers and {"-m", "--multirun"} & set(arguments) and shutil.which("sbatch") is None:
        raise ExperimentError(
            "hydra/launcher=slurm needs Slurm's sbatch, which is not on this machine: run it where that is, "
            "or take hydra/launcher=local."
        )


def run(configs: list[Config], log: IO[str] | None = None) -> None:
    """Run each of the configurations; what they have to say goes to the log, or else to the terminal.

    A case that fails does not stop the others. Raises ExperimentError in the end, with what each failed for.
    """
    from rich.console import Console

    console = Console(file=log, quiet=rank() > 0)
    if configs[0].scale == default_scale() and not any(a.startswith("scale=") for a in sys.argv[1:]):
        found = "a GPU was found" if configs[0].scale == "gpu" else "no GPU was found"
        console.print(f"scale={configs[0].scale}: {found}; choose another with scale=...", highlight=False)
    from . import wandb_log as mirror
    from .experiment import compare

    failed: list[str] = []
    for config in configs:
        try:
            sweeping = HydraConfig.get().mode is RunMode.MULTIRUN
            with sweep.noting_failure(config, explain, new=sweeping):
                picture = compare(config, console, skip_busy=sweeping)
                if picture is not None:
                    console.print(f"figure    {picture}", highlight=False, soft_wrap=True)
                console.print(f"log       {mirror.note(config)}", highlight=False, soft_wrap=True)
        except ExperimentError as error:
            if config.case is None:
                raise
            failed.append(f"case={config.case}: {error}")
            console.print(failed[-1], highlight=False, soft_wrap=True, markup=False)  # the others may take hours
    if failed:
        raise ExperimentError("\n".join(failed))


def configurations(composed: DictConfig, overrides: Iterable[str]) -> list[Config]:
    """What is run for a composed configuration and the settings that the command line named: a Config a case.

    Raises ExperimentError, or what OmegaConf raises, for one that cannot be run.
    """
    configs: list[Config] = []
    known = set(_keys())
    for resolved in resolve(composed, overrides):
        for key in flatten(OmegaConf.to_container(resolved)):  # type: ignore[arg-type]
            if key.partition(".")[0] not in FREE and key not in known:  # added with +, or by a case
                raise ExperimentError(_no_setting(key))
        config = OmegaConf.to_object(resolved)
        assert isinstance(config, Config)
        check(config)
        configs.append(config)
    return configs


def rank() -> int:
    """Which of the processes is this that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def default_scale() -> str:
    """gpu if this machine has an NVIDIA or AMD GPU, else cpu; found without loading torch."""
    return "gpu" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() else "cpu"


def listing() -> str:
    """The experiments, each with its claim."""
    lines = ["Experiments (python train.py experiment=NAME):", ""]
    paths = sorted((CONFIGS / "experiment").glob("*.yaml"))
    wide = max(len(path.stem) for path in paths)
    for path in paths:
        text = OmegaConf.load(path)
        lines += [f"  {path.stem:<{wide}} {OmegaConf.select(text, 'claim')}"]
        cases = OmegaConf.select(text, "cases") or {}
        lines += [f"  {'':<{wide}} case={', '.join(cases)}"] * bool(cases)
    scales = ", ".join(sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml")))
    return "\n".join([*lines, "", f"Scales: {scales}. Every setting: python train.py experiment=NAME --cfg job"])


def explain(error: Exception) -> str:
    """An error in a sentence, with the nearest valid key or option."""
    text = str(error).strip()
    if isinstance(error, ExperimentError):
        return text
    if not isinstance(error, KNOWN):
        return f"{type(error).__name__}: {text}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is no setting: write KEY=VALUE, and quote what has brackets: 'KEY=\"a(b)\"'."
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = match.groups()
        options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        return f"there is no {group}={option}{nearest(option, options)}. There are: {', '.join(options)}."
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, values = match[1].partition("=")
        return f"{key} has several values: write a list, {key}=[{values}], or add -m to run one after the other."
    match = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", text)
    if match and (key := next(group for group in match.groups() if group)) not in _keys():
        return _no_setting(key)
    if match := re.search(r"Error merging override (.*)", text):
        return f"{match[1]}: {str(error.__cause__).splitlines()[0].rstrip('.')}."
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "reference_type" not in line)


def _no_setting(key: str) -> str:
    if key.partition(".")[0] in FREE:
        return f"{key!r} is not set, so it cannot be changed: to give a network one more argument, write +{key}=VALUE."
    keys = _keys()
    same = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f" (did you mean {same[0]!r}?)" if same else nearest(key, keys)
    return f"there is no setting {key!r}{hint}. `--cfg job` shows them all."


def _keys() -> list[str]:
    """Every setting by its dotted name, and the config groups."""

    def walk(node: DictConfig, prefix: str = "") -> list[str]:
        keys: list[str] = []
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                keys += walk(child, f"{prefix}{key}.")
        return keys

    return walk(OmegaConf.structured(Config))


register()  # a job that was sent to another process composes its configuration there
