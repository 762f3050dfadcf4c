"""What the kernels of `kernels/cuda` take: the structs of `common.cuh`, `scan.cu` and `conv.cu`.

They are passed by value. Pointers are null where a tensor is left out; strides count bytes, and
`Rows` hold the I/O type.
"""

from __future__ import annotations

import ctypes

from dis_ssm.ops.abi import Rows, ScanDirection, integers, pointers

MAX_PLANES = 10


class Scan(ctypes.Structure):
    """The kernels of `scan.cu`."""

    _fields_ = [
        *integers("batch", "length", "channels", "state", "directions"),
        ("direction", ScanDirection * 2),
        ("z", Rows),
        ("dout", Rows),
        *pointers("out", "pregate", "y", "dz"),
    ]


class ConvSide(ctypes.Structure):
    """The filter over the past or the one over the future: filter, output, gradients."""

    _fields_ = [
        *pointers("weight", "bias", "y"),
        ("dy", Rows),
        *pointers("dweight", "dbias"),
    ]


class Conv(ctypes.Structure):
    """The kernels of `conv.cu`."""

    _fields_ = [
        *integers("batch", "length", "channels", "segment"),
        ("past", ConvSide),
        ("future", ConvSide),
        ("x", Rows),
        *pointers("dx"),
    ]


class Plane(ctypes.Structure):
    """Partial results of `rows` blocks and where their sum goes."""

    _fields_ = [*pointers("partial", "out"), *integers("rows", "size", "as_io")]


class Sums(ctypes.Structure):
    """`sum_partials`."""

    _fields_ = [("plane", Plane * MAX_PLANES)]
