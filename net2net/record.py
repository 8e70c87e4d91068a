"""The record of a transfer: where every entry of every student tensor came from. Filling only carries it out."""

import base64
import json
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .equivalence import Equivalence
from .errors import TransferError

FORMAT = 1

NEW = -1  # what no unit or entry of the teacher's corresponds to: the student's own, and read with zero weights
ZERO = -2  # what is zero wherever it goes: padding of an RMS norm
MEAN = -3  # and below, MEAN - k: the mean of the teacher's units or entries `means[k]`: padding of a layer norm


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a student tensor: entry j comes from entry `index[j]` of the teacher's.

    Negative entries come from no single one: they are `NEW`, `ZERO`, or `MEAN - k`. `first` marks the entries that are
    not copies of an earlier one. `reads` says that the axis reads units, so that its entries are shared out among
    copies. `share` is what part of the teacher's outgoing weight (if it reads) or gradient (if it does not) each entry
    takes; a negative one belongs to a unit that has the other sign, of a pair that passes an activation. With `groups`
    entries are shared among those of one group; if `index` is longer than the axis it has one row a group.
    """

    index: Tensor
    first: Tensor
    reads: bool
    share: Tensor
    groups: int = 1
    means: tuple[Tensor, ...] = ()

    @property
    def copies(self) -> int:
        """How many entries repeat an earlier one."""
        return int(((self.index >= 0) & ~self.first).sum())

    @property
    def signed(self) -> bool:
        """Whether it reads pairs of units, which are no copies of each other."""
        return bool((self.share < 0).any())


@dataclass(frozen=True)
class Mixed:
    """One axis of a student tensor that is the teacher's times a matrix, made of the stream's `frames`.

    `how` says which: `stream` (Q, for what is on the stream), `before` (A, for what the norm that begins it sees), or
    `behind` (Q, for what reads another norm on the stream, whose weight and bias, `norm`, it takes in). `first` and
    `other` stand for the weights of the first and the other norms, `bias` for the biases of those. `begins` is the
    teacher's weight of the norm that begins the stream, `widths` are the stream's in teacher and student. `rows` and
    `columns` are the channels of the entries of the student's and the teacher's axis, those of several positions one
    after the other.
    """

    dim: int
    how: str
    begins: str | None
    widths: tuple[int, int]
    norm: tuple[str | None, str | None]
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """Where one student tensor came from: `how` is shared, identity, silent or fresh.

    `axes` says it axis by axis; of a `flat` tensor it is of all elements in one row. `fill` is what a tensor that the
    teacher lacks holds: its own values, zero, one, a pass-through of its units (`pass`, `tap`), or what undoes the
    normalisation of its norm (`deviation`, `mean`, from the statistics `of`). A shared tensor, and a pass-through,
    are multiplied by `factor`, and along the first axis by `rows`. With `turn` a layer's units, or what reads them, are
    turned by a random rotation of that seed. `tied` marks a table of embeddings that a layer reads, too. `merged` says
    how many groups the teacher's layer has, and how many of them make one of the student's, with zeros between them
    (the last is of what is left). `mixed` are axes that are the teacher's times a matrix, whatever `axes` says.
    """

    how: str
    teacher: str | None = None
    axes: dict[int, Axis] = field(default_factory=dict)
    flat: bool = False
    fill: str = "own"
    of: tuple[str, float] = ("", 0.0)
    factor: float = 1.0
    rows: Tensor | None = None
    turn: int | None = None
    tied: bool = False
    merged: tuple[int, int] = (1, 1)
    mixed: tuple[Mixed, ...] = ()


@dataclass(frozen=True, eq=False)
class Transfer:
    """The record of a transfer: where every tensor of the student came from, and what was measured.

    `split` and `noise` are those of `transfer`; of `random_pad` the split is "pad". `eps` holds the new eps of norms
    that see padding. `state` is the state of the generator from which shares and noise were drawn. `shapes` are those
    of all tensors of the teacher and of the student. `measured` is the difference of the two networks on the example,
    before noise; None for `random_pad`.
    """

    origins: dict[str, Origin]
    split: str
    noise: float
    eps: dict[str, float] = field(default_factory=dict)
    state: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = field(default_factory=lambda: ({}, {}))
    measured: Equivalence | None = None
    models: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]] | None = field(
        default=None, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "models": None}  # a copy, or a pickle, is of no networks yet

    def of(self, teacher: nn.Module, student: nn.Module) -> "Transfer":
        """The same record, of these networks (a loaded record knows of none)."""
        return replace(self, models=(weakref.ref(teacher), weakref.ref(student)))

    def gradients(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's gradients, given the teacher's by name (see `net2net.optimizer.gradients`)."""
        from .optimizer import gradients

        return gradients(self, theirs, self._networks()[1])

    def optimizer_state(self, old: Optimizer, new: Optimizer) -> None:
        """Carry what `old` has gathered while it trained the teacher into `new`, which will train the student
        (see `net2net.optimizer.optimizer_state`)."""
        from .optimizer import optimizer_state

        optimizer_state(self, old, new, *self._networks())

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        teacher, student = (None, None) if self.models is None else (ref() for ref in self.models)
        if teacher is None or student is None:
            raise TransferError("This record knows of no networks: say which by record.of(teacher, student).")
        return teacher, student

    def __str__(self) -> str:
        count = {
            how: sum(o.how == how for o in self.origins.values()) for how in ("shared", "identity", "silent", "fresh")
        }
        wider = sum(any(axis.copies for axis in o.axes.values()) for o in self.origins.values() if o.how == "shared")
        text = (
            f"{count['shared']} tensors from the teacher ({wider} of them wider), {count['identity']} of identities, "
            f"{count['silent']} of silent branches, {count['fresh']} fresh"
        )
        return f"{text}; {self.measured}" if self.measured else text


def save_record(record: Transfer, path: str | Path) -> None:
    """Write `record` as JSON to `path`, readable in any language; it appears there complete or not at all."""
    path = Path(path)
    data = asdict(replace(record, models=None))
    text = json.dumps({"format": FORMAT, **data}, default=_plain)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "x") as file:  # with the permissions of any new file, unlike tempfile's
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(tensor: Tensor) -> object:
    if tensor.dtype == torch.uint8:
        return base64.b64encode(bytes(tensor.tolist())).decode()
    return tensor.long().tolist() if tensor.dtype == torch.bool else tensor.tolist()


def load_record(path: str | Path) -> Transfer:
    """Read what `save_record` wrote. TransferError if the file is not a record; OSError if it cannot be read."""
    try:
        data = json.loads(Path(path).read_text())
        if data.pop("format") != FORMAT:
            raise TransferError(f"{path} is a record of another version of net2net: its format is not {FORMAT}.")
        data["origins"] = {name: _origin(**origin) for name, origin in data["origins"].items()}
        data["state"] = torch.tensor(list(base64.b64decode(data["state"])), dtype=torch.uint8)
        data["shapes"] = tuple({name: tuple(shape) for name, shape in shapes.items()} for shapes in data["shapes"])
        data["measured"] = Equivalence(**data["measured"]) if data["measured"] else None
        return Transfer(**data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TransferError(f"{path} is no record of a transfer: {error}") from error


def _origin(axes: dict, of: list, rows: list | None, merged: list, mixed: Sequence[dict] = (), **rest) -> Origin:
    axes = {int(dim): _axis(**axis) for dim, axis in axes.items()}
    rows_tensor = None if rows is None else torch.tensor(rows, dtype=torch.double)
    mixture = tuple(_mixed(**one) for one in mixed)
    return Origin(**rest, axes=axes, of=(of[0], of[1]), rows=rows_tensor, merged=(merged[0], merged[1]), mixed=mixture)


def _mixed(widths: list, norm: list, rows: list, columns: list, **rest) -> Mixed:
    places = {"rows": torch.tensor(rows), "columns": torch.tensor(columns)}
    return Mixed(widths=(widths[0], widths[1]), norm=(norm[0], norm[1]), **places, **rest)


def _axis(index: list, first: list, share: list, means: list, **rest) -> Axis:
    return Axis(
        torch.tensor(index, dtype=torch.long),
        torch.tensor(first, dtype=torch.bool),
        share=torch.tensor(share, dtype=torch.double),
        means=tuple(torch.tensor(entries, dtype=torch.long) for entries in means),
        **rest,
    )
