"""Noise schedules: β_t by name."""

import math

import torch
from torch import Tensor

LINEAR_BETAS = (1e-4, 2e-2)  # at LINEAR_STEPS steps; scaled by LINEAR_STEPS / T at others
LINEAR_STEPS = 1000
COSINE_OFFSET = 0.008
MAX_BETA = 0.999


def linear_betas(num_steps: int) -> Tensor:
    """β linear from 1e-4 to 2e-2 at 1000 steps (Ho et al. 2020, §4), times 1000 / T at T steps, at
    most 0.999. Float64 (T,)."""
    scale = LINEAR_STEPS / num_steps
    first, last = (scale * beta for beta in LINEAR_BETAS)
    return torch.linspace(first, last, num_steps, dtype=torch.float64).clamp(max=MAX_BETA)


def cosine_betas(num_steps: int) -> Tensor:
    """ᾱ(u) ∝ cos²((u + 0.008) / 1.008 · π/2), u = (t + 1) / T, β at most 0.999 (Nichol & Dhariwal
    2021, eq. 17). Float64 (T,)."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = ((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
