import io
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.data.open import open_dataset

SIZE = 8


def pixels(*seed, size=(SIZE, SIZE)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def assert_holds(ds, arrays, labels):
    """Byte for byte, the (H, W, 3) arrays in this order."""
    got, got_labels = ds.batch(range(len(ds)))
    assert got_labels.tolist() == list(labels)
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), np.stack(arrays))


# --- CIFAR-10 in its own formats -------------------------------------------------------------

CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
PER_BATCH = 4


def cifar_batch(k):
    rng = np.random.default_rng(k)
    return rng.integers(0, 256, (PER_BATCH, 3072), np.uint8), [k, 9, 0, (k + 3) % 10]


def python2_pickle(data, labels):
    """What Python 2's cPickle wrote: protocol 2, byte strings, NumPy's old module names."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    shape = b"".join(b"M" + struct.pack("<H", n) for n in data.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b")
    array += b"\x87R(K\1" + shape + dtype + b"\x89T" + struct.pack("<I", data.nbytes)
    array += data.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    items = text(b"batch_label") + text(b"training batch") + text(b"data") + array
    return b"\x80\x02}(" + items + text(b"labels") + listed + b"u."


def cifar_files(form, batch_pickle=python2_pickle):
    if form == "bin":
        files = {"batches.meta.txt": ("\n".join(CIFAR_NAMES) + "\n\n").encode()}
        for k, name in enumerate(BATCHES):
            data, labels = cifar_batch(k)
            files[f"{name}.bin"] = np.c_[np.uint8(labels), data].tobytes()
    else:
        meta = {"num_cases_per_batch": PER_BATCH, "label_names": CIFAR_NAMES, "num_vis": 3072}
        files = {"batches.meta": pickle.dumps(meta, 2)}
        files |= {name: batch_pickle(*cifar_batch(k)) for k, name in enumerate(BATCHES)}
    return files


def write_cifar(folder, form, packed, files=None):
    files = files or cifar_files(form)
    inner = folder / f"cifar-10-batches-{form}"
    if not packed:
        inner.mkdir(parents=True)
        for name, content in files.items():
            (inner / name).write_bytes(content)
        return inner
    path = folder / f"cifar-10-{'binary' if form == 'bin' else 'python'}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{inner.name}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize("form", ["bin", "py"])
def test_cifar10_is_read_byte_for_byte(tmp_path, form, packed):
    path = write_cifar(tmp_path, form, packed)
    for source in (path, tmp_path):
        for split, ks in (("train", range(5)), ("heldout", [5])):
            ds = open_dataset(source, split)
            assert ds.class_names == tuple(CIFAR_NAMES)
            images, labels = ds.batch(range(len(ds)))
            assert images.shape == (PER_BATCH * len(ks), 3, 32, 32)
            assert images.numpy().tobytes() == b"".join(cifar_batch(k)[0].tobytes() for k in ks)
            assert labels.tolist() == [y for k in ks for y in cifar_batch(k)[1]]
    assert len(list(tmp_path.iterdir())) == 1  # nothing unpacked
    assert len(open_dataset(path, image_size=32)) == 5 * PER_BATCH
    with pytest.raises(ValueError, match="32x32 and are not resized"):
        open_dataset(path, image_size=64)


def test_cifar10_pickled_by_todays_python(tmp_path):
    def batch(data, labels):
        return pickle.dumps({"data": data, "labels": labels}, 2)

    path = write_cifar(tmp_path, "py", False, cifar_files("py", batch))
    images = open_dataset(path).images.numpy()
    assert images.tobytes() == b"".join(cifar_batch(k)[0].tobytes() for k in range(5))


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize(
    "function", [os.system, eval, getattr, np.load, np.frombuffer], ids=lambda f: f.__name__
)
def test_a_pickle_that_would_run_something_is_refused(tmp_path, where, function):
    trap = tmp_path / "trap"
    evil = Evil(function, f"touch {trap}" if function is os.system else f"open({str(trap)!r}, 'w')")
    files = cifar_files("py")
    files[where] = pickle.dumps({"labels": [0], "label_names": ["a"], "data": evil}, 2)
    path = write_cifar(tmp_path, "py", False, files)
    with pytest.raises(ValueError, match=rf"{where}.*would run \w+.*\.{function.__name__}"):
        open_dataset(path)
    assert not trap.exists()


@pytest.mark.parametrize("form", ["bin", "py"])
def test_cifar10_archive_cut_anywhere(tmp_path, form):
    path = write_cifar(tmp_path, form, True)
    whole = path.read_bytes()
    for cut in [0, 5, 30, *range(200, len(whole), len(whole) // 12), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"tar\.gz (is not a whole archive|lacks)"):
            open_dataset(path)
    broken = bytearray(whole)
    broken[-6] ^= 1  # gzip's checksum
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="is not a whole archive"):
        open_dataset(path)


def test_cifar10_errors(tmp_path):
    files = cifar_files("bin")
    path = write_cifar(tmp_path, "bin", False, files)

    def check(name, content, message):
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_dataset(path)
        (path / name).write_bytes(files[name])

    name, record = "data_batch_2.bin", 3073
    check(name, files[name][:-1], r"data_batch_2\.bin: 12291 bytes are not whole records of 3073")
    check(name, files[name][:-record], r"data_batch_2\.bin is cut short, 3 of 4 images")
    check(name, b"\x0c" + files[name][1:], "label 12 but there are 10 classes")
    check("batches.meta.txt", b"\n", "names no classes")
    (path / name).unlink()
    with pytest.raises(ValueError, match=r"lacks CIFAR-10's data_batch_2\.bin: get the archive"):
        open_dataset(path)
    assert len(open_dataset(path, "heldout")) == PER_BATCH
    for wrong in ({"labels": [1]}, {"data": [1], "labels": [1]}, [1], {"label_names": 7}):
        name = "batches.meta" if "label_names" in wrong else "test_batch"
        files = cifar_files("py") | {name: pickle.dumps(wrong, 2)}
        path = write_cifar(tmp_path / repr(wrong), "py", False, files)
        with pytest.raises(ValueError, match=rf"{name} (holds|names) no"):
            open_dataset(path, "heldout")
    foreign = tmp_path / "photos.tar.gz"
    with tarfile.open(foreign, "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"photos\.tar\.gz lacks CIFAR-10's data_batch_1,"):
        open_dataset(foreign)


# --- zip files -------------------------------------------------------------------------------


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, str) else bytes(content))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("around", ["", "pets/"])
def test_zip_of_class_folders_is_read_like_the_folder(tmp_path, around, method):
    arrays = {f"{c}/{k}.png": pixels(k, len(c)) for c in ("dog", "cat-2", "cat") for k in range(3)}
    arrays |= {"cat/deep/er/a.PNG": pixels(7), "cat/deep-1.png": pixels(8)}
    junk = {f"__MACOSX/{around}cat/._0.png": b"", f"{around}.DS_Store": b"", "LIESMICH.txt": b"x"}
    files = {around + name: png(array) for name, array in arrays.items()}
    path = write_zip(tmp_path / "images.zip", junk | {f"{around}dog/": b""} | files, method)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked", [name for name in files])
    in_zip = open_dataset(path, image_size=SIZE)
    in_folder = open_dataset(tmp_path / "unpacked" / around, image_size=SIZE)
    assert in_zip.class_names == in_folder.class_names == ("cat", "cat-2", "dog")
    order = [f"cat/{k}.png" for k in range(3)] + ["cat/deep/er/a.PNG", "cat/deep-1.png"]
    order += [f"{c}/{k}.png" for c in ("cat-2", "dog") for k in range(3)]
    for ds in (in_zip, in_folder):
        assert_holds(ds, [arrays[name] for name in order], [0] * 5 + [1] * 3 + [2] * 3)
    assert [in_zip.files.title(i) for i in (3, 9)] == [f"{path}: {order[i]}" for i in (3, 9)]


def test_zip_splits_and_unlabelled(tmp_path):
    files = {f"{s}/{c}/0.png": png(pixels(ord(c))) for s in ("train", "heldout") for c in "ab"}
    path = write_zip(tmp_path / "s.zip", files)
    heldout = open_dataset(str(path), "heldout", SIZE)
    assert heldout.class_names == ("a", "b")
    assert_holds(heldout, [pixels(ord("a")), pixels(ord("b"))], [0, 1])
    write_zip(path, {"train/a/0.png": b"", "other/0.png": b""})
    with pytest.raises(ValueError, match="'train' but not both"):
        open_dataset(path, image_size=SIZE)
    write_zip(path, {"faces/1.png": png(pixels(1)), "faces/0.png": png(pixels(0))})
    faces = open_dataset(path, image_size=SIZE)
    assert faces.num_classes == 0
    assert_holds(faces, [pixels(0), pixels(1)], [-1, -1])
    with pytest.raises(ValueError, match="no held-out images"):
        open_dataset(path, "heldout", SIZE)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_labels_of_stylegan_and_edm(tmp_path, packed):
    """dataset.json decides, and the folders, which only bundle images, do not."""
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]

    def write(labels):
        files = {name: png(pixels(k)) for k, name in enumerate(names)}
        files["dataset.json"] = json.dumps({"labels": labels}).encode()
        if packed:
            return write_zip(tmp_path / "edm.zip", files, zipfile.ZIP_STORED)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path

    path = write([[names[2], 1], [names[0], 4], [names[1], 0]])
    ds = open_dataset(path, image_size=SIZE)
    assert ds.class_names == tuple("01234")
    assert_holds(ds, [pixels(k) for k in range(3)], [4, 0, 1])
    assert_holds(open_dataset(write(None), "train", SIZE), [pixels(k) for k in range(3)], [-1] * 3)
    for labels, message in (
        ([[names[0], 0], [names[2], 0]], f"no label of {names[1]}"),
        ([[name, 0.5] for name in names], "label 0.5 of 00000/img00000000.png is not a class"),
        ([[name, -1] for name in names], "label -1 of"),
        ([names], r"is not .*labels"),
        ("no pairs", r"is not .*labels"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(write(labels), image_size=SIZE)


def test_zip_errors(tmp_path):
    files = {f"a/{k}.png": png(pixels(k)) for k in range(4)}
    path = write_zip(tmp_path / "x.zip", files)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.zip is not a whole zip file \(get it again\): "):
            open_dataset(path, image_size=SIZE)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"x\.zip is a file of images: say image_size"):
        open_dataset(path)
    write_zip(path, {"readme.txt": b"hello"})
    with pytest.raises(ValueError, match="is empty"):
        open_dataset(path, image_size=SIZE)
    write_zip(path, files, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match=r"a/0\.png is encrypted or compressed by method 14"):
        open_dataset(path, image_size=SIZE)
    write_zip(path, {"a/0.png": b"x", "b/": b""})
    with pytest.raises(ValueError, match="b is empty: fill it or remove it"):
        open_dataset(path, image_size=SIZE)


def test_a_damaged_member_is_a_corrupt_image(tmp_path):
    files = {f"{k}.png": png(pixels(k)) for k in range(3)}
    path = write_zip(tmp_path / "x.zip", files, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(files["1.png"]) + 60] ^= 255
    path.write_bytes(raw)
    ds = open_dataset(path, image_size=SIZE)
    with pytest.warns(UserWarning, match=r"x\.zip: 1\.png: its bytes do not have the checksum"):
        assert_holds(ds, [pixels(0), pixels(2), pixels(2)], [-1] * 3)


# --- Hugging Face data sets ------------------------------------------------------------------


def hf_dataset(ks, names=("cat", "dog", "eel"), image="image", label="label"):
    import datasets

    columns = {
        image: [{"bytes": png(pixels(k)), "path": f"{k}.png"} for k in ks],
        "caption": [f"picture {k}" for k in ks],
        label: [k % 3 for k in ks],
    }
    types = [datasets.Image(), datasets.Value("string"), datasets.ClassLabel(names=list(names))]
    return datasets.Dataset.from_dict(
        columns, datasets.Features(dict(zip(columns, types, strict=True)))
    )


@pytest.fixture
def offline(tmp_path_factory, monkeypatch):
    """Whatever is opened, nothing is fetched and nothing is put in a cache."""
    pytest.importorskip("datasets")
    import datasets.config

    cache = tmp_path_factory.mktemp("cache")
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache / name)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects somewhere"))
    yield
    assert not list(cache.iterdir())


def write_parquet(folder, ks, shards, split="train", **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    ds = hf_dataset(ks, **kwargs)
    for s in range(shards):
        part = ds.shard(shards, s, contiguous=True)
        part.to_parquet(folder / f"{split}-{s:05d}-of-{shards:05d}.parquet", batch_size=3)


@pytest.mark.parametrize("inner", ["data", ""])
def test_parquet_repository(tmp_path, inner, offline):
    write_parquet(tmp_path / inner, range(11), 2)
    write_parquet(tmp_path / inner, [20, 22], 1, "test")
    (tmp_path / "README.md").write_text("---\n---")
    before = sorted(tmp_path.rglob("*"))
    ds = open_dataset(tmp_path, image_size=SIZE, workers=3)
    assert ds.class_names == ("cat", "dog", "eel")
    assert_holds(ds, [pixels(k) for k in range(11)], [k % 3 for k in range(11)])
    for i in (10, 0, 6, 5, 3, 10, 7):  # out of order: other row groups
        assert np.array_equal(ds[i][0].transpose(1, 2, 0), pixels(i))
    assert ds.files.title(7) == f"{tmp_path / inner}/train-00001-of-00002.parquet, row 1"
    heldout = open_dataset(tmp_path, "heldout", SIZE)
    assert_holds(heldout, [pixels(20), pixels(22)], [2, 1])
    write_parquet(tmp_path / inner, [1], 1, "validation")
    assert len(open_dataset(tmp_path, "heldout", SIZE)) == 1  # before test
    assert sorted(tmp_path.rglob("*")) == sorted(
        [*before, tmp_path / inner / "validation-00000-of-00001.parquet"]
    )


def test_parquet_of_other_writers(tmp_path, offline):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"img": [png(pixels(k)) for k in range(4)], "label": [3, 0, 1, 0]}
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    for source in (tmp_path / "all.parquet", tmp_path):
        ds = open_dataset(source, image_size=SIZE)
        assert ds.class_names == tuple("0123")
        assert_holds(ds, [pixels(k) for k in range(4)], [3, 0, 1, 0])
        with pytest.raises(ValueError, match=r"no validation or test split.* only train"):
            open_dataset(source, "heldout", SIZE)
    del table["label"]
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    assert_holds(open_dataset(tmp_path, "train", SIZE), [pixels(k) for k in range(4)], [-1] * 4)
    for split, labels in (("train", [0, 5]), ("validation", [1, 0])):
        (tmp_path / "p" / split).mkdir(parents=True)
        table = {"image": [png(pixels(k)) for k in labels], "label": labels}
        pq.write_table(pa.table(table), tmp_path / "p" / split / "0000.parquet")
    heldout = open_dataset(tmp_path / "p", "heldout", SIZE)
    assert heldout.num_classes == 6  # those of every split
    assert_holds(heldout, [pixels(1), pixels(0)], [1, 0])


def test_parquet_errors(tmp_path, offline):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, path = [png(pixels(0))] * 2, tmp_path / "train.parquet"
    for table, message in (
        ({"text": ["a", "b"]}, r"has the columns \['text'\]: one of them must be 'image'"),
        ({"x": image, "y": image}, r"columns \['x', 'y'\]: one of them must be 'image'"),
        ({"image": image, "label": ["a", "b"]}, "label column holds string"),
        ({"image": image, "label": [0, None]}, "with 1 empty rows"),
        ({"image": image, "label": [0, -1]}, "label -1 but there are 1 classes"),
        ({"image": pa.array([], pa.binary())}, "holds no images"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path, image_size=SIZE)
    pq.write_table(pa.table({"image": [image[0], None]}), path)
    with pytest.warns(UserWarning, match=r"train\.parquet, row 1: the row holds no bytes"):
        assert open_dataset(path, image_size=SIZE).read([1, 0])[2].tolist() == [0]
    with pytest.raises(ValueError, match=r"train\.parquet is a file of images: say image_size"):
        open_dataset(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"train\.parquet is not a whole Parquet file"):
        open_dataset(tmp_path, image_size=SIZE)
    path.unlink()
    write_parquet(tmp_path / "data", range(4), 2)
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"data lacks train-00000-of-00002\.parquet: get 1 files"):
        open_dataset(tmp_path, image_size=SIZE)
    with pytest.raises(ValueError, match="no validation or test split for 'heldout', only train"):
        open_dataset(tmp_path, "heldout", image_size=SIZE)
    write_parquet(tmp_path / "data", range(2), 1, "extra")
    with pytest.raises(ValueError, match=r"extra-00000-of-00001\.parquet is of no split"):
        open_dataset(tmp_path, image_size=SIZE)
    hf_dataset(range(2)).rename_column("label", "fine").add_column("coarse", [0, 1]).to_parquet(
        tmp_path / "one.parquet"
    )
    assert open_dataset(tmp_path / "one.parquet", image_size=SIZE).labels.tolist() == [0, 1]


def test_saved_to_disk(tmp_path, offline):
    import datasets

    parts = {"train": hf_dataset(range(7), image="img"), "test": hf_dataset([9, 8])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
    train = open_dataset(tmp_path / "both", "train", SIZE)
    assert train.class_names == ("cat", "dog", "eel")
    assert_holds(train, [pixels(k) for k in range(7)], [k % 3 for k in range(7)])
    assert_holds(open_dataset(tmp_path / "both", "heldout", SIZE), [pixels(9), pixels(8)], [0, 2])
    parts["train"].select([5, 3]).save_to_disk(tmp_path / "one")
    assert_holds(open_dataset(tmp_path / "one", "train", SIZE), [pixels(5), pixels(3)], [2, 0])
    with pytest.raises(ValueError, match="no validation or test split for 'heldout', only train"):
        open_dataset(tmp_path / "one", "heldout", SIZE)
    with pytest.raises(ValueError, match="is a folder of images: say image_size"):
        open_dataset(tmp_path / "one")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="one is not a whole save_to_disk folder"):
        open_dataset(tmp_path / "one", image_size=SIZE)


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_a_missing_library_names_the_extra(tmp_path, offline, monkeypatch, missing):
    if missing == "pyarrow":
        write_parquet(tmp_path, range(2), 1)
    else:
        hf_dataset(range(2)).save_to_disk(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"need {missing}: pip install '\.\[data\]'"):
        open_dataset(tmp_path, image_size=SIZE)


# --- CelebA ----------------------------------------------------------------------------------


def write_celeba(folder, parts, images="img_align_celeba", listed="list_eval_partition.txt"):
    (folder / images).mkdir(parents=True)
    (folder / listed).parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{k:06d}.png {part}" for k, part in enumerate(parts, 1)]
    (folder / listed).write_text("\n".join(lines) + "\n")
    for k in range(1, len(parts) + 1):
        array = pixels(k, size=(218, 178))
        (folder / images / f"{k:06d}.png").write_bytes(png(array))


@pytest.mark.parametrize(
    "layout",
    [{}, {"listed": "Eval/list_eval_partition.txt", "images": "Img/img_align_celeba"},
     {"listed": "Anno/list_eval_partition.txt"}],
)  # fmt: skip
def test_celeba_splits_and_box(tmp_path, layout):
    write_celeba(tmp_path, [0, 1, 2, 0, 1], **layout)
    for split, ks in (("train", [1, 4]), ("heldout", [2, 5])):
        ds = open_dataset(tmp_path, split, 128)  # the box itself: no resampling
        assert ds.num_classes == 0 and ds.crop == "celeba"
        boxes = [pixels(k, size=(218, 178))[121 - 64 : 121 + 64, 89 - 64 : 89 + 64] for k in ks]
        assert_holds(ds, boxes, [-1, -1])


def test_celeba_is_shrunk_by_an_antialiased_triangle(tmp_path):
    write_celeba(tmp_path, [0])
    box = pixels(1, size=(218, 178))[57:185, 25:153].astype(np.float64)
    centres, places = 2 * np.arange(64) + 1, np.arange(128) + 0.5
    weights = np.clip(1 - np.abs(places - centres[:, None]) / 2, 0, None)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ij,jkc,lk->ilc", weights, box, weights)
    got = open_dataset(tmp_path, image_size=64)[0][0].transpose(1, 2, 0)
    assert np.abs(got - expected).max() <= 1.01  # rounding of two 8-bit passes


def test_celeba_errors(tmp_path):
    write_celeba(tmp_path, [0, 0, 2])
    listed = tmp_path / "list_eval_partition.txt"
    with pytest.raises(ValueError, match="lists no images of partition 1"):
        open_dataset(tmp_path, "heldout", 64)
    with pytest.raises(ValueError, match="is a folder of images: say image_size"):
        open_dataset(tmp_path)
    (tmp_path / "img_align_celeba" / "000002.png").write_bytes(png(pixels(0)))
    with pytest.warns(UserWarning, match=r"000002\.png: 8 x 8 is not the size of CelebA's aligned"):
        assert open_dataset(tmp_path, image_size=64).read([0, 1])[2].tolist() == [0]
    (tmp_path / "img_align_celeba" / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 images, 000001\.png the first"):
        open_dataset(tmp_path, image_size=64)
    listed.write_text("000001.png 0\n000002.png 7\n")
    with pytest.raises(ValueError, match=r"partition\.txt, line 2: '000002\.png 7'"):
        open_dataset(tmp_path, image_size=64)
    listed.unlink()
    with pytest.raises(ValueError, match=r"but not CelebA's list_eval_partition\.txt"):
        open_dataset(tmp_path, image_size=64)


# --- what a stranger gives -------------------------------------------------------------------


def test_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="is empty: no class folders and no images"):
        open_dataset(tmp_path, image_size=SIZE)
    with pytest.raises(ValueError, match=r"notes\.txt is no data source: .*\.zip, \.parquet"):
        open_dataset(tmp_path / "notes.txt", image_size=SIZE)
    with pytest.raises(ValueError, match=r"unknown data source '.*gone\.zip': there are"):
        open_dataset(tmp_path / "gone.zip", image_size=SIZE)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"class folder .*sub is empty"):
        open_dataset(tmp_path, image_size=SIZE)
    (tmp_path / "fake.zip").write_text("hello")
    (tmp_path / "fake.tar.gz").write_text("hello")
    (tmp_path / "fake.parquet").write_text("hello")
    for name in ("fake.zip", "fake.tar.gz", "fake.parquet"):
        with pytest.raises(ValueError, match=rf"{name} is not a whole"):
            open_dataset(tmp_path / name, image_size=SIZE)


# --- threads and processes -------------------------------------------------------------------


def checksum(ds, seed):
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(seed))
    images, _ = ds.batch(order)
    return [(int(i), image.long().sum().item()) for i, image in zip(order, images, strict=True)]


def put_checksum(queue, ds, seed):
    queue.put(checksum(ds, seed))


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet", "arrow"])
def test_same_images_in_every_thread_and_process(tmp_path, kind, request):
    if kind in ("parquet", "arrow"):
        request.getfixturevalue("offline")
    n = 24
    expected = {k: int(pixels(k).astype(int).sum()) for k in range(n)}
    path = tmp_path / "images"
    if kind == "parquet":
        write_parquet(path, range(n), 2)
    elif kind == "arrow":
        hf_dataset(range(n)).save_to_disk(path, num_shards=2)
    else:
        files = {f"{k:02d}.png": png(pixels(k)) for k in range(n)}
        path.mkdir()
        if kind == "zip":
            path = write_zip(path / "x.zip", files)
        for name, content in files.items() if kind == "folder" else ():
            (path / name).write_bytes(content)
    ds = open_dataset(path, image_size=SIZE, workers=4)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda seed: checksum(ds, seed), range(12)):
            assert dict(result) == expected and len(result) == n
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=put_checksum, args=(queue, ds, 5))
    child.start()
    assert dict(checksum(ds, 6)) == expected  # while the child reads
    assert dict(queue.get(timeout=60)) == expected
    child.join()
    assert dict(checksum(pickle.loads(pickle.dumps(ds)), 1)) == expected


def test_a_fresh_process_opens_what_it_is_handed(tmp_path):
    """As torch's DataLoader does where processes are spawned."""
    path = write_zip(tmp_path / "x.zip", {f"{k}.png": png(pixels(k)) for k in range(5)})
    ds = open_dataset(path, image_size=SIZE, workers=2)
    before = ds.batch(range(5))[0]  # with threads and handles alive
    (tmp_path / "ds").write_bytes(pickle.dumps(ds))
    code = "import pickle, sys; ds = pickle.load(open(sys.argv[1], 'rb')); "
    code += "sys.stdout.buffer.write(ds.batch(range(5))[0].numpy().tobytes())"
    command = [sys.executable, "-c", code, str(tmp_path / "ds")]
    got = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert got == before.numpy().tobytes()
