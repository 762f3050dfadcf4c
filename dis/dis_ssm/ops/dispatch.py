"""Which implementation runs an op: one place, no silent fallback."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dis_ssm.ops import cpu, cuda, kernel_cache, mamba_ssm, reference
from dis_ssm.ops.kernel_cache import BackendError, say_once

BACKENDS = ("reference", "cpu", "cuda", "mamba_ssm")
PLAIN = {"reference": reference, "mamba_ssm": mamba_ssm}  # their functions have the ops' names


def _constant(function):
    """torch.compiler.assume_constant_result without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _forced() -> str | None:
    """`$DIS_SSM_BACKEND`, for the whole process."""
    return os.environ.get("DIS_SSM_BACKEND") or None


@_constant
def _why_not(backend: str) -> str | None:
    return {"cpu": cpu, "cuda": cuda, "mamba_ssm": mamba_ssm}[backend].why_not()


@_constant
def _ready(backend: str) -> bool:
    if reason := _why_not(backend):
        where = "CPU" if backend == "cpu" else "GPU"
        say_once(f"running the PyTorch reference, far slower than the {where} kernel: {reason}")
    return reason is None


@_constant
def _functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def _other_derivatives(tensors: tuple[Tensor | None, ...]) -> str:
    """What the kernels have no derivative for, if it is asked for."""
    if _functorch():
        return "torch.func's transforms"
    if forward_ad._current_level >= 0:
        pairs = (forward_ad.unpack_dual(t) for t in tensors if t is not None)
        if any(pair.tangent is not None for pair in pairs):
            return "forward-mode derivatives"
    return ""


def select(backend: str | None, x: Tensor, *others: Tensor | None, unsupported: str = "") -> str:
    """The backend to run, one of `BACKENDS`.

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
    unsupported = unsupported or _other_derivatives((x, *others))
    kernel = {"cpu": "cpu", "meta": "cpu", "cuda": "cuda"}.get(x.device.type)
    if backend is None:
        if not kernel or double:
            return "reference"
        if unsupported:  # before a kernel is tried out, which a transform would disturb
            if not torch.compiler.is_compiling():
                say_once(f"running the PyTorch reference: the kernel does not do {unsupported}")
            return "reference"
        return kernel if _ready(kernel) else "reference"
    if backend == "reference":
        return backend
    if backend not in (kernel, "mamba_ssm"):
        raise ValueError(
            f"backend {backend!r} got a tensor on {x.device}; move it or use backend=None"
        )
    if double:
        raise ValueError(
            f"backend {backend!r} computes in float32; use backend='reference' for float64"
        )
    if unsupported:
        raise ValueError(f"backend {backend!r}: {unsupported}; use backend='reference'")
    if reason := _why_not(backend):
        raise BackendError(f"backend {backend!r} cannot run: {reason}")
    return backend


def no_second_derivative(ctx, *grads):
    """The backward pass of a backward pass that has none: NotImplementedError with the remedy."""
    raise NotImplementedError(
        "the kernels have no second derivative: use backend='reference', "
        "or DIS_SSM_BACKEND=reference for the whole process"
    )


def refuse_batched_gradients(*grads: Tensor | None) -> None:
    """At the head of a kernel's backward, which vmap may hand several gradients at once."""
    if torch.compiler.is_compiling():
        return
    keys = [torch._C._dispatch_keys(grad) for grad in grads if grad is not None]
    if any(key.has(batched) for key in keys for batched in _BATCHED):
        raise NotImplementedError(
            "the kernels take no batched gradients (is_grads_batched, vectorize): use "
            "backend='reference', or DIS_SSM_BACKEND=reference for the whole process"
        )


_BATCHED = [torch._C._parse_dispatch_key(name) for name in ("Batched", "FuncTorchBatched")]


def forced_problem() -> str | None:
    """Why the backend that `$DIS_SSM_BACKEND` forces cannot run; None if it can, or none is."""
    forced = _forced()
    if forced in (None, "reference"):
        return None
    if forced not in BACKENDS:
        return f"unknown, choose one of {', '.join(BACKENDS)}"
    return _why_not(forced)


def check_forced() -> None:
    """ValueError or BackendError if `$DIS_SSM_BACKEND` forces what cannot run."""
    if reason := forced_problem():
        kind = BackendError if _forced() in BACKENDS else ValueError
        raise kind(f"DIS_SSM_BACKEND={_forced()} cannot run: {reason}")


def backend_report() -> list[str]:
    """What runs by default and why, then one line per backend: where it runs, or what it lacks."""
    reasons = {backend: _why_not(backend) for backend in ("cuda", "cpu", "mamba_ssm")}
    if reasons["cpu"] is None:
        threads = f"{torch.get_num_threads()} threads"
        if not cpu.library().dis_ssm_has_openmp():
            threads = "1 thread, the compiler has no OpenMP"
    lines = []
    for backend, reason in reasons.items():
        if reason:
            lines.append(f"{backend}: not available: {reason}")
        elif backend == "cpu":
            lines.append(f"cpu: native kernels, {cpu.instruction_set()}, {threads}")
        elif backend == "cuda":
            lines.append(f"cuda: fused kernels on {torch.cuda.get_device_name()}")
        else:
            lines.append("mamba_ssm: for comparison; never chosen by itself")
    lines.append("reference: plain PyTorch, every device and dtype")
    lines.append(kernel_cache.report())
    if forced := _forced():
        reason = forced_problem()
        refused = f" and cannot run: {reason}" if reason else ""
        lines.insert(0, f"DIS_SSM_BACKEND={forced} is forced{refused}")
    else:
        best = {d: d if reasons[d] is None else "reference" for d in ("cpu", "cuda")}
        gpu = f", on the GPU: {best['cuda']}" if torch.cuda.is_available() else ""
        lines.insert(0, f"runs by default on the CPU: {best['cpu']}{gpu}")
    return lines
