"""Encoded images to RGB: which formats are read, up to which size, and what becomes of alpha."""

import io
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

from dis_ssm.system.reading import MAX_PIXELS, check_size, reason

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "drop": None}


class UnreadableImage(ValueError):
    """An image is there but cannot be decoded to 8-bit RGB, or would cost too much."""


def check_background(background: str) -> None:
    """Check that `background` is a key of `BACKGROUNDS`.

    Raises:
        ValueError: it is not.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"background {background!r}: choose one of {', '.join(BACKGROUNDS)}")


def decode(raw: bytes, background: str = "white") -> tuple[Image.Image, bool]:
    """The (first) image of a file as RGB, and whether it was composed on `background`.

    An image with an alpha channel or a transparent colour, of which some pixel is not opaque, is
    composed: alpha * image + (1 - alpha) * background. "drop" leaves out alpha instead, as ADM. The
    file is tried as the `FORMATS` and nothing else.

    Raises:
        UnreadableImage: it is none, or damaged; before any pixel is decoded where there are more
            than `MAX_PIXELS` or the file has more than `MAX_FILE_BYTES`.
        MemoryError: there is not enough memory for it.
    """
    try:
        check_size(len(raw))
        with Image.open(io.BytesIO(raw), formats=_formats()) as image:
            check_pixels(*image.size)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} is more than 8 bits a channel")
            return _to_rgb(image, BACKGROUNDS[background])
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"no image in a known format ({', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged image fails in any way it likes
        raise UnreadableImage(reason(error)) from error


def check_pixels(width: int, height: int, what: str = "") -> None:
    """Check that an image has a pixel and not more than `MAX_PIXELS`; `what` ends the message.

    Raises:
        UnreadableImage: it does not.
    """
    if width * height > MAX_PIXELS or min(width, height) < 1:
        raise UnreadableImage(f"{width} x {height} pixels{what}: 1 to {MAX_PIXELS:,} can be read")


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, background: tuple[int, ...] | None) -> tuple[Image.Image, bool]:
    image.load()
    if background is not None and image.has_transparency_data:
        whole = image.convert("RGBA")
        if whole.getchannel("A").getextrema()[0] < 255:
            canvas = Image.new("RGB", whole.size, background)
            canvas.paste(whole, mask=whole)
            return canvas, True
        image = whole
    return image if image.mode == "RGB" else image.convert("RGB"), False
