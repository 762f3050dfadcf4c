"""Samples as files: grids of pictures, and the arrays that evaluators read."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dis_ssm.data.images import HALF_RANGE, VISIBLE_CHANNELS
from dis_ssm.system.files import drafted

GAP = 2  # pixels between the cells of a grid
VISIBLE = 64  # smaller images are enlarged to at least this many pixels a side
MAX_COLUMNS = 32
FORMATS = (".png", ".npz")


def label_columns(num: int, classes: list[int]) -> tuple[Tensor | None, int]:
    """int64 labels (num,) that fill a grid row by row, one class a column, and its column count.

    Without classes there are no labels and the grid is about square, as with more classes than
    `MAX_COLUMNS`.
    """
    columns = len(classes) if 0 < len(classes) <= MAX_COLUMNS else math.ceil(math.sqrt(num))
    if not classes:
        return None, columns
    return torch.tensor(classes)[torch.arange(num) % len(classes)], min(num, columns)


def make_grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """A picture of uint8 images (n, C, H, W), row by row, on white.

    Args:
        columns: images in a row.
        scale: nearest-neighbour enlargement; None enlarges to at least `VISIBLE` pixels a side.

    Raises:
        ValueError: the images are neither grey nor RGB.
    """
    n, channels, height, width = images.shape
    if channels not in VISIBLE_CHANNELS:
        raise ValueError(f"a grid shows grey or RGB images, not {channels} channels")
    scale = scale or max(1, math.ceil(VISIBLE / max(height, width)))
    height, width = height * scale, width * scale
    rows = math.ceil(n / columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    canvas = np.full(size, 2 * HALF_RANGE, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        cell = image.repeat(scale, 0).repeat(scale, 1)
        canvas[top : top + height, left : left + width] = cell
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def check_format(path: Path) -> None:
    """Raises ValueError unless `save_images` can write a file of this name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: give a name that ends in {' or '.join(FORMATS)}")


def save_images(images: Tensor, labels: Tensor | None, path: Path, columns: int = 1) -> None:
    """Write images (n, C, H, W) as a grid (.png) or as ADM's arrays (.npz).

    The arrays are arr_0, uint8 images (n, H, W, C) or float samples (n, C, H, W), and arr_1, the
    labels (n,) if there are any. The folder is made if need be; a reader sees a whole file or none.

    Raises:
        ValueError: a name that ends otherwise, or a grid of images that are neither grey nor RGB.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path) as draft:
        if path.suffix == ".npz":
            whole = images.permute(0, 2, 3, 1) if images.dtype == torch.uint8 else images
            arrays = [whole.contiguous()] + ([] if labels is None else [labels])
            np.savez_compressed(draft, *(array.numpy() for array in arrays))
        else:
            make_grid(images, columns).save(draft)
