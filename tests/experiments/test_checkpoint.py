"""A checkpoint that is not as it was written is never used, and the one before is."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint
from experiments.config import ExperimentError

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def state(step: int) -> dict[str, Any]:
    return {"network": {"w": torch.full((300,), float(step))}, "optimizer": {}, "step": step, "rows": [], "meter": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    return tmp_path


def signed(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def test_it_comes_back_and_torch_reads_it_too(folder):
    found = checkpoint.load(folder)
    assert torch.equal(found["network"]["w"], torch.full((300,), 2.0)) and found["step"] == 2
    assert torch.load(folder / NEWEST, weights_only=True)["step"] == 2
    assert sorted(path.name for path in folder.iterdir()) == [PREVIOUS, NEWEST]


@pytest.mark.parametrize("length", [0, -1])  # empty, truncated
def test_a_damaged_one_is_noticed_and_the_one_before_is_used(folder, length, capsys):
    content = (folder / NEWEST).read_bytes()
    (folder / NEWEST).write_bytes(content[:length])
    assert checkpoint.load(folder)["step"] == 1
    err = capsys.readouterr().err
    assert err == f"Warning: {folder}/{NEWEST} cannot be read (its checksum is wrong); continuing from {PREVIOUS}.\n"
    assert (folder / NEWEST).exists()  # who only reads removes nothing
    assert checkpoint.resume(folder)["step"] == 1
    checkpoint.save(folder, state(3))
    checkpoint.save(folder, state(4))
    (folder / NEWEST).unlink()
    assert checkpoint.load(folder)["step"] == 3  # and not what was damaged


def test_every_single_flipped_bit_is_noticed(tmp_path):
    checkpoint.save(tmp_path, state(1))
    content = bytearray((tmp_path / NEWEST).read_bytes())
    for place in range(0, len(content), 7):
        content[place] ^= 1 << place % 8
        (tmp_path / NEWEST).write_bytes(content)
        with pytest.raises(ExperimentError, match="its checksum is wrong"):
            checkpoint.load(tmp_path)
        content[place] ^= 1 << place % 8


def test_two_damaged_ones_are_refused(folder):
    for name in (NEWEST, PREVIOUS):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    said = rf"{NEWEST} cannot be read \(its checksum is wrong\); .*{PREVIOUS} cannot .*: delete {folder} to run this"
    with pytest.raises(ExperimentError, match=said):
        checkpoint.load(folder)


def test_between_the_two_renames_of_a_save_the_one_before_is_there(folder, capsys):
    (folder / NEWEST).rename(folder / PREVIOUS)
    assert checkpoint.exists(folder)
    assert checkpoint.resume(folder)["step"] == 2
    assert capsys.readouterr().err == ""  # nothing is lost


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": 1}, "it is not one of this project"),
        (torch.ones(2), "it is not one of this project"),
        (state(1) | {"network": Path("x")}, "UnpicklingError"),  # a class: to load it would be to run it
    ],
)
def test_what_is_whole_but_no_checkpoint_is_refused(tmp_path, content, said):
    (tmp_path / NEWEST).write_bytes(signed(content))
    with pytest.raises(ExperimentError, match=rf"cannot be read \({said}\): delete "):
        checkpoint.load(tmp_path)
