"""Gaussian likelihoods, and the variational bound made of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VariationalBound:
    """-log p(x0) ≤ total = prior + Σ_t L_{t-1} + decoder, in bits per dimension, one row per image.

    `timesteps` (n, B) are the t ≥ 1 that were evaluated and `terms` (n, B) their L_{t-1}.
    `standard_error` (B,) is that of Σ_t L_{t-1} under the choice of timesteps and their noise; 0
    for the whole bound, where no timestep is chosen. The noise of L_0 is not in it.
    """

    total: Tensor
    prior: Tensor
    decoder: Tensor
    timesteps: Tensor
    terms: Tensor
    standard_error: Tensor


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, exp log_var1) ‖ N(mean2, exp log_var2)) in nats, elementwise and broadcast."""
    spread = log_var2 - log_var1 + (log_var1 - log_var2).exp() - 1
    return (spread + (mean1 - mean2).square() * (-log_var2).exp()) / 2


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass of N(mean, exp log_variance) in the bin around x, in nats, elementwise.

    The 256 bins are centred on equally spaced values from -1 to 1; the first and last reach to
    ∓∞ (Ho et al. 2020, eq. 13). Written with log Φ, so the tails do not underflow.
    """
    half = 1 / 255
    inverse_sigma = (-log_variance / 2).exp()
    centred = x - mean
    # By symmetry the bin may be put below the mean, where log Φ is accurate.
    upper = torch.special.log_ndtr((half - centred.abs()) * inverse_sigma)
    lower = torch.special.log_ndtr(-(half + centred.abs()) * inverse_sigma)
    gap = (upper - lower).clamp(min=torch.finfo(x.dtype).eps)
    inside = upper + (-torch.expm1(-gap)).log()
    # An outermost bin has all the mass up to its inner edge, the nearer or the farther of the two.
    beyond = torch.log1p(-lower.exp())
    edge = torch.where((x < 0) == (centred < 0), upper, beyond)
    return torch.where(x.abs() > 1 - half, edge, inside)


def strata(total: int, count: int) -> Tensor:
    """`count` ranges [start, end) that part 1 … total, their width growing as the rank squared."""
    rank = torch.arange(count + 1, dtype=torch.float64)
    edges = 1 + rank.long() + ((total - count) * (rank / count) ** 3).long()
    return torch.stack([edges[:-1], edges[1:]], 1)
