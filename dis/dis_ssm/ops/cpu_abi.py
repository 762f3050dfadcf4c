"""What the functions of `kernels/cpu` take: the structs of `scan.cpp`, `conv.cpp` and `norm.cpp`.

Pointers are to float32 memory and null where a tensor is left out; strides count floats.
"""

from __future__ import annotations

import ctypes

from dis_ssm.ops.abi import Rows, ScanDirection, integers, pointers


class Scan(ctypes.Structure):
    """`dis_ssm_scan_forward` and `dis_ssm_scan_backward`."""

    _fields_ = [
        *integers("batch", "length", "channels", "state", "directions", "softplus"),
        ("direction", ScanDirection * 2),
        ("z", Rows),
        ("dout", Rows),
        *pointers("out", "pregate", "dz"),
    ]


class ConvDirection(ctypes.Structure):
    """One direction of a convolution: filter, output, gradients."""

    _fields_ = [
        *pointers("weight", "bias", "y"),
        ("dy", Rows),
        *pointers("dweight", "dbias"),
        *integers("reverse"),
    ]


class Conv(ctypes.Structure):
    """`dis_ssm_conv_forward` and `dis_ssm_conv_backward`."""

    _fields_ = [
        *integers("batch", "length", "channels", "width", "directions", "silu"),
        ("direction", ConvDirection * 2),
        ("x", Rows),
        *pointers("dx"),
    ]


class Norm(ctypes.Structure):
    """`dis_ssm_norm_forward` and `dis_ssm_norm_backward`."""

    _fields_ = [
        *integers("rows", "width"),
        ("eps", ctypes.c_float),
        *pointers("h", "residual", "weight", "stream", "normed", "rstd"),
        *pointers("dnormed", "dstream", "dx", "dweight"),
    ]
