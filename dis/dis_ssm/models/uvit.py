"""U-ViT (Bao et al. 2023, arXiv 2209.12152), to compare with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_ssm.models.conditioning import timestep_features


class UViTBlock(nn.Module):
    """h + attention(LN(h)), then h + MLP(LN(h)); a deep one first maps [h, skip] back to D."""

    def __init__(self, dim: int, heads: int, deep: bool):
        super().__init__()
        self.heads = heads
        self.skip_linear = nn.Linear(2 * dim, dim) if deep else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor, skip: Tensor | None) -> Tensor:
        """h (B, L, D) and, in deep blocks, the shallow block's output (B, L, D) -> (B, L, D)."""
        if self.skip_linear is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(m.transpose(1, 2) for m in (q, k, v)))
        h = h + self.proj(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class UViT(nn.Module):
    """A transformer in the manner of U-ViT (arXiv 2209.12152): time, class and patches are tokens,
    long skips are concatenated and projected, a 3x3 convolution ends it.

    Args:
        input_size: (height, width). patch_size: p. in_channels: C. num_classes: 0 for none.
        depth: L, odd. heads, head_width: D is their product.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        num_classes: int,
        depth: int,
        heads: int,
        head_width: int,
    ):
        super().__init__()
        dim = heads * head_width
        self.grid = tuple(side // patch_size for side in input_size)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.extra = 2 if num_classes else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + math.prod(self.grid), dim))
        self.blocks = nn.ModuleList(UViTBlock(dim, heads, i > depth // 2) for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, patch_size**2 * in_channels)
        self.final = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), y (B,) int or None -> (B, C, H, W)."""
        h = self.patch_embed(x).flatten(2).mT
        tokens = [timestep_features(t, h.shape[-1], h.dtype)]
        tokens += [] if self.class_embed is None else [self.class_embed(y)]
        h = torch.cat([*(token[:, None] for token in tokens), h], dim=1) + self.pos_embed
        skips, half = [], len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            h = block(h, skips.pop() if i > half else None)
            if i < half:
                skips.append(h)
        h = self.linear(self.norm(h))[:, self.extra :].mT
        p = self.patch_embed.stride
        return self.final(
            F.fold(h, [n * s for n, s in zip(self.grid, p, strict=True)], p, stride=p)
        )
