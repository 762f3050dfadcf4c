"""The bidirectional Mamba mixer: two directional scans of one projected sequence, gated and merged.

Letters: B batch, L tokens, D width, I = expand * D inner width, N = d_state, R = dt_rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import flop_registry

from dis_ssm.ops import bidirectional_selective_scan, causal_conv1d
from dis_ssm.ops.conv import MAX_WIDTH, conv_backward_op, conv_op
from dis_ssm.ops.dispatch import refuse_batched_gradients, select
from dis_ssm.ops.scan import scan_backward_op, scan_op

# torch counts addmm, but not in place.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


class Direction(nn.Module):
    """One scan direction up to the scan itself: convolution, x_proj and dt_proj.

    A = -exp(A_log) is float32 even in a half-precision model; the scan computes Δ.
    """

    def __init__(self, d_inner: int, d_state: int, d_conv: int, dt_rank: int):
        super().__init__()
        self.conv_weight = nn.Parameter(torch.empty(d_inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))

    def forward(self, x: Tensor, reverse: bool) -> tuple[Tensor | None, ...]:
        """x (B, L, I) -> the scan's x, dt before softplus (B, L, I), A (I, N), B, C (B, L, N), D
        and the bias (I,) still to be added to dt, None if it is in it.

        D and the bias are copies: what shards or offloads parameters may take them back after the
        call.
        """
        x = causal_conv1d(x, self.conv_weight, self.conv_bias, reverse=reverse)
        low, B, C = split(self.x_proj(x), self.A_log)
        if is_plain(self.dt_proj):
            dt, bias = F.linear(low, self.dt_proj.weight), self.dt_proj.bias
            bias = None if bias is None else bias.clone()
        else:  # the bias is in dt, which autocast must not round then
            with torch.autocast(low.device.type, enabled=False):
                dt, bias = self.dt_proj(low.to(dtype_of(self.dt_proj, low.dtype))), None
        return x, dt, rates(self.A_log), B, C, self.D.clone(), bias

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters in the order of :class:`FusedMixer`."""
        return (
            self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight,
            self.dt_proj.bias, self.A_log, self.D,
        )  # fmt: skip


_LINEAR_FORWARD = nn.Linear.forward
_PLAIN_TENSORS = frozenset({nn.Parameter, Tensor, FakeTensor})


def is_plain(module: nn.Module | None, kind: type = nn.Linear) -> bool:
    """Whether calling ``module`` computes what ``kind`` does with its parameters.

    False for wrapped, subclassed, parametrised, quantised or hooked modules: these must be called.
    """
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (
        "forward" in own
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or _has_any_global_hook()
        or nn.Linear.forward is not _LINEAR_FORWARD
    )


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype ``module`` computes in: that of its first floating-point parameter.

    A wrapper or a quantised module may have no ``weight`` to ask, and a parametrised one would
    compute it.
    """
    if type(module) is nn.Linear:
        return module.weight.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def _fit(h: Tensor, in_weight: Tensor, *others: Tensor | None) -> bool:
    """Whether :class:`FusedMixer`'s tensors have the kind and the shapes it takes for granted."""
    f, b, out_weight = others[:7], others[7:14], others[14]
    (inner, width), rank, state = f[0].shape, f[3].shape[1], f[5].shape[1]
    shapes = [(inner, width), (inner,), (rank + 2 * state, inner)]
    shapes += [(inner, rank), (inner,), (inner, state), (inner,)]
    return (
        _PLAIN_TENSORS.issuperset(map(type, (h, in_weight, *others)))
        and all([t.shape for t in tensors] == shapes for tensors in (f, b))
        and in_weight.shape[0] == 2 * inner == 2 * out_weight.shape[1]
    )


def rates(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def split(projected: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_proj's output (B, L, R + 2 N) -> dt before dt_proj (B, L, R), B and C (B, L, N)."""
    state = A_log.shape[1]
    return projected.split([projected.shape[-1] - 2 * state, state, state], dim=-1)


class BiMamba(nn.Module):
    r"""Bidirectional selective state space ("v2" of Vision Mamba, arXiv 2401.09417; DiS §3.2).

    .. math:: x, z = in\_proj(h) \qquad out = out\_proj((scan_f(x) + scan_b(x)) · silu(z))

    where each direction convolves, projects and scans x with its own parameters.

    Args:
        d_model: D. d_state: N. expand: I / D. d_conv: width of the convolution.
    """

    def __init__(self, d_model: int, d_state: int = 16, expand: int = 2, d_conv: int = 4):
        super().__init__()
        self.d_inner = expand * d_model
        dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.forward_scan = Direction(self.d_inner, d_state, d_conv, dt_rank)
        self.backward_scan = Direction(self.d_inner, d_state, d_conv, dt_rank)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if self._only_parameters_matter():
            f, b = self.forward_scan.tensors(), self.backward_scan.tensors()
            tensors = (h, self.in_proj.weight, *f, *b, self.out_proj.weight)
            width = f[0].shape[1]
            beyond = f"width {width} > {MAX_WIDTH}" if width > MAX_WIDTH else ""
            if _fit(*tensors) and select(None, *tensors, unsupported=beyond) in ("cpu", "cuda"):
                save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
                return FusedMixer.apply(*tensors, save)
        return self.op_by_op(h)

    def _only_parameters_matter(self) -> bool:
        """Whether no module in here needs to be called."""
        own = self._modules
        f, b = own.get("forward_scan"), own.get("backward_scan")
        if not (is_plain(f, Direction) and is_plain(b, Direction)):
            return False
        f, b = f._modules, b._modules
        projections = [own.get("in_proj"), own.get("out_proj"), f.get("x_proj"), b.get("x_proj")]
        return all(map(is_plain, (*projections, f.get("dt_proj"), b.get("dt_proj")))) and not any(
            linear.bias is not None for linear in projections
        )

    def op_by_op(self, h: Tensor) -> Tensor:
        """:meth:`forward` by calling each module: for every backend, dtype, order of derivative,
        and for modules with hooks, wrappers or weights that are computed."""
        x, z = self.in_proj(h).chunk(2, dim=-1)
        f, b = self.forward_scan(x, reverse=False), self.backward_scan(x, reverse=True)
        pairs = (t for pair in zip(f[:6], b[:6], strict=True) for t in pair)
        y = bidirectional_selective_scan(*pairs, z, f[6], b[6])
        return self.out_proj(y)


class FusedMixer(torch.autograd.Function):
    """:class:`BiMamba` on the kernels, keeping little for the backward pass.

    Kept: the input, in_proj's and both x_proj outputs, the sum before the gate and the scan's
    states at chunk starts. The convolutions, Δ before its bias and the gated output are computed
    again. Everything runs in in_proj's output dtype, except A, D and the biases, which the kernels
    take in float32 as they take all sums.
    """

    @staticmethod
    def forward(ctx, h: Tensor, *parameters_and_save) -> Tensor:
        *parameters, save = parameters_and_save
        in_weight, f, b, out_weight = _unpack(parameters)
        xz = F.linear(h, in_weight)
        inputs, projected = _scan_inputs(xz, f, b)
        y, pregate, states = scan_op(*inputs, xz.chunk(2, dim=-1)[1], True, False, save)
        if save:
            ctx.save_for_backward(h, xz, *projected, pregate, states, *parameters)
        return F.linear(y, out_weight.to(y.dtype))

    @staticmethod
    def backward(ctx, dout: Tensor):
        refuse_batched_gradients(dout)
        h, xz, projected_f, projected_b, pregate, states, *parameters = ctx.saved_tensors
        in_weight, f, b, out_weight = _unpack(parameters)
        x, z = xz.chunk(2, dim=-1)
        inputs, _ = _scan_inputs(xz, f, b, (projected_f, projected_b))
        y = (pregate * F.silu(z.float())).to(xz.dtype)
        dout = dout.to(xz.dtype)
        dy, dout_weight = dout @ out_weight.to(dout.dtype), _weight_grad(dout, y)
        grads = scan_backward_op(dy, pregate, states, *inputs, z, True, False)
        dz = grads[14]
        dx_f, d_f = _direction_backward(grads[:7], inputs[0], projected_f, f)
        dx_b, d_b = _direction_backward(grads[7:14], inputs[7], projected_b, b)
        dx, *d_conv = conv_backward_op(dx_f, dx_b, x, f[0], f[1], b[0], b[1], True, False)
        weight_x, weight_z = in_weight.to(dx.dtype).chunk(2)
        dh = _add_product(dx @ weight_x, dz, weight_z)
        halves = [_weight_grad(d, h.to(d.dtype)) for d in (dx, dz)]
        found = (torch.cat(halves), *d_conv[:2], *d_f, *d_conv[2:], *d_b, dout_weight)
        found = (g.to(p.dtype) for g, p in zip(found, parameters, strict=True))
        return dh.to(h.dtype), *found, None


def _unpack(parameters):
    """in_proj's weight, the tensors of both directions, out_proj's weight."""
    return parameters[0], parameters[1:8], parameters[8:15], parameters[15]


def _scan_inputs(xz, f, b, projected=None):
    """The scan's fourteen directional inputs and both x_proj outputs, which may be given."""
    x_f, x_b = conv_op(xz.chunk(2, dim=-1)[0], f[0], f[1], b[0], b[1], True, False)
    if projected is None:
        projected = [F.linear(x, p[2].to(x.dtype)) for x, p in ((x_f, f), (x_b, b))]
    inputs = []
    for x, low, parameters in ((x_f, projected[0], f), (x_b, projected[1], b)):
        _, _, _, dt_weight, dt_bias, A_log, D = parameters
        dt, B, C = split(low, A_log)
        inputs += x, F.linear(dt, dt_weight.to(x.dtype)), rates(A_log), B, C, D, dt_bias
    return inputs, projected


def _direction_backward(grads, x, projected, parameters):
    """dx and the gradients of x_proj, dt_proj, its bias, A_log and D."""
    dx, ddt, dA, dB, dC, dD, ddt_bias = grads
    _, _, x_weight, dt_weight, _, A_log, _ = parameters
    dt, _, _ = split(projected, A_log)
    dprojected = torch.cat([ddt @ dt_weight.to(ddt.dtype), dB, dC], dim=-1)
    dx = _add_product(dx, dprojected, x_weight.to(dx.dtype))
    dx_weight, ddt_weight = _weight_grad(dprojected, x), _weight_grad(ddt, dt)
    return dx, (dx_weight, ddt_weight, ddt_bias, dA * rates(A_log), dD)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in total's memory."""
    total.view(-1, b.shape[1]).addmm_(a.flatten(0, 1), b)
    return total


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """Of W in y = x Wᵀ."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1)
