"""The command line: Hydra composes the configuration; an error is reported in one sentence.

Nothing here imports torch at the top: a typo, `--help` and `--cfg job` are answered before it is loaded.
"""

import importlib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from . import sweep
from .config import CONFIGS, Config, ExperimentError, check, flatten, nearest, shorten
from .signals import Interrupted
from .words import check_words, complete, list_choices, quote_values

KNOWN = (ExperimentError, HydraException, OmegaConfBaseException)  # errors that the user can put right
LAUNCHER_ERRORS = {  # errors of the launchers, which are installed only where they are used, by the name of the class
    "TerminatedWorkerError": "A process of the sweep was killed, as happens when memory is short",
    "BrokenProcessPool": "A process of the sweep was killed, as happens when memory is short",
    "UncompletedJobError": "Slurm ended a job",
    "FailedJobError": "Slurm refused the jobs",
}
# The keys of these are not in the schema.
FREE = ("model", "inception", "speedrun", "teacher", "first", "students", "rates", "cases", "data.options")
RUN = "experiments.experiment"  # the module that runs experiments; it loads torch, which takes seconds

HELP = """\
python train.py experiment=NAME [KEY=VALUE ...]        run an experiment, or continue it
python train.py experiment=NAME [KEY=VALUE ...] -m     every combination of values: seed=0,1,2
python train.py experiment=NAME --cfg job              its settings; experiments/config.py explains them
python train.py experiment=NAME --help                 the choices of each group, and its settings
python train.py --hydra-help                           options of the command line itself
eval "$(python train.py -sc install=bash)"             Tab completes settings and their choices (or fish, zsh)

{listing}"""

_reported: set[str] = set()  # the sentences that this command has printed


class JobFailed(Exception):
    """A job of a sweep failed, and has reported its error where it ran."""

    def __init__(self, sentence: str, elsewhere: bool) -> None:
        super().__init__(sentence, elsewhere)
        self.sentence = sentence
        self.elsewhere = elsewhere  # in a log file on another machine


def main(arguments: list[str]) -> int:
    """Run the command line and return its exit status: 0, 1 for an error, 2 for a wrong command, 128 + a signal."""
    _reported.clear()
    sweep.forget()
    try:
        check_words(arguments)
    except ExperimentError as error:
        report(explain(error))
        return 2
    status = answer(arguments)
    if status is not None:
        return status
    _prepare(quote_values(arguments))
    try:
        is_slurm = check_launcher(arguments) == "slurm"
        with sweep.announce_jobs() if is_slurm else nullcontext():
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run_job)()
        _print_sweep()
    except JobFailed as failed:
        _print_sweep()
        if failed.elsewhere:
            for sentence in (failed.sentence, *sweep.read_failures()):
                report(sentence)
        return 1
    except KNOWN as error:
        report(explain(error))
    except KeyboardInterrupt as stop:
        return _report_interruption(stop)
    except Exception as error:
        if type(error).__name__ not in LAUNCHER_ERRORS:
            raise
        what = " ".join(str(error).split())[:200]
        advice = "Run the same command again when this is put right: it does only what is missing."
        report(f"{LAUNCHER_ERRORS[type(error).__name__]} ({what}). {advice}")
    return 1 if _reported else 0


def answer(arguments: list[str]) -> int | None:
    """Answer a command that needs no Hydra and return its exit status; None for all others."""
    if "COMP_LINE" in os.environ and {"-sc", "--shell-completion"} & set(arguments):
        offered = complete(os.environ["COMP_LINE"])
        print(" ".join(offered), end="\n" * bool(offered))
        return 0 if offered else None  # Hydra knows the other settings
    if any(a.startswith(("experiment=", "+experiment=")) for a in arguments) or {"-c", "--cfg"} & set(arguments):
        return None
    if {"-h", "--help"} & set(arguments):
        print(HELP.format(listing=list_experiments()))
        return 0
    if "--version" in arguments:
        print(f"net2net {importlib.import_module('net2net').__version__}")
        return 0
    if any(a.startswith("-") for a in arguments):
        return None
    if arguments:
        print("Name an experiment, as in: python train.py experiment=quickstart " + " ".join(arguments) + "\n")
    print(list_experiments())
    return 2 if arguments else 0


def list_experiments() -> str:
    """Return the experiments, each with its claim and its cases, cut to the width of the terminal."""
    lines = ["Run one with python train.py experiment=NAME. quickstart takes half a minute and downloads nothing.", ""]
    paths = sorted((CONFIGS / "experiment").glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    room = max(40, shutil.get_terminal_size((120, 24)).columns - width - 3)
    for path in paths:
        text = OmegaConf.load(path)
        cases = OmegaConf.select(text, "cases")
        for name, said in ((path.stem, OmegaConf.select(text, "claim")), ("", cases and f"case={', '.join(cases)}")):
            lines += [f"  {name:<{width}} {textwrap.shorten(said, room, placeholder=' ...')}"] if said else []
    scales = ", ".join(f"scale={scale}" for scale in list_choices("scale"))
    return "\n".join([*lines, "", f"Sizes: {scales}. All settings of one: python train.py experiment=NAME --cfg job"])


def _prepare(arguments: list[str]) -> None:
    """Set up Hydra's surroundings: its arguments, its schema, and the path of processes that a launcher starts."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here as they are
    path = [str(CONFIGS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    if not any(a.startswith(("experiment=", "+experiment=")) for a in arguments):
        arguments = [*arguments, "experiment=[]"]  # --cfg alone shows the settings that all experiments share
    # Hydra reads sys.argv, and wants its own options before the settings.
    sys.argv[1:] = sorted(arguments, key=lambda a: "=" in a and not a.startswith("-"))
    register()


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("default_scale", default_scale, replace=True)
    OmegaConf.register_new_resolver("runs_at_once", sweep.runs_at_once, replace=True)


def default_scale() -> str:
    """Return gpu if this machine has an NVIDIA or AMD GPU, else cpu; found without torch."""
    return "gpu" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() else "cpu"


def check_launcher(arguments: list[str]) -> str:
    """Return the launcher of a sweep, or ""; refuse one that would not be used, or cannot be, with ExperimentError."""
    launchers = [a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")]
    if launchers and not {"-m", "--multirun", "--cfg", "-c"} & set(arguments):
        raise ExperimentError(f"hydra/launcher={launchers[0]} starts the jobs of a sweep: add -m.")
    if "slurm" in launchers and {"-m", "--multirun"} & set(arguments) and shutil.which("sbatch") is None:
        raise ExperimentError(
            "hydra/launcher=slurm needs Slurm's sbatch, which is not on this machine: run it on a machine that has "
            "it, or take hydra/launcher=local."
        )
    return launchers[0] if launchers else ""


def run_job(composed: DictConfig) -> None:
    """Run what Hydra has composed. A single run reports its error, a job of a sweep also raises JobFailed."""
    sweeping = HydraConfig.get().mode is RunMode.MULTIRUN
    overrides = list(HydraConfig.get().overrides.task)
    name = ""
    try:
        configs = make_configs(composed, overrides)
        if sweeping:
            name = f"{sweep.job_name(configs[0])}: "
            sys.argv = ["train.py", *overrides]  # the command in the manifest makes this job alone
        if sweeping and HydraConfig.get().runtime.choices["hydra/launcher"] == "local":
            sweep.take_gpu()
            with sweep.open_log(configs[0]) as log:
                run(configs, sweeping, log)
        else:
            run(configs, sweeping)
    except Exception as error:
        if not isinstance(error, KNOWN):
            if not sweeping:
                raise
            traceback.print_exc()
        report(name + explain(error), getattr(error, "shared", False))
        if sweeping:
            raise JobFailed(name + explain(error), elsewhere="SUBMITIT_EXECUTOR" in os.environ) from None


def make_configs(composed: DictConfig, overrides: Iterable[str]) -> list[Config]:
    """Return the configurations that a command runs, one for each case; `overrides` are the settings that it names."""
    configs: list[Config] = []
    known, overrides = set(_list_keys()), list(overrides)
    for resolved in sweep.resolve_cases(composed, overrides):
        for key in flatten(OmegaConf.to_container(resolved)):  # type: ignore[arg-type]
            if not _is_free(key) and key not in known:  # added with +, or by a case
                raise ExperimentError(_describe_unknown(key))
        config = OmegaConf.to_object(resolved)
        assert isinstance(config, Config)
        if (scale := f"scale={config.scale}") not in overrides and any(o.startswith("scale=") for o in overrides):
            raise ExperimentError(f"{config.experiment} has one size on every machine, {scale}: leave scale= out.")
        check(config)
        configs.append(shorten(config))
    return configs


def run(configs: list[Config], sweeping: bool, log: IO[str] | None = None) -> None:
    """Run the configurations one after another, and print to `log` or else to the terminal.

    A case that fails does not stop the others. In the end raises an ExperimentError that says why each failed.
    """
    console = Console(file=log, quiet=rank() > 0)
    if configs[0].scale == default_scale() and not any(a.startswith("scale=") for a in sys.argv[1:]):
        found = "a GPU was found" if configs[0].scale == "gpu" else "no GPU was found"
        console.print(f"scale={configs[0].scale}: {found}; choose another with scale=...", highlight=False)
    run_experiment = importlib.import_module(RUN).run_experiment
    failed: list[str] = []
    for config in configs:
        try:
            with sweep.note_failure(config, explain, new=sweeping):
                run_experiment(config, console, in_sweep=sweeping)
        except ExperimentError as error:
            if config.case is None:
                raise
            failed.append(f"case={config.case}: {error}")
            console.print(failed[-1], highlight=False, soft_wrap=True, markup=False)  # the others may take hours
    if failed:
        raise ExperimentError("\n".join(failed))


def _print_sweep() -> None:
    """Print the results of each experiment of this command's sweep, as far as its arms are finished."""
    if not sweep.places:
        return
    curves, pages = (importlib.import_module(f"experiments.analysis.{name}") for name in ("curves", "pages"))
    for runs, experiment in sweep.places:
        for name, folder in curves.find_experiments(runs).items():
            if name == experiment or name.startswith(f"{experiment}/"):
                with suppress(ExperimentError):  # no arm is finished
                    pages.print_results(folder, Console())


def rank() -> int:
    """Return this process's rank among those that torchrun has started; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def report(sentence: str, shared: bool = False) -> None:
    """Print an error once. Of the ranks that all find it (`shared`, or before anything runs), rank 0 prints it."""
    if sentence not in _reported and not (rank() and (shared or RUN not in sys.modules)):
        print(f"\nError: {sentence}", file=sys.stderr)
    _reported.add(sentence)
    if "TORCHELASTIC_RUN_ID" in os.environ and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        with suppress(OSError):  # torchrun ends with a report of its own, and shows this in it
            Path(file).write_text(json.dumps({"message": f"Error: {sentence}", "timestamp": int(time.time())}))


def _report_interruption(stop: KeyboardInterrupt) -> int:
    """Say that the run was stopped and how to continue; return the exit status."""
    number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
    what = "Interrupted" if number == signal.SIGINT else f"Stopped by {number.name}"
    if not rank():
        print(f"\n{what}. {stop}{'. ' if str(stop) else ''}Run the same command again to continue.", file=sys.stderr)
    return 128 + number


def explain(error: Exception) -> str:
    """Return an error as one sentence: its own words, with the nearest valid name where a name is unknown."""
    if isinstance(error, ExperimentError):
        return str(error)
    if not isinstance(error, KNOWN):
        return f"{type(error).__name__}: {error}"
    lines = [*str(error).splitlines(), *str(error.__cause__ or "").splitlines()[:1]]
    text = " ".join(line.strip() for line in lines if line.strip() and "reference_type" not in line)
    if option := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):  # Hydra adds its search path
        group, name = option.groups()
        choices = list_choices(group)
        more = " Those of torchvision are written data=torchvision data.name=NAME." if group == "data" else ""
        return f"There is no {group} {name!r}{nearest(name, choices)}. There are {', '.join(choices)}.{more}"
    if wrong := re.search(r"merging override (.+) Value '.*' of type .* converted to (Integer|Float)", text):
        return f"{wrong[1]}: it has to be a {'whole ' * (wrong[2] == 'Integer')}number."
    unknown = re.search(r"(?:override|Key|find) '([^']+)'", text)
    if unknown and _is_free(unknown[1]):
        hint = nearest(unknown[1].rpartition(".")[2], _list_siblings(error))
        return f"The experiment sets no {unknown[1]}{hint}. To set it all the same, write +{unknown[1]}=VALUE."
    if unknown:
        return _describe_unknown(unknown[1])
    return text


def _is_free(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{free}." for free in FREE))


def _describe_unknown(key: str) -> str:
    return f"There is no setting {key!r}{_nearest_key(key)}. `--cfg job` shows them all."


def _list_siblings(error: BaseException | None) -> list[str]:
    """Return the keys beside the one that OmegaConf did not find."""
    while error is not None:
        if (node := getattr(error, "parent_node", None)) is not None:
            return [str(key) for key in node]
        error = error.__cause__
    return []


def _nearest_key(key: str) -> str:
    """A hint at the setting, or at the option of a group, that an unknown name resembles most."""
    same = [known for known in _list_keys() if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return nearest(key, same or _list_keys()) or f" (did you mean {same[0]!r}?)" * bool(same)


def _list_keys() -> list[str]:
    """Every setting by its dotted name, and the groups of settings."""
    return [*(field.name for field in fields(Config)), *flatten(asdict(Config()))]


register()  # a job that was sent to another process composes its configuration there
