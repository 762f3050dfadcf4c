"""What DiS is stacked from: norms of the residual stream, the block, the decoder.

Letters: B batch, L tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_ssm.models.mixer import BiMamba, dtype_of
from dis_ssm.ops.norm import add_rms_norm


class AddRMSNorm(nn.Module):
    """`stream = residual + h` and `stream / rms(stream) * weight`: `dis_ssm.ops.norm.add_rms_norm`.

    Args:
        dim: D.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed stream and the stream, (B, L, D) in float32 or wider; no residual is zero."""
        return add_rms_norm(h, residual, self.weight, self.eps)


class AddLayerNorm(nn.Module):
    """`stream = residual + h` and its LayerNorm without weights, which a condition will modulate.

    Args:
        dim: D.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed stream and the stream, (B, L, D) in float32 or wider; no residual is zero."""
        wide = torch.promote_types(h.dtype, torch.float32)
        stream = h.to(wide) if residual is None else residual + h
        return F.layer_norm(stream, (self.dim,), eps=self.eps), stream


class Block(nn.Module):
    """One residual step: `residual += h; h = mixer(norm(residual))`.

    Deep blocks first merge the output of their mirror shallow block. The residual stream is
    float32.

    Args:
        mixer: maps tokens to tokens.
        dim: D.
        skip: how the shallow block's output is merged: "concat" (a linear map of both), "add", or
            "none".
        adaln: the paper's ablation (§3.2): the norm is `scale * LayerNorm(stream) + shift`, both
            a linear map of the condition, instead of RMSNorm.
        drop_path: in training, the chance that an image's h is left out.
    """

    def __init__(self, mixer: BiMamba, dim: int, skip: str, adaln: bool, drop_path: float):
        super().__init__()
        self.skip_mode, self.drop_path = skip, drop_path
        self.skip_linear = nn.Linear(2 * dim, dim) if skip == "concat" else None
        self.norm = AddLayerNorm(dim) if adaln else AddRMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if adaln else None
        self.mixer = mixer

    def forward(
        self,
        h: Tensor,
        residual: Tensor | None,
        skip: Tensor | None,
        condition: Tensor | None,
        block_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The step of a batch.

        Args:
            h: (B, L, D), the output of the block before.
            residual: (B, L, D), the stream; None before the first block.
            skip: (B, L, D), the shallow block's output, where one is merged.
            condition: (B, D), which adaLN needs.
            block_mask: (B,) bool, the images whose h stochastic depth keeps in training; None
                draws them here.

        Returns:
            The new h and the new residual, (B, L, D).
        """
        if self.skip_linear is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))  # (B, L, 2D) -> (B, L, D)
        elif self.skip_mode == "add":
            h = h + skip
        if self.training and self.drop_path and residual is not None:
            h = _drop(h, self.drop_path, block_mask)
        normed, residual = self.norm(h, residual)
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
            normed = scale * normed + shift
        return self.mixer(normed.to(dtype_of(self.mixer.in_proj, normed.dtype))), residual


def _drop(h: Tensor, drop_path: float, block_mask: Tensor | None) -> Tensor:
    """Stochastic depth (Huang et al. 2016): h of some images 0, of the others over its chance."""
    kept = 1 - drop_path
    if block_mask is None:
        block_mask = h.new_empty(h.shape[0]).bernoulli_(kept)
    return h * block_mask[:, None, None].to(h.dtype) / kept


class Decoder(nn.Module):
    """RMSNorm, LayerNorm without weights, modulation if conditional, a linear map to pixels.

    Args:
        dim: D.
        out_features: numbers in a patch.
        conditional: whether the condition shifts and scales what is decoded, as in DiT.
    """

    def __init__(self, dim: int, out_features: int, conditional: bool):
        super().__init__()
        self.norm = AddRMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if conditional else None
        self.linear = nn.Linear(dim, out_features)

    def forward(self, h: Tensor, residual: Tensor, condition: Tensor | None) -> Tensor:
        """h and residual (B, L, D), condition (B, D) -> (B, L, out_features)."""
        normed, _ = self.norm(h, residual)
        h = F.layer_norm(normed, normed.shape[-1:], eps=1e-6)
        if self.modulation is not None:
            shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        return self.linear(h.to(dtype_of(self.linear, h.dtype)))
