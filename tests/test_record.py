"""A record is saved, read and carried out again bit for bit, or refused in a sentence."""

import copy
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import BAR, assert_same, every_eps, refused, state, trained, unchanged
from networks import attention, chain, grouped, images, inserted, mlp, positions, rows
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves

from net2net import Transfer, equivalence, load_record, random_pad, replay, save_record, transfer

pytestmark = pytest.mark.usefixtures("float64")

in_a_row = partial(mlp, act=nn.Identity)


def normed(n: int) -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, n)), nn.Tanh(), weight_norm(nn.Linear(n, 5)))


def padded(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, n), nn.RMSNorm(n, eps=1e-6), nn.Linear(n, n), nn.LayerNorm(n), nn.Linear(n, 5))


def gelu(units: int) -> nn.Module:
    """With units, two new layers and an activation that is not idempotent between them."""
    new = (nn.Conv2d(4, units, 1), nn.GELU(), nn.Conv2d(units, 4, 1)) if units else ()
    return inserted(lambda: nn.Sequential(*new))


CASES: dict[str, tuple[Callable, Callable, Callable, dict]] = {
    "wider": (lambda: chain(3, 4), lambda: chain(7, 13), images, {}),
    "deeper": (lambda: chain(3, 4), lambda: chain(7, 9, new=1), images, {}),
    "more heads": (lambda: attention(2, 6, 8), lambda: attention(4, 12, 16), positions, {}),
    "padded norms": (lambda: padded(8), lambda: padded(13), rows, {}),
    "groups": (lambda: grouped(2, 3, 3), lambda: grouped(4, 4, 4), images, {}),
    "packed groups": (lambda: grouped(3, 2, 3), lambda: grouped(2, 5, 9), images, {}),
    "pairs of signs": (lambda: gelu(0), lambda: gelu(9), images, {}),
    "dense": (lambda: in_a_row(3, 4, 5), lambda: in_a_row(3, 7, 7, 5), rows, {"depth": "dense"}),
    "weight norm": (lambda: normed(4), lambda: normed(9), rows, {}),
}


TABLE = """\
layer    before         after          how
conv0    3 x 3 x 3 x 3  7 x 3 x 3 x 3  grown
norm0    3              7              grown
conv0_1  –              7 x 7 x 3 x 3  new: passes its units on
"""


def grow(name: str, split: str = "equal", **options):
    make, larger, inputs, own = CASES[name]
    teacher, student = trained(make(), larger())
    generator = torch.Generator().manual_seed(5)
    fresh, x = copy.deepcopy(student), inputs()
    record = transfer(teacher, student, x, split=split, generator=generator, **own, **options)
    return teacher, student, fresh, record, x


def test_a_record_is_shown_in_one_line_and_its_layers_in_a_table() -> None:
    record = grow("deeper")[3]
    assert record.table().startswith(TABLE) and record.table().endswith(
        "\nfc       5 x 24         5 x 54         grown"
    )
    assert repr(record) == f"<Transfer: {record}>" and "\n" not in repr(record)
    assert transfer(nn.Linear(3, 4), nn.Linear(3, 4), rows()).table().endswith("4 x 3   4 x 3  as it was")


def same(a: Transfer, b: Transfer) -> bool:
    """Whether two records say the same, bit for bit."""
    leaves = zip(*(tree_leaves(asdict(replace(record, models=None))) for record in (a, b)), strict=True)
    return all(x == y if not isinstance(x, Tensor) else torch.equal(x, y) and x.dtype == y.dtype for x, y in leaves)


@pytest.mark.parametrize("split", ["equal", "uneven", "paired", "fresh"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_carried_out_again_bit_for_bit(name: str, split: str, tmp_path: Path) -> None:
    teacher, student, fresh, record, x = grow(name, split)
    path = tmp_path / "record.json"
    save_record(record, path)
    loaded = load_record(path)
    assert same(loaded, record) and str(loaded) == str(record) and loaded.models is None
    before = state(teacher)
    replay(loaded, teacher, fresh)
    assert unchanged(student, state(fresh)) and unchanged(teacher, before)
    assert_same(teacher, fresh, x)
    assert every_eps(student) == every_eps(fresh)
    save_record(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_noise_and_calibration_are_not_replayed(tmp_path: Path) -> None:
    teacher, student, fresh, record, x = grow("wider", noise=0.1)
    save_record(record, tmp_path / "r")
    replay(load_record(tmp_path / "r"), teacher, fresh)
    assert not unchanged(student, state(fresh))
    assert equivalence(teacher, fresh, x).max_relative <= BAR < equivalence(teacher, student, x).max_relative


def test_the_baseline_is_replayed_too(tmp_path: Path) -> None:
    teacher, student = trained(chain(3, 4), chain(7, 9, new=1))
    fresh = copy.deepcopy(student)
    save_record(random_pad(teacher, student, images()), tmp_path / "r")
    replay(load_record(tmp_path / "r"), teacher, fresh)
    assert unchanged(student, state(fresh))
    assert load_record(tmp_path / "r").measured is None


def test_a_later_teacher_may_be_grown_by_an_earlier_record() -> None:
    """The record says where entries come from, not what they are."""
    teacher, _, fresh, record, x = grow("more heads", "uneven")
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    replay(record, teacher, fresh)
    assert_same(teacher, fresh, x)


def test_a_file_is_json_and_holds_no_pickle(tmp_path: Path) -> None:
    """Its models may be null."""
    *_, record, _ = grow("deeper")
    path = tmp_path / "record.json"
    save_record(record, str(path))
    data = json.loads(path.read_text())
    assert data["format"] == 1 and data["origins"]["conv0.weight"]["how"] == "shared"
    assert data.get("models") is None
    path.write_text(json.dumps(data | {"models": None}))
    loaded = load_record(path)
    assert same(loaded, record) and loaded.models is None


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, record, _ = grow("wider")
    path = tmp_path / "record.json"
    path.write_text("the old one")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="the disk is full"):
                save_record(record, path)
        assert path.read_text() == "the old one" and os.listdir(tmp_path) == ["record.json"], name
    save_record(record, path)
    assert same(load_record(path), record) and os.listdir(tmp_path) == ["record.json"]


def test_others_may_read_a_record_as_they_may_any_file(tmp_path: Path) -> None:
    *_, record, _ = grow("wider")
    before = os.umask(0o022)
    try:
        save_record(record, tmp_path / "record.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "record.json").stat().st_mode) == 0o644


def axis(data: dict) -> dict:
    return data["origins"]["conv1.weight"]["axes"]["1"]


# what a file holds, or what is done to its data
BROKEN: list[str | Callable[[dict], object]] = [
    *("", '{"format": 1, "origins": {', "[]", "null", '"a record"', "{}", "\x80\udc80 no text"),
    *(lambda data, key=key: data.pop(key) for key in ("format", "origins", "split")),
    lambda data: data.update(format=2),
    lambda data: data.update(more=1),
    lambda data: data.update(origins=[]),
    lambda data: data["origins"].update(x=3),
    lambda data: data.update(state="§"),
    lambda data: data.update(measured=3),
    lambda data: data["origins"]["conv1.weight"].update(of=[]),
    lambda data: axis(data).pop("share"),
    lambda data: axis(data).update(index="all"),
    lambda data: axis(data).update(index=[[1], [1, 2]]),
]


@pytest.mark.parametrize("edit", BROKEN)
def test_a_broken_file_is_refused_by_name(edit: str | Callable[[dict], object], tmp_path: Path) -> None:
    *_, record, _ = grow("wider")
    path = tmp_path / "record.json"
    save_record(record, path)
    data = json.loads(path.read_text())
    if callable(edit):
        edit(data)
    path.write_bytes((json.dumps(data) if callable(edit) else edit).encode(errors="surrogateescape"))
    with refused(r"record\.json is "):
        load_record(path)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_record(tmp_path / "none")


def test_networks_of_other_shapes_are_refused() -> None:
    *_, record, _ = grow("wider")
    students = chain(7, 14), chain(7), chain(7, 13, new=1), nn.Linear(2, 2)
    teachers = chain(2, 4), chain(3), chain(4, 4)
    for teacher, student in [(chain(3, 4), s) for s in students] + [(t, chain(7, 13)) for t in teachers]:
        with refused(r"of another (teacher|student)", student):
            replay(record, teacher, student)


def test_a_record_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    teacher, _, fresh, record, _ = grow("wider")
    save_record(record, tmp_path / "r")
    data = json.loads((tmp_path / "r").read_text())
    axis(data)["index"][0] = 10**6
    (tmp_path / "r").write_text(json.dumps(data))
    with refused(None, teacher):
        replay(load_record(tmp_path / "r"), teacher, fresh)


def test_a_record_outlives_its_networks() -> None:
    record = transfer(chain(3, 4), chain(7, 9), images())
    with refused(r"record\.of\(teacher, student\)"):
        record.gradients({})


def test_what_padding_alone_makes_wider_is_larger():
    """A norm between whose width and the new one no multiple lies is padded: no unit is copied."""
    record = transfer(padded(4), padded(6), rows())
    assert "(8 of them larger)" in str(record)
    assert "(0 of them larger)" in str(transfer(mlp(3, 4, 2), mlp(3, 4, 2), rows()))
