"""The command line: Hydra composes the configuration; whatever is wrong with it is said in one sentence.

Nothing here imports torch: a typo, `--help` and `--cfg job` answer before it is loaded.
"""

import os
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .cases import resolve
from .config import Config, ExperimentError, check, flatten, nearest
from .signals import Interrupted

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FREE = ("model", "inception", "teacher", "students", "rates", "cases")  # their keys are not in the schema


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    if not any(a.startswith(("experiment=", "-", "+experiment=")) for a in arguments):
        if arguments:
            print("Name an experiment, as in: python train.py experiment=quickstart " + " ".join(arguments) + "\n")
        print(listing())
        return 2 if arguments else 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are, to be said in a sentence
    # Hydra reads sys.argv, and wants its own options before the settings.
    sys.argv[1:] = sorted(arguments, key=lambda a: "=" in a and not a.startswith("-"))
    register()
    said: set[str] = set()

    def say(sentence: str) -> None:
        if sentence not in said:
            print(f"\nError: {sentence}", file=sys.stderr)
        said.add(sentence)

    def job(composed: DictConfig) -> None:
        try:
            run(composed)
        except (ExperimentError, OmegaConfBaseException) as error:
            say(explain(error))
            # A launcher has to know what became of its jobs. A single run would only be told once more, by Hydra.
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except (ExperimentError, HydraException, OmegaConfBaseException) as error:
        say(explain(error))
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        what = "Interrupted" if number == signal.SIGINT else f"Stopped by {number.name}"
        print(f"\n{what}. {stop}{'. ' if str(stop) else ''}Run the same command again to go on.", file=sys.stderr)
        return 128 + number
    return 1 if said else 0


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("default_scale", default_scale, replace=True)


def run(composed: DictConfig) -> None:
    """Run one composed configuration, or each of its cases; all of them are checked before the first is run.

    A case that fails does not stop the others. Raises ExperimentError in the end, with what each failed for.
    """
    configs = configurations(composed, HydraConfig.get().overrides.task)
    from rich.console import Console

    console = Console()
    if configs[0].scale == default_scale() and not any(a.startswith("scale=") for a in sys.argv[1:]):
        found = "a GPU was found" if configs[0].scale == "gpu" else "no GPU was found"
        console.print(f"scale={configs[0].scale}: {found}; choose another with scale=...", highlight=False)
    from . import mirror
    from .compare import compare

    failed: list[str] = []
    for config in configs:
        try:
            picture = compare(config, console, skip_busy=HydraConfig.get().mode is RunMode.MULTIRUN)
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
    for resolved in resolve(composed, overrides):
        for key in flatten(OmegaConf.to_container(resolved)):  # type: ignore[arg-type]
            if key.partition(".")[0] not in FREE and key not in _keys():  # added with +, or by a case
                raise ExperimentError(_no_setting(key))
        config = OmegaConf.to_object(resolved)
        assert isinstance(config, Config)
        check(config)
        configs.append(config)
    return configs


def default_scale() -> str:
    """gpu if this machine has an NVIDIA or AMD GPU, else cpu; found without loading torch."""
    return "gpu" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() else "cpu"


def listing() -> str:
    """The experiments, each with its claim."""
    lines = ["Experiments (python train.py experiment=NAME):", ""]
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        text = OmegaConf.load(path)
        lines += [f"  {path.stem:<18} {OmegaConf.select(text, 'claim')}"]
        cases = OmegaConf.select(text, "cases") or {}
        lines += [f"  {'':<18} case={', '.join(cases)}"] * bool(cases)
    scales = ", ".join(sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml")))
    return "\n".join([*lines, "", f"Scales: {scales}. Every setting: python train.py experiment=NAME --cfg job"])


def explain(error: Exception) -> str:
    """An error in a sentence, with the nearest valid key or option."""
    text = str(error).strip()
    if isinstance(error, ExperimentError):
        return text
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
