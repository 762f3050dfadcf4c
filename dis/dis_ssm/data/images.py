"""Between pictures, uint8 (n, C, H, W), and model space, float32 in [-1, 1]."""

import torch
from torch import Tensor

HALF_RANGE = 127.5  # of uint8
VISIBLE_CHANNELS = (1, 3)  # grey, RGB


def to_model_space(images: Tensor) -> Tensor:
    """uint8 -> float32, x / 127.5 - 1."""
    return images.float() / HALF_RANGE - 1


def to_uint8(x: Tensor) -> Tensor:
    """Inverse of `to_model_space`, rounded to nearest and clipped; black where not a number."""
    return ((x.nan_to_num(-1) + 1) * HALF_RANGE).round().clamp(0, 2 * HALF_RANGE).to(torch.uint8)
