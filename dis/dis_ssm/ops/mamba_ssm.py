"""mamba-ssm and causal-conv1d behind this package's signatures, for comparison only.

They want (batch, channels, length) and know one direction: the reverse one is flipped in memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dis_ssm.ops import reference


@functools.cache
def why_not() -> str | None:
    """None if both packages can be imported, else the reason."""
    try:
        import causal_conv1d  # noqa: F401
        from mamba_ssm.ops import selective_scan_interface  # noqa: F401
    except Exception as error:  # builds for another torch or CUDA fail in many ways
        return f"{error} (needs mamba-ssm and causal-conv1d built for this torch)"
    return None


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse) -> Tensor:
    """mamba-ssm's `selective_scan_fn`; see `dis_ssm.ops.selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    dtype = x.dtype
    x, dt, B, C, z = (_theirs(t, dtype, reverse) for t in (x, dt, B, C, z))
    A, D, dt_bias = (None if t is None else t.float() for t in (A, D, dt_bias))
    return _ours(selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, dt_softplus), reverse)


def bidirectional_selective_scan(
    x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, D_f, D_b, z, dt_bias_f, dt_bias_b,
    dt_softplus,
) -> Tensor:  # fmt: skip
    """Two scans and their gated sum; see `dis_ssm.ops.bidirectional_selective_scan`."""
    y_f = selective_scan(x_f, dt_f, A_f, B_f, C_f, D_f, None, dt_bias_f, dt_softplus, False)
    y_b = selective_scan(x_b, dt_b, A_b, B_b, C_b, D_b, None, dt_bias_b, dt_softplus, True)
    return reference.gated_sum(y_f, y_b, z)


def causal_conv1d(x, weight, bias, activation, reverse) -> Tensor:
    """causal-conv1d's `causal_conv1d_fn`; see `dis_ssm.ops.causal_conv1d`."""
    from causal_conv1d import causal_conv1d_fn

    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    y = causal_conv1d_fn(_theirs(x, x.dtype, reverse), weight, bias, activation=activation)
    return _ours(y, reverse)


def bidirectional_causal_conv1d(
    x, weight_f, weight_b, bias_f, bias_b, activation
) -> tuple[Tensor, Tensor]:
    """Two convolutions; see `dis_ssm.ops.bidirectional_causal_conv1d`."""
    y_f = causal_conv1d(x, weight_f, bias_f, activation, False)
    return y_f, causal_conv1d(x, weight_b, bias_b, activation, True)


def _theirs(x: Tensor | None, dtype: torch.dtype, reverse: bool) -> Tensor | None:
    if x is None:
        return None
    return (x.flip(1) if reverse else x).to(dtype).mT.contiguous()


def _ours(y: Tensor, reverse: bool) -> Tensor:
    return y.mT.flip(1) if reverse else y.mT
