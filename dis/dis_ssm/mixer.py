"""The bidirectional Mamba mixer: two directional scans of one projected sequence, gated and merged.

Letters: B batch, L tokens, D width, I = expand * D inner width, N = d_state, R = dt_rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan


class Direction(nn.Module):
    """The parameters of one scan direction.

    A = -exp(A_log) is float32 even in a half-precision model; the scan computes Δ.
    """

    def __init__(self, d_inner: int, d_state: int, d_conv: int, dt_rank: int):
        super().__init__()
        self.conv_weight = nn.Parameter(torch.empty(d_inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.splits = [dt_rank, d_state, d_state]

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, L, I) -> dt before bias and softplus (B, L, I), A (I, N), B and C (B, L, N)."""
        dt, B, C = self.x_proj(x).split(self.splits, dim=-1)
        A_log = self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))
        return F.linear(dt, self.dt_proj.weight), -torch.exp(A_log), B, C


class BiMamba(nn.Module):
    r"""Bidirectional selective state space ("v2" of Vision Mamba, arXiv 2401.09417; DiS §3.2).

    .. math:: x, z = in\_proj(h) \qquad out = out\_proj((scan_f(x) + scan_b(x)) · silu(z))

    where each direction convolves, projects and scans x with its own parameters.

    Args:
        d_model: D. d_state: N. expand: I / D. d_conv: width of the convolution.
    """

    def __init__(self, d_model: int, d_state: int = 16, expand: int = 2, d_conv: int = 4):
        super().__init__()
        self.d_inner = expand * d_model
        dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.forward_scan = Direction(self.d_inner, d_state, d_conv, dt_rank)
        self.backward_scan = Direction(self.d_inner, d_state, d_conv, dt_rank)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        f, b = self.forward_scan, self.backward_scan
        x, z = self.in_proj(h).chunk(2, dim=-1)
        x_f, x_b = bidirectional_causal_conv1d(
            x, f.conv_weight, b.conv_weight, f.conv_bias, b.conv_bias
        )
        dt_f, A_f, B_f, C_f = f.scan_inputs(x_f)
        dt_b, A_b, B_b, C_b = b.scan_inputs(x_b)
        y = bidirectional_selective_scan(
            x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, f.D, b.D, z,
            f.dt_proj.bias, b.dt_proj.bias,
        )  # fmt: skip
        return self.out_proj(y)
