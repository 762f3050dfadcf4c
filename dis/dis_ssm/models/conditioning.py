"""Time and condition as vectors for the model.

Letters: B batch, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_ssm.condition import Condition, Conditioning
from dis_ssm.models.mixer import dtype_of


def timestep_features(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features `[cos(t w) | sin(t w)]`, w_i = 10000^(-i / (dim / 2)).

    Computed in float32 or wider, whatever `dtype` is asked for.

    Args:
        t: (B,) integer or float.
        dim: how many features; the last of an odd number is 0.
        dtype: of the result.

    Returns:
        (B, dim).
    """
    half, wide = dim // 2, torch.promote_types(dtype, torch.float32)
    w = torch.exp(torch.arange(half, device=t.device, dtype=wide) * (-math.log(10_000) / half))
    angles = t.to(wide)[:, None] * w
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2)).to(dtype)


class TimeEmbedding(nn.Sequential):
    """A perceptron of sinusoidal features of the time.

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.dim = dim

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (B,) -> (B, D); `dtype` is that of the features where the layers do not say one."""
        return super().forward(timestep_features(t, self.dim, dtype_of(self, dtype)))


def batch_of_times(t: Any, x: Tensor) -> Tensor:
    """A number or a tensor () for every image of x, (B,), on its device; a tensor (B,) stays."""
    t = torch.as_tensor(t, device=x.device)
    return t.expand(len(x)) if t.ndim == 0 else t


def as_tensor(y: Conditioning) -> Tensor | None:
    """The label or the vector of a `Condition` that has no other part; a tensor or None stays.

    Raises:
        ValueError: the condition has other parts, or both.
    """
    if not isinstance(y, Condition):
        return y
    parts = y.parts()
    if parts.keys() not in ({"label"}, {"vector"}):
        raise ValueError(
            f"y has {', '.join(parts)}: this model takes a label or a vector and nothing else"
        )
    return next(iter(parts.values()))


def drop_labels(y: Tensor, probability: float, null_class: int) -> Tensor:
    """Each label of y (B,) replaced by the null class with this probability."""
    dropped = torch.rand(y.shape, device=y.device, dtype=torch.float32) < probability
    return torch.where(dropped, null_class, y)
