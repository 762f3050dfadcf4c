import gzip
import hashlib
import struct
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.data.crops import center_crop
from dis_ssm.data.open import open_dataset
from dis_ssm.data.order import batch_indices, epoch_order

GOLDEN_ORDER = [3, 2, 1, 6, 0, 7, 4, 5]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def solid(path, rgb, size=(8, 8)):
    return save(path, np.full((size[1], size[0], 3), rgb))


def keys(dataset):
    images, _ = dataset.batch(range(len(dataset)))
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


# --- order -----------------------------------------------------------------------------------


def test_epoch_order_is_a_permutation_of_its_arguments_only():
    order = epoch_order(1000, seed=3, epoch=5)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(1000))
    torch.manual_seed(99)
    again = epoch_order(1000, seed=3, epoch=5)
    assert torch.equal(order, again)
    again[:] = 0  # a caller's change must not reach later calls
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=5))
    for other in (epoch_order(1000, 3, 6), epoch_order(1000, 4, 5), epoch_order(1000, 5, 3)):
        assert (order == other).sum() < 20


def test_epoch_order_never_changes():
    """The order is part of a run's resume; these values must survive upgrades."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == GOLDEN_ORDER


def test_order_is_uniform():
    first = torch.stack([epoch_order(5, seed, 0)[0] for seed in range(500)])
    counts = torch.bincount(first, minlength=5).double()
    assert ((counts - 100) ** 2 / 100).sum() < 20  # chi-squared, 4 degrees of freedom, p = 5e-4


@pytest.mark.parametrize("n, batch_size", [(10, 4), (10, 10), (3, 8), (1, 5), (7, 1)])
def test_batches_read_the_epochs_end_to_end(n, batch_size):
    steps = 25
    got = torch.cat([batch_indices(n, batch_size, 1, step) for step in range(steps)])
    epochs = -(-len(got) // n)
    expected = torch.cat([epoch_order(n, 1, epoch) for epoch in range(epochs)])[: len(got)]
    assert len(got) == steps * batch_size and torch.equal(got, expected)
    assert torch.equal(batch_indices(n, batch_size, 1, 17), got[17 * batch_size :][:batch_size])


@pytest.mark.parametrize("args", [(0, 1, 0, 0), (5, 0, 0, 0), (5, 1, 0, -1)])
def test_batch_indices_rejects(args):
    with pytest.raises(ValueError, match="batch_size >= 1"):
        batch_indices(*args)


# --- sources in memory -----------------------------------------------------------------------


def test_digits_are_scikit_learns_in_two_disjoint_parts():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    parts = [open_dataset("digits", split) for split in ("train", "heldout")]
    assert [len(p) for p in parts] == [1195, 602]
    images = torch.cat([p.images for p in parts])
    labels = torch.cat([p.labels for p in parts])
    back = (images[:, 0].double() * 16 / 255).round().numpy()
    levels = sorted(images.unique().tolist())
    assert levels == [round(k * 255 / 16) for k in range(17)]
    mine = sorted((int(y), x.tobytes()) for x, y in zip(back, labels, strict=True))
    theirs = zip(bunch.images.astype(np.float64), bunch.target, strict=True)
    assert mine == sorted((int(y), x.tobytes()) for x, y in theirs)
    train, heldout = (torch.bincount(p.labels, minlength=10) for p in parts)
    assert torch.equal(heldout, -(-(train + heldout) // 3))  # every third of each class
    for part, keep in zip(parts, (1, 0), strict=True):
        zeros = np.flatnonzero(bunch.target == 0)
        first = np.rint(bunch.images[zeros[keep]] * 255 / 16)
        assert np.array_equal(part.batch((part.labels == 0).nonzero()[:1, 0])[0][0, 0], first)


def test_indexing_and_batches_agree():
    ds = open_dataset("digits")
    assert (ds.channels, ds.height, ds.width, ds.num_classes) == (1, 8, 8, 10)
    assert ds.class_names == tuple("0123456789")
    x, y = ds.batch(torch.tensor([5, 2, 5]))
    for k, i in enumerate((5, 2, 5)):
        image, label = ds[i]
        assert image.dtype == np.uint8 and type(label) is int
        assert np.array_equal(image, x[k].numpy()) and label == y[k]
    assert ds[-1][1] == ds[len(ds) - 1][1]
    assert y.dtype == torch.int64 and x.dtype == torch.uint8
    with pytest.raises(IndexError):
        ds[len(ds)]


def test_fashion_subset_is_balanced_and_as_published():
    sums = {
        "train": "cf313073c7eb485392848071d5c433571d7166043e971e3345b095cc30518084",
        "heldout": "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef",
    }
    seen = []
    for split, count in (("train", 600), ("heldout", 100)):
        ds = open_dataset("fashion-mnist", split)
        assert torch.bincount(ds.labels).tolist() == [count] * 10
        header = struct.pack(">4B3i", 0, 0, 8, 3, len(ds), 28, 28)
        content = header + ds.images.numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == sums[split]
        seen.append(set(keys(ds)))
    assert ds.class_names[9] == "Ankle boot" and not seen[0] & seen[1]


def test_fashion_is_found_through_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path / "fashion-mnist", "train", np.zeros((2, 4, 4)), [0, 1])
    monkeypatch.setenv("DIS_SSM_DATA", str(tmp_path))
    assert len(open_dataset("fashion-mnist")) == 2
    monkeypatch.setenv("DIS_SSM_DATA", str(tmp_path / "nowhere"))
    assert len(open_dataset("fashion-mnist")) == 6000
    elsewhere = str(tmp_path / "a" / "b" / "c" / "d.py")
    monkeypatch.setattr("dis_ssm.data.sources.arrays.__file__", elsewhere)
    with pytest.raises(ValueError, match=r"is not in .*nowhere.*set DIS_SSM_DATA"):
        open_dataset("fashion-mnist")
    monkeypatch.delenv("DIS_SSM_DATA")
    with pytest.raises(ValueError, match=r"does not come with the package: .*set DIS_SSM_DATA"):
        open_dataset("fashion-mnist")


def write_idx(folder, prefix, images, labels, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", np.array(images)), ("labels-idx1", np.array(labels))):
        raw = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
        raw += array.astype(np.uint8).tobytes()
        name = f"{prefix}-{kind}-ubyte"
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_folder(tmp_path, compress):
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    write_idx(tmp_path, "train", images, [2, 0], compress)
    ds = open_dataset(tmp_path)
    assert (ds.channels, ds.height, ds.width, ds.num_classes) == (1, 3, 4, 3)
    assert torch.equal(ds.batch([1, 0])[0][:, 0], torch.tensor(images[[1, 0]], dtype=torch.uint8))
    assert ds.batch([1, 0])[1].tolist() == [0, 2]
    with pytest.raises(ValueError, match="lacks t10k-images"):
        open_dataset(tmp_path, "heldout")


def test_idx_errors(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 4, 4)), [0, 1, 1])
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        open_dataset(tmp_path)
    write_idx(tmp_path, "train", np.zeros((2, 4, 4)), [0, 7])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="label 7 but there are 2 classes"):
        open_dataset(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-12], b"not a gzip", gzip.compress(b"\0\0\x08\x03"), gzip.compress(b"")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
            open_dataset(tmp_path)


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def two_classes(tmp_path):
    solid(tmp_path / "dog" / "1.png", (9, 8, 7))
    solid(tmp_path / "cat" / "b.png", (1, 2, 3), size=(20, 40))
    solid(tmp_path / "cat" / "deep" / "a.PNG", (4, 5, 6))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_folder_labels_are_sorted_class_names(two_classes):
    ds = open_dataset(two_classes, image_size=8)
    assert ds.class_names == ("cat", "dog") and ds.num_classes == 2
    x, y = ds.batch(range(3))
    assert x.shape == (3, 3, 8, 8) and x.is_contiguous()
    assert y.tolist() == [0, 0, 1]
    assert x[:, :, 4, 4].tolist() == [[1, 2, 3], [4, 5, 6], [9, 8, 7]]
    assert ds.batch([])[0].shape == (0, 3, 8, 8)


def test_unlabelled_folder_and_grey_images(tmp_path):
    save(tmp_path / "b.png", np.full((8, 8), 70))
    solid(tmp_path / "a.png", (1, 2, 3))
    ds = open_dataset(str(tmp_path), image_size=4)
    assert ds.num_classes == 0 and ds.batch([0, 1])[1].tolist() == [-1, -1]
    assert ds.batch([0, 1])[0][:, :, 0, 0].tolist() == [[1, 2, 3], [70, 70, 70]]


def test_folder_splits(tmp_path):
    solid(tmp_path / "train" / "a" / "0.png", (1, 1, 1))
    solid(tmp_path / "train" / "b" / "0.png", (2, 2, 2))
    with pytest.raises(ValueError, match="'train' but not both"):
        open_dataset(tmp_path, image_size=8)
    solid(tmp_path / "heldout" / "b" / "0.png", (3, 3, 3))
    train, heldout = (open_dataset(tmp_path, split, 8) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (2, 1)
    assert heldout.class_names == ("a", "b") and heldout[0][1] == 1  # the train split's labels
    solid(tmp_path / "heldout" / "c" / "0.png", (3, 3, 3))
    with pytest.raises(ValueError, match="c is not a class of the train split"):
        open_dataset(tmp_path, "heldout", 8)


def test_center_crop_of_a_known_image():
    """Rows above and below the middle square are cropped away; box halving averages blocks."""
    size = 4
    tall = np.zeros((64, 16), np.uint8)
    tall[24:40] = 200  # the middle quarter
    crop = np.asarray(center_crop(Image.fromarray(tall), size))
    assert crop.shape == (size, size) and (crop == 200).all()
    checker = np.indices((64, 64)).sum(0) % 2 * 200
    crop = np.asarray(center_crop(Image.fromarray(checker.astype(np.uint8)), 16))
    assert (crop == 100).all()
    ramp = np.tile(np.arange(0, 240, 8, dtype=np.uint8), (8, 1))  # 8 x 30, no resize
    assert np.array_equal(center_crop(Image.fromarray(ramp), 8), ramp[:, 11:19])


def test_center_crop_filter_is_bicubic_after_box():
    """Against the two filters applied by hand: 22 -> 11 (box) -> 8 (bicubic)."""
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 256, (22, 22)).astype(np.uint8))
    pixels = np.asarray(image, np.float64)
    box = np.floor(pixels.reshape(11, 2, 11, 2).mean((1, 3)) + 0.5)
    scale = 11 / 8
    offset = np.abs((np.arange(11) + 0.5)[None] - (np.arange(8) + 0.5)[:, None] * scale) / scale
    near = 1.5 * offset**3 - 2.5 * offset**2 + 1
    far = -0.5 * offset**3 + 2.5 * offset**2 - 4 * offset + 2  # Keys' cubic, a = -1/2
    kernel = np.where(offset < 1, near, np.where(offset < 2, far, 0))
    kernel /= kernel.sum(1, keepdims=True)
    expected = np.clip(kernel @ box @ kernel.T, 0, 255)
    got = np.asarray(center_crop(image, 8), np.float64)
    assert np.abs(got - expected).max() <= 1.5  # rounding of two 8-bit passes


def test_unreadable_files_are_named(tmp_path):
    good = solid(tmp_path / "a" / "0.png", (1, 2, 3), size=(64, 64))
    (tmp_path / "a" / "1.png").write_bytes(good.read_bytes()[:100])
    (tmp_path / "a" / "2.png").write_text("hello")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a" / "3.png")
    ds = open_dataset(tmp_path, image_size=8, max_corrupt=0)
    assert ds[0][0].shape == (3, 8, 8)
    for i in (1, 2, 3):
        with pytest.raises(ValueError, match=rf"cannot read image .*{i}\.png.*; replace the file"):
            ds.batch([0, i])


def ten_images(folder, broken=()):
    """Image k is solid (k, k, k), of class 0 (the first five) or 1."""
    for k in range(10):
        path = solid(folder / "ab"[k // 5] / f"{k}.png", (k, k, k))
        if k in broken:
            path.write_bytes(path.read_bytes()[:40])
    return folder


def values(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_corrupt_image_gives_way_to_the_next(tmp_path, workers):
    folder = ten_images(tmp_path, broken=(1, 4, 9))
    ds = open_dataset(folder, image_size=8, workers=workers)
    with pytest.warns(UserWarning) as seen:
        x, y = ds.batch([4, 9, 0, 1, 4, -1])
    assert values(x) == [5, 0, 0, 2, 5, 0]  # after the last comes the first
    assert y.tolist() == [1, 0, 0, 0, 1, 0]  # the label of the image that is shown
    said = [str(w.message) for w in seen]
    assert len(said) == 3 and all("of at most 10" in text for text in said)
    for text, name in zip(said, ("a/4.png", "b/9.png", "a/1.png"), strict=True):
        assert f"cannot read image {folder / name}: " in text and "skipped" in text
    assert list(ds.corrupt) == [4, 9, 1] and "9.png: " in ds.corrupt[9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is named once
        assert values(ds.batch(range(10))[0]) == [0, 2, 2, 3, 5, 5, 6, 7, 8, 0]
        x, y, kept = ds.read([4, 8, 1, 2, -2])
    assert kept.tolist() == values(x) == [8, 2, 8] and kept.dtype == torch.int64
    assert y.tolist() == [1, 0, 1] and x.shape[1:] == (3, 8, 8)
    assert [part.shape[0] for part in ds.read([1, 9])] == [0, 0, 0]
    assert ds[4][1] == 1 and ds[4][0][0, 0, 0] == 5


def test_what_replaces_a_corrupt_image_does_not_depend_on_history(tmp_path):
    folder = ten_images(tmp_path, broken=(3, 4, 5))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for order in ([3], [5, 4, 3], [9, 4, 3]):
            ds = open_dataset(folder, image_size=8)
            results.append((values(ds.batch(order)[0])[-1], sorted(ds.corrupt)))
    assert results == [(6, [3, 4, 5])] * 3


def test_too_many_corrupt_images(tmp_path):
    folder = ten_images(tmp_path, broken=(0, 2, 4))
    ds = open_dataset(folder, image_size=8, max_corrupt=2)
    with pytest.warns(UserWarning, match=r"0\.png.*1 of at most 2"):
        ds.read([0, 1])
    message = r"(?s)3 images of .* more than max_corrupt 2; replace .*0\.png.*2\.png.*4\.png"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        ds.batch(range(10))
    with pytest.raises(ValueError, match="more than max_corrupt 2"):  # and so it stays
        ds.batch([0])
    strict = open_dataset(folder, image_size=8, max_corrupt=0)
    with pytest.raises(ValueError, match=r"cannot read image .*0\.png: .*; replace the file"):
        strict.read(range(10))
    nothing = open_dataset(ten_images(tmp_path / "x", range(10)), image_size=8)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no image of .* can be"):
        nothing.batch([6])


def test_a_vanished_file_is_an_error_at_once(tmp_path):
    ds = open_dataset(ten_images(tmp_path), image_size=8)
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*3\.png: .*No such file.*; replace"):
        ds.batch(range(10))
    assert not ds.corrupt


def test_readers_in_memory_leave_nothing_out():
    ds = open_dataset("digits")
    x, y, kept = ds.read([5, 2])
    assert kept.tolist() == [5, 2] and ds.corrupt == {}
    assert all(map(torch.equal, (x, y), ds.batch([5, 2])))


def test_limits_that_are_wrong(tmp_path):
    folder = ten_images(tmp_path)
    for name, value in (("max_corrupt", -1), ("workers", 0)):
        with pytest.raises(ValueError, match=f"{name} {value} must be at least"):
            open_dataset(folder, image_size=8, **{name: value})
    with pytest.raises(IndexError):
        open_dataset(folder, image_size=8).batch([0, 10])


def test_one_pool_of_threads_serves_a_dataset(tmp_path):
    ds = open_dataset(ten_images(tmp_path), image_size=8, workers=2)
    before = threading.active_count()
    for _ in range(5):
        ds.batch(range(10))
    assert before < threading.active_count() <= before + 2


def test_a_manifest_makes_it_a_latent_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("dis_ssm.data.open.open_cache", lambda folder: ("latents of", folder))
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"split": "train", "image_size": 64}')
    assert open_dataset(str(tmp_path)) == open_dataset(tmp_path, "train", 64)
    assert open_dataset(tmp_path) == ("latents of", tmp_path)
    with pytest.raises(ValueError, match="was encoded with split 'train', not 'heldout'"):
        open_dataset(tmp_path, "heldout")
    with pytest.raises(ValueError, match="was encoded with image_size 64, not 32"):
        open_dataset(tmp_path, image_size=32)
    manifest.write_text("[")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of a latent cache"):
        open_dataset(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        open_dataset(tmp_path, image_size=8)
    with pytest.raises(ValueError, match="say image_size"):
        open_dataset(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat is empty"):
        open_dataset(tmp_path, image_size=8)
    solid(tmp_path / "cat" / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match="no held-out images"):
        open_dataset(tmp_path, "heldout", image_size=8)
    with pytest.raises(ValueError, match="image_size 0"):
        open_dataset(tmp_path, image_size=0)
    solid(tmp_path / "loose.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"loose.png lies beside class folders"):
        open_dataset(tmp_path, image_size=8)


def test_names_that_are_wrong():
    with pytest.raises(ValueError, match=r"unknown data source 'digit'.*mean 'digits'"):
        open_dataset("digit")
    with pytest.raises(ValueError, match="data source '/no/such/folder': there are"):
        open_dataset("/no/such/folder")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        open_dataset("digits", "test")
    with pytest.raises(ValueError, match=r"8x8 and are not resized.*instead of 16"):
        open_dataset("digits", image_size=16)
    assert len(open_dataset("digits", image_size=8)) == 1195


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"dis-ssm\[demo\]"):
        open_dataset("digits")


def test_images_are_stored_mirrored_where_asked_and_need_no_noise():
    dataset = open_dataset("digits")
    indices, flips = torch.tensor([5, 0, 5]), torch.tensor([False, True, True])
    data, labels = dataset.stored(indices, flips)
    plain, wanted = dataset.batch(indices)
    assert torch.equal(labels, wanted) and data.dtype == torch.uint8
    assert torch.equal(data, torch.stack([plain[0], plain[1].flip(-1), plain[2].flip(-1)]))
    x = dataset.to_model_space(data, draw=lambda: pytest.fail("images need no noise"))
    assert not dataset.latents and torch.equal(x, data.float() / 127.5 - 1)
