"""Grow a Hugging Face checkpoint from file to file: the plan is made without values, and tensors come one by one."""

import base64
import copy
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .equivalence import assert_equivalent_on
from .errors import TransferError, no_other_error
from .fill.fill import fill_tensor
from .fill.isometry import mixing_matrix
from .grow.blocks import Renamed, add_blocks
from .grow.describe import Description, describe
from .grow.widen import widen
from .network import Inputs
from .pretrained import Facts, make_empty
from .record import NEW, Fill, How, Origin, Record, save_record, to_text
from .safetensors import INDEX, SINGLE, FromFiles, TensorFiles, divide, open_files, read_header, write_tensors
from .transfer import transfer

PROGRESS = "progress.json"
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
MIXED = (Fill.MEAN, Fill.DEVIATION)  # fills that need other tensors of the student


@dataclass(frozen=True)
class Growth:
    """What is wanted of a checkpoint."""

    mlp: float = 1.0  #: the factor of every width that nothing holds, as those inside the MLPs
    stream: float = 1.0  #: the factor of the width of the residual stream
    layers: int = 0  #: the number of new blocks


@no_other_error("grow")
def grow_checkpoint(folder: str | Path, out: str | Path, growth: Growth) -> Record:
    """Grow a checkpoint of Hugging Face's transformers, in safetensors files, into a new folder.

    Never more than the largest tensor and its copy are in memory. The plan is made on the meta device. The folder
    appears complete or not at all: until then all is in `OUT.partial`. If that exists, and is of the same growth of the
    same files, the growth goes on behind the last file that was finished; the result is the same to the last bit.

    New blocks are spread evenly. Their weights are as the model's class draws them; their last ones are zero. Tensors
    keep their types. Files beside the weights, as those of a tokenizer, are copied, and the record is written as
    `growth.json`. At the end both checkpoints run on random tokens, a tensor at a time, and are compared.

    Args:
        folder: the teacher, as `save_pretrained` wrote it.
        out: a folder that does not exist yet.
        growth: what grows, and by how much.

    Returns:
        The record, with the measured difference.

    Raises:
        TransferError: the checkpoint cannot grow so, no config says what it would be, or the disk has no room for it;
            before anything is written. Or the two compute something else; then nothing stays. Or a file cannot be read
            or written; then what is finished stays in `OUT.partial`.

    Example:
        >>> grow_checkpoint("llama", "larger", Growth(mlp=1.5, layers=4))
    """
    try:
        with _default_dtype(torch.float32):  # as when it is loaded
            return _grow(Path(folder), Path(out), growth)
    except OSError as error:
        kept = f"the same call goes on from what is finished, in {out}.partial"
        raise TransferError(f"A file cannot be read or written: {error}: {kept}.") from error


@no_other_error("describe")
def describe_checkpoint(folder: str | Path) -> Description:
    """Return the groups of units of a checkpoint (see `describe`), which is traced without its values."""
    with _default_dtype(torch.float32):
        teacher = _make_teacher(Path(folder), _open(Path(folder)))
        return describe(copy.deepcopy(teacher).to("meta"), _example(teacher, "meta"))


def _grow(folder: Path, out: Path, growth: Growth) -> Record:
    """Grow a checkpoint (see `grow_checkpoint`)."""
    partial = out.with_name(f"{out.name}.partial")
    if not out.name or os.path.lexists(out):
        raise TransferError(f"{out} exists: give the name of a new folder.")
    files = _open(folder)
    teacher = _make_teacher(folder, files)
    student, record = _plan(teacher, growth)
    theirs = files.rename(_file_names(teacher, files))
    tensors = _list_tensors(theirs, student, record)
    shards = divide(tensors, folder)
    _check_rotations(record, theirs)
    identity = _identify(folder, record)
    done, state = _begin(partial, identity, record.state, shards)
    _check_room(partial, sum(tensor.nbytes for tensor in tensors.values()))
    partial.mkdir(exist_ok=True)
    _note(partial, identity, done, state)
    writer = _Writer(student, record, theirs, tensors)
    writer.generator.set_state(state)
    for place, (file, names) in enumerate(shards.items()):
        if place >= done:
            (partial / file).unlink(missing_ok=True)
            write_tensors(partial / file, {name: tensors[name] for name in names}, writer.make)
            _note(partial, identity, place + 1, writer.generator.get_state())
    _write_rest(folder, partial, student, shards, tensors)
    record = _compare(partial, teacher, student, theirs, record)
    save_record(record, partial / "growth.json")
    (partial / PROGRESS).unlink()
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.rename(partial, out)
    return record


def _open(folder: Path) -> TensorFiles:
    """Return the tensors of a checkpoint; raise TransferError if there is none."""
    if not (folder / "config.json").is_file():
        raise TransferError(f"{folder} has no config.json, as the folder of a Hugging Face model has.")
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("it names no files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TransferError(f"{INDEX} in {folder} is damaged: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise TransferError(f"{folder} has no {missing[0]}, which its {INDEX} names.")
        return open_files(folder / name for name in names)
    if (folder / SINGLE).is_file():
        return open_files([folder / SINGLE])
    raise TransferError(
        f"{folder} has no {SINGLE}, nor {INDEX}: convert what it holds to safetensors "
        "(from_pretrained, then save_pretrained)."
    )


def _make_teacher(folder: Path, files: TensorFiles) -> Any:
    """Make the model of a checkpoint by its config; its parameters are on the meta device."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise TransferError(
            f"A checkpoint is grown with the help of transformers, which is missing: {error}"
        ) from error
    with _of_transformers(f"config.json in {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found = [getattr(transformers, str(name), None) for name in config.architectures or ()]
        kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, nn.Module)]
        if not kinds:
            raise TransferError(f"config.json in {folder} names no model of transformers ({config.architectures}).")
        if getattr(config, "quantization_config", None):
            raise TransferError(f"The checkpoint in {folder} is quantised: grow it before it is quantised.")
        dtypes = Counter(place.dtype for place in files.places.values() if place.dtype.is_floating_point)
        with _default_dtype(dtypes.most_common(1)[0][0]):
            return make_empty(kinds[0], config).eval()


@contextmanager
def _of_transformers(what: str) -> Iterator[None]:
    try:
        yield
    except TransferError:
        raise
    except Exception as error:  # of the class or the config, which are not ours
        raise TransferError(f"{what} makes no model: {type(error).__name__}: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _example(model: Any, device: str) -> dict[str, Any]:
    """Return inputs of a model of transformers, with random tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, value: Tensor) -> Tensor:
        if name.endswith("input_ids"):
            value = torch.randint(model.config.get_text_config().vocab_size, value.shape, generator=generator)
        return value.to(device)

    return {name: draw(name, value) for name, value in model.dummy_inputs.items()}


def _plan(teacher: Any, growth: Growth) -> tuple[Any, Record]:
    """Return the student that the class makes from the grown config, without values, and the record that fills it."""
    if not all(1 <= factor < math.inf for factor in (growth.mlp, growth.stream)) or growth.layers < 0:
        raise TransferError("A checkpoint only grows: factors are 1 or more, and the number of new layers 0 or more.")
    if growth == Growth():
        raise TransferError("Nothing is to grow: give --mlp, --stream or --layers.")
    empty, example, renamed = copy.deepcopy(teacher).to("meta"), _example(teacher, "meta"), None
    grown = empty
    widths = [float(growth.mlp), {_table(teacher): float(growth.stream)}]
    for factor, each in zip((growth.mlp, growth.stream), widths, strict=True):
        if factor > 1:
            grown = widen(grown, example, each)  # type: ignore[arg-type]
            if (refusal := vars(grown).get("save_pretrained")) is not None:
                advice = "Load the model, use net2net.widen, and save it by net2net.save, which needs no config"
                raise TransferError(f"{refusal.args[0].partition(': save it by')[0]}. {advice}.")
    if growth.layers:
        grown, renamed = _add_layers(grown, growth.layers)
    with _of_transformers("The grown config"), _default_dtype(next(teacher.parameters()).dtype):
        student = make_empty(type(teacher), grown.config).eval()
    filled = copy.deepcopy(student).to("meta")
    record = transfer(empty, filled, example, rename=renamed)
    if Facts.of(filled).numbers != Facts.of(student).numbers:
        raise TransferError(f"The config of {type(teacher).__name__} cannot say the eps that the wider norms need.")
    if any(origin.fill in MIXED or origin.how == How.IDENTITY for origin in record.origins.values()):
        raise TransferError("New layers on the way of units are not grown from file to file.")
    return student, record


def _table(model: Any) -> str:
    """Return the name of the table of input embeddings."""
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)


def _add_layers(model: nn.Module, layers: int) -> tuple[nn.Module, Renamed]:
    """Return a copy with new blocks, spread evenly over the stack that the config counts."""
    for stack, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            places = [-(-(k + 1) * len(blocks) // layers) - 1 for k in range(layers)]
            if (deeper := add_blocks(model, [f"{stack}.{place}" for place in places])) is not None:
                return deeper
    raise TransferError(f"The config of {type(model).__name__} counts the blocks of no stack: no new one can be said.")


def _file_names(model: nn.Module, files: TensorFiles) -> dict[str, str]:
    """Return for every tensor of a model that is saved the name that it has in the files."""
    # Older files leave out the prefix of the model's body.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    saved = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        aliases.setdefault(id(tensor), []).append(name)
    found = {}
    for names in aliases.values():
        held = [n for n in dict.fromkeys(m for name in names for m in (name, name.removeprefix(prefix))) if n in files]
        if not held:
            raise TransferError(f"The checkpoint has no {names[0]}, a tensor of {type(model).__name__}.")
        place, shape = files.places[held[0]], tuple(saved[names[0]].shape)
        if place.shape != shape:
            raise TransferError(f"{held[0]} is {place.shape} in the checkpoint, and {shape} by its config.")
        if any(not torch.equal(files[held[0]], files[other]) for other in held[1:]):
            raise TransferError(f"{' and '.join(held)} differ in the checkpoint, and are tied by its config.")
        found |= dict.fromkeys(names, held[0])
    return found


def _list_tensors(theirs: TensorFiles, student: nn.Module, record: Record) -> dict[str, Tensor]:
    """List the tensors to write, on the meta device, with the types that the teacher's have."""
    saved, plain = student.state_dict().keys(), next(student.parameters()).dtype
    tensors = {}
    for name, origin in record.origins.items():
        if name in saved:
            dtype = theirs.places[origin.teacher].dtype if origin.teacher else plain
            tensors[name] = torch.empty(record.shapes[1][name], dtype=dtype, device="meta")
    return tensors


def _identify(folder: Path, record: Record) -> str:
    """Return a text that is the same for the same growth of the same files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([to_text(record), stats]).encode()).hexdigest()


def _begin(partial: Path, identity: str, state: Tensor, shards: Mapping[str, Sequence[str]]) -> tuple[int, Tensor]:
    """Return how many files are finished, and the state of the generator behind them; clear what is of no use."""
    done, is_ours = 0, False
    found = set(os.listdir(partial)) if partial.is_dir() else {partial.name} if os.path.lexists(partial) else set()
    try:
        progress = json.loads((partial / PROGRESS).read_text())
        is_ours, files = progress["growth"] == identity, list(shards.items())[: progress["files"]]
        if is_ours and all(read_header(partial / file).keys() == set(names) for file, names in files):
            done, state = len(files), torch.tensor([*base64.b64decode(progress["state"])], dtype=torch.uint8)
    except (TransferError, OSError, ValueError, KeyError, TypeError):  # a finished file may be missing, or damaged
        is_ours = is_ours or "growth.json" in found  # it was stopped before its last step
    if found and not is_ours:
        raise TransferError(f"{partial} is there already, and is not of this growth: move or delete it.")
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
    return done, state


def _check_room(partial: Path, size: int) -> None:
    """Raise TransferError if the disk has no room for what is left of a checkpoint of `size` bytes."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    if (free := shutil.disk_usage(partial.parent).free) < size - held:
        raise TransferError(f"The larger checkpoint takes {size - held:,} bytes more, and the disk has {free:,}.")


def _note(partial: Path, identity: str, files: int, state: Tensor) -> None:
    """Write down how far the growth has come."""
    text = base64.b64encode(bytes(state.tolist())).decode()
    new = partial / f"{PROGRESS}.new"
    new.write_text(json.dumps({"growth": identity, "files": files, "state": text}))
    os.replace(new, partial / PROGRESS)


def _check_rotations(record: Record, theirs: Mapping[str, Tensor]) -> None:
    """Raise TransferError if a rotation of a stream has no solution."""
    every = {(m.begins, m.widths): m for origin in record.origins.values() for m in origin.mixed}
    for mixed in every.values():
        mixing_matrix(mixed, theirs)


class _Writer:
    """Makes the student's tensors one by one, in the order of the record."""

    def __init__(self, student: Any, record: Record, theirs: TensorFiles, tensors: Mapping[str, Tensor]) -> None:
        self.student, self.record, self.theirs, self.tensors = student, record, theirs, tensors
        self.generator = torch.Generator()

    @torch.no_grad()
    def make(self, name: str) -> Tensor:
        """Return the tensor with its values."""
        origin, like = self.record.origins[name], self.tensors[name]
        target = self._draw(name).to(like.dtype) if _keeps_own(origin) else torch.empty_like(like, device="cpu")
        matrices = [mixing_matrix(mixed, self.theirs) for mixed in origin.mixed]
        fill_tensor(target, origin, (self.theirs, {}), matrices, self.generator, self.record.split)
        return target

    def _draw(self, name: str) -> Tensor:
        """Return what the model's class draws for a tensor: it follows from the name alone."""
        path, _, leaf = name.rpartition(".")
        with torch.random.fork_rng(devices=[]), _default_dtype(torch.float32):
            torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
            module = copy.deepcopy(self.student.get_submodule(path)).float().to_empty(device="cpu")
            for tensor in module.parameters():
                tensor.fill_(torch.nan)
            self.student._init_weights(module)
        drawn = getattr(module, leaf).detach()
        if not bool(drawn.isfinite().all()):
            raise TransferError(f"{type(self.student).__name__} draws no initial values for {name}.")
        return drawn


def _keeps_own(origin: Origin) -> bool:
    """Tell whether a tensor keeps values that the model's class draws."""
    if origin.how != How.SHARED:
        return origin.fill == Fill.OWN
    return any(bool((axis.index == NEW).any()) for axis in origin.axes.values())


def _write_rest(
    folder: Path, partial: Path, student: Any, shards: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor]
) -> None:
    """Write the config and the index, and copy what else is in the teacher's folder."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, partial / path.name)
    student.config.save_pretrained(partial)
    if len(shards) > 1 or SINGLE not in shards:
        places = {name: file for file, names in shards.items() for name in names}
        size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        (partial / INDEX).write_text(json.dumps({"metadata": size, "weight_map": places}, indent=2))


def _compare(partial: Path, teacher: Any, student: Any, theirs: TensorFiles, record: Record) -> Record:
    """Return the record with the difference of the two checkpoints; raise TransferError if it is no rounding."""
    files = open_files(sorted(partial.glob("*.safetensors")))
    mine = files.rename(_file_names(student, files))
    try:
        with FromFiles([(teacher, theirs), (student, mine)]):
            inputs = Inputs.of(_example(teacher, "cpu"))
            measured = assert_equivalent_on(teacher, student, inputs, "random tokens")
    except TransferError:
        shutil.rmtree(partial)
        raise
    train = "not measured: the checkpoints were compared in eval mode"
    return replace(record, measured=measured, modes={"eval": "exact", "train": train})
