"""A trial on a few images: `limit=N` makes the same stages, short, in a folder of its own."""

from pathlib import Path

import torch
from loops import read_rows

from experiments import data
from experiments.config import Data


def test_a_trial_has_two_evaluations_and_a_folder_of_its_own(train_py):
    assert train_py("limit=150", "arms=[net2net,random_init]", "schedule.teacher_epochs=7ep") == 0
    assert not Path("runs").exists()
    folder = Path("runs-limit150")
    for arm in ("teacher", "net2net", "random_init"):
        rows = read_rows(folder / "quickstart/seed0" / arm)
        assert [row["epoch"] for row in rows] == ["0", "2"]
        assert int(rows[-1]["examples"]) <= 2 * 150


def test_every_class_is_in_a_thin_split(tmp_path):
    splits = data.load(Data(name="digits", size=8, pad=1, flip=False, cache=str(tmp_path))).thin(200, 100)
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [200, 100, 100]
    assert len(splits.train.labels.unique()) == 10
    assert "at most 200 / 100 of them" in splits.description
    images, labels = next(splits.train.batches(200, 0, 0, augment=False))
    assert len(images) == 200 and torch.equal(labels.sort().values, splits.train.labels.sort().values)


def test_too_few_images_are_refused(train_py, capsys):
    assert train_py("limit=20") == 1
    assert "limit is 20: it has to be 100 or more." in capsys.readouterr().err
