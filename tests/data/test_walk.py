"""One walk over folders and zip files, for training and evaluation alike."""

import contextlib
import os
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

from dis_ssm.data.open import open_dataset
from dis_ssm.metrics.readers import open_images

SIZE = 8


def solid(path, value, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((SIZE, SIZE, 3), value, np.uint8)
    Image.fromarray(array).save(path, kind)
    return path


def values(source):
    """The grey levels that training and evaluation read from a source, which are the same."""
    messy = source.name.startswith("messy")
    with pytest.warns(UserWarning, match="left out") if messy else contextlib.nullcontext():
        dataset, images = open_dataset(source, image_size=SIZE), open_images(source)
    trained = dataset.batch(range(len(dataset)))[0][:, 0, 0, 0].tolist()
    scored = images.read(0, len(images))[:, 0, 0, 0].tolist()
    assert trained == scored
    return trained


JUNK = (
    "a/._0.png", "._x.png", ".DS_Store", "a/.ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/a/._0.png", "a/__MACOSX/0.png", "a/@eaDir/0.png", "a/Thumbs.db", "@eaDir/x.png",
)  # fmt: skip


def test_what_systems_add_is_left_out_at_every_depth_and_said(tmp_path):
    folder = tmp_path / "messy"
    for k, name in enumerate(("a/0.png", "a/deep/1.png", "b/2.png")):
        solid(folder / name, k)
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"junk")
    (folder / "a" / "notes.txt").write_text("not an image")
    packed = tmp_path / "messy.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    for source in (folder, packed):
        assert values(source) == [0, 1, 2]
        for opened in (lambda s: open_dataset(s, image_size=SIZE), open_images):
            with pytest.warns(UserWarning) as seen:
                opened(source)
            (text,) = [str(w.message) for w in seen if w.category is UserWarning]
            assert text.startswith(f"{source}: left out ")
            assert "1 that are no images (a/notes.txt)" in text and "\n" not in text
            assert "hidden or of the system (" in text and "@eaDir" in text
    with pytest.warns(UserWarning):
        assert open_dataset(folder, image_size=SIZE).class_names == ("a", "b")


def test_the_first_names_stand_for_many(tmp_path):
    solid(tmp_path / "x.png", 1)
    for k in range(12):
        (tmp_path / f"{k:02d}.txt").write_text("caption")
    with pytest.warns(
        UserWarning, match=r"12 that are no images \(00\.txt, 01\.txt, 02\.txt, \.\.\.\)$"
    ):
        open_images(tmp_path)


def test_links_are_followed_and_cycles_end(tmp_path):
    outside = tmp_path / "outside"
    for k in range(4):
        solid(outside / "inner" / f"{k}.png", 10 + k)
    folder = tmp_path / "messy"
    solid(folder / "a" / "0.png", 1)
    (folder / "b").symlink_to(outside)  # a class folder
    (folder / "a" / "more").symlink_to(outside / "inner")  # a folder inside a class
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "here").symlink_to(".")
    (folder / "a" / "1.png").symlink_to(outside / "inner" / "0.png")
    assert values(folder) == [1, 10, 10, 11, 12, 13, 10, 11, 12, 13]
    with pytest.warns(UserWarning, match=r"2 links to a folder around them \(a/here/, a/up/\)"):
        dataset = open_dataset(folder, image_size=SIZE)
    assert dataset.labels.tolist() == [0] * 6 + [1] * 4


@pytest.mark.parametrize("name", ["a/gone.png", "gone", "loop"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    solid(tmp_path / "a" / "0.png", 1)
    (tmp_path / name).symlink_to(tmp_path / name if name == "loop" else "/no/such/place")
    for opened in (lambda: open_dataset(tmp_path, image_size=SIZE), lambda: open_images(tmp_path)):
        with pytest.raises(ValueError, match=rf"{name} is a link to nothing"):
            opened()


def test_suffixes_of_jpeg_and_avif_in_any_case(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.jfif", "d.Jpe"]
    for k, name in enumerate(names):
        solid(tmp_path / name, 40 * k, "jpeg")
    if ".avif" in Image.registered_extensions():
        solid(tmp_path / "e.AVIF", 160, "avif")
        names.append("e.AVIF")
    found = values(tmp_path)
    assert len(found) == len(names)
    assert all(abs(v - 40 * k) < 4 for k, v in enumerate(found))


@pytest.mark.timeout(60)
def test_only_regular_files_are_read(tmp_path):
    folder = tmp_path / "messy"
    solid(folder / "x.png", 3)
    os.mkfifo(folder / "f.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s.png"))
        (folder / "d.png").symlink_to("/dev/zero")
        assert values(folder) == [3]
        with pytest.warns(
            UserWarning, match=r"3 that are no regular files \(d\.png, f\.png, s\.png\)"
        ):
            open_images(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.parquet", "a.tar.gz"])
def test_a_source_that_is_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for opened in (
        lambda: open_dataset(tmp_path / name, image_size=SIZE),
        lambda: open_images(tmp_path / name),
    ):
        with pytest.raises(ValueError, match=rf"{name}.* is not a regular file"):
            opened()


@pytest.mark.timeout(60)
def test_labels_that_are_no_regular_file_are_not_left_out(tmp_path):
    solid(tmp_path / "x.png", 3)
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match=r"dataset\.json: it is not a regular file"):
        open_dataset(tmp_path, image_size=SIZE)


@pytest.mark.timeout(60)
def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path):
    for k in range(2):
        solid(tmp_path / f"{k}.png", k)
    dataset = open_dataset(tmp_path, image_size=SIZE)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.warns(UserWarning, match=r"0\.png: it is not a regular file"):
        assert dataset.read([0, 1])[2].tolist() == [1]


# --- zip files of other systems ----------------------------------------------------------------


def write_zip(path, names):
    """Image k of the grey level k; the names are written as they are."""
    with zipfile.ZipFile(path, "w") as archive:
        for k, name in enumerate(names):
            if name.endswith(("/", "\\")):
                content = b""
            else:
                content = solid(path.parent / "one.png", k).read_bytes()
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            archive.writestr(info, content)
    return path


def test_backslashes_in_a_zip_separate_folders(tmp_path):
    path = write_zip(tmp_path / "w.zip", ["cat\\0.png", "dog\\0.png", "cat\\in\\1.png", "cat\\"])
    dataset = open_dataset(path, image_size=SIZE)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1] and values(path) == [0, 2, 1]
    path = write_zip(tmp_path / "s.zip", ["set\\train\\a\\0.png", "set\\heldout\\a\\1.png"])
    for split, value in (("train", 0), ("heldout", 1)):
        assert open_dataset(path, split, SIZE).batch([0])[0][0, 0, 0, 0] == value
        assert open_images(path, split).read(0, 1)[0, 0, 0, 0] == value


def test_names_in_a_zip_are_only_names(tmp_path):
    names = ["/cat/0.png", "./cat/1.png", "../dog/2.png", "C:\\dog\\3.png"]
    dataset = open_dataset(write_zip(tmp_path / "n.zip", names), image_size=SIZE)
    assert dataset.class_names == ("..", "C:", "cat")
    assert sorted(values(tmp_path / "n.zip")) == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"n.zip", "one.png"}
