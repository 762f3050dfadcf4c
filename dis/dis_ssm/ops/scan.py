"""Selective scan (Mamba, arXiv 2312.00752, algorithm 2), one-way and bidirectional.

Letters: b batch, l length, d channels, n state. Everything is channels-last, and the reverse
direction is index arithmetic: nothing is flipped or transposed in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dis_ssm.ops import cpu, cpu_abi, cuda
from dis_ssm.ops.dispatch import PLAIN, no_second_derivative, refuse_batched_gradients, select


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
    backend: str | None = None,
) -> Tensor:
    r"""Runs the state-space recurrence over the tokens.

    .. math::
        Δ_t = softplus(dt_t + dt\_bias) \qquad h_t = \exp(Δ_t A) h_{t-1} + Δ_t B_t x_t \qquad
        y_t = (C_t · h_t + D x_t) · silu(z_t)

    This is Mamba's Euler rule for B (DiS eq. 4 prints the zero-order hold; released weights need
    Euler). The state is float32, or float64 if x is (reference only).

    Args:
        x, dt, z: (b, l, d); z None leaves the gate out.
        A: (d, n), usually negative.
        B, C: (b, l, n).
        D, dt_bias: (d,).
        dt_softplus: False uses dt + dt_bias as it is.
        reverse: run from the last token to the first.
        backend: None for the best that can run, or one of "reference", "cpu", "cuda", "mamba_ssm".

    Returns:
        (b, l, d) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, devices that differ, or an unknown backend.
        RuntimeError: a forced backend that cannot run here.
    """
    forward = (x, dt, A, B, C, D, dt_bias)
    _check(z, dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias))
    chosen = select(backend, *forward, z, unsupported=_limit(x, A))
    if chosen in PLAIN:
        scan = PLAIN[chosen].selective_scan
        return scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    return _native(forward, (None,) * 7, z, dt_softplus, reverse)


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
    backend: str | None = None,
) -> Tensor:
    """``(scan_f + scan_b) * silu(z)``, scan_b running from the last token to the first.

    Args and errors are those of :func:`selective_scan`, one set a direction. Returns (b, l, d).
    """
    forward = (x_f, dt_f, A_f, B_f, C_f, D_f, dt_bias_f)
    backward = (x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b)
    _check(z, dict(x_f=x_f, dt_f=dt_f, A_f=A_f, B_f=B_f, C_f=C_f, D_f=D_f, dt_bias_f=dt_bias_f))
    _check(z, dict(x_b=x_b, dt_b=dt_b, A_b=A_b, B_b=B_b, C_b=C_b, D_b=D_b, dt_bias_b=dt_bias_b))
    if x_f.shape != x_b.shape:
        raise ValueError(f"x_b must have x_f's shape {tuple(x_f.shape)}, got {tuple(x_b.shape)}")
    limit = _limit(x_f, A_f, A_b)
    chosen = select(backend, *forward, *backward, z, unsupported=limit)
    if chosen in PLAIN:
        return PLAIN[chosen].bidirectional_selective_scan(
            x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, D_f, D_b, z,
            dt_bias_f, dt_bias_b, dt_softplus,
        )  # fmt: skip
    return _native(forward, backward, z, dt_softplus, False)


def _check(z: Tensor | None, tensors: dict[str, Tensor | None]) -> None:
    (name_x, x), _, (name_A, A), *_ = tensors.items()
    if x.ndim != 3:
        raise ValueError(f"{name_x} must be (batch, length, channels), got shape {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] < 1:
        shape = tuple(A.shape)
        raise ValueError(f"{name_A} must be (channels {channels}, state >= 1), got {shape}")
    token = (batch, length, A.shape[1])
    shapes = [x.shape, x.shape, A.shape, token, token, (channels,), (channels,)]
    for (name, t), shape in zip([*tensors.items(), ("z", z)], [*shapes, x.shape], strict=True):
        if t is None:
            continue
        if t.shape != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, the rest on {x.device}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {t.dtype}")


def _limit(x: Tensor, *matrices: Tensor) -> str:
    sizes = {A.shape[1] for A in matrices}
    if len(sizes) > 1:
        return f"two state sizes {sorted(sizes)} in one call"
    too_many = x.is_cuda and max(sizes) > cuda.MAX_STATE
    return f"state size {max(sizes)} > {cuda.MAX_STATE} on a GPU" if too_many else ""


def _native(forward: tuple, backward: tuple, z: Tensor | None, dt_softplus: bool, reverse: bool):
    tensors = [t for t in (*forward, *backward, z) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return scan_op(*forward, *backward, z, dt_softplus, reverse, save)[0]


# ---- the native op ---------------------------------------------------------------------------


@torch.library.custom_op("dis_ssm::scan", mutates_args=(), device_types="cpu")
def scan_op(
    x_f: Tensor,
    dt_f: Tensor,
    A_f: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    D_f: Tensor | None,
    bias_f: Tensor | None,
    x_b: Tensor | None,
    dt_b: Tensor | None,
    A_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D_b: Tensor | None,
    bias_b: Tensor | None,
    z: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scans direction f (reversed if ``reverse``), and b against it when x_b is given.

    Returns (out, sum before the gate, states at chunk starts); the last two are for the backward
    pass, empty unless ``save`` (and a gate) asks for them.
    """
    inputs = (x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z)
    call = _Call(inputs, dt_softplus, reverse)
    out = cpu.empty(x_f.shape)
    pregate = cpu.empty(x_f.shape if save and z is not None else (0,))
    states = cpu.empty(call.states_shape if save else (0,))
    call.scan.out = cpu.pointer(out, x_f.shape)
    if save:
        call.keep_states(states)
        call.scan.pregate = None if z is None else cpu.pointer(pregate, x_f.shape)
    cpu.run("scan_forward", call.scan)
    return out.to(x_f.dtype), pregate, states


scan_op.register_kernel("cuda")(cuda.scan_forward)


@scan_op.register_fake
def _(*args):
    x, x_b, A, z, save = args[0], args[7], args[2], args[14], args[17]
    pregate = x.new_empty(x.shape if save and z is not None else 0, dtype=torch.float32)
    batch, length, channels = x.shape
    directions = 1 if x_b is None else 2
    chunks = -(-length // (cuda.CHUNK if x.is_cuda else CHUNK))
    shape = (directions, batch, chunks, A.shape[1], channels) if save else 0
    return x.new_empty(x.shape), pregate, x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dis_ssm::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward_op(
    dout: Tensor,
    pregate: Tensor,
    states: Tensor,
    x_f: Tensor,
    dt_f: Tensor,
    A_f: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    D_f: Tensor | None,
    bias_f: Tensor | None,
    x_b: Tensor | None,
    dt_b: Tensor | None,
    A_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D_b: Tensor | None,
    bias_b: Tensor | None,
    z: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of :func:`scan_op`'s fifteen tensors, in order; empty where one was None."""
    inputs = (x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z)
    call = _Call(inputs, dt_softplus, reverse)
    call.keep_states(states)
    dout, pregate = cpu.float_rows(dout), pregate.contiguous()
    grads = [None if t is None else cpu.empty(t.shape) for t in inputs]
    call.scan.dout = cpu.rows(dout, x_f.shape)
    call.scan.pregate = None if z is None else cpu.pointer(pregate, x_f.shape)
    call.scan.dz = cpu.pointer(grads[14], x_f.shape)
    names = ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias")
    for direction, group in zip(call.scan.direction, (grads[:7], grads[7:14]), strict=True):
        for name, grad, shape in zip(names, group, call.shapes, strict=True):
            setattr(direction, name, cpu.pointer(grad, shape))
    cpu.run("scan_backward", call.scan)
    return [
        x_f.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)
    ]


scan_backward_op.register_kernel("cuda")(cuda.scan_backward)


@scan_backward_op.register_fake
def _(dout, pregate, states, *args):
    x = args[0]
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:15]]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.reverse, ctx.saved = inputs
    _, pregate, states = output
    ctx.save_for_backward(pregate, states, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 18
    if not ctx.saved:
        raise RuntimeError("the states for the backward pass were not kept")
    refuse_batched_gradients(dout)
    pregate, states, *tensors = ctx.saved_tensors
    grads = scan_backward_op(dout, pregate, states, *tensors, ctx.dt_softplus, ctx.reverse)
    needs = ctx.needs_input_grad[:15]
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


scan_op.register_autograd(_backward, setup_context=_setup_context)
scan_backward_op.register_autograd(no_second_derivative)

# For each token, channel and state of a direction, an exponential counted as one: ΔA, exp, h (3)
# and C·h (2); backwards the first five again and g (2), g a h', dC, dB, g·B, dΔ, dA (2 each), a g.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 7, 19


@register_flop_formula(torch.ops.dis_ssm.scan)
def _(x, dt, A, B, C, D, bias, x_b, *args, **kwargs) -> int:
    batch, length, channels = x
    return (1 if x_b is None else 2) * _FORWARD_FLOPS * batch * length * channels * A[1]


@register_flop_formula(torch.ops.dis_ssm.scan_backward)
def _(dout, pregate, states, x, dt, A, B, C, D, bias, x_b, *args, **kwargs) -> int:
    batch, length, channels = x
    return (1 if x_b is None else 2) * _BACKWARD_FLOPS * batch * length * channels * A[1]


CHUNK = cpu.CHUNK


class _Call:
    """The kernel's argument block; keeps the float32 tensors behind its pointers alive."""

    def __init__(self, inputs: tuple, dt_softplus: bool, reverse: bool):
        x, A, x_b, z = inputs[0], inputs[2], inputs[7], inputs[14]
        batch, length, channels = x.shape
        state, directions = A.shape[1], 1 if x_b is None else 2
        token = (batch, length, state)
        vector = (channels,)
        self.shapes = (x.shape, x.shape, (channels, state), token, token, vector, vector)
        self.states_shape = (directions, batch, -(-length // CHUNK), state, channels)
        self.scan = cpu_abi.Scan(batch, length, channels, state, directions, dt_softplus)
        self.keep = []
        for i in range(directions):
            given = list(zip(inputs[7 * i : 7 * i + 7], self.shapes, strict=True))
            rows = [cpu.rows(self._hold(cpu.float_rows(t)), s) for t, s in given[:2]]
            rows += [cpu.rows(self._hold(cpu.float_rows(t)), s) for t, s in given[3:5]]
            vectors = [cpu.pointer(self._vector(t), s) for t, s in (given[2], *given[5:])]
            self.scan.direction[i] = cpu_abi.ScanDirection(
                *rows, *vectors, reverse=(i == 1) != reverse
            )
        z = None if z is None else self._hold(cpu.float_rows(z))
        self.scan.z = cpu.rows(z, x.shape)

    def _hold(self, t: Tensor) -> Tensor:
        self.keep.append(t)
        return t

    def _vector(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self._hold(t.float().contiguous())

    def keep_states(self, states: Tensor) -> None:
        """Where the state at the start of each chunk is written to, or read from."""
        states = self._hold(states.contiguous())
        cpu.pointer(states, self.states_shape)
        for direction, part in zip(self.scan.direction, states, strict=False):
            direction.states = part.data_ptr()
