"""Other implementations of the selective scan, on the tensors of `dis_ssm.ops.selective_scan`.

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
def _mamba_interface():
    """mamba-ssm's module of the scan without the rest of its package; None if not installed.

    Its compiled part is replaced by a stub with a `reason` where it cannot be imported.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        return None
    for name in ("mamba_ssm", "mamba_ssm.ops.triton.layer_norm"):
        stub = types.ModuleType(name)
        stub.__path__ = list(spec.submodule_search_locations)
        stub._layer_norm_fwd = None
        sys.modules.setdefault(name, stub)
    try:
        importlib.import_module("selective_scan_cuda")
    except ImportError as error:
        stub = types.ModuleType("selective_scan_cuda")
        stub.reason = str(error)
        sys.modules["selective_scan_cuda"] = stub
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface")


def mamba_reference():
    """mamba-ssm's `selective_scan_ref`; None if not installed.

    Its files suffice: MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps
    --no-build-isolation mamba-ssm
    """
    if (interface := _mamba_interface()) is None:
        return None

    def run(x, dt, A, B, C, D, z, dt_bias):
        x, dt, B, C, z = (t.mT for t in (x, dt, B, C, z))
        y = interface.selective_scan_ref(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True)
        return y.mT

    return run


REVERSED = ("dt_b", "B_b", "C_b")  # projected from the flipped sequence, so already in its order


def to_mamba(name: str, t: Tensor) -> Tensor:
    """A tensor of `bidirectional_selective_scan` as mamba-ssm's users hold it: (b, d, l)."""
    if t.ndim == 3:
        t = (t.flip(1) if name in REVERSED else t).mT.contiguous()
    return t


def mamba_bidirectional():
    """mamba-ssm's CUDA scan as bidirectional users call it, on tensors of `to_mamba`.

    x and z are flipped, each direction is gated, the second output is flipped back and added: nine
    passes over a tensor beside the scans. Vision Mamba's v2 does the same.

    To build the CUDA kernels of Mamba-1 alone, for one architecture (here sm_90), with nvcc of the
    same major version as torch's CUDA. `TORCH_CUDA_ARCH_LIST` has no effect because setup.py
    names nine architectures itself; `--no-deps` leaves out what Mamba-2 and 3 need. Releases up
    to 2.3.2.post1 build the kernels by default, later ones only with `MAMBA_KEEP_CUDA_BUILD`::

        git clone --depth 1 --branch v2.3.2.post1 https://github.com/state-spaces/mamba && cd mamba
        sed -i -E 's/compute_[0-9]+,code=sm_[0-9]+/compute_90,code=sm_90/' setup.py
        pip install setuptools wheel packaging ninja einops
        MAX_JOBS=4 MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE \
            pip install --no-build-isolation --no-deps .

    Raises:
        ImportError: not installed, or not built for this torch.
    """
    if (interface := _mamba_interface()) is None:
        raise ImportError("mamba-ssm is not installed; peers.py has a recipe")
    if reason := getattr(interface.selective_scan_cuda, "reason", None):
        raise ImportError(f"mamba-ssm's kernels cannot be imported: {reason}")

    def run(
        x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, D_f, D_b, z, dt_bias_f, dt_bias_b
    ):  # fmt: skip
        forward = x_f, dt_f, A_f, B_f, C_f, D_f, z, dt_bias_f
        backward = x_b.flip(-1), dt_b, A_b, B_b, C_b, D_b, z.flip(-1), dt_bias_b
        y_f = interface.selective_scan_fn(*forward, delta_softplus=True)
        return y_f + interface.selective_scan_fn(*backward, delta_softplus=True).flip(-1)

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
