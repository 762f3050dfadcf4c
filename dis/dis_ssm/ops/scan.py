"""Selective scan (Mamba, arXiv 2312.00752, algorithm 2), one-way and bidirectional.

Letters: b batch, l length, d channels, n state. Everything is channels-last, and the reverse
direction is index arithmetic: nothing is flipped or transposed in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dis_ssm.ops import cpu, cpu_abi, cuda
from dis_ssm.ops.dispatch import PLAIN, no_second_derivative, refuse_batched_gradients, select
from dis_ssm.ops.tensors import ScanInputs, ScanTensors, as_returned

CHUNK = cpu.CHUNK


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
    f = ScanTensors(x, dt, A, B, C, D, dt_bias)
    _check(f, z)
    chosen = select(backend, *f, z, unsupported=_limit(f))
    if chosen in PLAIN:
        scan = PLAIN[chosen].selective_scan
        return scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    return _native(ScanInputs(f, None, z), dt_softplus, reverse)


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
    """`(scan_f + scan_b) * silu(z)`, scan_b running from the last token to the first.

    Args and errors are those of `selective_scan`, one set a direction. Returns (b, l, d).
    """
    f = ScanTensors(x_f, dt_f, A_f, B_f, C_f, D_f, dt_bias_f)
    b = ScanTensors(x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b)
    _check(f, z, "_f")
    _check(b, z, "_b")
    if x_f.shape != x_b.shape:
        raise ValueError(f"x_b must have x_f's shape {tuple(x_f.shape)}, got {tuple(x_b.shape)}")
    chosen = select(backend, *f, *b, z, unsupported=_limit(f, b))
    if chosen in PLAIN:
        return PLAIN[chosen].bidirectional_selective_scan(
            x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, D_f, D_b, z,
            dt_bias_f, dt_bias_b, dt_softplus,
        )  # fmt: skip
    return _native(ScanInputs(f, b, z), dt_softplus, False)


def _check(tensors: ScanTensors, z: Tensor | None, suffix: str = "") -> None:
    """ValueError for the first argument that does not fit; suffix ends its name."""
    x, A = tensors.x, tensors.A
    if x.ndim != 3:
        shape = tuple(x.shape)
        raise ValueError(f"x{suffix} must be (batch, length, channels), got shape {shape}")
    batch, length, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] < 1:
        shape = tuple(A.shape)
        raise ValueError(f"A{suffix} must be (channels {channels}, state >= 1), got {shape}")
    shapes = _shapes(batch, length, channels, A.shape[1])
    names = [f"{name}{suffix}" for name in ScanTensors._fields]
    rows = zip([*names, "z"], [*tensors, z], [*shapes, shapes.x], strict=True)
    for name, t, shape in rows:
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, the rest on {x.device}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {t.dtype}")


def _shapes(batch: int, length: int, channels: int, state: int) -> ScanTensors:
    tokens, states, vector = (batch, length, channels), (batch, length, state), (channels,)
    return ScanTensors(tokens, tokens, (channels, state), states, states, vector, vector)


def _limit(*directions: ScanTensors) -> str:
    """Why the kernels do not take this call, if they do not."""
    sizes = {tensors.A.shape[1] for tensors in directions}
    if len(sizes) > 1:
        return f"two state sizes {sorted(sizes)} in one call"
    too_many = directions[0].x.is_cuda and max(sizes) > cuda.MAX_STATE
    return f"state size {max(sizes)} > {cuda.MAX_STATE} on a GPU" if too_many else ""


def _native(given: ScanInputs, dt_softplus: bool, reverse: bool) -> Tensor:
    tensors = given.flat()
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, _, _ = scan_op(*tensors, dt_softplus, reverse, save)
    return out


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
    """Scans direction f (reversed if `reverse`), and b against it when x_b is given.

    Returns (out, sum before the gate, states at chunk starts); the last two are for the backward
    pass, empty unless `save` (and a gate) asks for them.
    """
    given = ScanInputs.from_flat(
        x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z
    )
    call = _Call(given, dt_softplus, reverse)
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
def _(*arguments):
    *tensors, _, _, save = arguments
    given = ScanInputs.from_flat(*tensors)
    x, A, z, directions = given.f.x, given.f.A, given.z, len(given.directions())
    pregate = x.new_empty(x.shape if save and z is not None else 0, dtype=torch.float32)
    batch, length, channels = x.shape
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
    """The gradients of `scan_op`'s fifteen tensors, in order; empty where one was None."""
    given = ScanInputs.from_flat(
        x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z
    )
    call = _Call(given, dt_softplus, reverse)
    call.keep_states(states)
    dout, pregate = cpu.float_rows(dout), pregate.contiguous()
    grads = given.each(lambda t: cpu.empty(t.shape))
    call.scan.dout = cpu.rows(dout, x_f.shape)
    call.scan.pregate = None if z is None else cpu.pointer(pregate, x_f.shape)
    call.scan.dz = cpu.pointer(grads.z, x_f.shape)
    for direction, grad in zip(call.scan.direction, grads.directions(), strict=False):
        direction.dx = cpu.pointer(grad.x, call.shapes.x)
        direction.ddt = cpu.pointer(grad.dt, call.shapes.dt)
        direction.dA = cpu.pointer(grad.A, call.shapes.A)
        direction.dB = cpu.pointer(grad.B, call.shapes.B)
        direction.dC = cpu.pointer(grad.C, call.shapes.C)
        direction.dD = cpu.pointer(grad.D, call.shapes.D)
        direction.ddt_bias = cpu.pointer(grad.dt_bias, call.shapes.dt_bias)
    cpu.run("scan_backward", call.scan)
    return as_returned(grads.flat(), given.flat(), x_f)


scan_backward_op.register_kernel("cuda")(cuda.scan_backward)


@scan_backward_op.register_fake
def _(dout, pregate, states, *arguments):
    x, *_ = arguments
    *tensors, _, _ = arguments
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.reverse, ctx.saved = inputs
    _, pregate, states = output
    ctx.save_for_backward(pregate, states, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    if not ctx.saved:
        raise RuntimeError("the states for the backward pass were not kept")
    refuse_batched_gradients(dout)
    pregate, states, *tensors = ctx.saved_tensors
    grads = scan_backward_op(dout, pregate, states, *tensors, ctx.dt_softplus, ctx.reverse)
    *needs, _, _, _ = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


scan_op.register_autograd(_backward, setup_context=_setup_context)
scan_backward_op.register_autograd(no_second_derivative)


class _Call:
    """The kernel's argument block; keeps the float32 tensors behind its pointers alive."""

    def __init__(self, given: ScanInputs, dt_softplus: bool, reverse: bool):
        batch, length, channels = given.f.x.shape
        state, directions = given.f.A.shape[1], given.directions()
        self.shapes = _shapes(batch, length, channels, state)
        self.states_shape = (len(directions), batch, -(-length // CHUNK), state, channels)
        self.scan = cpu_abi.Scan(batch, length, channels, state, len(directions), dt_softplus)
        self.keep = []
        for i, tensors in enumerate(directions):
            self.scan.direction[i] = cpu_abi.ScanDirection(
                x=self._rows(tensors.x, self.shapes.x),
                dt=self._rows(tensors.dt, self.shapes.dt),
                B=self._rows(tensors.B, self.shapes.B),
                C=self._rows(tensors.C, self.shapes.C),
                A=self._vector(tensors.A, self.shapes.A),
                D=self._vector(tensors.D, self.shapes.D),
                dt_bias=self._vector(tensors.dt_bias, self.shapes.dt_bias),
                reverse=(i == 1) != reverse,
            )
        self.scan.z = self._rows(given.z, self.shapes.x)

    def _rows(self, t: Tensor | None, shape: tuple[int, ...]) -> cpu_abi.Rows:
        return cpu.rows(None if t is None else self._hold(cpu.float_rows(t)), shape)

    def _vector(self, t: Tensor | None, shape: tuple[int, ...]) -> int | None:
        return cpu.pointer(None if t is None else self._hold(t.float().contiguous()), shape)

    def _hold(self, t: Tensor) -> Tensor:
        self.keep.append(t)
        return t

    def keep_states(self, states: Tensor) -> None:
        """Where the state at the start of each chunk is written to, or read from."""
        states = self._hold(states.contiguous())
        cpu.pointer(states, self.states_shape)
        for direction, part in zip(self.scan.direction, states, strict=False):
            direction.states = part.data_ptr()
