"""FLOPs of what `torch.utils.flop_counter` does not know: our operators, and addmm in place.

A multiply-add counts as two. b batch, l length, d channels, n state, k width.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dis_ssm.ops import conv, scan  # noqa: F401 (they define the operators)

# For each token, channel and state of a direction, an exponential counted as one: ΔA, exp, h (3)
# and C·h (2); backwards the first five again and g (2), g a h', dC, dB, g·B, dΔ, dA (2 each), a g.
SCAN_FORWARD, SCAN_BACKWARD = 7, 19
# For each token, channel and tap: the filter; backwards the filter again, dx and dweight.
CONV_FORWARD, CONV_BACKWARD = 2, 6


def register_formulas() -> None:
    """Make every `FlopCounterMode` of this process that is made from now on count them.

    Formulas that are registered already are left as they are, so that it may be called again.
    """
    operators = torch.ops.dis_ssm
    formulas = {
        operators.scan: _scan,
        operators.scan_backward: _scan_backward,
        operators.conv: _conv,
        operators.conv_backward: _conv_backward,
    }
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
    # torch counts addmm, but not in place
    flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


def _scan(x, dt, A, B, C, D, dt_bias, x_b, *_, **__) -> int:
    return _directions(x_b) * SCAN_FORWARD * math.prod(x) * A[1]


def _scan_backward(dout, pregate, states, x, dt, A, B, C, D, dt_bias, x_b, *_, **__) -> int:
    return _directions(x_b) * SCAN_BACKWARD * math.prod(x) * A[1]


def _conv(x, weight, bias, weight_b, *_, **__) -> int:
    return _directions(weight_b) * CONV_FORWARD * math.prod(x) * weight[1]


def _conv_backward(dy, dy_b, x, weight, bias, weight_b, *_, **__) -> int:
    return _directions(weight_b) * CONV_BACKWARD * math.prod(x) * weight[1]


def _directions(backward: tuple[int, ...] | None) -> int:
    return 1 if backward is None else 2
