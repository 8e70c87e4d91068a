"""The command line: Hydra composes the configuration; whatever is wrong with it is said in one sentence.

Nothing here imports torch: a typo, `--help` and `--cfg job` answer before it is loaded.
"""

import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import Config, ExperimentError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    if not any(a.startswith(("experiment=", "-", "+experiment=")) for a in arguments):
        if arguments:
            print("Name an experiment, as in: python train.py experiment=quickstart " + " ".join(arguments) + "\n")
        print(listing())
        return 2 if arguments else 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are, to be said in a sentence
    register()
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run)()
    except ExperimentError as error:
        print(f"\nError: {error}", file=sys.stderr)
        return 1
    except (HydraException, OmegaConfBaseException) as error:
        print(f"\nError: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\nInterrupted. {stop}{'. ' if str(stop) else ''}Run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("default_scale", default_scale, replace=True)


def run(composed: DictConfig) -> None:
    """Run one composed configuration."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    from rich.console import Console

    console = Console()
    if config.scale == default_scale() and not any(a.startswith("scale=") for a in sys.argv[1:]):
        found = "a GPU was found" if config.scale == "gpu" else "no GPU was found"
        console.print(f"scale={config.scale}: {found}; choose another with scale=...", highlight=False)
    from . import mirror
    from .compare import compare

    picture = compare(config, console)
    console.print(f"figure    {picture}", highlight=False, soft_wrap=True)
    console.print(f"log       {mirror.note(config)}", highlight=False, soft_wrap=True)


def default_scale() -> str:
    """gpu if this machine has an NVIDIA or AMD GPU, else cpu; found without loading torch."""
    return "gpu" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() else "cpu"


def listing() -> str:
    """The experiments, each with its claim."""
    lines = ["Experiments (python train.py experiment=NAME):", ""]
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        claim = OmegaConf.load(path)["claim"]
        lines += [f"  {path.stem:<18} {claim}"]
    scales = ", ".join(sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml")))
    return "\n".join([*lines, "", f"Scales: {scales}. Every setting: python train.py experiment=NAME --cfg job"])


def explain(error: Exception) -> str:
    """A composition error in a sentence, with the nearest valid key or option."""
    text = str(error).strip()
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = match.groups()
        options = [path.stem for path in (CONFIGS / group).glob("*.yaml")]
        return f"there is no {group}={option}{_hint(option, options)}. There are: {', '.join(sorted(options))}."
    match = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in|full_key: (\S+)", text)
    if match:
        key = next(group for group in match.groups() if group)
        keys = _keys()
        if key not in keys:
            return f"there is no setting {key!r}{_hint(key, keys)}. `--cfg job` shows them all."
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "reference_type" not in line)


def _hint(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


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
