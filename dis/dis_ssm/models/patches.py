"""An image cut into patches, and put together again.

Letters: B batch, C channels, H, W sides, p, q patch, J patches, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dis_ssm.models.checks import check_count


@dataclass(frozen=True)
class PatchGrid:
    """The patches of an image, row after row.

    Args:
        sides: (H, W).
        patch: (p, q), which divide the sides.
    """

    sides: tuple[int, ...]
    patch: tuple[int, ...]

    @classmethod
    def of(cls, input_size: int | Sequence[int], patch_size: int) -> PatchGrid:
        """The grid of a square's side or (H, W), and a patch's side.

        Raises:
            ValueError: sizes that are no counts, or do not fit together.
        """
        sides = (input_size,) * 2 if isinstance(input_size, Number) else tuple(input_size)
        for name, side in zip(("height", "width"), sides, strict=True):
            check_count(name, side)
        check_count("patch_size", patch_size)
        if any(side % patch_size for side in sides):
            size = "x".join(map(str, sides))
            raise ValueError(f"patch_size {patch_size} does not divide the input size {size}")
        return cls(sides, (patch_size,) * 2)

    @property
    def cells(self) -> tuple[int, ...]:
        """How many patches there are along each side."""
        return tuple(side // p for side, p in zip(self.sides, self.patch, strict=True))

    @property
    def patch_area(self) -> int:
        """How many cells of the input are in a patch."""
        return math.prod(self.patch)

    def __str__(self) -> str:
        sides, patch = ("x".join(map(str, sizes)) for sizes in (self.sides, self.patch))
        return f"{sides} in patches of {patch}"

    def __len__(self) -> int:
        """J, the number of patches."""
        return math.prod(self.cells)

    def embedding(self, in_channels: int, dim: int) -> nn.Module:
        """The linear map of each patch, a convolution: (B, C, H, W) -> (B, D, H/p, W/q)."""
        return nn.Conv2d(in_channels, dim, self.patch, stride=self.patch)

    def flatten(self, h: Tensor) -> Tensor:
        """The embedding's output as tokens: (B, D, H/p, W/q) -> (B, J, D)."""
        return rearrange(h, "b d ... -> b (...) d")

    def unpatchify(self, h: Tensor) -> Tensor:
        """Tokens back to an image: (B, J, p q C) -> (B, C, H, W)."""
        sizes = dict(zip("hwpq", (*self.cells, *self.patch), strict=True))
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", **sizes)

    def resize(self, rows: Tensor, old: PatchGrid) -> Tensor:
        """A vector for each patch of another grid, interpolated to this one, bicubically.

        Args:
            rows: (1, J of `old`, D).
            old: the grid that they belong to.

        Returns:
            (1, J, D).
        """
        rows = rearrange(rows, "1 (h w) d -> 1 d h w", h=old.cells[0])
        rows = F.interpolate(rows, self.cells, mode="bicubic", align_corners=False)
        return rearrange(rows, "1 d h w -> 1 (h w) d")
