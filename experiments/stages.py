"""Stages: the teacher and each arm. A stage whose product exists is skipped; one made otherwise is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ledger
from .config import ExperimentError, flatten


def is_complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the stage in `folder` has been finished with these settings.

    Raises ExperimentError, showing the difference, if the folder holds a run, finished or not, with others.
    """
    manifest = ledger.read_manifest(folder)
    if manifest is None:
        if (folder / "checkpoint.pt").exists():
            raise ExperimentError(
                f"{folder} holds a checkpoint but no manifest, so nobody knows what made it: delete the folder."
            )
        return False
    before, now = flatten(manifest["settings"]), flatten(settings)
    changed = [
        f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ExperimentError(
            f"{folder} holds a run made with other settings:\n" + "\n".join(changed) + "\n"
            "Delete that folder to run it anew, or write elsewhere with runs=FOLDER."
        )
    return bool(manifest["complete"])
