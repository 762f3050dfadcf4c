"""The bidirectional Mamba mixer: two directional scans of one projected sequence, gated and merged.

Letters: B batch, L tokens, D width, I = expand * D inner width, N = d_state, R = dt_rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from dis_ssm.ops import bidirectional_selective_scan, causal_conv1d
from dis_ssm.ops.conv import MAX_WIDTH, conv_backward_op, conv_op
from dis_ssm.ops.dispatch import refuse_batched_gradients, select
from dis_ssm.ops.scan import scan_backward_op, scan_op
from dis_ssm.ops.tensors import ScanInputs, ScanTensors


class DirectionParameters(NamedTuple):
    """The parameters of a `Direction`; or their gradients, or their shapes."""

    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


class MixerParameters(NamedTuple):
    """The parameters of a `BiMamba`, or their gradients, by direction."""

    in_weight: Tensor
    f: DirectionParameters
    b: DirectionParameters
    out_weight: Tensor

    @classmethod
    def from_flat(cls, in_weight: Tensor, *others: Tensor) -> MixerParameters:
        """From what `flat` returns."""
        *directions, out_weight = others
        half = len(DirectionParameters._fields)
        f, b = DirectionParameters(*directions[:half]), DirectionParameters(*directions[half:])
        return cls(in_weight, f, b, out_weight)

    def flat(self) -> tuple[Tensor, ...]:
        """One after the other, as autograd wants them."""
        return (self.in_weight, *self.f, *self.b, self.out_weight)


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

    def forward(self, x: Tensor, reverse: bool) -> ScanTensors:
        """x (B, L, I) -> what is scanned; dt_bias is None if it has been added to dt.

        D and dt_bias are copies: what shards or offloads parameters may take them back after the
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
        return ScanTensors(x, dt, rates(self.A_log), B, C, self.D.clone(), bias)

    def tensors(self) -> DirectionParameters:
        """The parameters, whatever else the modules do when they are called."""
        return DirectionParameters(
            self.conv_weight,
            self.conv_bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
        )


_LINEAR_FORWARD = nn.Linear.forward
_PLAIN_TENSORS = frozenset({nn.Parameter, Tensor, FakeTensor})


def is_plain(module: nn.Module | None, kind: type = nn.Linear) -> bool:
    """Whether calling `module` computes what `kind` does with its parameters.

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
    """The dtype `module` computes in: that of its first floating-point parameter.

    A wrapper or a quantised module may have no `weight` to ask, and a parametrised one would
    compute it.
    """
    if type(module) is nn.Linear:
        return module.weight.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def _fit(h: Tensor, parameters: MixerParameters) -> bool:
    """Whether the tensors have the kind and the shapes that `FusedMixer` takes for granted."""
    in_weight, f, b, out_weight = parameters
    (inner, width), (_, rank), (_, state) = f.conv_weight.shape, f.dt_weight.shape, f.A_log.shape
    shapes = DirectionParameters(
        conv_weight=(inner, width),
        conv_bias=(inner,),
        x_weight=(rank + 2 * state, inner),
        dt_weight=(inner, rank),
        dt_bias=(inner,),
        A_log=(inner, state),
        D=(inner,),
    )
    return (
        _PLAIN_TENSORS.issuperset(map(type, (h, *parameters.flat())))
        and all(tuple(t.shape for t in tensors) == shapes for tensors in (f, b))
        and in_weight.shape[0] == 2 * inner == 2 * out_weight.shape[1]
    )


def rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 or wider."""
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
            parameters = self.tensors()
            tensors, width = (h, *parameters.flat()), parameters.f.conv_weight.shape[1]
            beyond = f"width {width} > {MAX_WIDTH}" if width > MAX_WIDTH else ""
            kernels = ("cpu", "cuda")
            if _fit(h, parameters) and select(None, *tensors, unsupported=beyond) in kernels:
                save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
                return FusedMixer.apply(*tensors, save)
        return self.op_by_op(h)

    def tensors(self) -> MixerParameters:
        """The parameters, whatever else the modules do when they are called."""
        f, b = self.forward_scan.tensors(), self.backward_scan.tensors()
        return MixerParameters(self.in_proj.weight, f, b, self.out_proj.weight)

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
        """`forward` by calling each module: for every backend, dtype, order of derivative, and for
        modules with hooks, wrappers or weights that are computed."""
        x, z = self.in_proj(h).chunk(2, dim=-1)  # (B, L, I) each
        f = ScanTensors(*self.forward_scan(x, reverse=False))  # a hook may return a plain tuple
        b = ScanTensors(*self.backward_scan(x, reverse=True))
        y = bidirectional_selective_scan(
            f.x, b.x, f.dt, b.dt, f.A, b.A, f.B, b.B, f.C, b.C, f.D, b.D, z, f.dt_bias, b.dt_bias
        )
        return self.out_proj(y)


class FusedMixer(torch.autograd.Function):
    """`BiMamba` on the kernels, keeping little for the backward pass.

    Kept: the input, in_proj's and both x_proj outputs, the sum before the gate and the scan's
    states at chunk starts. The convolutions, Δ before its bias and the gated output are computed
    again. Everything runs in in_proj's output dtype, except A, D and the biases, which the kernels
    take in float32 as they take all sums.

    `FusedMixer.apply(h, *parameters.flat(), save)` with `MixerParameters`; `save` keeps what the
    backward pass needs.
    """

    @staticmethod
    def forward(ctx, h: Tensor, *parameters_and_save) -> Tensor:
        """h (B, L, D), the tensors of `MixerParameters`, whether to save -> (B, L, D)."""
        *tensors, save = parameters_and_save
        parameters = MixerParameters.from_flat(*tensors)
        xz = F.linear(h, parameters.in_weight)
        _, z = xz.chunk(2, dim=-1)
        inputs, projected = _scan_inputs(xz, parameters)
        y, pregate, states = scan_op(*inputs.f, *inputs.b, z, True, False, save)
        if save:
            ctx.save_for_backward(h, xz, *projected, pregate, states, *tensors)
        return F.linear(y, parameters.out_weight.to(y.dtype))

    @staticmethod
    def backward(ctx, dout: Tensor):
        """dout (B, L, D) -> the gradients of h and of each parameter, None for the flag."""
        refuse_batched_gradients(dout)
        h, xz, low_f, low_b, pregate, states, *tensors = ctx.saved_tensors
        parameters = MixerParameters.from_flat(*tensors)
        in_weight, f, b, out_weight = parameters
        x, z = xz.chunk(2, dim=-1)
        inputs, _ = _scan_inputs(xz, parameters, (low_f, low_b))
        y = (pregate * F.silu(z.float())).to(xz.dtype)
        dout = dout.to(xz.dtype)
        dy, dout_weight = dout @ out_weight.to(dout.dtype), _weight_grad(dout, y)
        grads = scan_backward_op(dy, pregate, states, *inputs.f, *inputs.b, z, True, False)
        d = ScanInputs.from_flat(*grads)
        dx_f, d_f = _direction_backward(d.f, inputs.f.x, low_f, f)
        dx_b, d_b = _direction_backward(d.b, inputs.b.x, low_b, b)
        filters = (f.conv_weight, f.conv_bias, b.conv_weight, b.conv_bias)
        dx, dw_f, dbias_f, dw_b, dbias_b = conv_backward_op(dx_f, dx_b, x, *filters, True, False)
        d_f, d_b = (
            d_f._replace(conv_weight=dw_f, conv_bias=dbias_f),
            d_b._replace(conv_weight=dw_b, conv_bias=dbias_b),
        )
        weight_x, weight_z = in_weight.to(dx.dtype).chunk(2)
        dh = _add_product(dx @ weight_x, d.z, weight_z)
        din_weight = torch.cat([_weight_grad(dxz, h.to(dxz.dtype)) for dxz in (dx, d.z)])
        found = MixerParameters(din_weight, d_f, d_b, dout_weight).flat()
        found = (g.to(p.dtype) for g, p in zip(found, tensors, strict=True))
        return dh.to(h.dtype), *found, None


def _scan_inputs(
    xz: Tensor, parameters: MixerParameters, projected: tuple[Tensor, Tensor] | None = None
) -> tuple[ScanInputs, tuple[Tensor, Tensor]]:
    """What is scanned, ungated, and both x_proj outputs (B, L, R + 2 N), which may be given."""
    _, f, b, _ = parameters
    x, _ = xz.chunk(2, dim=-1)
    filters = (f.conv_weight, f.conv_bias, b.conv_weight, b.conv_bias)
    x_f, x_b = conv_op(x, *filters, True, False)
    if projected is None:
        projected = _project(x_f, f), _project(x_b, b)
    low_f, low_b = projected
    return ScanInputs(_scan_tensors(x_f, low_f, f), _scan_tensors(x_b, low_b, b), None), projected


def _project(x: Tensor, parameters: DirectionParameters) -> Tensor:
    return F.linear(x, parameters.x_weight.to(x.dtype))


def _scan_tensors(x: Tensor, projected: Tensor, parameters: DirectionParameters) -> ScanTensors:
    dt, B, C = split(projected, parameters.A_log)
    dt = F.linear(dt, parameters.dt_weight.to(x.dtype))
    return ScanTensors(x, dt, rates(parameters.A_log), B, C, parameters.D, parameters.dt_bias)


def _direction_backward(
    grads: ScanTensors, x: Tensor, projected: Tensor, parameters: DirectionParameters
) -> tuple[Tensor, DirectionParameters]:
    """dx and the gradients of all parameters but the filter."""
    dt, _, _ = split(projected, parameters.A_log)
    ddt = grads.dt
    dlow = ddt @ parameters.dt_weight.to(ddt.dtype)
    dprojected = torch.cat([dlow, grads.B, grads.C], dim=-1)
    dx = _add_product(grads.x, dprojected, parameters.x_weight.to(grads.x.dtype))
    return dx, DirectionParameters(
        conv_weight=None,
        conv_bias=None,
        x_weight=_weight_grad(dprojected, x),
        dt_weight=_weight_grad(ddt, dt),
        dt_bias=grads.dt_bias,
        A_log=grads.A * rates(parameters.A_log),
        D=grads.D,
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in total's memory."""
    total.view(-1, b.shape[1]).addmm_(a.flatten(0, 1), b)
    return total


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """Of W in y = x Wᵀ."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1)
