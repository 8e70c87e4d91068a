"""Data sets: what a split gives, that its randomness has no state, and what it says about damaged data."""

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import fields, replace
from hashlib import md5
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from loops import pictures
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.datasets import CIFAR10
from torchvision.transforms import RandomResizedCrop, v2

from experiments.config import Data, ExperimentError
from experiments.data import Images, complete_batches, image_folder, load, streamed
from experiments.data.image_folder import crop_centre
from experiments.data.in_memory import crop_and_flip, mean_and_std
from experiments.data.sources import hold_out
from experiments.data.streamed import AREA, RATIO, random_crop
from experiments.randomness import derive_seed, generator

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return pictures(tmp_path / "tree", side=12, train={"cat": 20, "dog": 10}, test={"cat": 3, "dog": 2})


@pytest.fixture
def config(tmp_path: Path, root: Path) -> Data:
    return Data(name="image_folder", root=str(root), cache=str(tmp_path / "cache"), size=12, pad=2, holdout=0.2)


@pytest.fixture
def stream(tmp_path: Path) -> Data:
    root = pictures(tmp_path / "net", train={"n01": 10, "n02": 8}, val={"n01": 3, "n02": 2})
    return Data(name="imagenet", root=str(root), cache=str(tmp_path / "cache"), size=16, pad=0, holdout=0.2)


@pytest.fixture(params=["config", "stream"])
def either(request: pytest.FixtureRequest) -> Data:
    return request.getfixturevalue(request.param)


def same(first, second) -> bool:
    """Whether two iterators of batches give the same images and labels, bit for bit."""
    first, second = (list(itertools.chain(*batches)) for batches in (first, second))
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


# Randomness


def test_seeds_and_generators_depend_on_every_part_and_their_order():
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), ("0",), (0, 0), (0, "a", 1), (1, "a", 0), (0, "b", 1)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "order", 3) == 386106667988085106  # the same on every machine and in every version
    draws = [torch.rand(4, generator=generator(*parts)) for parts in [(0, "a"), (0, "a"), (0, "b")]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_resumed_epoch_goes_on_as_it_would_have_and_ranks_share_its_batches(either):
    train = load(either).train
    whole = list(train.batches(4, epoch=1, seed=0))
    assert len(whole) >= 3
    for start in range(len(whole)):
        assert same(train.batches(4, epoch=1, seed=0, start=start), whole[start:])
        for share in (slice(0, 2), slice(2, 4)):
            part = [(images[share], labels[share]) for images, labels in whole[start:]]
            assert same(train.batches(4, epoch=1, seed=0, start=start, share=share), part)
    assert list(train.batches(4, epoch=1, seed=0, start=len(whole))) == []
    ranks = [list(train.ordered(4, rank, 2)) for rank in range(2)]
    alternating = [batch for pair in itertools.zip_longest(*ranks) for batch in pair if batch is not None]
    assert same(train.ordered(4), alternating)


def test_arms_of_a_seed_share_the_stream_and_nothing_else_disturbs_it(either):
    first, second = load(either).train, load(either).train
    torch.manual_seed(1)
    expected = list(first.batches(4, epoch=0, seed=0))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same(second.batches(4, epoch=0, seed=0), expected)
    assert torch.equal(torch.random.get_rng_state(), before)  # nor does it disturb the global stream
    for epoch, seed in [(1, 0), (0, 1)]:
        assert not same(second.batches(4, epoch=epoch, seed=seed), expected)
        plain, other = (second.batches(4, e, s, augment=False) for e, s in [(0, 0), (epoch, seed)])
        assert not same(plain, other)  # the order alone


def test_a_batch_larger_than_the_split_is_refused(either):
    train = load(either).train
    with pytest.raises(ExperimentError, match=rf"schedule.batch_size is 100.* only {len(train)} images: lower it"):
        next(train.batches(100, 0, 0))
    assert complete_batches(10, 5) == 2


# Images in memory


def test_crop_and_flip_agrees_with_torchvision():
    images, pad = torch.from_numpy(pixels(6, 3, 5, 7)), 2
    fill = torch.tensor([7, 8, 9], dtype=torch.uint8)
    rows, columns = torch.tensor([0, 4, 2, 1, 3, 2]), torch.tensor([4, 0, 2, 3, 1, 2])
    mirror = torch.tensor([True, False, False, True, True, True])
    found = crop_and_flip(images, rows, columns, mirror, pad, fill)
    for number, image in enumerate(v2.functional.pad(images, [pad], fill=fill.tolist())):
        window = v2.functional.crop(image, int(rows[number]), int(columns[number]), 5, 7)
        assert torch.equal(found[number], window.flip(-1) if mirror[number] else window)


def test_padding_is_zero_after_normalisation():
    images = torch.from_numpy(pixels(64, 3, 4, 4))
    mean, std = mean_and_std(images)
    batch, _ = next(Images(images, torch.zeros(64).long(), mean, std, pad=4).batches(64, 0, 0))
    # Half a grey level around zero is taken by the padding and by few other pixels.
    limit = torch.tensor([0.5 / 255 / s + 1e-6 for s in std]).view(-1, 1, 1)
    assert (batch.abs() <= limit).float().mean() > 0.5


def test_statistics_are_those_of_the_pixels():
    images = torch.from_numpy(pixels(10, 3, 4, 4))
    mean, std = mean_and_std(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert mean_and_std(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8))[1] == (1 / 255,)


def test_every_image_comes_at_most_once_and_the_incomplete_batch_is_dropped():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    batches = list(Images(images, torch.arange(10), (0.0,), (1 / 255,)).batches(4, 0, 0, augment=False))
    for batch, labels in batches:
        assert (batch.dtype, labels.dtype, len(labels)) == (torch.float32, torch.int64, 4)
    seen = torch.cat([labels for _, labels in batches])
    assert len(set(seen.tolist())) == 8
    assert torch.equal(torch.cat([batch for batch, _ in batches]).flatten(), seen.float())  # labels follow images


def test_augmentation_moves_and_mirrors_within_its_bounds():
    images = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 3] = 255  # left of the centre: mirrored, it is right of it
    split = Images(images, torch.arange(200), (0.0,), (1.0,), pad=1, flip=True)
    ((batch, _),) = split.batches(200, 0, 0)
    _, _, rows, columns = batch.nonzero().unbind(1)
    assert set(rows.tolist()) == {3, 4, 5}
    assert set(columns.tolist()) == {2, 3, 4, 5, 6}
    mirrored = (columns > 4).float().mean()  # a third of the mirrored ones lies at column 4
    assert 0.2 < mirrored < 0.5
    ((unmirrored, _),) = replace(split, flip=False).batches(200, 0, 0)
    assert set(unmirrored.nonzero()[:, 3].tolist()) == {2, 3, 4}
    ((still, _),) = split.batches(200, 0, 0, augment=False)
    assert set(still.nonzero()[:, 3].tolist()) == {3}
    # Every image shows the same point, so batches, epochs and seeds differ by what was drawn for them.
    first, second = (images for images, _ in split.batches(100, 0, 0))
    for other in (second, next(split.batches(100, 1, 0))[0], next(split.batches(100, 0, 1))[0]):
        assert not torch.equal(first, other)


# The holdout


def test_the_holdout_has_its_share_of_each_class_and_nothing_of_training(config):
    splits, again, other = load(config), load(config), load(config, seed_split=1)
    assert torch.bincount(splits.holdout.labels).tolist() == [4, 2]
    assert torch.bincount(splits.train.labels).tolist() == [16, 8]
    held, kept = ({image.numpy().tobytes() for image in part.images} for part in (splits.holdout, splits.train))
    assert (len(held), len(kept), held & kept) == (6, 24, set())
    assert (splits.train.mean, splits.train.std) == mean_and_std(splits.train.images)
    assert (splits.train.pad, splits.train.flip) == (2, True)
    assert torch.equal(splits.holdout.images, again.holdout.images)
    assert not torch.equal(splits.holdout.images, other.holdout.images)


def test_division_keeps_one_of_each_class_on_either_side():
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    kept, held = hold_out(labels, 0.01, generator(0))
    assert labels[held].tolist() == [1, 2]
    assert sorted(kept.tolist() + held.tolist()) == list(range(6))
    kept, _ = hold_out(torch.tensor([0, 0, 1, 1]), 0.99, generator(0))
    assert len(kept) == 2
    with pytest.raises(ExperimentError, match=r"No class has two training images.*: add images"):
        hold_out(torch.tensor([0, 1, 2]), 0.1, generator(0))


# Sources


def test_digits(tmp_path):
    settings = Data(name="digits", size=8, pad=1, flip=False, cache=str(tmp_path))
    splits = load(settings)
    assert (len(splits.train), len(splits.holdout), len(splits.test)) == (1295, 143, 359)
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert int(splits.train.images.max()) == 255
    assert (splits.classes, len(splits.mean), len(splits.std)) == (10, 1, 1)
    assert splits.description == "scikit-learn digits, 1,438 train / 359 test"
    counts = torch.bincount(splits.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37
    assert torch.equal(splits.test.images, load(settings, seed_split=1).test.images)  # the test is fixed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("name=digits size=64", "data=digits has images of 8 pixels: set data.size=8"),
        ("name=cifar10 size=64", "data=cifar10 has images of 32 pixels: set data.size=32"),
        ("name=imagefolder", r"=imagefolder is unknown \(did you mean 'image_folder'\?\): there are digits, cifar10,"),
        ("name=digits size=8 holdout=0.0", "data.holdout is 0.0: choose a share between 0 and 1"),
        ("name=imagenet", r"data.root is not set: data=imagenet needs data.root=FOLDER with train/ and val/"),
        ("name=image_folder root=nowhere", r"data.root=nowhere is not a folder: .* and test/ or val/ in it"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    config = OmegaConf.merge(OmegaConf.structured(Data), OmegaConf.from_dotlist(settings.split()))
    with pytest.raises(ExperimentError, match=message):
        load(OmegaConf.to_object(config))


def test_splits_move_as_one(config, stream):
    meta = load(config).to("meta")
    assert all(part.images.is_meta and part.labels.is_meta for part in (meta.train, meta.holdout, meta.test))
    moved = load(stream).to("meta")
    assert {part.device.type for part in (moved.train, moved.holdout, moved.test)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(either):
    both = load(either), load(either).to("cuda")
    here, there = ([*splits.train.batches(4, 0, 0), *splits.test.ordered(4)] for splits in both)
    for (images, labels), (moved, moved_labels) in zip(here, there, strict=True):
        assert moved.is_cuda and torch.allclose(images, moved.cpu(), atol=1e-5)
        assert torch.equal(labels, moved_labels.cpu())


# Trees of pictures


def test_an_image_folder_is_read_as_it_lies(config, root):
    (root / "train" / "cat" / "._0.png").write_bytes(b"what another system leaves")
    (root / "train" / "notes.txt").write_text("no picture")
    (root / "train" / ".hidden").mkdir()
    Image.fromarray(pixels(40, 30)).save(root / "test" / "cat" / "0.jpeg")
    os.rename(root / "test", root / "val")  # it stands in for test
    splits = load(config)
    assert splits.classes == 2
    assert splits.description == "image folder tree, 30 train / 6 test"
    assert splits.test.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert splits.test.images.shape == (6, 3, 12, 12)
    assert torch.equal(splits.test.images[0, 0], splits.test.images[0, 1])  # grey
    with Image.open(root / "val" / "dog" / "1.png") as picture:
        assert torch.equal(splits.test.images[5], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


@pytest.mark.parametrize(("shape", "side", "size"), [((31, 45), 18, 16), ((45, 31), 9, 8), ((12, 50), 12, 12)])
def test_the_centre_is_that_of_torchvision(shape, side, size):
    image = Image.fromarray(pixels(*shape, 3))
    expected = v2.Compose([v2.Resize(side), v2.CenterCrop(size)])(image)
    assert np.array_equal(np.array(crop_centre(image, side, size)), np.array(expected))


def test_a_tree_is_decoded_once_and_again_where_it_or_the_size_changes(config, root, monkeypatch):
    before = load(config)
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "read_picture", lambda file: pytest.fail(f"{file} decoded again"))
        assert torch.equal(load(config).test.images, before.test.images)
    Image.fromarray(pixels(12, 12, 3, seed=99)).save(root / "test" / "cat" / "0.png")
    os.utime(root / "test" / "cat" / "0.png", ns=(1, 1))
    after = load(config)
    assert not torch.equal(after.test.images[0], before.test.images[0])
    assert torch.equal(after.test.images[1:], before.test.images[1:])
    config.size = 6
    assert load(config).test.images.shape == (5, 3, 6, 6)
    assert len(list(Path(config.cache).iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another"])
def test_a_damaged_cache_is_made_again(config, damage):
    before = load(config)
    (file,) = Path(config.cache).iterdir()
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    if damage == "another":
        np.savez(file, train=pixels(1, 3, 12, 12), test=pixels(1, 3, 12, 12))
    else:
        content[half] ^= 0xFF
        file.write_bytes({"flipped": content, "truncated": content[:half], "empty": b""}[damage])
    assert torch.equal(load(config).train.images, before.train.images)
    assert [entry.name for entry in Path(config.cache).iterdir()] == [file.name]


def test_nothing_half_written_stays(config, monkeypatch):
    monkeypatch.setattr("experiments.files.os.replace", MagicMock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ExperimentError, match=r"npz cannot be written \(No space left on device\): make room"):
        load(config)
    assert list(Path(config.cache).iterdir()) == []


def test_a_cache_that_cannot_be_written_and_a_tree_larger_than_memory_are_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.cache = str(tmp_path / "file" / "cache")
    with pytest.raises(ExperimentError, match=r"file/cache cannot be written .*: set data.cache, or .*NET2NET_CACHE"):
        load(config)
    config.size = 2**20
    with pytest.raises(ExperimentError, match=r"GiB in memory .*: lower data.size, or stream it with data=imagenet"):
        load(config)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_picture_of_16_bits_keeps_its_scale_and_numbers_without_one_are_refused(tmp_path, suffix):
    file = tmp_path / f"ramp.{suffix}"
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(file)
    assert np.array_equal(np.array(image_folder.read_picture(str(file)))[..., 0].ravel(), np.arange(256))
    for kind in (np.float32, np.int32):
        Image.fromarray(np.zeros((4, 4), kind)).save(tmp_path / "a.tif")
        with pytest.raises(ExperimentError, match=r"a\.tif cannot be read \(what is white .* 8 or 16 bits a pixel"):
            image_folder.read_picture(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("target", ["train/cat", "."])
def test_a_link_to_a_folder_around_it_is_named_and_other_links_are_followed(config, root, target, tmp_path):
    os.rename(root / "train" / "dog", tmp_path / "dogs")
    (root / "train" / "dog").symlink_to(tmp_path / "dogs")
    assert len(load(config).train) == 24
    for name in ("one", "two"):
        (root / "train" / "cat" / name).symlink_to(root / target)
    with pytest.raises(ExperimentError, match=r"The link .*cat/(one|two) leads to a folder that contains it: delete"):
        load(config)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", ["truncated", "no picture", "a link to nowhere"])
def test_an_unreadable_picture_is_named(config, root, suffix, damage):
    file = root / "train" / "dog" / f"broken.{suffix}"
    Image.fromarray(pixels(60, 60, 3)).save(file)
    if damage == "a link to nowhere":
        file.unlink()
        file.symlink_to("nowhere")
    else:
        file.write_bytes(file.read_bytes()[:800] if damage == "truncated" else b"no picture")
    with pytest.raises(ExperimentError, match=rf"The image .*dog/broken.{suffix} cannot be read \(.*: replace it"):
        load(config)
    assert not list(Path(config.cache).glob("*"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"bare needs train/ and test/ or val/.* but holds nothing"),
        (["train"], r"bare needs train/ and test/ or val/.* but holds train\."),
        (["train/cat/a.png", "test"], r"class folder in .*bare/test\. Put the pictures .*bare/test/CLASS"),
        (["train/cat/a.png", "test/cat"], r"no valid file for the classes cat\. Put the pictures .*test/CLASS/ \(.jpg"),
        (["train/cat/a.png", "test/wolf/a.png"], r"differ \(cat is only in train/; wolf is only in test/\): make them"),
    ],
)
def test_what_is_missing_in_a_tree_is_named(tmp_path, config, folders, message):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in folders:
        folder = (bare / name).parent if name.endswith(".png") else bare / name
        folder.mkdir(parents=True)
        if name.endswith(".png"):
            (bare / name).touch()
    config.root = str(bare)
    with pytest.raises(ExperimentError, match=message):
        load(config)


# Pictures streamed from disk


def test_streamed_splits(stream):
    splits = load(stream)
    assert (len(splits.train), len(splits.holdout), len(splits.test), splits.classes) == (14, 4, 5, 2)
    assert splits.description == "ImageNet tree net, 2 classes, 18 train / 5 test"
    assert torch.bincount(splits.holdout.labels).tolist() == [2, 2]
    assert not set(splits.holdout.files.tolist()) & set(splits.train.files.tolist())
    batches = list(splits.test.ordered(2))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1]
    usual = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    usual = v2.Compose([usual, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    with Image.open(os.fsdecode(splits.test.files[0])) as picture:
        assert torch.allclose(batches[0][0][0], usual(picture), atol=1e-5)


def test_streamed_pictures_are_changed_each_in_its_own_way(stream):
    train = load(stream).train
    for file in train.files:
        Image.fromarray(pixels(20, 20, 3)).save(os.fsdecode(file))
    draws = [image for epoch, seed in [(0, 0), (1, 0), (0, 1)] for image in next(train.batches(4, epoch, seed))[0]]
    assert len({image.numpy().tobytes() for image in draws}) == 12


def test_one_set_of_workers_serves_all_epochs(stream, monkeypatch):
    stream.workers = 2
    train = load(stream).train
    monkeypatch.setattr(streamed, "random_crop", lambda *_: Image.new("RGB", (1, 1), os.getpid()))

    def workers(epoch: int) -> set[float]:
        return {value for images, _ in train.batches(2, epoch, 0) for value in images[:, 0].unique().tolist()}

    assert len(workers(0)) == 2
    assert workers(0) == workers(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_may_be_left_resumed_and_may_overlap_for_any_number_of_workers(stream, workers):
    expected = [list(load(stream).train.batches(4, epoch, 0)) for epoch in range(3)]
    stream.workers = workers
    train = load(stream).train
    for epoch in (0, 1):
        assert same([next(train.batches(4, epoch, 0))], expected[epoch][:1])  # left after a batch of three
    assert same(train.batches(4, 1, 0, start=1), expected[1][1:])
    outer, inner = train.batches(4, 1, 0), train.batches(4, 2, 0)
    pairs = [(next(outer), next(inner)) for _ in expected[1]]
    assert same([first for first, _ in pairs], expected[1])
    assert same([second for _, second in pairs], expected[2])
    assert same(train.batches(4, 0, 0), expected[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_ends_an_epoch_and_not_the_workers(stream, workers):
    expected = list(load(stream).train.batches(4, 0, 0))
    stream.workers = workers
    train = load(stream).train
    file = Path(os.fsdecode(train.files[0]))
    content = file.read_bytes()
    file.write_bytes(content[:200])
    for _ in range(2):
        with pytest.raises(ExperimentError, match=rf"^The image {file} cannot be read \(.*\): replace it, or delete"):
            list(train.batches(len(train), 0, 0))
    file.write_bytes(content)
    assert same(train.batches(4, 0, 0), expected)


def test_a_random_part_has_the_pixels_of_torchvision_and_half_are_mirrored(tmp_path):
    file = tmp_path / "a.png"
    image = Image.fromarray(pixels(60, 80, 3))
    image.save(file)
    flips = 0
    for seed, flip in itertools.product(range(40), (True, False)):
        torch.manual_seed(seed)
        mirrored = torch.rand(1).item() < 0.5 and flip
        usual = v2.functional.resized_crop(image, *RandomResizedCrop.get_params(image, AREA, RATIO), [16, 16])
        expected = v2.functional.horizontal_flip(usual) if mirrored else usual
        found = random_crop(str(file), 16, flip, seed)
        # The outermost pixels are interpolated with what lies beyond the part, and not cut off there.
        assert np.abs(np.subtract(found, expected, dtype=int))[2:-2, 2:-2].max() <= 1
        flips += mirrored
    assert 10 < flips < 30


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch):
    file = tmp_path / "china.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(file, quality=95)  # 640 x 427
    sizes, spare = set(), streamed.SPARE

    def read_picture(*arguments) -> Image.Image:
        image = image_folder.read_picture(*arguments)
        sizes.add(image.width)
        return image

    def crops(spare: float) -> np.ndarray:
        monkeypatch.setattr(streamed, "SPARE", spare)
        sizes.clear()
        return np.stack([random_crop(str(file), 64, True, seed) for seed in range(60)]) / 255

    monkeypatch.setattr(streamed, "read_picture", read_picture)
    full = crops(10**6)
    assert sizes == {640}
    errors = np.sqrt(((crops(spare) - full) ** 2).mean((1, 2, 3)))
    assert sizes == {640, 320}
    assert 0 < errors.max() < 0.02 and errors.min() == 0  # small parts need every pixel
    rough = np.sqrt(((crops(0.5) - full) ** 2).mean((1, 2, 3)))
    assert rough.max() > 0.02  # what is left out shows if nothing is to spare


def test_workers_ignore_the_signals_of_preemption(stream, monkeypatch):
    def read_picture(file: str) -> Image.Image:
        (mask,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
        return Image.new("RGB", (20, 20), (int(mask.split()[1], 16) >> 11 & 0b1001,) * 3)  # USR2 is 12, TERM 15

    monkeypatch.setattr(streamed, "read_picture", read_picture)
    stream.workers = 1
    splits = load(stream)
    images, _ = next(splits.test.ordered(1))
    assert (images[0, 0] * splits.std[0] + splits.mean[0]).mul(255).round().unique().tolist() == [0b1001]


@pytest.mark.system
def test_a_run_that_ends_within_an_epoch_leaves_no_worker_and_no_noise(stream):
    stream.workers = 1
    code = f"""
from experiments.config import Data
from experiments.data import load
batches = load(Data(**{vars(stream)!r})).test.ordered(2)
next(batches)  # two more are to come
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=CONFIGS.parents[1], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# CIFAR-10


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a tiny archive, which torchvision downloads and takes for the official one; return its path."""
    contents: dict[str, bytes] = {}
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        entry = {"data": pixels(20, 3072, seed=number), "labels": [label % 10 for label in range(20)]}
        contents[name] = pickle.dumps(entry, protocol=2)
    contents["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    path = tmp_path / "there" / CIFAR10.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sums = {name: md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", path.as_uri())
    # Its own asks the answer for a length, which a file: address does not give.
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda url, target: shutil.copy(path, target))
    return path


def test_cifar10_is_downloaded_once_and_read(tmp_path, archive):
    settings = Data(name="cifar10", cache=str(tmp_path / "cache"))
    splits = load(settings)
    archive.unlink()
    assert torch.equal(load(settings).train.images, splits.train.images)
    assert (len(splits.train), len(splits.holdout), len(splits.test), splits.classes) == (30, 10, 20, 10)
    assert splits.description == "CIFAR-10 (official archive)"
    assert np.array_equal(splits.test.images.numpy(), pixels(20, 3072, seed=2).reshape(20, 3, 32, 32))
    assert splits.test.labels.tolist() == [label % 10 for label in range(20)]
    assert [entry.name for entry in (tmp_path / "cache" / "cifar10").iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/nothing-listens-here", "http://cifar.invalid/", None])
def test_without_a_network_an_archive_in_the_root_is_used_or_asked_for(tmp_path, archive, monkeypatch, url):
    if url is not None:
        monkeypatch.setattr(CIFAR10, "url", url)
        assert len(load(Data(name="cifar10", root=str(archive.parent))).test) == 20
    archive.unlink()
    settings = Data(name="cifar10", cache=str(tmp_path / "cache"))
    message = r"CIFAR-10 is not in .*cache/cifar10 and cannot .*: copy cifar-10-python.tar.gz there, or .*"
    with pytest.raises(ExperimentError, match=message + r"data=image_folder data.root=FOLDER\.$"):
        load(settings)
    assert list((tmp_path / "cache" / "cifar10").iterdir()) == []


def test_a_damaged_archive_is_named_and_a_damaged_download_is_not_kept(tmp_path, archive):
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(ExperimentError, match=r"tar.gz is not the official archive \(its checksum differs\): delete"):
        load(Data(name="cifar10", root=str(archive.parent)))
    with pytest.raises(ExperimentError, match=r"cannot be downloaded from .* \(File not found or corrupted"):
        load(Data(name="cifar10", root=str(tmp_path / "new")))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("file", ["data_batch_2", "batches.meta"])
def test_damaged_cifar10_files_are_named(archive, file):
    settings = Data(name="cifar10", root=str(archive.parent))
    load(settings)
    (archive.parent / CIFAR10.base_folder / file).write_bytes(b"damaged")
    with pytest.raises(ExperimentError, match=r"cifar-10-batches-py is incomplete or damaged: delete it"):
        load(settings)


# Configuration


def test_every_source_has_a_configuration_that_fits_the_schema_and_says_what_differs():
    defaults = {field.name: field.default for field in fields(Data)}
    files = sorted(CONFIGS.glob("*.yaml"))
    assert [file.stem for file in files] == ["cifar10", "digits", "image_folder", "imagenet", "torchvision"]
    for file in files:
        assert file.read_text().startswith("# ")
        changes = OmegaConf.load(file)
        merged = OmegaConf.merge(OmegaConf.structured(Data), changes)  # a key that is not in the schema raises
        assert merged.name == file.stem
        assert [key for key in changes if key != "name" and changes[key] == defaults[key]] == []
