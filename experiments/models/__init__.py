"""Networks by name: the paper's Inception, a residual and a plain one for CIFAR, and any torchvision classifier."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import ExperimentError, nearest
from .inception import Inception
from .plain import Plain
from .resnet import ResNet

OURS = {"inception": Inception, "plain": Plain, "resnet": ResNet}
# Auxiliary classifiers need a loss of their own, which the arms do not have; unsaid, torchvision builds them.
PLAIN = {"aux_logits": False, "init_weights": True}


def build(spec: Mapping[str, Any], classes: int, channels: int) -> nn.Module:
    """The network that `spec` describes: `name`, and the arguments of its constructor.

    `classes` and `channels` come from the data set. Raises ExperimentError for an unknown name or argument, naming the
    nearest that exists.
    """
    arguments = dict(spec)
    name = arguments.pop("name", "inception")
    if name in OURS:
        constructor, arguments = OURS[name], arguments | {"classes": classes, "channels": channels}
    else:
        plain = PLAIN if name in ("googlenet", "inception_v3") else {}
        constructor, arguments = _torchvision(name), plain | arguments | {"num_classes": classes}
        if channels != 3:
            raise ExperimentError(f"The torchvision network {name} reads 3 channels, the images have {channels}.")
    accepted = inspect.signature(constructor).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
        for key in arguments:
            if key not in accepted:
                raise ExperimentError(
                    f"The network {name} has no argument {key!r}{nearest(key, accepted)}. "
                    f"It takes {', '.join(accepted)}."
                )
    try:
        return constructor(**arguments)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"The network {name} cannot be built with {arguments}: {error}.") from error


def _torchvision(name: str) -> Any:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ExperimentError(f"There is no network {name!r}{nearest(name, [*OURS, *known])}.")
    return models.get_model_builder(name)
