"""What becomes of one encoded image: its alpha, its format, and what it may cost."""

import io
import json
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dis_ssm.build import open_run
from dis_ssm.config import DataConfig, differences, from_dict, from_saved, to_dict
from dis_ssm.data.open import open_dataset
from dis_ssm.data.sources.decode import FORMATS, UnreadableImage, decode
from dis_ssm.metrics.readers import open_images
from dis_ssm.system.reading import MAX_FILE_BYTES, MAX_PIXELS

SIZE = 8
WHITE, BLACK = (255,) * 3, (0,) * 3


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(raw, background="white"):
    return np.asarray(decode(raw, background)[0])


# --- alpha ------------------------------------------------------------------------------------


def with_alpha(mode):
    """An image of `mode` whose left half is a red (or grey 76) and whose right half is clear; its
    file, the colour, and the hidden colour under the clear half."""
    if mode in ("RGB", "L"):  # a transparent colour, the tRNS chunk
        red, key = ((200, 0, 0), (0, 200, 0)) if mode == "RGB" else (76, 30)
        image = Image.new(mode, (SIZE, SIZE), red)
        image.paste(key, (SIZE // 2, 0, SIZE, SIZE))
        return encoded(image, transparency=key), red, key
    if mode == "P":
        image = Image.new("P", (SIZE, SIZE), 0)
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.paste(1, (SIZE // 2, 0, SIZE, SIZE))
        return encoded(image, transparency=bytes([255, 0])), (200, 0, 0), (0, 200, 0)
    red, key = ((200, 0, 0, 255), (0, 200, 0, 0)) if mode == "RGBA" else ((76, 255), (30, 0))
    image = Image.new(mode, (SIZE, SIZE), red)
    image.paste(key, (SIZE // 2, 0, SIZE, SIZE))
    return encoded(image), red[:-1], key[:-1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_alpha_of_every_kind_is_composed(mode):
    raw, left, hidden = with_alpha(mode)
    for background, right in (("white", WHITE), ("black", BLACK), ("drop", hidden)):
        array = rgb(raw, background)
        assert (array[:, : SIZE // 2] == left).all(), background
        assert (array[:, SIZE // 2 :] == right).all(), background
    assert decode(raw)[1] and not decode(raw, "drop")[1]


def test_partial_alpha_is_the_mean_of_image_and_background():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 4), np.uint8)
    alpha = pixels[..., 3:].astype(float) / 255
    raw = encoded(Image.fromarray(pixels))
    for background, value in (("white", 255), ("black", 0)):
        expected = alpha * pixels[..., :3] + (1 - alpha) * value
        assert np.abs(rgb(raw, background) - expected).max() <= 0.51
    assert np.array_equal(rgb(raw, "drop"), pixels[..., :3])  # as Pillow's convert("RGB")


@pytest.mark.parametrize("background", ["white", "black", "drop"])
def test_without_alpha_the_bits_are_pillows(background):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (16, 16, 4), np.uint8)
    opaque = pixels.copy()
    opaque[..., 3] = 255
    images = [Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 0])]
    files = [encoded(image, kind) for image in images for kind in ("png", "jpeg", "webp", "gif")]
    files += [encoded(Image.fromarray(pixels[..., :3]).convert("CMYK"), "jpeg")]
    files += [encoded(Image.fromarray(opaque)), encoded(images[0].quantize(16), transparency=15)]
    for raw in files:
        image, composed = decode(raw, background)
        if not composed:
            with Image.open(io.BytesIO(raw)) as expected:
                assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
    assert not any(decode(raw, background)[1] for raw in files[:-1])


@pytest.fixture
def drawings(tmp_path):
    """Three PNGs: an opaque one, and two that are clear."""
    for k, alpha in enumerate((255, 0, 0)):
        Image.new("RGBA", (SIZE, SIZE), (90, 90, 90, alpha)).save(tmp_path / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("background, level", [("white", 255), ("black", 0), ("drop", 90)])
def test_training_and_evaluation_compose_alike_and_say_so_once(drawings, background, level):
    with zipfile.ZipFile(drawings / "z.zip", "w") as archive:
        for k in range(3):
            archive.write(drawings / f"{k}.png", f"{k}.png")
    readers = {
        "training": lambda s: open_dataset(s, image_size=SIZE, background=background),
        "samples": lambda s: open_images(s, background=background),
        "reference": lambda s: open_images(s, "train", SIZE, background),
    }
    for source in (drawings / "z.zip", drawings):
        for name, opened in readers.items():
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                images = opened(source)
                for _ in range(2):
                    batch = images.read([0, 1, 2]) if name == "training" else images.read(0, 3)
            x = batch[0] if name == "training" else batch
            assert x[:, 0, 4, 4].tolist() == [90, level, level], name
            said = [str(w.message) for w in seen if "alpha" in str(w.message)]
            text = f"images with alpha are composed on {background}"
            assert len(said) == (background != "drop") and all(s.startswith(text) for s in said)
    with pytest.raises(ValueError, match="background 'pink': choose one of white, black, drop"):
        open_dataset(drawings, image_size=SIZE, background="pink")
    with pytest.raises(ValueError, match="background 'pink'"):
        open_images(drawings, background="pink")


def test_a_run_takes_its_background_from_its_config(drawings):
    values = {"model": {"name": "DiS-S/4"}, "data": {"source": str(drawings), "image_size": SIZE}}
    for given, level in ({}, 255), ({"background": "drop"}, 90):
        config = from_dict(values | {"data": values["data"] | given})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = open_run(config)[1].batch([1])[0]
        assert images.unique().tolist() == [level]
    with pytest.raises(ValueError, match=r"data\.background is 'pink': choose one of white"):
        from_dict({"data": {"background": "pink"}})


def test_a_run_of_before_there_was_a_choice_dropped_alpha():
    saved = to_dict(from_dict({}))
    del saved["data"]["background"], saved["data"]["relabel"]
    assert from_saved(saved).data == DataConfig(background="drop")
    assert differences(from_saved(saved), from_dict({})) == ["data.background: 'drop' -> 'white'"]
    assert from_saved(to_dict(from_dict({}))) == from_dict({})


# --- formats ----------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["eps", "ppm", "tga", "pcx", "sgi", "ico", "dds", "xbm", "pdf"])
def test_other_formats_are_not_tried_whatever_the_name(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("starts a program"))
    image = Image.new("1" if kind == "xbm" else "RGB", (SIZE, SIZE))
    (tmp_path / "a.png").write_bytes(EPS if kind == "eps" else encoded(image, kind))
    message = rf"a\.png: no image in a known format \({', '.join(FORMATS)}\)"
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, image_size=SIZE, max_corrupt=0).batch([0])
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_allowed_format_is_read_whatever_the_name(kind):
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    assert (
        np.abs(rgb(encoded(Image.new("RGB", (16, 16), (80,) * 3), kind)).astype(int) - 80).max() < 4
    )


# --- limits -----------------------------------------------------------------------------------


def png_header(width, height, colour=0):
    """A PNG that says its size and has few bytes."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(13_000, 13_000), (MAX_PIXELS + 1, 1), (20_000, 20_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch, size):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decodes"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(UnreadableImage, match="pixels"):
            decode(png_header(*size))


def test_nothing_is_wrong_with_a_large_photograph():
    raw = encoded(Image.new("L", (9000, 6000)))  # 54 million pixels
    assert decode(raw)[0].size == (9000, 6000)


def read_limited(expression, *sources, extra_mb=700):
    """What ValueError says for `expression` of each source, in a process that may take so much more
    memory than the imports take."""
    script = f"""
        import resource, sys, warnings
        warnings.simplefilter("ignore")
        from dis_ssm.data.open import open_dataset
        from dis_ssm.metrics.readers import open_images
        from PIL import Image
        Image.init()
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + {extra_mb} * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for source in sys.argv[1:]:
            try:
                {expression}
            except ValueError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


TRAINING = "open_dataset(source, image_size=128, max_corrupt=0, workers=1).batch([0])"
EVALUATION = "open_images(source)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_hostile_image_is_bounded(tmp_path):
    hostile = {
        "long": encoded(Image.new("L", (30_000, 1))),
        "tall": encoded(Image.new("L", (1, 30_000))),
        "bomb": encoded(Image.new("L", (13_000, 13_000)), compress_level=1),
        "alpha": png_header(13_000, 13_000, colour=6),
        "webp": webp_canvas(16_383, 16_383),
    }
    for name, raw in hostile.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(raw)
    said = read_limited(TRAINING, *(tmp_path / name for name in hostile))
    assert len(said) == len(hostile)
    assert all("a.png: " in text and "pixels" in text for text in said), said


def webp_canvas(width, height):
    """An extended WebP that says its size, without a picture."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + sizes
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("reader", [TRAINING, EVALUATION], ids=["training", "evaluation"])
def test_the_memory_of_a_hostile_member_or_file_is_bounded(tmp_path, reader):
    honest, lying = tmp_path / "honest.zip", tmp_path / "lying.zip"
    with zipfile.ZipFile(honest, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.png", "w") as member:
            for _ in range(1500):
                member.write(bytes(2**20))
    raw = bytearray(honest.read_bytes())
    place = raw.rindex(b"PK\1\2") + 24
    raw[place : place + 4] = struct.pack("<I", 1000)  # the size that the directory states
    lying.write_bytes(raw)
    (tmp_path / "sparse").mkdir()
    with (tmp_path / "sparse" / "a.png").open("wb") as file:
        file.truncate(2**40)
    said = read_limited(reader, honest, lying, tmp_path / "sparse")
    assert f"a.png: it has 1,572,864,000 bytes, more than {MAX_FILE_BYTES:,}" in said[0]
    assert "a.png: its bytes do not have the checksum" in said[1]
    assert "a.png: it has 1,099,511,627,776 bytes, more than" in said[2]


def test_a_corrupt_image_by_its_cost_is_counted_and_replaced(tmp_path):
    Image.new("L", (30_000, 1)).save(tmp_path / "0.png")
    Image.new("L", (SIZE, SIZE), 7).save(tmp_path / "1.png")
    dataset = open_dataset(tmp_path, image_size=128)
    with pytest.warns(UserWarning, match=r"0\.png: 3840000 x 128 pixels after scaling the shorter"):
        assert dataset.batch([0])[0].unique().tolist() == [7]
    assert list(dataset.corrupt) == [0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_a_damaged_image_is_corrupt_whatever_pillow_raises(kind):
    random = np.random.default_rng(5)
    whole = encoded(Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(400):
            raw = bytearray(whole[: random.integers(0, len(whole))] if k % 4 == 0 else whole)
            for place in random.integers(0, max(len(raw), 1), 3) if raw else ():
                raw[place] = random.integers(256)
            try:
                image, _ = decode(bytes(raw))
            except UnreadableImage as error:
                assert str(error)
            else:
                assert image.mode == "RGB"


def test_the_settings_that_a_report_keeps(drawings):
    images = open_images(drawings, background="black")
    assert json.loads(json.dumps(images.describe()))["background"] == "black"
    assert "background" not in open_images("digits").describe()
