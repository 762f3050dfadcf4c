"""What a model refuses: sizes that cannot be, inputs that it was not built for."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dis_ssm.system.limits import LARGEST_SIDE


def check_count(name: str, value: Any, least: int = 1, most: int = LARGEST_SIDE) -> None:
    """ValueError for what is no integer from `least` to `most`."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be at least {least} and an integer, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_input(x: Tensor, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whether a model takes these images and times.

    Args:
        x: should be (B, *shape), and of `dtype` unless autocast is on.
        t: should be (B,).
        shape: (C, H, W).
        dtype: of the model's weights.

    Raises:
        ValueError: another shape or dtype.
    """
    if x.shape[1:] != shape:
        raise ValueError(f"x must be (batch, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x is {x.dtype} and the model {dtype}: give x.to({dtype})")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")


def check_condition(
    y: Tensor | None, batch: int, num_classes: int, cond_dim: int | None, null_class: bool
) -> None:
    """Whether a model takes this condition.

    Args:
        y: should be (batch,) labels with `num_classes`, (batch, cond_dim) with `cond_dim`, or None.
        batch: B.
        num_classes: K, 0 for none.
        cond_dim: width of the vectors, None for none.
        null_class: whether K is a label too.

    Raises:
        ValueError: a condition that is missing, unwanted, of another shape, or not in the table.
    """
    if not num_classes and cond_dim is None:
        if y is not None:
            raise ValueError("y was given to an unconditional model (num_classes=0)")
        return
    if y is None:
        raise ValueError(f"y is missing: this model needs {'labels' if num_classes else 'vectors'}")
    shape = (batch,) if cond_dim is None else (batch, cond_dim)
    if y.shape != shape:
        raise ValueError(f"y must have shape {shape}, got {tuple(y.shape)}")
    if num_classes:
        _check_labels(y, num_classes, null_class)


def _check_labels(y: Tensor, num_classes: int, null_class: bool) -> None:
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {y.dtype}")
    if y.device.type != "cpu" or type(y) is not Tensor or torch.compiler.is_compiling():
        return  # the embedding itself traps; a check here would wait for the device
    if torch._C._functorch.is_functorch_wrapped_tensor(y):
        return  # its numbers are not to be seen inside a transform
    last = num_classes if null_class else num_classes - 1
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= last:
        wrong = int(y[(y < 0) | (y > last)][0])
        hint = ""
        if wrong == num_classes:
            hint = "; it has no null class, having been built without label dropout"
        raise ValueError(f"label {wrong} is out of range: the model knows 0 ... {last}{hint}")
