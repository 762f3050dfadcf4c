"""What the kernels of `kernels/cuda` take: the structs of `common.cuh`, `scan.cu` and `conv.cu`.

They are passed by value. Pointers are null where a tensor is left out; strides count bytes.
"""

from __future__ import annotations

import ctypes

MAX_PLANES = 10


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor in the I/O type whose last stride is one element."""

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
    """The kernels of `scan.cu`."""

    _fields_ = [
        *_integers("batch", "length", "channels", "state", "directions"),
        ("direction", ScanDirection * 2),
        ("z", Rows),
        ("dout", Rows),
        *_pointers("out", "pregate", "y", "dz"),
    ]


class ConvSide(ctypes.Structure):
    """The filter over the past or the one over the future: filter, output, gradients."""

    _fields_ = [
        *_pointers("weight", "bias", "y"),
        ("dy", Rows),
        *_pointers("dweight", "dbias"),
    ]


class Conv(ctypes.Structure):
    """The kernels of `conv.cu`."""

    _fields_ = [
        *_integers("batch", "length", "channels", "segment"),
        ("past", ConvSide),
        ("future", ConvSide),
        ("x", Rows),
        *_pointers("dx"),
    ]


class Plane(ctypes.Structure):
    """Partial results of `rows` blocks and where their sum goes."""

    _fields_ = [*_pointers("partial", "out"), *_integers("rows", "size", "as_io")]


class Sums(ctypes.Structure):
    """`sum_partials`."""

    _fields_ = [("plane", Plane * MAX_PLANES)]
