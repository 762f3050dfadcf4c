"""The structs that the kernels of CPU and CUDA have in common.

Pointers are null where a tensor is left out.
"""

from __future__ import annotations

import ctypes


def pointers(*names: str) -> list[tuple[str, type]]:
    """Fields that hold addresses."""
    return [(name, ctypes.c_void_p) for name in names]


def integers(*names: str) -> list[tuple[str, type]]:
    """Fields of 64 bits, signed."""
    return [(name, ctypes.c_int64) for name in names]


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor whose channels lie side by side."""

    _fields_ = [*pointers("data"), *integers("batch_stride", "row_stride")]


class ScanDirection(ctypes.Structure):
    """One direction of a scan: inputs, kept states, gradients."""

    _fields_ = [
        *((name, Rows) for name in ("x", "dt", "B", "C")),
        *pointers("A", "D", "dt_bias", "states"),
        *pointers("dx", "ddt", "dB", "dC", "dA", "dD", "ddt_bias"),
        *integers("reverse"),
    ]
