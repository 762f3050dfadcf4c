"""What every process shares: what a model is, where its noise comes from, in which precision."""

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Generators = torch.Generator | list[torch.Generator] | None


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


def check_inputs(x: Tensor, y: Tensor | None):
    if not x.is_floating_point():
        raise ValueError(f"images must be floating point, in [-1, 1] when clean, got {x.dtype}")
    if y is not None and not isinstance(y, Tensor):
        raise ValueError(f"y must be a tensor, one row per image, got {y!r}")
    if y is not None and (y.ndim == 0 or y.shape[0] != x.shape[0]):
        raise ValueError(
            f"y has shape {tuple(y.shape)} for {x.shape[0]} images: give one per image"
        )
