"""What every process shares: its interface, what a model is, where noise comes from, precision.

Letters: B images; x (B, C, ...), t (B,) times as the process counts them; y what the model is told
(`dis_ssm.condition`): a tensor, a Condition or None, one row per image.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from dis_ssm.condition import Condition, Conditioning, rows

Model: TypeAlias = Callable[[Tensor, Tensor, Any], Tensor]  # model(x, t, y)
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


class Process(Protocol):
    """What a process of noise and data offers to those who train a model for it."""

    def draw_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Times (n,) to train at, on the generator's device; None is PyTorch's global generator."""

    def bin_times(self, t: Tensor, bins: int) -> Tensor:
        """int64 like t, in [0, bins): in which of `bins` equal parts of the process's time t lies,
        from clean data to noise."""

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor,
        y: Conditioning = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of each image at its time, (B,) each; "loss" is what training minimises."""


def draw(
    distribution: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: Generators,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """`torch.randn` or `torch.rand` of a shape (B, ...) on `device`, drawn on the generators' own.

    With a list, image i comes from generator i alone, whatever the batch around it.

    Raises:
        ValueError: something else, or a list that has not one generator per image.
    """
    if generator is None:
        return distribution(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        values = distribution(shape, generator=generator, device=generator.device, dtype=dtype)
        return values.to(device)
    if not isinstance(generator, list | tuple):
        raise ValueError(f"generator must be a torch.Generator or a list, got {generator!r}")
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images: give one per image")
    return torch.stack(
        [distribution(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    ).to(device)


def tensor_of(output) -> Tensor:
    """What a model predicts: a tensor, or the first of a tuple, or `.sample` as in diffusers.

    Raises:
        ValueError: anything else.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    output = getattr(output, "sample", output) if not isinstance(output, Tensor) else output
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returned {type(output).__name__}: return a tensor (B, C, ...)")
    return output


def working_dtype(x: Tensor) -> torch.dtype:
    """Float64 stays, everything else computes in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_inputs(x: Tensor, y: Conditioning) -> None:
    """Raises ValueError unless x is floating point and y, if given, has a row for each image."""
    if not x.is_floating_point():
        raise ValueError(f"images must be floating point, in [-1, 1] when clean, got {x.dtype}")
    if y is None:
        return
    if not isinstance(y, Tensor | Condition):
        raise ValueError(f"y must be a tensor or a Condition, one row per image, got {y!r}")
    if isinstance(y, Tensor) and (y.ndim == 0 or y.shape[0] != x.shape[0]):
        raise ValueError(
            f"y has shape {tuple(y.shape)} for {x.shape[0]} images: give one per image"
        )
    if rows(y) != x.shape[0]:
        raise ValueError(f"y has {rows(y)} rows for {x.shape[0]} images: give one per image")
