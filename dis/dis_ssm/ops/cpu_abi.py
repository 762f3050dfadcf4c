"""What the functions of `kernels/cpu` take: the structs of `scan.cpp`, `conv.cpp` and `norm.cpp`.

Pointers are to float32 memory and null where a tensor is left out; strides count floats.
"""

from __future__ import annotations

import ctypes


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor whose last stride is 1."""

    _fields_ = [*_pointers("data"), *_integers("batch_stride", "row_stride")]


class ScanDirection(ctypes.Structure):
    """One direction of a scan: inputs, kept states, gradients."""

    _fields_ = [
        *((name, Rows) for name in ("x", "dt", "B", "C")),
        *_pointers("A", "D", "dt_bias", "states"),
        *_pointers("dx", "ddt", "dB", "dC", "dA", "dD", "ddt_bias"),
        *_integers("reverse"),
    ]


class Scan(ctypes.Structure):
    """`dis_ssm_scan_forward` and `dis_ssm_scan_backward`."""

    _fields_ = [
        *_integers("batch", "length", "channels", "state", "directions", "softplus"),
        ("direction", ScanDirection * 2),
        ("z", Rows),
        ("dout", Rows),
        *_pointers("out", "pregate", "dz"),
    ]


class ConvDirection(ctypes.Structure):
    """One direction of a convolution: filter, output, gradients."""

    _fields_ = [
        *_pointers("weight", "bias", "y"),
        ("dy", Rows),
        *_pointers("dweight", "dbias"),
        *_integers("reverse"),
    ]


class Conv(ctypes.Structure):
    """`dis_ssm_conv_forward` and `dis_ssm_conv_backward`."""

    _fields_ = [
        *_integers("batch", "length", "channels", "width", "directions", "silu"),
        ("direction", ConvDirection * 2),
        ("x", Rows),
        *_pointers("dx"),
    ]


class Norm(ctypes.Structure):
    """`dis_ssm_norm_forward` and `dis_ssm_norm_backward`."""

    _fields_ = [
        *_integers("rows", "width"),
        ("eps", ctypes.c_float),
        *_pointers("h", "residual", "weight", "stream", "normed", "rstd"),
        *_pointers("dnormed", "dstream", "dx", "dweight"),
    ]
