"""The record of a growth: where every entry of every student tensor comes from.

The plan writes a record, and `fill` carries it out without looking at anything else. It is data: it can be saved as
JSON, read in any language, and replayed on the same two networks.
"""

import base64
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from .equivalence import Equivalence
from .errors import TransferError

FORMAT = 1
EXACT_IN_TRAINING = "exact, apart from random numbers: copies of a unit draw their own"

NEW = -1  # the teacher has no such unit: the student keeps its own value, and the weights that read it are zero
ZERO = -2  # zero everywhere: what pads an RMS norm
MEAN = -3  # MEAN - k is the mean of the teacher's units, or entries, `means[k]`; this pads a layer norm


class How(StrEnum):
    """Where a student tensor comes from."""

    SHARED = "shared"  # from a tensor of the teacher
    IDENTITY = "identity"  # it belongs to a new layer that passes its units through
    SILENT = "silent"  # it belongs to a new branch that adds nothing at first
    FRESH = "fresh"  # from the student's own initialisation


class Fill(StrEnum):
    """What a tensor that the teacher lacks holds."""

    OWN = "own"  # the student's own values
    ZERO = "zero"
    ONE = "one"
    MEAN = "mean"  # the running mean of its batch norm
    DEVIATION = "deviation"  # the running standard deviation of its batch norm
    TAP = "tap"  # one at the centre of every depthwise kernel
    PASS = "pass"  # a layer whose output is its input


class Matrix(StrEnum):
    """The matrix that a rotated axis is multiplied by; A and Q are those of `fill.isometry.find_isometries`."""

    STREAM = "stream"  # Q: the axis writes to the stream
    BEFORE = "before"  # A without its mean: the axis writes to the norm that begins the stream
    BEHIND = "behind"  # Q and the affine part of the norm in front of it: the axis reads from the stream
    FIRST = "first"  # the weight of the norm that begins the stream
    OTHER = "other"  # the weight of another norm on the stream
    BIAS = "bias"  # the bias of a norm on the stream


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a student tensor: entry j comes from entry `index[j]` of the teacher's axis."""

    index: Tensor  #: teacher entries, in groups one group after another; a negative one is NEW, ZERO or MEAN - k
    first: Tensor  #: marks the entries that are not a copy of an earlier one
    reads: bool  #: whether the axis reads units, so that copies divide a weight among themselves
    #: The part of the teacher's weight (if it reads) or gradient (if not) that each entry takes, float64. A negative
    #: share belongs to the second unit of a sign pair.
    share: Tensor
    groups: int = 1  #: the number of groups; a weight is divided among the copies inside one group
    means: tuple[Tensor, ...] = ()  #: for each code MEAN - k the teacher entries to average

    @property
    def copies(self) -> int:
        """The number of entries that repeat an earlier one."""
        return int(((self.index >= 0) & ~self.first).sum())

    @property
    def signed(self) -> bool:
        """Whether the axis reads sign pairs, whose units are no copies of each other."""
        return bool((self.share < 0).any())


@dataclass(frozen=True)
class Mixed:
    """One axis of a student tensor that is a matrix times the teacher's, on a stream whose channels are rotated."""

    dim: int
    how: Matrix
    begins: str | None  # the teacher's weight of the norm that begins the stream
    widths: tuple[int, int]  # the channels of the stream in the teacher and in the student
    norm: tuple[str | None, str | None]  # the teacher's weight and bias of the norm in front of an axis that reads
    rows: Tensor  # the channel of each entry of the student's axis, one position after the other
    columns: Tensor  # the same for the teacher's axis


@dataclass(frozen=True)
class Scaled:
    """A layer scale that multiplies what a tensor produces: the tensor's means are those of the products."""

    scale: str  # the teacher's tensor; in that tensor itself a mean is one
    entries: Tensor  # its entry for each of the teacher's on the axis that produces units


@dataclass(frozen=True, eq=False)
class Origin:
    """Where one student tensor comes from."""

    how: How
    teacher: str | None = None  #: the name of the teacher's tensor, if it is shared
    axes: dict[int, Axis] = field(default_factory=dict)  #: those that carry units, or kernel taps
    flat: bool = False  #: axes[0] counts all elements of the tensor in one row
    fill: Fill = Fill.OWN  #: what it holds if the teacher lacks it
    of: tuple[str, float] = ("", 0.0)  #: for the fills MEAN and DEVIATION the name of the statistic, and the norm's eps
    factor: float = 1.0  #: multiplies the whole tensor
    rows: Tensor | None = None  #: multiplies each entry of the axis that produces units, float64
    turn: int | None = None  #: the seed of a random rotation of the units between this layer and the next
    tied: bool = False  #: whether it is an embedding that a layer reads, too, or takes the shares of such a one
    offset: float = 0.0  #: what the network adds to it before use; the fields above describe this sum
    merged: tuple[int, int] = (1, 1)  #: (groups, times): `times` groups of the teacher's make one, with zeros between
    mixed: tuple[Mixed, ...] = ()  #: axes that are a matrix times the teacher's, whatever `axes` says of them
    scaled: tuple[Scaled, ...] = ()  #: layer scales between it and the norms that see its means


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Where every tensor of a student comes from, and how far the student is from its teacher."""

    origins: dict[str, Origin]  # of every parameter and buffer of the student by name
    split: str  # how copies divide a weight: equal, uneven or paired; "fresh" for none; "pad" for `random_pad`
    noise: float  # see `transfer`
    eps: dict[str, float] = field(default_factory=dict)  # the new eps of norms, by module or attribute
    # The state of the generator that shares are drawn from.
    state: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    shapes: tuple[Shapes, Shapes] = field(default_factory=lambda: ({}, {}))  # all tensors of the teacher, the student
    measured: Equivalence | None = None  # the difference on the example, before noise; None for `random_pad`
    grew: str = ""  # what `widen` and `deepen` say of the whole network
    modes: dict[str, str] = field(default_factory=dict)  # "eval" and "train": how far the function is kept in this mode

    def __str__(self) -> str:
        origins = self.origins.values()
        count = {how: sum(origin.how == how for origin in origins) for how in How}
        theirs, mine = self.shapes
        shared = [(o.teacher, name) for name, o in self.origins.items() if o.how == How.SHARED]
        larger = sum(theirs[teacher] != mine[name] for teacher, name in shared if teacher is not None)
        text = f"{self.grew}; " * bool(self.grew) + (
            f"{count[How.SHARED]} tensors from the teacher ({larger} of them larger), {count[How.IDENTITY]} of "
            f"identities, {count[How.SILENT]} of silent branches, {count[How.FRESH]} fresh"
        )
        train = self.modes.get("train", EXACT_IN_TRAINING)
        text += f"; {self.measured}" * bool(self.measured)
        return text if train == EXACT_IN_TRAINING else f"{text}; in train mode {train.partition(':')[0]}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def table(self) -> str:
        """Return a text with a line for each layer: its largest tensor's shape before and after, and how it was made.

        Example:
            >>> print(net2net.transfer(nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3)).table())
            layer  before  after  how
                   4 x 3   4 x 3  as it was
        """
        rows = [("layer", "before", "after", "how"), *(self._row(*pair) for pair in self.largest_tensors().items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def largest_tensors(self) -> dict[str, str]:
        """Return the name of the largest tensor of each layer of the student."""
        largest: dict[str, str] = {}
        for name in self.origins:
            layer = name.rpartition(".")[0]
            if layer not in largest or math.prod(self.shapes[1][largest[layer]]) < math.prod(self.shapes[1][name]):
                largest[layer] = name
        return largest

    def _row(self, layer: str, name: str) -> tuple[str, str, str, str]:
        origin, (theirs, mine) = self.origins[name], self.shapes
        before = theirs[origin.teacher] if origin.teacher else None
        how = _HOW.get(origin.how) or ("as it was" if before == mine[name] else "grown")
        return layer, _format_shape(before), _format_shape(mine[name]), how


_HOW = {How.IDENTITY: "new: passes its units on", How.SILENT: "new: adds nothing yet", How.FRESH: "new: random"}


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "–" if shape is None else " x ".join(map(str, shape)) or "1"


def save_record(record: Record, path: str | Path) -> None:
    """Write a record as JSON. The file appears complete or not at all.

    Args:
        record: what `transfer`, `random_pad` or `load_record` returned.
        path: the file, which is replaced if it exists.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> record = net2net.transfer(nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3))
        >>> net2net.save_record(record, "growth.json")
    """
    path, text = Path(path), to_text(record)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "x") as file:  # tempfile would give it permissions that no other new file has
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_text(record: Record) -> str:
    """Return a record as JSON."""
    data = {each.name: getattr(record, each.name) for each in fields(Record)}
    return json.dumps({"format": FORMAT, **data}, default=_to_json)


def _to_json(value: object) -> object:
    if is_dataclass(value):
        return vars(value)
    assert isinstance(value, Tensor)
    if value.dtype == torch.uint8:
        return base64.b64encode(bytes(value.tolist())).decode()
    return value.long().tolist() if value.dtype == torch.bool else value.tolist()


def read_record(path: str | Path) -> Record:
    """Read what `save_record` wrote (see `load_record`)."""
    try:
        data = json.loads(Path(path).read_text())
        if data.pop("format") != FORMAT:
            raise TransferError(f"{path} is a record of another version of net2net: its format is not {FORMAT}.")
        data.pop("models", None)  # files of FORMAT 1 may hold a null here
        data["origins"] = {name: _origin(**origin) for name, origin in data["origins"].items()}
        data["state"] = torch.tensor(list(base64.b64decode(data["state"])), dtype=torch.uint8)
        data["shapes"] = tuple({name: tuple(shape) for name, shape in shapes.items()} for shapes in data["shapes"])
        data["measured"] = Equivalence(**data["measured"]) if data["measured"] else None
        return Record(**data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TransferError(f"{path} is no record of a transfer: {error}") from error


def _origin(axes: dict, rows: list | None, mixed: Sequence[dict] = (), scaled: Sequence[dict] = (), **rest) -> Origin:
    rest |= {"how": How(rest["how"]), "fill": Fill(rest["fill"])}
    rest |= {name: (rest[name][0], rest[name][1]) for name in ("of", "merged")}
    rest |= {"rows": None if rows is None else torch.tensor(rows, dtype=torch.double)}
    axes = {int(dim): _axis(**axis) for dim, axis in axes.items()}
    rest |= {"scaled": tuple(Scaled(one["scale"], torch.tensor(one["entries"])) for one in scaled)}
    return Origin(axes=axes, mixed=tuple(_mixed(**one) for one in mixed), **rest)


def _mixed(how: str, widths: list, norm: list, rows: list, columns: list, **rest) -> Mixed:
    places = {"rows": torch.tensor(rows), "columns": torch.tensor(columns)}
    return Mixed(how=Matrix(how), widths=(widths[0], widths[1]), norm=(norm[0], norm[1]), **places, **rest)


def _axis(index: list, first: list, share: list, means: list, **rest) -> Axis:
    return Axis(
        torch.tensor(index, dtype=torch.long),
        torch.tensor(first, dtype=torch.bool),
        share=torch.tensor(share, dtype=torch.double),
        means=tuple(torch.tensor(entries, dtype=torch.long) for entries in means),
        **rest,
    )
