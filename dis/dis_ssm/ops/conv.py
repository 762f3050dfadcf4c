"""Depthwise causal convolution, channels-last, one-way and in both directions from one read."""

from __future__ import annotations

import torch
from torch import Tensor

from dis_ssm.ops import cpu, cpu_abi, cuda
from dis_ssm.ops.dispatch import PLAIN, no_second_derivative, refuse_batched_gradients, select
from dis_ssm.ops.tensors import ConvInputs, as_returned

MAX_WIDTH = 4  # of the native kernel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Each channel's own filter over the past tokens.

    .. math:: y_t = σ(bias + \sum_{k<K} weight_k x_{t-(K-1)+k}), \quad x_{<0} = 0

    With `reverse` the filter sees the future, `x_{t+(K-1)-k}`, as if the sequence were flipped.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); the kernel takes widths up to 4, the reference any.
        bias: (channels,).
        activation: "silu" or None.
        backend: as in `dis_ssm.ops.selective_scan`.

    Returns:
        (batch, length, channels) in x's dtype; sums are float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, or an unknown activation or backend.
        RuntimeError: a forced backend that cannot run here.
    """
    _check(x, activation, weight=weight, bias=bias)
    chosen = select(backend, x, weight, bias, unsupported=_limit(weight))
    if chosen in PLAIN:
        return PLAIN[chosen].causal_conv1d(x, weight, bias, activation, reverse)
    return conv_op(x, weight, bias, None, None, activation == "silu", reverse)[0]


def bidirectional_causal_conv1d(
    x: Tensor,
    weight_f: Tensor,
    weight_b: Tensor,
    bias_f: Tensor | None = None,
    bias_b: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal convolution with `weight_f` and the anti-causal one with `weight_b`.

    Args and errors are those of `causal_conv1d`. Returns two tensors like x.
    """
    _check(x, activation, weight_f=weight_f, bias_f=bias_f)
    _check(x, activation, weight_b=weight_b, bias_b=bias_b)
    limit = _limit(weight_f, weight_b)
    chosen = select(backend, x, weight_f, weight_b, bias_f, bias_b, unsupported=limit)
    if chosen in PLAIN:
        convolve = PLAIN[chosen].bidirectional_causal_conv1d
        return convolve(x, weight_f, weight_b, bias_f, bias_b, activation)
    y_f, y_b = conv_op(x, weight_f, bias_f, weight_b, bias_b, activation == "silu", False)
    return y_f, y_b


def _check(x: Tensor, activation: str | None, **parameters: Tensor | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), got shape {tuple(x.shape)}")
    (weight_name, weight), (bias_name, bias) = parameters.items()
    channels = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        shape = tuple(weight.shape)
        raise ValueError(f"{weight_name} must be (channels {channels}, width), got {shape}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{bias_name} must be ({channels},), got {tuple(bias.shape)}")
    for name, t in (("x", x), *parameters.items()):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}")
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {t.dtype}")


def _limit(*weights: Tensor) -> str:
    widths = {w.shape[1] for w in weights}
    if len(widths) > 1:
        return f"two widths {sorted(widths)} in one call"
    return f"width {max(widths)} > {MAX_WIDTH}" if max(widths) > MAX_WIDTH else ""


# ---- the native op ---------------------------------------------------------------------------


@torch.library.custom_op("dis_ssm::conv", mutates_args=(), device_types="cpu")
def conv_op(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
    reverse: bool,
) -> list[Tensor]:
    """Direction f (reversed if `reverse`), and b against it when weight_b is given."""
    call = _Call(ConvInputs.from_flat(x, weight_f, bias_f, weight_b, bias_b), silu, reverse)
    outputs = [cpu.empty(x.shape) for _ in range(call.conv.directions)]
    for direction, y in zip(call.conv.direction, outputs, strict=False):
        direction.y = cpu.pointer(y, x.shape)
    cpu.run("conv_forward", call.conv)
    return [y.to(x.dtype) for y in outputs]


conv_op.register_kernel("cuda")(cuda.conv_forward)


@conv_op.register_fake
def _(x, weight_f, bias_f, weight_b, bias_b, silu, reverse):
    return [x.new_empty(x.shape) for _ in range(1 if weight_b is None else 2)]


@torch.library.custom_op("dis_ssm::conv_backward", mutates_args=(), device_types="cpu")
def conv_backward_op(
    dy_f: Tensor,
    dy_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    silu: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of x, weight_f, bias_f, weight_b, bias_b; empty where one was None."""
    given = ConvInputs.from_flat(x, weight_f, bias_f, weight_b, bias_b)
    call = _Call(given, silu, reverse)
    grads = given.each(lambda t: cpu.empty(t.shape))
    call.conv.dx = cpu.pointer(grads.x, x.shape)
    directions = zip(call.conv.direction, grads.directions(), (dy_f, dy_b), strict=False)
    for direction, grad, dy in directions:
        direction.dy = cpu.rows(call.hold(cpu.float_rows(dy)), x.shape)
        direction.dweight = cpu.pointer(grad.weight, weight_f.shape)
        direction.dbias = cpu.pointer(grad.bias, x.shape[2:])
    cpu.run("conv_backward", call.conv)
    return as_returned(grads.flat(), given.flat(), x)


conv_backward_op.register_kernel("cuda")(cuda.conv_backward)


@conv_backward_op.register_fake
def _(dy_f, dy_b, x, weight_f, bias_f, weight_b, bias_b, silu, reverse):
    inputs = (x, weight_f, bias_f, weight_b, bias_b)
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dys):
    refuse_batched_gradients(*dys)
    x, *parameters = ctx.saved_tensors
    dy_f, *rest = [torch.zeros_like(x) if dy is None else dy for dy in dys]
    (dy_b,) = rest or (None,)
    grads = conv_backward_op(dy_f, dy_b, x, *parameters, ctx.silu, ctx.reverse)
    *needs, _, _ = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


conv_op.register_autograd(_backward, setup_context=_setup_context)
conv_backward_op.register_autograd(no_second_derivative)


class _Call:
    """The kernel's argument block; keeps the float32 tensors behind its pointers alive."""

    def __init__(self, given: ConvInputs, silu: bool, reverse: bool):
        batch, length, channels = given.x.shape
        _, width = given.f.weight.shape
        directions = given.directions()
        self.keep = []
        self.conv = cpu_abi.Conv(batch, length, channels, width, len(directions), silu)
        self.conv.x = cpu.rows(self.hold(cpu.float_rows(given.x)), given.x.shape)
        for i, (weight, bias) in enumerate(directions):
            self.conv.direction[i] = cpu_abi.ConvDirection(
                weight=self._vector(weight, (channels, width)),
                bias=self._vector(bias, (channels,)),
                reverse=(i == 1) != reverse,
            )

    def _vector(self, t: Tensor | None, shape: tuple[int, ...]) -> int | None:
        return cpu.pointer(None if t is None else self.hold(t.float().contiguous()), shape)

    def hold(self, t: Tensor) -> Tensor:
        self.keep.append(t)
        return t
