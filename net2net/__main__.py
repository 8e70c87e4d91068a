"""Print the unit groups of a network, or grow one into another and print how equal they are.

python -m net2net resnet18            prints the unit groups of a network
python -m net2net resnet18 resnet34   grows the first into the second

Networks are those of torchvision, or of timm if that is installed, by name, with weights that look trained.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import nn

from .equivalence import equivalence
from .errors import TransferError
from .grow.describe import describe
from .testing import look_trained
from .transfer import transfer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 1 with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m net2net", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="the name of a network, as resnet18 or timm's resnet10t")
    parser.add_argument("student", nargs="?", help="a larger network to grow it into")
    parser.add_argument("--size", type=int, default=224, help="height and width of the example images (224)")
    parser.add_argument("--batch", type=int, default=2, help="how many of them (2)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    images = torch.randn(options.batch, 3, options.size, options.size)
    try:
        teacher = look_trained(_make_network(options.teacher))
        if options.student is None:
            print(describe(teacher, images))
            return 0
        student = _make_network(options.student)
        print(transfer(teacher, student, images, split="uneven"))
        print(f"on other images: {equivalence(teacher, student, torch.randn_like(images))}")
    except TransferError as error:
        print(f"{options.teacher}{f' -> {options.student}' if options.student else ''}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_default_dtype(before)
    return 0


def _make_network(name: str) -> nn.Module:
    """Make a network of torchvision, or else of timm, with random weights."""
    if find_spec("torchvision"):
        models = import_module("torchvision.models")
        if name in models.list_models():
            options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
            if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
                options["weights_backbone"] = None
            return models.get_model(name, weights=None, **options)
    if find_spec("timm"):
        timm = import_module("timm")
        if name in timm.list_models():
            return timm.create_model(name, pretrained=False)
    raise TransferError(f"No network is called {name!r} in torchvision, or in timm if that is installed.")


if __name__ == "__main__":
    raise SystemExit(main())
