"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    cfg_scale: float,
    channels: int,
    inside: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance of model outputs (Ho & Salimans 2021), out_∅ + s (out_y - out_∅).

    On the first ``channels`` of the images that are ``inside``, (B,) bool, all when None; the rest
    stays conditional, as everything does at s = 1.
    """
    if cfg_scale == 1:
        return conditional
    towards, away = conditional[:, :channels], unconditional[:, :channels]
    result = away + cfg_scale * (towards - away)
    if inside is not None:
        result = torch.where(inside.reshape(-1, *[1] * (result.ndim - 1)), result, towards)
    return torch.cat([result, conditional[:, channels:]], dim=1)


def within(t: Tensor, interval: tuple[float, float] | None) -> Tensor | None:
    """Which timesteps lie in (low, high), both included: bool like t; None without an interval."""
    return None if interval is None else (t >= interval[0]) & (t <= interval[1])
