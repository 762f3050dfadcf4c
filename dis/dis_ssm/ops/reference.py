"""Every op in plain PyTorch: on any device, in any floating dtype, with every kind of derivative.

The functions take the arguments of the public ops, which have checked them, without `backend`.
Kernels are tested against them. Letters: b batch, l length, d channels, n state, k width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """`dis_ssm.ops.selective_scan` token by token; the state is float32, or float64 if x is."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x, dt, B, C = (t.to(wide) for t in (x, dt, B, C))
        A = A.to(wide).T  # (n, d)
        if dt_bias is not None:
            dt = dt + dt_bias.to(wide)
        if dt_softplus:
            dt = F.softplus(dt)
        tokens = list(zip(dt.unbind(1), (dt * x).unbind(1), B.unbind(1), C.unbind(1), strict=True))
        h, outputs = x.new_zeros(x.shape[0], *A.shape), []  # (b, n, d)
        for dt_t, dtx_t, B_t, C_t in reversed(tokens) if reverse else tokens:
            h = torch.exp(dt_t[:, None] * A) * h + B_t[..., None] * dtx_t[:, None]
            outputs.append((C_t[:, None] @ h).squeeze(1))
        y = torch.stack(outputs[::-1] if reverse else outputs, 1) if outputs else x
        if D is not None:
            y = y + D.to(wide) * x
        if z is not None:
            y = y * F.silu(z.to(wide))
        return y.to(dtype)


def bidirectional_selective_scan(
    x_f: Tensor,
    x_b: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A_f: Tensor,
    A_b: Tensor,
    B_f: Tensor,
    B_b: Tensor,
    C_f: Tensor,
    C_b: Tensor,
    D_f: Tensor | None = None,
    D_b: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias_f: Tensor | None = None,
    dt_bias_b: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """`dis_ssm.ops.bidirectional_selective_scan` as two scans."""
    y_f = selective_scan(x_f, dt_f, A_f, B_f, C_f, D_f, None, dt_bias_f, dt_softplus, False)
    y_b = selective_scan(x_b, dt_b, A_b, B_b, C_b, D_b, None, dt_bias_b, dt_softplus, True)
    return gated_sum(y_f, y_b, z)


def gated_sum(y_f: Tensor, y_b: Tensor, z: Tensor | None) -> Tensor:
    """`(y_f + y_b) * silu(z)` in float32 or wider, returned in y_f's dtype; z None: no gate."""
    wide = torch.promote_types(y_f.dtype, torch.float32)
    y = y_f.to(wide) + y_b.to(wide)
    return (y if z is None else y * F.silu(z.to(wide))).to(y_f.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
) -> Tensor:
    """`dis_ssm.ops.causal_conv1d` with PyTorch's own convolution; any width."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, width = weight.shape
    if x.numel() == 0:
        return x * weight.sum()
    tokens = F.pad(x.to(wide).transpose(1, 2), (0, width - 1) if reverse else (width - 1, 0))
    weight = weight.to(wide).flip(1) if reverse else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    y = F.conv1d(tokens, weight[:, None], bias, groups=channels).transpose(1, 2)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def bidirectional_causal_conv1d(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None = None,
    bias_b: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """`dis_ssm.ops.bidirectional_causal_conv1d` as two convolutions."""
    y_f = causal_conv1d(x, weight_f, bias_f, activation, False)
    return y_f, causal_conv1d(x, weight_b, bias_b, activation, True)


def add_rms_norm(
    h: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`dis_ssm.ops.norm.add_rms_norm` with PyTorch's own normalisation."""
    wide = torch.promote_types(h.dtype, torch.float32)
    stream = h.to(wide) if residual is None else residual + h
    return F.rms_norm(stream, stream.shape[-1:], weight.to(stream.dtype), eps), stream
