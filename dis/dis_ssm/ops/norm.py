"""Residual addition and RMS normalisation, as every block of a Mamba stack begins."""

from __future__ import annotations

import torch
from torch import Tensor

from dis_ssm.ops import cpu, cpu_abi, reference
from dis_ssm.ops.dispatch import no_second_derivative, refuse_batched_gradients, select


def add_rms_norm(
    h: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    r"""The residual stream and its normalised value (Zhang & Sennrich 2019, eq. 4).

    .. math:: stream = residual + h, \quad normed = stream · weight / \sqrt{mean(stream²) + eps}

    Args:
        h: (..., D). residual: like h, float32 or wider; None for zero. weight: (D,).

    Returns:
        normed, stream, both (..., D) in float32 or wider. One native pass each way on the CPU;
        plain PyTorch elsewhere, where it has a fused kernel, and in a compiled graph.

    Raises:
        ValueError: a residual of another shape.
    """
    if residual is not None and residual.shape != h.shape:
        raise ValueError(f"residual must be {tuple(h.shape)}, got {tuple(residual.shape)}")
    inputs = (h, weight) if residual is None else (h, residual, weight)
    narrow = all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in inputs)
    if narrow and not torch.compiler.is_compiling() and select(None, *inputs) == "cpu":
        normed, stream, _ = norm_op(h, residual, weight, eps)
        return normed, stream
    return reference.add_rms_norm(h, residual, weight, eps)


@torch.library.custom_op("dis_ssm::norm", mutates_args=(), device_types="cpu")
def norm_op(h: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """normed, stream and rstd (...,), float32."""
    held = [None if t is None else t.float().contiguous() for t in (h, residual, weight)]
    normed, stream = cpu.empty(h.shape), cpu.empty(h.shape)
    rstd = cpu.empty(h.shape[:-1])
    shapes = (h.shape, h.shape, h.shape[-1:])
    call = cpu_abi.Norm(rstd.numel(), h.shape[-1], eps, *map(cpu.pointer, held, shapes))
    call.stream, call.normed = cpu.pointer(stream, h.shape), cpu.pointer(normed, h.shape)
    call.rstd = cpu.pointer(rstd, h.shape[:-1])
    cpu.run("norm_forward", call)
    return [normed, stream, rstd]


@norm_op.register_fake
def _(h, residual, weight, eps):
    full = (h.new_empty(h.shape, dtype=torch.float32) for _ in range(2))
    return [*full, h.new_empty(h.shape[:-1], dtype=torch.float32)]


@torch.library.custom_op("dis_ssm::norm_backward", mutates_args=(), device_types="cpu")
def norm_backward_op(
    dnormed: Tensor, dstream: Tensor | None, stream: Tensor, rstd: Tensor, weight: Tensor
) -> list[Tensor]:
    """The gradient of h and of residual, which is the same, and that of weight; float32."""
    grads = [None if t is None else t.float().contiguous() for t in (dnormed, dstream)]
    weight = weight.float().contiguous()
    full, width = stream.shape, stream.shape[-1:]
    dx, dweight = cpu.empty(full), cpu.empty(width)
    call = cpu_abi.Norm(rstd.numel(), stream.shape[-1], weight=cpu.pointer(weight, width))
    call.stream, call.rstd = cpu.pointer(stream, full), cpu.pointer(rstd, full[:-1])
    call.dnormed, call.dstream = (cpu.pointer(grad, full) for grad in grads)
    call.dx, call.dweight = cpu.pointer(dx, full), cpu.pointer(dweight, width)
    cpu.run("norm_backward", call)
    return [dx, dweight]


@norm_backward_op.register_fake
def _(dnormed, dstream, stream, rstd, weight):
    return [torch.empty_like(stream), weight.new_empty(weight.shape, dtype=torch.float32)]


def _setup_context(ctx, inputs, output):
    h, residual, weight, _ = inputs
    _, stream, rstd = output
    ctx.dtypes = h.dtype, None if residual is None else residual.dtype, weight.dtype
    ctx.save_for_backward(stream, rstd, weight)


def _backward(ctx, grads):
    refuse_batched_gradients(*grads)
    dnormed, dstream, _ = grads
    stream, rstd, weight = ctx.saved_tensors
    dnormed = torch.zeros_like(stream) if dnormed is None else dnormed
    dx, dweight = norm_backward_op(dnormed, dstream, stream, rstd, weight)
    h, residual, kind = ctx.dtypes
    return dx.to(h), None if residual is None else dx.to(residual), dweight.to(kind), None


norm_op.register_autograd(_backward, setup_context=_setup_context)
norm_backward_op.register_autograd(no_second_derivative)
