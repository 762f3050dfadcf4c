import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.data.open import open_dataset
from dis_ssm.metrics.readers import open_images


def pictures(n=7, height=5, width=6, channels=3, seed=0):
    shape = (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_folder(folder, arrays, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        path = folder / (names[i] if names else f"{i:05d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(path)
    return folder


def whole(images, batch=3):
    parts = [images.read(i, i + batch) for i in range(0, len(images), batch)]
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def test_every_kind_of_file_gives_the_same_bytes_in_the_same_order(tmp_path):
    arrays = pictures()
    names = ["a/2.png", "a/10.png", "b/0.png", "b/1.bmp", "b/c/0.tiff", "z.png", "zz.PNG"]
    order = np.argsort(names)  # Python's order of names
    folder = write_folder(tmp_path / "folder", arrays, names)
    (folder / ".hidden.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image either")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for name in names:
            archive.write(folder / name, f"top/{name}")
        archive.writestr("__MACOSX/top/._2.png", b"junk")
    np.savez(tmp_path / "stored.npz", arrays[order], np.arange(7))
    np.savez_compressed(tmp_path / "packed.npz", arrays[order])
    for source in ("folder", "f.zip", "stored.npz", "packed.npz"):
        images = open_images(tmp_path / source)
        assert (len(images), images.height, images.width) == (7, 5, 6)
        np.testing.assert_array_equal(whole(images), arrays[order], err_msg=source)
        back = images.read(2, 4).permute(0, 2, 3, 1).numpy()  # a stream goes back too
        np.testing.assert_array_equal(back, arrays[order][2:4], err_msg=source)
        assert images.describe()["source"] == str(tmp_path / source)


def test_grey_is_repeated(tmp_path):
    arrays = pictures(channels=1)
    np.savez(tmp_path / "grey.npz", arrays)
    for source in (tmp_path / "grey.npz", write_folder(tmp_path / "grey", arrays)):
        np.testing.assert_array_equal(whole(open_images(source)), arrays.repeat(3, axis=3))
    digits = open_dataset("digits", "heldout")
    for source in ("digits", digits):
        got = open_images(source, "heldout").read(5, 8)
        assert torch.equal(got, digits.images[5:8].expand(-1, 3, -1, -1))


def test_image_size_crops_and_scales_as_the_data_sets_do(tmp_path):
    write_folder(tmp_path, [*pictures(1, 9, 6), *pictures(1, 6, 11)])
    with pytest.raises(ValueError, match=r"00001\.png is 6x11, .*00000\.png is 9x6"):
        open_images(tmp_path).read(0, 2)
    cropped = open_images(tmp_path, image_size=6)
    expected, _ = open_dataset(tmp_path, image_size=6).batch([0, 1])
    assert torch.equal(cropped.read(0, 2), expected)


def test_empty_missing_and_unreadable(tmp_path):
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    (tmp_path / "no.zip").write_bytes(b"not a zip")
    write_folder(tmp_path / "bad", pictures(2))
    (tmp_path / "bad" / "00001.png").write_bytes(b"\x89PNG cut short")
    deep = write_folder(tmp_path / "deep", pictures(1))
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(deep / "00000.png")
    for source, message in (
        ("empty", "holds no images"),
        ("empty.zip", "holds no images"),
        ("no.zip", "no.zip is not a whole zip file"),
        ("nowhere", "unknown data source"),
        ("nowhere.npz", "nowhere.npz does not exist"),
        ("deep", "more than 8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / source)
    with pytest.raises(ValueError, match=r"cannot read image .*00001\.png"):
        open_images(tmp_path / "bad").read(0, 2)


def test_npz_of_something_else(tmp_path):
    arrays = pictures()
    (tmp_path / "0.npz").write_bytes(b"not a zip")
    np.savez(tmp_path / "1.npz", mu=np.zeros(3))
    np.savez(tmp_path / "2.npz", arrays.astype(np.float32))
    np.savez(tmp_path / "3.npz", arrays[0])
    np.savez(tmp_path / "4.npz", arrays[..., :2])
    np.savez(tmp_path / "5.npz", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "6.npz", np.asfortranarray(arrays))
    np.savez(tmp_path / "7.npz", arrays[:0])
    for i, message in enumerate(
        (
            "cut short: File is not a zip",
            r"has no images \(arr_0\), only mu",
            "arr_0 is float32",
            r"arr_0 is uint8 \(5, 6, 3\)",
            r"grey or RGB, got 7 of \(C, H, W\) \(2, 5, 6\)",
            "Python objects",
            "column by column",
            "got 0 of",
        )
    ):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / f"{i}.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_cut_short_or_altered(tmp_path, save):
    path, arrays = tmp_path / "images.npz", pictures(400)
    save(path, arrays)
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cut short"):
        open_images(path)
    raw[len(raw) // 2] ^= 0xFF  # the checksum of the archive shows it when the end is reached
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="arr_0 is damaged"):
        whole(open_images(path), batch=150)


def test_a_folder_with_splits_is_read_by_split(tmp_path):
    arrays = pictures(6)
    write_folder(tmp_path / "both" / "train", arrays[:4])
    write_folder(tmp_path / "both" / "heldout" / "a", arrays[4:])
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for path in (tmp_path / "both").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "both"))
    for source in ("both", "both.zip"):
        np.testing.assert_array_equal(whole(open_images(tmp_path / source)), arrays[:4])
        held = open_images(tmp_path / source, "heldout")
        np.testing.assert_array_equal(whole(held), arrays[4:])
    with pytest.raises(ValueError, match="no split 'heldout'"):
        open_images(tmp_path / "both" / "train", "heldout")


def test_an_image_that_cannot_be_read_is_not_replaced(tmp_path):
    folder = write_folder(tmp_path / "images", pictures(4))
    (folder / "00002.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"00002\.png"):
        whole(open_images(folder, image_size=4))


def test_archives_that_cannot_be_opened(tmp_path):
    np.savez(tmp_path / "a.npz", pictures())
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[0] = 0  # of the member's header; the directory at the end is whole
    (tmp_path / "header.npz").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "suffix.npz", "w") as archive:
        archive.writestr("arr_0", b"")
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[6] |= 1  # encrypted
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "encrypted.npz").write_bytes(raw)
    for name in ("header", "suffix", "encrypted"):
        with pytest.raises(ValueError, match=f"{name}.npz: arr_0 is damaged"):
            open_images(tmp_path / f"{name}.npz")
