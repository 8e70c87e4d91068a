"""A checkpoint grows from file to file: as in memory, to the last bit, and whole or not at all."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pretrained
import pytest
import torch
from checks import refused
from torch import Tensor, nn

from net2net import TransferError, checkpoint, describe, load_record, widen
from net2net.__main__ import main
from net2net.checkpoint import Growth, grow_checkpoint
from net2net.safetensors import open_files, read_tensors, write_tensors
from net2net.testing import look_trained


class Config(pretrained.Config):
    """As those of transformers, with the methods that a checkpoint needs."""

    def __init__(self, **values) -> None:
        super().__init__(**{"architectures": ["Model"], "ties": False} | values)

    def get_text_config(self) -> SimpleNamespace:
        return SimpleNamespace(vocab_size=self.vocabulary)

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "config.json").write_text(json.dumps(self.to_dict()))


class Model(pretrained.Model):
    base_model_prefix = "body"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.ties:
            self.head.weight = self.words.weight

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(3, 5, dtype=torch.long)}

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(parameter)
            elif name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


def stand_in() -> ModuleType:
    """Transformers has a class by its name, and makes the config of a folder."""

    def load(folder: Path, trust_remote_code: bool) -> Config:
        return Config.from_dict(json.loads((Path(folder) / "config.json").read_text()))

    module = ModuleType("transformers")
    vars(module).update(Model=Model, AutoConfig=SimpleNamespace(from_pretrained=load))
    return module


def write(folder: Path, shards: int = 4, dtype: torch.dtype = torch.float32, **values) -> Model:
    """Write a checkpoint in several files, and return the model."""
    model = look_trained(Model(Config(**values))).to(dtype)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tensors = dict(model.named_parameters())
    names = [[*tensors][k::shards] for k in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{k}.safetensors" for k in range(shards)]
    for file, held in zip(files, names, strict=True):
        write_tensors(folder / file, {name: tensors[name] for name in held})
    if shards > 1:
        places = {name: file for file, held in zip(files, names, strict=True) for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "tokenizer.json").write_text("{}")
    return model


def load(folder: Path) -> Model:
    config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in read_tensors(path).items()}
    model = Model(config).to(next(iter(tensors.values())).dtype)
    tied = {"head.weight"} if config.ties else set()
    assert set(model.load_state_dict(tensors, strict=False).missing_keys) == tied
    return model.eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", stand_in())


GROWTH = Growth(mlp=1.5)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint, and what it becomes without a stop."""
    folder = tmp_path_factory.mktemp("grown")
    write(folder / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", stand_in())
        grow_checkpoint(folder / "small", folder / "large", GROWTH)
    return folder


@pytest.mark.parametrize("values", [{}, {"ties": True, "hidden": 12}])
@pytest.mark.parametrize("growth", [GROWTH, Growth(mlp=2.0, layers=3)])
def test_what_is_written_is_the_grown_model(values: dict, growth: Growth, tmp_path: Path) -> None:
    model = write(tmp_path / "small", **values)
    record = grow_checkpoint(tmp_path / "small", tmp_path / "large", growth)
    again, words = load(tmp_path / "large"), torch.randint(11, (4, 5))
    assert again.config.blocks == 2 + growth.layers
    assert again.config.inner == int(4 * model.config.hidden * growth.mlp)
    bar = 1e-6
    assert ((again(words) - model(words)).abs().max() / model(words).abs().max()).item() <= bar
    assert record.measured is not None and record.measured.max_relative <= bar
    assert load_record(tmp_path / "large/growth.json").shapes == record.shapes
    assert (tmp_path / "large/tokenizer.json").read_text() == "{}" and not [*tmp_path.glob("*.partial")]
    index = json.loads((tmp_path / "large/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in again.parameters())
    if not growth.layers:
        wider = widen(model, {"input_ids": words}, growth.mlp)
        held = open_files((tmp_path / "large").glob("*.safetensors"))
        state = wider.state_dict()
        assert all(torch.equal(held[name], state[name]) for name in held)
        assert vars(wider.config) == vars(again.config)


def test_types_stay_and_one_file_becomes_one(tmp_path: Path) -> None:
    write(tmp_path / "small", 1, torch.bfloat16)
    (tmp_path / "small/pytorch_model.bin").write_text("the same weights in another format")
    grow_checkpoint(tmp_path / "small", tmp_path / "large", Growth(mlp=1.5, layers=1))
    names = {"config.json", "growth.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "large").iterdir()} == names
    assert {t.dtype for t in read_tensors(tmp_path / "large/model.safetensors").values()} == {torch.bfloat16}


class Stop(BaseException):
    """What `kill -9` is to the growth: nothing that it could do."""


@pytest.mark.parametrize("step", ["write_tensors", "_note", "_write_rest", "_compare", "os.rename"])
def test_a_growth_that_was_stopped_goes_on(
    step: str, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    module, name = (os, "rename") if step == "os.rename" else (checkpoint, step)
    whole = getattr(module, name)

    def stop(*args) -> object:
        calls.append(args)
        if step == "write_tensors" and len(calls) == 1:
            return whole(*args)
        if step == "write_tensors":
            args[0].write_bytes(b"half of a file")
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, name, stop)
        grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    assert not (tmp_path / "large").exists()
    finished = [path.stat().st_mtime_ns for path in (tmp_path / "large.partial").glob("*-00001-*")]
    grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    assert contents(tmp_path / "large") == contents(grown / "large") and not (tmp_path / "large.partial").exists()
    if step not in ("_note", "os.rename"):  # a file that was finished is not written again
        assert finished == [path.stat().st_mtime_ns for path in (tmp_path / "large").glob("*-00001-*")]


def test_the_files_of_another_growth_are_left_alone(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "_write_rest", lambda *_: (_ for _ in ()).throw(Stop))
        grow_checkpoint(grown / "small", tmp_path / "large", Growth(mlp=1.25))
    made = contents(tmp_path / "large.partial")
    assert len(made) > 2
    with pytest.raises(TransferError, match="is not of this growth: move or delete it"):
        grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    assert contents(tmp_path / "large.partial") == made


def child(folder: str, out: str, warm_up: str = "") -> None:
    """Grow in a process of its own; print how much more memory that took than a small growth before."""
    sys.modules["transformers"] = stand_in()
    growth = Growth(mlp=1.5, layers=1)
    if warm_up:
        grow_checkpoint(warm_up, f"{warm_up}-large", growth)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grow_checkpoint(folder, out, growth)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def start(*arguments: str) -> subprocess.Popen:
    code = "import sys, test_grow_checkpoint; test_grow_checkpoint.child(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE)


@pytest.mark.system
def test_a_growth_that_was_killed_goes_on(tmp_path: Path) -> None:
    small, large, whole = (tmp_path / name for name in ("small", "large", "whole"))
    write(small, shards=20, blocks=4, kinds=["plain"] * 4)
    with start(str(small), str(whole)):
        pass
    for files in (1, 4):
        with start(str(small), str(large)) as process:
            while process.poll() is None:
                if len([*tmp_path.glob("large.partial/*.safetensors")]) >= files:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.001)
        assert process.returncode == -signal.SIGKILL and not large.exists()
    with start(str(small), str(large)):
        pass
    assert contents(large) == contents(whole)


@pytest.mark.slow
def test_memory_holds_the_largest_tensor_and_its_copy(tmp_path: Path) -> None:
    values = {"hidden": 1024, "heads": 8, "kinds": ["plain"] * 6, "blocks": 6}
    write(tmp_path / "tiny")
    write(tmp_path / "small", **values)
    total = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    with start(str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "tiny")) as process:
        more = 1024 * int(process.communicate()[0].split()[-1])
    largest = 4 * 1024 * 6144
    assert total > 12 * largest / 1.5 and more < 2 * largest + 100e6, (more, total)


def spoil(name: str) -> Callable:
    """Change one number of one tensor after it was made."""
    made = checkpoint._Writer.make

    def make(writer: checkpoint._Writer, tensor: str) -> Tensor:
        value = made(writer, tensor)
        if tensor == name:
            value.view(-1)[3] += 0.5
        return value

    return make


def test_a_wrong_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "small")
    monkeypatch.setattr(checkpoint._Writer, "make", spoil("blocks.1.down.weight"))
    with refused("The filled student does not compute its teacher's function: on random tokens they differ by"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", GROWTH)
    assert not [*tmp_path.glob("large*")]


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


REFUSALS: dict[str, tuple[Callable[[Path], object], Growth]] = {
    "large exists": (lambda small: (small.parent / "large").mkdir(), GROWTH),
    "small has no config.json": (lambda small: (small / "config.json").unlink(), GROWTH),
    "convert what it holds to safetensors": (lambda small: (small / "model.safetensors.index.json").unlink(), GROWTH),
    "small has no model-2.safetensors, which its": (
        lambda small: (small / "model-2.safetensors").unlink(),
        GROWTH,
    ),
    "index.json in .* is damaged": (
        lambda small: (small / "model.safetensors.index.json").write_text("{}"),
        GROWTH,
    ),
    "is no safetensors file, or a damaged one": (
        lambda small: os.truncate(small / "model-2.safetensors", (small / "model-2.safetensors").stat().st_size - 1),
        GROWTH,
    ),
    "names no model of transformers ..'Other'": (lambda small: change_config(small, architectures=["Other"]), GROWTH),
    "names no model of transformers ..'AutoConfig'": (
        lambda small: change_config(small, architectures=["AutoConfig"]),
        GROWTH,
    ),
    "is quantised": (lambda small: change_config(small, quantization_config={"bits": 4}), GROWTH),
    "words.weight is .11, 8. in the checkpoint, and .12, 8. by its config": (
        lambda small: change_config(small, vocabulary=12),
        GROWTH,
    ),
    "has no blocks.2.norm.weight": (
        lambda small: change_config(small, blocks=3, kinds=["plain"] * 3),
        GROWTH,
    ),
    "makes no model: ValueError: heads": (lambda small: change_config(small, heads=3), GROWTH),
    "Nothing is to grow": (lambda _: None, Growth()),
    "only grows": (lambda _: None, Growth(layers=-1)),
    "only grows: factors": (lambda _: None, Growth(mlp=0.5)),
    "The config of Model has no value that makes .* as it is now. Load the model, use net2net.widen": (
        lambda _: None,
        Growth(stream=2.0),
    ),
    "words.weight and head.weight differ in the checkpoint": (
        lambda small: change_config(small, ties=True),
        GROWTH,
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_refused_before_anything_is_written(why: str, tmp_path: Path) -> None:
    change, growth = REFUSALS[why]
    write(tmp_path / "small")
    change(tmp_path / "small")
    before = sorted(path.name for path in tmp_path.iterdir())
    with refused(why):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", growth)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_and_a_finished_file_that_is_damaged(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(partial: Path, identity: str, files: int, state: Tensor) -> None:
        if files > 1:
            raise OSError(28, "No space left on device")
        whole(partial, identity, files, state)

    whole = checkpoint._note
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_note", note)
        with refused(r"cannot be read or written: .*No space left on device: .* goes on from .*large.partial"):
            grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    first = next((tmp_path / "large.partial").glob("*-00001-*"))
    first.write_bytes(first.read_bytes()[:-8])
    written: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "write_tensors", lambda p, *a, w=checkpoint.write_tensors: (written.append(p), w(p, *a))
        )
        grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    assert written[0].name == first.name and contents(tmp_path / "large") == contents(grown / "large")


def test_a_full_disk_and_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "small")
    with monkeypatch.context() as patch, refused("takes [0-9,]+ bytes more, and the disk has 1,000"):
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        grow_checkpoint(tmp_path / "small", tmp_path / "large", GROWTH)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("grown with the help of transformers, which is missing"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", GROWTH)
    assert not [*tmp_path.glob("large*")]


def test_the_command_describes_a_checkpoint_as_the_model_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "small")
    assert main(["describe", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.strip() == str(describe(model, model.dummy_inputs))
    (tmp_path / "small" / "config.json").unlink()
    assert main(["describe", str(tmp_path / "small")]) == 1
    assert "small has no config.json, as the folder of a Hugging Face model has." in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "small")
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    assert main(["grow", small, large, "--mlp", "1.5", "--layers", "+2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["on random tokens"]["max_relative"] < 1e-6
    assert load(tmp_path / "large").config.blocks == 4 and torch.get_default_dtype() == torch.float32
    assert main(["grow", small, large, "--mlp", "1.5"]) == 1 and "large exists" in capsys.readouterr().err
    assert main(["grow", "resnet18", "resnet34", "--mlp", "1.5"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, tuple[dict, list[Growth]]] = {
    "LlamaForCausalLM": (SIZES | {"num_key_value_heads": 2}, [Growth(1.5, 2.0, 1)]),
    "Qwen3ForCausalLM": (
        SIZES | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        [Growth(1.5), Growth(stream=2.0)],
    ),
    "GPT2LMHeadModel": ({"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}, [Growth(1.5, layers=2)]),
    "BertForMaskedLM": (SIZES, [Growth(1.5)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (sizes, growths), kind = FAMILIES[family], getattr(transformers, family)
    model = look_trained(kind(kind.config_class(**sizes)))
    model.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    x = torch.randint(50, (2, 7))
    for k, growth in enumerate(growths):
        grow_checkpoint(tmp_path / "small", tmp_path / f"large{k}", growth)
        again, report = kind.from_pretrained(tmp_path / f"large{k}", output_loading_info=True)
        assert not any(report.values())
        theirs, mine = (network.eval()(x).logits for network in (model, again))
        assert (theirs - mine).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_folder_and_a_link_of_the_user_are_left_alone(grown: Path, tmp_path: Path) -> None:
    place = tmp_path / "large.partial"
    place.mkdir()
    (place / "mine.txt").write_text("notes")
    for _ in range(2):
        with pytest.raises(TransferError, match="is there already, and is not of this growth: move or delete it"):
            grow_checkpoint(grown / "small", tmp_path / "large", GROWTH)
    assert (place / "mine.txt").read_text() == "notes"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TransferError, match="exists: give the name of a new folder"):
        grow_checkpoint(grown / "small", tmp_path / "link", GROWTH)


@pytest.mark.parametrize("growth", [Growth(mlp=float("nan")), Growth(stream=float("inf")), Growth(mlp=0.5)])
def test_factors_that_are_none_are_refused(growth: Growth, grown: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="A checkpoint only grows"):
        grow_checkpoint(grown / "small", tmp_path / "large", growth)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_without_files_is_damaged(index: dict, tmp_path: Path) -> None:
    write(tmp_path / "small")
    (tmp_path / "small/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TransferError, match=r"index\.json in .* is damaged"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", GROWTH)
