"""The data sets of torchvision: parts by the usual arguments, no download unless asked, and what to type instead."""

import shutil
import struct
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from loops import error_of, read_rows
from scipy.io import savemat
from torchvision import datasets

from experiments.config import Data, ExperimentError
from experiments.data import from_torchvision, load


def pixels(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_mnist(folder: Path) -> None:
    """40 and 20 grey images in the format of MNIST."""
    folder.mkdir(parents=True)
    for seed, (part, count) in enumerate({"train": 40, "t10k": 20}.items()):
        head = struct.pack(">4I", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels(count, 28, 28, seed=seed).tobytes())
        labels = bytes(index % 10 for index in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 40 and 20 coloured images in the format of SVHN, which stands for the network, too."""
    folder, known = tmp_path / "served", {}
    folder.mkdir()
    for seed, (part, count) in enumerate({"train": 40, "test": 20}.items()):
        labels = 1 + np.arange(count)[:, None] % 10
        savemat(folder / f"{part}.mat", {"X": pixels(32, 32, 3, count, seed=seed), "y": labels.astype(np.uint8)})
        known[part] = ["served", f"{part}.mat", md5((folder / f"{part}.mat").read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)
    return folder


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let torchvision's downloads copy from the folder."""

    def download(self: datasets.SVHN) -> None:
        shutil.copy(folder / self.filename, self.root)

    monkeypatch.setattr(datasets.SVHN, "download", download)


def test_parts_by_train_are_those_of_torchvision(tmp_path):
    write_mnist(tmp_path / "MNIST/raw")
    splits = load(Data(name="MNIST", root=str(tmp_path), size=28))
    assert (len(splits.train), len(splits.holdout), len(splits.test), splits.classes) == (30, 10, 20, 10)
    assert np.array_equal(splits.test.images.numpy()[:, 0], pixels(20, 28, 28, seed=1))  # grey: one channel
    assert splits.test.labels.tolist() == [index % 10 for index in range(20)]
    assert splits.description == "torchvision's MNIST, 40 train / 20 test"
    assert load(Data(name="MNIST", root=str(tmp_path), size=14)).test.images.shape == (20, 1, 14, 14)


def test_parts_by_split_are_those_of_torchvision(svhn):
    splits = load(Data(name="SVHN", root=str(svhn)))
    assert (len(splits.train) + len(splits.holdout), len(splits.test), splits.classes) == (40, 20, 10)
    assert np.array_equal(splits.test.images.numpy(), pixels(32, 32, 3, 20, seed=1).transpose(3, 2, 0, 1))
    assert splits.test.labels[:3].tolist() == [1, 2, 3]


def test_a_split_has_another_name_where_the_usual_one_is_unknown(monkeypatch):
    made: list[str] = []

    class Named:
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in ("train", "val"):
                raise ValueError(split)
            made.append(split)

    monkeypatch.setattr(datasets, "Flowers102", Named)
    from_torchvision._open(Data(name="Flowers102"), Path())
    assert made == ["train", "val"]


def test_a_set_without_parts_keeps_a_fixed_fifth_of_each_class_for_the_test():
    config = Data(name="FakeData", size=8, options={"size": 100, "image_size": [3, 12, 8], "num_classes": 3})
    splits = load(config)
    parts = [splits.train, splits.holdout, splits.test]
    assert sum(map(len, parts)) == 100 and splits.classes == 3 and splits.test.images.shape[1:] == (3, 8, 8)
    whole = torch.cat([part.labels for part in parts]).bincount()
    assert splits.test.labels.bincount().tolist() == [round(0.2 * count) for count in whole.tolist()]
    assert load(config).fingerprint() == splits.fingerprint()


def test_arguments_that_go_to_the_class_above_are_found():
    accepted = {name: from_torchvision._list_arguments(getattr(datasets, name)) for name in ("EMNIST", "SVHN")}
    assert accepted["EMNIST"] >= {"root", "split", "train", "download"}  # `train` and `download` are those of MNIST
    assert "train" not in accepted["SVHN"]


def test_nothing_is_downloaded_unless_asked(svhn, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.SVHN, "download", lambda self: pytest.fail("it was downloaded"))
    config = Data(name="SVHN", cache=str(tmp_path / "cache"))
    with pytest.raises(ExperimentError, match=r"cannot read SVHN in .*cache/SVHN \(.*\): put .* data\.download=true"):
        load(config)
    assert not (tmp_path / "cache").exists()
    serve(monkeypatch, svhn)
    config.download = True
    first = load(config)
    assert sorted(path.name for path in (tmp_path / "cache/SVHN").iterdir()) == ["test.mat", "train.mat"]
    monkeypatch.setattr(datasets.SVHN, "download", lambda self: pytest.fail("it was downloaded twice"))
    assert load(config).fingerprint() == first.fingerprint()


def test_a_download_that_fails_leaves_nothing_and_says_where_to_put_the_data(svhn, tmp_path, monkeypatch):
    (svhn / "test.mat").write_bytes(b"damaged")
    serve(monkeypatch, svhn)
    with pytest.raises(ExperimentError, match=r"cannot download SVHN \(.*corrupted.*\): put .* into .*cache/SVHN\."):
        load(Data(name="SVHN", cache=str(tmp_path / "cache"), download=True))
    assert list((tmp_path / "cache/SVHN").iterdir()) == []


FAULTS = {  # what is loaded, and what is said
    "torchvision": ({}, r"data=torchvision needs the name of one of its classes, as in data\.name=SVHN\."),
    "SVNH": ({}, r"data\.name=SVNH is unknown \(did you mean 'SVHN'\?\)"),
    "FakeData": ({"sise": 3}, r"unexpected keyword argument 'sise'.*\+data\.options\.NAME=VALUE"),
    "EMNIST": ({}, r"argument: 'split'\): .*\+data\.options\.NAME=VALUE"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_loaded_gets_the_line_to_type(name, tmp_path):
    options, said = FAULTS[name]
    with pytest.raises(ExperimentError, match=said):
        load(Data(name=name, options=options, cache=str(tmp_path)))


def test_a_set_that_is_none_of_classes_is_refused(monkeypatch):
    monkeypatch.setattr(datasets.FakeData, "__getitem__", lambda self, index: (torch.zeros(3, 8, 8), "cat"))
    with pytest.raises(ExperimentError, match="gives Tensor and str where an image and the number of its class"):
        load(Data(name="FakeData"))


def test_a_set_that_the_memory_cannot_hold_is_refused():
    with pytest.raises(ExperimentError, match=r"FakeData would take .* GiB in memory"):
        load(Data(name="FakeData", size=1000, options={"size": 10**7}))


def test_the_command_trains_on_it_and_options_reach_the_class(train_py, tmp_path, capsys):
    write_mnist(tmp_path / "MNIST/raw")
    words = ["data=torchvision", "data.name=MNIST", f"data.root={tmp_path}", "data.size=14", "schedule.batch_size=8"]
    assert train_py(*words, "arms=[net2net]") == 0
    assert read_rows(tmp_path / "runs/quickstart/seed0/net2net")[-1]["step"] == "20"
    capsys.readouterr()
    assert train_py(*words, "arms=[net2net]", "+data.options.mirror=1", "tag=other") == 1
    assert "unexpected keyword argument 'mirror'" in error_of(capsys)
