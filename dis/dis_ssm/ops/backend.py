"""Which implementation runs an op: one place, no silent fallback."""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from dis_ssm.ops import native

log = logging.getLogger("dis_ssm")

BACKENDS = ("reference", "cpu", "cuda", "mamba_ssm")


def _constant(function):
    """torch.compiler.assume_constant_result without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _forced() -> str | None:
    """``$DIS_SSM_BACKEND``, for the whole process."""
    return os.environ.get("DIS_SSM_BACKEND") or None


@_constant
def _native_ready(forced: bool) -> bool:
    reason = native.why_not()
    if reason and not forced:
        _say_once(f"running the PyTorch reference on the CPU, far slower than the kernel: {reason}")
    return reason is None


@_constant
def _no_cuda_kernel() -> bool:
    _say_once("running the PyTorch reference on the GPU: this version has no fused CUDA kernel")
    return True


@functools.cache
def _say_once(message: str) -> None:
    log.warning("dis_ssm: %s", message)


def select(backend: str | None, x: Tensor, *others: Tensor | None, unsupported: str = "") -> str:
    """The backend to run: ``"reference"`` or ``"cpu"``.

    Args:
        backend: None picks the best that can run; a name forces it.
        x, others: the op's inputs; float64 is the reference's alone.
        unsupported: why this call is beyond the kernel, if it is ("width 7 > 4").

    Raises:
        ValueError: unknown backend, or one that does not take these inputs.
        BackendError: (a RuntimeError) the forced backend cannot run here; the message says why.
    """
    backend = backend or _forced()
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    double = any(t is not None and t.dtype is torch.float64 for t in (x, *others))
    if backend is None:
        if x.device.type == "cuda":
            _no_cuda_kernel()
        elif x.device.type in ("cpu", "meta") and not double and _native_ready(False):
            if not unsupported:
                return "cpu"
            if not torch.compiler.is_compiling():
                _say_once(f"running the PyTorch reference: the kernel does not do {unsupported}")
        return "reference"
    if backend == "cpu":
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"backend 'cpu' got a tensor on {x.device}; move it or use backend=None"
            )
        if double:
            raise ValueError(
                "backend 'cpu' computes in float32; use backend='reference' for float64"
            )
        if unsupported:
            raise ValueError(f"backend 'cpu': {unsupported}; use backend='reference'")
        if not _native_ready(True):
            raise native.BackendError(f"backend 'cpu' cannot run: {native.why_not()}")
    elif backend != "reference":
        raise native.BackendError(
            f"backend {backend!r} is not part of this version; use backend=None"
        )
    return backend


def backend_report() -> list[str]:
    """One line per backend: whether it runs here, and why or why not."""
    reason = native.why_not()
    if reason is None:
        threads = f"{torch.get_num_threads()} threads"
        if not native.library().dis_ssm_has_openmp():
            threads = "1 thread, the compiler has no OpenMP"
        where = native.cache_dir()
        cpu = f"native kernels, {native.instruction_set()}, {threads}, compiled into {where}"
    else:
        cpu = f"not available: {reason}"
    lines = [f"cpu: {cpu}", "reference: plain PyTorch, every device and dtype"]
    if torch.cuda.is_available():
        lines.append(
            f"cuda ({torch.cuda.get_device_name()}): runs the reference, no fused kernel yet"
        )
    if forced := _forced():
        lines.append(f"DIS_SSM_BACKEND={forced} forces this backend")
    return lines
