"""Other implementations of the selective scan, on the tensors of ``dis_ssm.ops.selective_scan``.

Each takes x, dt, z (b, l, d), A (d, n), B, C (b, l, n), D, dt_bias (d,) and returns (b, l, d).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor


def lean(x, dt, A, B, C, D, z, dt_bias) -> Tensor:
    """The best loop over tokens in plain PyTorch, without autograd: state (b, n, d), in place."""
    delta = F.softplus(dt + dt_bias)
    delta_x, A = delta * x, (A * math.log2(math.e)).T.contiguous()
    h = x.new_zeros(x.shape[0], *A.shape)
    decay, y = torch.empty_like(h), torch.empty_like(x)
    for t in range(x.shape[1]):
        torch.mul(delta[:, t, None], A, out=decay).exp2_()
        h.mul_(decay).addcmul_(B[:, t, :, None], delta_x[:, t, None])
        y[:, t] = torch.bmm(C[:, t, None], h).squeeze(1)
    return y.addcmul_(x, D).mul_(F.silu(z))


def lean_training(x, dt, A, B, C, D, z, dt_bias) -> Tensor:
    """The same with autograd: `unbind` and `baddbmm`, so that the backward is linear in l."""
    delta = F.softplus(dt + dt_bias)
    A = (A * math.log2(math.e)).T
    tokens = zip(delta.unbind(1), (delta * x).unbind(1), B.unbind(1), C.unbind(1), strict=True)
    h, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for delta_t, delta_x_t, B_t, C_t in tokens:
        decay = torch.exp2(delta_t[:, None] * A)
        h = torch.baddbmm(decay * h, B_t[..., None], delta_x_t[:, None])
        outputs.append(torch.bmm(C_t[:, None], h).squeeze(1))
    return (torch.stack(outputs, 1) + D * x) * F.silu(z)


@functools.cache
def mamba_reference():
    """mamba-ssm's ``selective_scan_ref``, its compiled modules stubbed; None if not installed.

    Its files suffice: MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps
    --no-build-isolation mamba-ssm
    """
    for name in ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops.triton.layer_norm"):
        stub = types.ModuleType(name)
        if name == "mamba_ssm":
            spec = importlib.util.find_spec(name)
            if spec is None:
                return None
            stub.__path__ = list(spec.submodule_search_locations)
        stub._layer_norm_fwd = None
        sys.modules.setdefault(name, stub)
    reference = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref

    def run(x, dt, A, B, C, D, z, dt_bias):
        x, dt, B, C, z = (t.mT for t in (x, dt, B, C, z))
        return reference(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True).mT

    return run


def mambapy():
    """mambapy's parallel scan; None if not installed."""
    if importlib.util.find_spec("mambapy") is None:
        return None
    pscan = importlib.import_module("mambapy.pscan").pscan

    def run(x, dt, A, B, C, D, z, dt_bias):
        delta = F.softplus(dt + dt_bias)
        h = pscan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None])
        return ((h @ C[..., None]).squeeze(-1) + D * x) * F.silu(z)

    return run
