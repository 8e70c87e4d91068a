"""The arms of an experiment: one file each, found by being here. Settings, reports, figures and claims read `ARMS`."""

from importlib import import_module
from pkgutil import iter_modules

from .arm import Arm, Start

__all__ = ["ARMS", "Arm", "Start"]


def _find() -> dict[str, Arm]:
    """Return the `ARM` of every module in this folder by its name, in reading order."""
    modules = [module.name for module in iter_modules(__path__) if module.name != "arm"]
    found: list[Arm] = [import_module(f"{__name__}.{module}").ARM for module in modules]
    return {arm.name: arm for arm in sorted(found, key=lambda arm: arm.place)}


ARMS = _find()
