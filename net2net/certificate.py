"""Certificates of growths: which networks, what was done, and how far they differ; as small JSON, and checked again."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .equivalence import compare
from .errors import TransferError
from .grow.describe import describe
from .network import Example, Inputs, Outputs, run, tensors_in, unwrap
from .record import How, Record
from .tensors import view_bytes
from .transfer import check_networks

Certificate = dict[str, Any]

FORMAT = 1
MODES = ("eval", "train")
KEYS = {"format", "operator", "settings", "teacher", "student", "inputs", "difference", "layers", "pinned", "sha256"}


def certify(
    record: Record,
    teacher: nn.Module,
    student: nn.Module,
    inputs: Example,
    settings: Mapping[str, Any] | None = None,
    outputs: Outputs = None,
) -> Certificate:
    """Measure a student that was just grown, and return a certificate of its growth, for `verify`.

    The certificate is data: `json.dump` writes it. It holds

    - `operator`: "wider", "deeper", "wider and deeper", "random_pad", or "copy" if nothing grew;
    - `settings`: the split, the noise, and the `settings` that you give;
    - `teacher`, `student`: SHA-256 of the names, shapes, dtypes and values of all parameters and buffers;
    - `inputs`: SHA-256 of the shapes, dtypes and values of the tensors on which the two were compared;
    - `difference`: for "eval" and "train" the largest |teacher - student| over all outputs (`max_abs`) and the same
      over the teacher's largest |output| (`max_relative`); for "train" a sentence instead if the networks cannot be
      compared there, as with dropout;
    - `layers`: the largest tensor of each layer of the student that is larger or new, by name, with how it came about
      and its shape: "wider, 64x3x3x3 to 96x3x3x3" (more units, or a larger kernel), or "identity", "silent" or "fresh"
      (`net2net.Origin`). Layers that hold one number for each unit, such as norms, are left out;
    - `pinned`: the layers of the teacher whose width no growth can change, with the reason;
    - `format`, and `sha256` of all of this, which finds a damaged file. It is no signature.

    Args:
        record: what `transfer` or `random_pad` returned, or the `growth` of a network of `widen` or `deepen`.
        teacher: the network that was grown.
        student: the grown network, not yet trained.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Keep them for `verify`.
        settings: what else was done to the student, as `{"calibrate": 1000}`: anything that JSON can hold.
        outputs: what of the result counts, as of `transfer`. Say the same to `verify`.

    Raises:
        TransferError: the record is of other networks, or they differ by no finite number in eval mode.

    Example:
        >>> wider = net2net.widen(model, images, 1.5)
        >>> certificate = net2net.certify(wider.growth, model, wider, images)
        >>> Path("certificate.json").write_text(json.dumps(certificate))
    """
    teacher, student = unwrap(teacher), unwrap(student)
    check_networks(record, teacher, student)
    hows, layers = _list_layers(record)
    content = {
        "format": FORMAT,
        "operator": _name_operator(record, hows),
        "settings": {"split": record.split, "noise": record.noise, **(settings or {})},
        "teacher": _digest_network(teacher),
        "student": _digest_network(student),
        "inputs": _digest_inputs(inputs),
        "difference": {mode: _measure(teacher, student, Inputs.of(inputs, outputs), mode)[0] for mode in MODES},
        "layers": layers,
        "pinned": {
            layer: group.pinned for group in describe(teacher, inputs).groups if group.pinned for layer in group.layers
        },
    }
    if isinstance(content["difference"]["eval"], str):
        raise TransferError(f"There is no difference to certify in eval mode: {content['difference']['eval']}.")
    content = json.loads(json.dumps(content))  # tuples become lists, as in a file
    return content | {"sha256": _digest_content(content)}


def verify(
    certificate: Mapping[str, Any],
    teacher: nn.Module,
    student: nn.Module,
    inputs: Example | None = None,
    outputs: Outputs = None,
) -> str:
    """Check that two networks are those of a certificate, and that they differ by what it says.

    Differences count as equal up to the square root of the precision, relative to the teacher's largest output: another
    machine rounds in another way. What the certificate says of the operator, its settings and the layers is checked
    against its checksum alone.

    Args:
        certificate: what `certify` returned, or the same from a JSON file.
        teacher: the network that was grown.
        student: the grown network, as it was before its training.
        inputs: those that the difference was measured on. Without them it is not measured again.
        outputs: as of `certify`.

    Returns:
        A sentence that says what was found to be as certified.

    Raises:
        TransferError: something differs, and the message says what: the teacher, the student, the inputs, the
            difference, or the certificate from what was written.

    Example:
        >>> certificate = json.loads(Path("certificate.json").read_text())
        >>> net2net.verify(certificate, model, wider, images)
        'The teacher and the student are those of the certificate. They differ by ...'
    """
    check_certificate(certificate)
    teacher, student = unwrap(teacher), unwrap(student)
    faults = []
    if _digest_network(teacher) != certificate["teacher"]:
        faults.append("The teacher is another: a name, shape, dtype or value of its tensors is not as certified.")
    if _digest_network(student) != certificate["student"]:
        faults.append(
            "The student is another, or has been trained since: a name, shape, dtype or value of its tensors is not as "
            "certified."
        )
    if inputs is not None and _digest_inputs(inputs) != certificate["inputs"]:
        faults.append("The inputs are others than those on which the difference was measured.")
    if faults:
        raise TransferError(" ".join(faults))
    same = "The teacher and the student are those of the certificate."
    if inputs is None:
        return f"{same} No inputs were given, so their difference was not measured."
    said = []
    for mode in MODES:
        stated = certificate["difference"][mode]
        found, largest = _measure(teacher, student, Inputs.of(inputs, outputs), mode)
        said.append(f"{_say(found)} in {mode} mode")
        if not _is_close(stated, found, _tolerance(teacher, student), largest):
            faults.append(f"The difference in {mode} mode is {_say(found)}, and {_say(stated)} by the certificate.")
    if faults:
        raise TransferError(" ".join(faults))
    return f"{same} Their largest difference is {', '.join(said)}."


def check_certificate(certificate: Mapping[str, Any]) -> None:
    """Raise TransferError if the certificate is not as `certify` wrote it, as far as its checksum can tell."""
    if not isinstance(certificate, Mapping) or set(certificate) != KEYS or certificate["format"] != FORMAT:
        raise TransferError(f"This is no certificate of a growth, or of another format than {FORMAT}.")
    content = {key: value for key, value in certificate.items() if key != "sha256"}
    if _digest_content(content) != certificate["sha256"]:
        raise TransferError("The certificate was changed after it was written: its checksum is that of another text.")


def _name_operator(record: Record, hows: set[str]) -> str:
    if record.split == "pad":
        return "random_pad"
    words = ["wider"] * ("wider" in hows) + ["deeper"] * bool(hows - {"wider"})
    return " and ".join(words) or "copy"


def _list_layers(record: Record) -> tuple[set[str], dict[str, str]]:
    """Return the ways in which layers are larger or new, and what the certificate says of each layer."""
    shapes, hows, found = record.shapes[1], set(), {}
    for name in record.largest_tensors().values():
        origin, shape = record.origins[name], "x".join(map(str, shapes[name]))
        if origin.how == How.SHARED and origin.teacher:
            before = "x".join(map(str, record.shapes[0][origin.teacher]))
            if before == shape:
                continue
            how, shape = "wider", f"{before} to {shape}"
        else:
            how = str(origin.how)
        hows.add(how)
        if len(shapes[name]) > 1:
            found[name] = f"{how}, {shape}"
    return hows, found


Difference = dict[str, float] | str  # or why there is none


def _measure(teacher: nn.Module, student: nn.Module, inputs: Inputs, mode: str) -> tuple[Difference, float]:
    """Return the difference in one mode, and the teacher's largest |output|."""
    training = mode == "train"
    try:
        theirs, mine = (run(model, inputs, training) for model in (teacher, student))
        if training:
            tolerance = _tolerance(teacher, student)
            for model, output in ((teacher, theirs), (student, mine)):
                if not compare(output, run(model, inputs, training, seed=1)).max_relative <= tolerance:
                    return f"The forward pass of {type(model).__name__} is random", 0.0
        found = compare(theirs, mine, mode)
    except TransferError as error:
        if not training:
            raise
        return str(error).rstrip("."), 0.0
    if not math.isfinite(found.max_relative):
        return "The outputs are not finite", 0.0
    largest = max(float(x.abs().max()) for x in tensors_in(theirs))
    return {"max_abs": found.max_abs, "max_relative": found.max_relative}, largest


def _tolerance(*models: nn.Module) -> float:
    """Return the square root of the coarsest precision of the networks' tensors."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    precisions = [torch.finfo(dtype).eps for dtype in {x.dtype for x in tensors if x.is_floating_point()}]
    return max(precisions, default=torch.finfo(torch.float32).eps) ** 0.5


def _is_close(stated: Difference, found: Difference, tolerance: float, largest: float) -> bool:
    """Tell whether two differences are equal up to rounding. Two sentences count as equal, whatever they say."""
    if isinstance(stated, str) or isinstance(found, str):
        return isinstance(stated, str) and isinstance(found, str)
    allowed = {"max_abs": tolerance * largest, "max_relative": tolerance}
    return all(abs(stated[key] - found[key]) <= bound for key, bound in allowed.items())


def _say(difference: Difference) -> str:
    """Return a difference in words."""
    if isinstance(difference, str):
        return f"not measured ({difference})"
    return f"{difference['max_abs']:.2e} (relative {difference['max_relative']:.2e})"


def _digest_network(model: nn.Module) -> str:
    return _digest_tensors(sorted([*model.named_parameters(), *model.named_buffers()], key=lambda named: named[0]))


def _digest_inputs(inputs: Example) -> str:
    return _digest_tensors((str(place), tensor) for place, tensor in enumerate(Inputs.of(inputs).tensors))


def _digest_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes, dtypes and bytes; the device and the layout in memory do not matter."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update((json.dumps([name, list(tensor.shape), str(tensor.dtype)]) + "\n").encode())
        data = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        data = data.cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(view_bytes(data))
    return digest.hexdigest()


def _digest_content(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
