"""Fill a student so that it computes its teacher's function (paper, section 3; Net2WiderNet and Net2DeeperNet)."""

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from .attempts import Attempt, list_attempts, restore_on_refusal, serve_most_modes
from .equivalence import assert_equivalent, assert_equivalent_in_training
from .errors import TransferError, no_other_error
from .fill.fill import SPLITS, add_noise, fill, set_eps
from .fill.new_layers import calibrate as measure_norms
from .network import Example, Inputs, Outputs, unwrap
from .optimizer import gradients, optimizer_state, parameter_groups
from .plan.names import Rename
from .plan.new_layers import check_identities, new_batch_norms
from .plan.plan import Plan, make_plan
from .plan.tensors import make_record
from .plan.traces import Traces, trace_both
from .pretrained import keep_configs, list_pretrained
from .record import EXACT_IN_TRAINING, Record, read_record
from .tensors import named_tensors
from .ties import tie_again, untie


@dataclass(frozen=True, eq=False, repr=False)
class Transfer(Record):
    """The record of a growth together with its two networks."""

    # None for a record that was loaded, copied or unpickled. The references are weak because a grown network holds its
    # record: strong ones would copy the teacher with every copy of the student, and keep it in memory.
    models: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "models": None}  # a weak reference can be neither copied nor pickled

    def of(self, teacher: nn.Module, student: nn.Module) -> "Transfer":
        """Return the same record with these two networks, which it holds weakly."""
        return replace(self, models=(weakref.ref(teacher), weakref.ref(student)))

    def gradients(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the student's gradients from the teacher's (see `net2net.optimizer.gradients`)."""
        return gradients(self, theirs, self._networks()[1])

    def parameter_groups(self, old: Optimizer) -> list[dict[str, Any]]:
        """Return the teacher's parameter groups for the student (see `net2net.optimizer.parameter_groups`)."""
        return parameter_groups(self, old, *self._networks())

    def optimizer_state(self, old: Optimizer, new: Optimizer, *, fresh_new: bool = False) -> None:
        """Carry the state of the teacher's optimizer into the student's (see `net2net.optimizer.optimizer_state`)."""
        optimizer_state(self, old, new, *self._networks(), fresh_new=fresh_new)

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        teacher, student = (None, None) if self.models is None else (ref() for ref in self.models)
        if teacher is None or student is None:
            raise TransferError("This record knows of no networks: say which by record.of(teacher, student).")
        return teacher, student


def load_record(path: str | Path) -> Transfer:
    """Read a record that `save_record` wrote. It has no networks yet: `load_record(path).of(teacher, student)`.

    Args:
        path: the JSON file.

    Returns:
        The record, for `replay`, or with its networks for `gradients` and `optimizer_state`.

    Raises:
        TransferError: the file is not a record, or of another format.
        OSError: the file cannot be read.

    Example:
        >>> record = net2net.transfer(nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3))
        >>> net2net.save_record(record, "growth.json")
        >>> net2net.replay(net2net.load_record("growth.json"), nn.Linear(3, 4), nn.Linear(3, 4))
    """
    return Transfer(**vars(read_record(path)))


@no_other_error("transfer")
def transfer(  # noqa: PLR0913 (public signature)
    teacher: nn.Module,
    student: nn.Module,
    example: Example,
    *,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
    split: str = "uneven",
    depth: str = "identity",
    rename: Rename = None,
    calibrate: Tensor | Iterable[Example] | None = None,
    outputs: Outputs = None,
) -> Transfer:
    """Fill `student` in place so that it computes the function of `teacher` in eval mode, up to rounding.

    The two agree whatever the student held before. Every layer of the teacher needs a counterpart of the same name in
    the student, at least as wide, with a kernel at least as large; renumbered layers of an `nn.Sequential` are found.
    The teacher is untouched. Norms that see padding get another eps. On the meta device the record is made alone.

    Args:
        teacher: the trained network.
        student: a wider, deeper network on the same inputs.
        example: an input of both (a tensor, a tuple of arguments, a dict). They are compared on it and others like it.
        generator: draws the units to copy and the shares, on the CPU. None means seed 0.
        noise: standard deviation of Gaussian noise on the incoming weights of all but the first copy of a unit, in
            units of the tensor's own (paper, section 3.3). It changes the function.
        split: how the copies of a unit divide its outgoing weight. "uneven" draws positive shares for every reading
            unit; "paired" adds noise that the copies cancel among themselves. "fresh" makes no copies: a new unit is as
            the student's constructor drew it, and what reads it is zero at first. "equal" is the paper's, which needs
            `noise`: such copies get the same gradients and never part, unless dropout tells them apart. All of them
            leave the function as it is.
        depth: what a new layer on the way of units becomes: "identity" (paper, section 3.4), or "dense" where no
            activation stands behind it: a random rotation, which the next layer undoes (after Network Morphism).
        rename: student names to teacher names, where they differ otherwise: a function, or a dict of prefixes in which
            "" marks a layer that the teacher lacks.
        calibrate: one batch of inputs, or several, on which the statistics of new batch norms are measured (paper,
            section 3.4). Without it, new batch norms are exact in eval mode only.
        outputs: what of the result counts, if not all: a function of it, a name, or names. The rest may change.

    Returns:
        The record: where every tensor came from, the measured difference, and `modes`: "eval" and "train", and how far
        the function is kept in this mode.

    Raises:
        TransferError: the student is smaller than its teacher somewhere, or units would grow that an operation pins.
            The student is then as it was. Some reasons show only in numbers: the results differ by more than rounding
            explains, or a forward pass, a calibration or a parametrisation fails. The student may then be filled
            already, and unusable. `reasons` says why each way to pair the layers was refused.
    """
    generator = generator or torch.Generator().manual_seed(0)
    given, student = unwrap(teacher), unwrap(student)
    has_values = _check_arguments(given, student, noise, split, depth, calibrate is not None)
    teacher, ties = untie(given, student)
    traces = trace_both(teacher, student, Inputs.of(example, outputs), rename)
    attempts = list_attempts(teacher, student, rename, bool(traces.scaled_layers[0]), traces.has_groups)
    models = list_pretrained(student)
    batches = calibrate if calibrate is None or isinstance(calibrate, (Tensor, dict)) else list(calibrate)

    def grow(attempt: Attempt) -> Record:
        plan = _plan(traces, attempt, generator, split == "fresh")
        check_identities(plan)
        record = make_record(plan, student, generator.get_state(), split, noise, depth)
        if not has_values:
            return _plan_alone(student, record)
        with restore_on_refusal(student, record) if len(attempts) > 1 or traces.training_counts else nullcontext():
            fill(teacher, student, record)
            if batches is not None:
                measure_norms(student, record, new_batch_norms(plan), batches)
            measured = assert_equivalent(teacher, student, traces.inputs, plan.teacher.output, plan.roles.identity)
            return replace(record, measured=measured, modes=_judge_modes(traces, plan, noise))

    record, refusal = serve_most_modes(grow, attempts, generator, traces.training_counts)
    record = _say_why(record, refusal)
    keep_configs(models if record.eps else {}, student, traces.inputs)  # a config may hold the eps of norms
    if noise:
        add_noise(student, record, generator)
    elif split == "equal":
        _warn_of_equal_copies(record, student)
    return Transfer(**vars(tie_again(record, ties))).of(given, student)


@no_other_error("random_pad")
def random_pad(
    teacher: nn.Module,
    student: nn.Module,
    example: Example,
    *,
    generator: torch.Generator | None = None,
    rename: Rename = None,
    outputs: Outputs = None,
) -> Transfer:
    """Fill one corner of `student` in place with the teacher's weights, the paper's baseline (section 4.2).

    Every entry that `transfer` would fill with the first copy of a teacher's entry holds exactly that entry, unshared.
    Everything else is as the student's constructor drew it, new layers included. The student computes another function.

    Args:
        teacher: the trained network.
        student: a wider, deeper network on the same inputs.
        example: an input of both, as of `transfer`.
        generator: draws the units to copy, as of `transfer`.
        rename: student names to teacher names, as of `transfer`.
        outputs: what of the result counts, as of `transfer`.

    Returns:
        The record; its split is "pad".

    Raises:
        TransferError: as `transfer` does, with the student as it was.
    """
    generator = generator or torch.Generator().manual_seed(0)
    given, student = unwrap(teacher), unwrap(student)
    teacher, ties = untie(given, student)
    traces = trace_both(teacher, student, Inputs.of(example, outputs), rename)

    def pad(attempt: Attempt) -> Record:
        return make_record(_plan(traces, attempt, generator), student, generator.get_state(), "pad")

    attempts = list_attempts(teacher, student, rename)
    record, _ = serve_most_modes(pad, attempts, generator, traces.training_counts)
    fill(teacher, student, record)
    return Transfer(**vars(tie_again(record, ties))).of(given, student)


@no_other_error("replay")
def replay(record: Record, teacher: nn.Module, student: nn.Module) -> None:
    """Fill `student` in place from `teacher` as a record says.

    It gets the weights that the recorded transfer gave, before noise and calibration.

    Args:
        record: what `transfer`, `random_pad` or `load_record` returned.
        teacher: a network with the tensors of the recorded teacher.
        student: a network with the tensors of the recorded student.

    Raises:
        TransferError: the networks have other tensors than the record, or it is damaged.
    """
    check_networks(record, teacher, student)
    try:
        fill(unwrap(teacher), unwrap(student), record)
    except (KeyError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
        raise TransferError(f"The record is damaged, or of other networks than these: {error}") from error


def check_networks(record: Record, teacher: nn.Module, student: nn.Module) -> None:
    """Raise TransferError if the networks have other tensors than those of the record."""
    for which, model, theirs in zip(("teacher", "student"), (teacher, student), record.shapes, strict=True):
        mine = {name: tuple(tensor.shape) for name, tensor in named_tensors(unwrap(model)).items()}
        if mine != theirs:
            name = next(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            here, there = mine.get(name), theirs.get(name)
            raise TransferError(f"The record is of another {which}: {name} is {here} here, {there} there.")


def _say_why(record: Record, refusal: TransferError | None) -> Record:
    """Add to a record that is not exact in training mode why no growth is exact in both."""
    if refusal is None or not record.modes["train"].startswith("not kept"):
        return record
    why = f"{record.modes['train']} Why no growth is exact in both modes: {refusal}"
    return replace(record, modes=record.modes | {"train": why})


def _warn_of_equal_copies(record: Record, student: nn.Module) -> None:
    """Warn that equal copies never part, unless noise or dropout tells them apart."""
    copies = any(axis.reads and axis.copies for origin in record.origins.values() for axis in origin.axes.values())
    dropout = any(isinstance(module, _DropoutNd) and module.p > 0 for module in student.modules())
    if copies and not dropout:
        why = "Copies of a unit that share its outgoing weights equally get the same gradients, and never part"
        warnings.warn(f"{why}: give them noise, or take split='uneven'.", stacklevel=3)


def _check_arguments(
    teacher: nn.Module, student: nn.Module, noise: float, split: str, depth: str, calibrates: bool
) -> bool:
    """Check what `transfer` is called with, and tell whether the networks have values."""
    if not 0 <= noise < math.inf:
        raise TransferError(f"The noise is {noise}: it is a standard deviation, a number of 0 or more.")
    if split not in SPLITS:
        raise TransferError(f"The split {split!r} is unknown: it is one of {', '.join(SPLITS)}.")
    if depth not in ("identity", "dense"):
        raise TransferError(f"The depth {depth!r} is unknown: it is identity or dense.")
    found = {parameter.is_meta for model in (teacher, student) for parameter in model.parameters()}
    if len(found) > 1 or ((noise or calibrates) and True in found):
        what = "both networks must have" if len(found) > 1 else "noise and calibration need"
        raise TransferError(f"A network on the meta device has no values to grow, which {what}.")
    return found != {True}


def _plan(traces: Traces, attempt: Attempt, generator: torch.Generator, fresh: bool = False) -> Plan:
    pair = traces.comparable(attempt.rename, attempt.absorb, attempt.both_modes)
    ways = (attempt.passing_all, attempt.in_pairs, attempt.side_by_side)
    return make_plan(pair, attempt.rename, generator, *ways, fresh)


def _plan_alone(student: nn.Module, record: Record) -> Record:
    """Return the record of a student without values, whose norms get their eps."""
    set_eps(student, record)
    return replace(record, modes=dict.fromkeys(("eval", "train"), "not measured: the networks have no values"))


def _judge_modes(traces: Traces, plan: Plan, noise: float) -> dict[str, str]:
    """Say for each mode how far a filled student, exact in eval mode, keeps the function of its teacher."""
    (teacher, student), failure = (each.model for each in traces.plain), traces.plain[0].failure
    train = EXACT_IN_TRAINING
    if noise:
        return dict.fromkeys(("eval", "train"), "close: there is noise on the copies")
    if any(new_batch_norms(plan).values()):
        train = "close: new batch norms take the statistics of the batch"
    elif failure is not None:
        train = f"not known: {failure}"
    elif traces.training_counts:
        try:
            assert_equivalent_in_training(teacher, student, traces.inputs, plan.roles.identity)
        except TransferError as error:
            train = f"not kept: {error}"
    return {"eval": "exact", "train": train}
