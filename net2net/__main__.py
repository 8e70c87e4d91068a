"""See how a network can grow, grow one into another, or check the certificate of a growth.

net2net describe NETWORK              lists the layers that grow together, and what keeps them from growing
net2net grow TEACHER STUDENT          grows the first network into the second, and prints how equal they are
net2net grow FOLDER OUT --mlp 1.5     grows a Hugging Face checkpoint in safetensors files into the new folder OUT
net2net verify certificate.json       checks the file that net2net.certify wrote, and prints what it says

A network is the name of one of torchvision or timm (resnet18), or package.module:function. The function is called
without arguments. `python -m net2net` also finds modules in the current folder. describe also takes the folder of a
checkpoint. A network by name has random weights that look trained; a checkpoint keeps its own. Networks run on random
images of three channels. If yours reads anything else, call net2net.describe or net2net.widen in Python.

A checkpoint may be larger than memory: its tensors are read and written one by one. OUT appears when all of it is
written. If you stop the command, call it again to continue.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .certificate import check_certificate
from .checkpoint import Growth, describe_checkpoint, grow_checkpoint
from .equivalence import equivalence
from .errors import TransferError
from .grow.describe import describe
from .testing import look_trained
from .transfer import transfer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 1 with one sentence on stderr."""
    options = _parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        text, data = options.run(options)
        print(json.dumps(data, indent=2) if options.json else text)
    except TransferError as error:
        print(f"{' -> '.join(filter(None, (options.subject, options.student)))}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_default_dtype(before)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("net2net", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"net2net {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help="describe, grow or verify; each has --help")
    network = "a name of torchvision or timm, package.module:function, or the folder of a checkpoint"
    for run, subject, what in (
        (_describe, "network", network),
        (_grow, "teacher", network),
        (_verify, "certificate", "the JSON file that net2net.certify wrote"),
    ):
        command = commands.add_parser(run.__name__[1:])
        command.set_defaults(run=run, student=None)
        command.add_argument("subject", metavar=subject, help=what)
        if run is _grow:
            command.add_argument("student", help="the larger network, or the new folder if the teacher is a checkpoint")
            for option, what in (("mlp", "the width inside each MLP"), ("stream", "the width of the residual stream")):
                command.add_argument(
                    f"--{option}", type=float, default=1.0, help=f"checkpoints only: multiply {what} by this number"
                )
            command.add_argument("--layers", type=int, default=0, help="checkpoints only: add so many blocks")
        if run is not _verify:
            command.add_argument("--size", type=int, default=224, help="height and width of the example images (224)")
            command.add_argument("--batch", type=int, default=2, help="number of example images (2)")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _describe(options: argparse.Namespace) -> tuple[str, object]:
    if Path(options.subject).is_dir():
        found = describe_checkpoint(options.subject)
    else:
        found = describe(look_trained(_make_network(options.subject)), _draw_images(options))
    groups = [{key: value for key, value in vars(group).items() if key != "units"} for group in found.groups]
    return str(found), [group | {"free": each.free} for group, each in zip(groups, found.groups, strict=True)]


def _grow(options: argparse.Namespace) -> tuple[str, object]:
    growth = Growth(options.mlp, options.stream, options.layers)
    if Path(options.subject).is_dir():
        record = grow_checkpoint(options.subject, options.student, growth)
        assert record.measured is not None
        return str(record), {"on random tokens": asdict(record.measured), "modes": record.modes}
    if growth != Growth():
        raise TransferError(
            "--mlp, --stream and --layers are for the folder of a checkpoint, and there is no such folder."
        )
    teacher, images = look_trained(_make_network(options.subject)), _draw_images(options)
    student = _make_network(options.student)
    record = transfer(teacher, student, images, split="uneven")
    other = equivalence(teacher, student, torch.randn_like(images))
    assert record.measured is not None
    found = {"on the example": asdict(record.measured), "on other images": asdict(other), "modes": record.modes}
    return f"{record}\non other images: {other}", found


def _verify(options: argparse.Namespace) -> tuple[str, object]:
    try:
        certificate = json.loads(Path(options.subject).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TransferError(f"The certificate cannot be read: {error}.") from error
    check_certificate(certificate)
    shown = "\n".join(f"{key:<10}  {certificate[key]}" for key in ("operator", "settings", "difference", "inputs"))
    networks = "The file is as it was written. net2net.verify checks the networks, too."
    return f"{shown}\n{networks}", certificate


def _draw_images(options: argparse.Namespace) -> torch.Tensor:
    return torch.randn(options.batch, 3, options.size, options.size)


def _make_network(name: str) -> nn.Module:
    """Make a network of torchvision, or else of timm, or by a function that can be imported, with random weights."""
    if ":" in name:
        return _call(name)
    known: list[str] = []
    if find_spec("torchvision"):
        models = import_module("torchvision.models")
        known += models.list_models()
        if name in known:
            options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
            if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
                options["weights_backbone"] = None
            return models.get_model(name, weights=None, **options)
    if find_spec("timm"):
        timm = import_module("timm")
        if name in timm.list_models():
            return timm.create_model(name, pretrained=False)
        known += timm.list_models()
    if not known:
        raise TransferError("Networks by name come from torchvision: pip install torchvision, or name a function.")
    near = get_close_matches(name.lower(), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise TransferError(
        f"No network is called {name!r}{hint} in torchvision, or in timm if that is installed. Write yours as "
        "package.module:function, and a checkpoint as its folder."
    )


def _call(place: str) -> nn.Module:
    module, _, function = place.partition(":")
    try:
        return getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        why = f"makes no network when called without arguments: {error}"
        raise TransferError(f"{function} of {module} {why}.") from error


if __name__ == "__main__":
    raise SystemExit(main())
