"""Pixels as features: without a network, so the numbers are the same on every machine."""

import torch
import torch.nn.functional as F


def pixel_features(images: torch.Tensor, max_side: int = 8) -> torch.Tensor:
    """uint8 images (n, C, H, W) -> float64 (n, C*h*w), h = min(H, max_side), w = min(W, max_side).

    Values are in [0, 1], divided by sqrt(C): a grey image is as far from another whether it is
    stored as one channel or as three. Larger images are average-pooled to h x w (adaptive windows:
    output i covers the pixels floor(i H / h) .. ceil((i + 1) H / h) - 1). Distances over these
    features see coarse shape and contrast only; they rank models of one small data set and mean
    nothing across data sets.

    Raises:
        ValueError: `images` are not uint8, or not four-dimensional.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"need uint8 images (n, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    channels, height, width = images.shape[1:]
    x = images.cpu().to(torch.float64) / (torch.iinfo(torch.uint8).max * channels**0.5)
    return F.adaptive_avg_pool2d(x, (min(height, max_side), min(width, max_side))).flatten(1)
