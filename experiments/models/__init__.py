"""Networks by name: the paper's Inception, three others for CIFAR, and torchvision's classifiers."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torchvision import models

from ..config import ExperimentError, nearest
from .inception import Inception
from .plain import Plain
from .resnet import ResNet
from .speedrun import SpeedRun

OURS = {"inception": Inception, "plain": Plain, "resnet": ResNet, "speedrun": SpeedRun}
# torchvision builds these two with auxiliary classifiers, whose losses the training does not know.
WITHOUT_AUXILIARY = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def build(spec: Mapping[str, Any], classes: int, channels: int) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        spec: The network's `name`, or package.module:function, and the arguments of its constructor. It gets `classes`
            and `channels`, or without an argument `classes` what torchvision's get, `num_classes`.
        classes: Classes of the data set.
        channels: Channels of its images.

    Raises:
        ExperimentError: The name or an argument is unknown, or the constructor refuses the arguments.
    """
    arguments = dict(spec)
    for key in ("width", "slim"):
        if not 0 < float(arguments.get(key, 1.0)) < math.inf:
            raise ExperimentError(f"{key}={arguments[key]} multiplies channels: it has to be above 0.")
    name = arguments.pop("name", "inception")
    if name in OURS:
        constructor, arguments = OURS[name], arguments | {"classes": classes, "channels": channels}
    elif ":" in name:
        constructor = _find_constructor(name)
        ours = "classes" in inspect.signature(constructor).parameters
        arguments |= {"classes": classes, "channels": channels} if ours else {"num_classes": classes}
    elif name not in (known := models.list_models(module=models)):
        raise ExperimentError(
            f"There is no network {name!r}{nearest(name, [*OURS, *known])}. There are {', '.join(OURS)}, and the "
            "classifiers of torchvision by their names there. Yours is called as package.module:function."
        )
    elif channels != 3:
        raise ExperimentError(f"The torchvision network {name} reads 3 channels, the images have {channels}.")
    else:
        constructor = models.get_model_builder(name)
        arguments = WITHOUT_AUXILIARY.get(name, {}) | arguments | {"num_classes": classes}
    accepted = inspect.signature(constructor).parameters
    unknown = [key for key in arguments if key not in accepted]
    if unknown and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
        meant = nearest(unknown[0], accepted)
        leave_out = "" if meant else f" If the experiment's model has it, ~model.{unknown[0]} leaves it out."
        raise ExperimentError(
            f"The network {name} has no argument {unknown[0]!r}{meant}. It takes {', '.join(accepted)}.{leave_out}"
        )
    try:
        return constructor(**arguments)
    except (TypeError, ValueError) as error:
        raise ExperimentError(
            f"The network {name} cannot be built with {arguments}: {error}. They stand in the experiment's model, "
            "teacher and students; ~model.NAME leaves one out."
        ) from error


def _find_constructor(place: str) -> Callable[..., nn.Module]:
    """Import the function or class that `place` names, as package.module:function."""
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExperimentError(f"model.name={place} names no function that can be imported: {error}.") from error
