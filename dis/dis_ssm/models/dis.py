"""DiS: a diffusion backbone of bidirectional Mamba blocks (arXiv 2402.05608), top to bottom.

Letters: B batch, C image channels, H, W image size, p patch, J = HW / p² patches, D hidden size,
L tokens = J + condition tokens, K classes.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dis_ssm.condition import Conditioning
from dis_ssm.models.blocks import Block, Decoder
from dis_ssm.models.checks import check_condition, check_input
from dis_ssm.models.conditioning import TimeEmbedding, as_tensor, batch_of_times, drop_labels
from dis_ssm.models.config import DiSConfig
from dis_ssm.models.initialization import init_weights
from dis_ssm.models.mixer import BiMamba, dtype_of
from dis_ssm.models.patches import PatchGrid


class DiS(nn.Module):
    """Predicts a diffusion target from a noisy image or latent.

    Args:
        input_size: side of a square input, or (height, width), in pixels or latent cells.
        patch_size: p; must divide both sides.
        in_channels: C.
        hidden_size: D.
        depth: number of blocks, odd.
        num_classes: K; 0 is unconditional.
        learn_sigma: also predict C channels of variance interpolation.
        d_state, expand, d_conv: of the mixer (`dis_ssm.models.mixer.BiMamba`).
        skip: "concat" (the paper's long skips), "add", or "none".
        time_conditioning: "token", or "adaln" (no condition tokens, each block's norm modulated).
        class_dropout_prob: in training, labels become the null class with this probability; 0
            means no null row. Set the attribute to 0 later to keep the row but drop elsewhere.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        cond_dim: y is a vector (B, cond_dim), mapped by a linear layer, instead of a class. It is
            never dropped here.

    Raises:
        ValueError: sizes that do not fit together, or an unknown option.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 368,
        depth: int = 25,
        num_classes: int = 0,
        learn_sigma: bool = True,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        skip: str = "concat",
        time_conditioning: str = "token",
        class_dropout_prob: float = 0.1,
        drop_path: float = 0.0,
        cond_dim: int | None = None,
    ):
        super().__init__()
        config = DiSConfig(
            input_size, patch_size, in_channels, hidden_size, depth, num_classes, learn_sigma,
            d_state, expand, d_conv, skip, time_conditioning, class_dropout_prob, drop_path,
            cond_dim,
        )  # fmt: skip
        self.config = asdict(config)  # rebuilds this model: DiS(**config)
        self.grid = config.grid
        self.input_size, self.patch_size = config.grid.sides, patch_size
        self.in_channels, self.out_channels = in_channels, config.out_channels
        self.learn_sigma = learn_sigma
        self.hidden_size, self.depth = hidden_size, depth
        self.num_classes, self.cond_dim = num_classes, cond_dim
        self.has_null_class, self.class_dropout_prob = config.has_null_class, class_dropout_prob
        self.num_condition_tokens = config.num_condition_tokens
        self.grad_checkpointing = False

        self.patch_embed = self.grid.embedding(in_channels, hidden_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.class_embed = self.cond_embed = None
        if num_classes:
            self.class_embed = nn.Embedding(num_classes + self.has_null_class, hidden_size)
        elif cond_dim is not None:
            self.cond_embed = nn.Linear(cond_dim, hidden_size)
        tokens = self.num_condition_tokens + len(self.grid)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, hidden_size))
        self.blocks = nn.ModuleList(
            Block(
                BiMamba(hidden_size, d_state, expand, d_conv),
                hidden_size,
                skip if i > depth // 2 else "none",
                config.adaln,
                drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        out_features = self.grid.patch_area * self.out_channels
        self.decoder = Decoder(hidden_size, out_features, config.conditional and not config.adaln)
        init_weights(self)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class": `num_classes`.

        Its row exists where `has_null_class` is true: with `class_dropout_prob` > 0.
        """
        return self.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def resize_positions(self, positions: Tensor, input_size: tuple[int, int]) -> Tensor:
        """A position embedding learned at another input size, made to fit this model.

        The rows of the patches are interpolated (`PatchGrid.resize`); those of the condition
        tokens stay. One that has the right shape is returned as it is.

        Args:
            positions: (1, tokens, D).
            input_size: of the model that it comes from, whose patch size was the same.

        Raises:
            ValueError: an embedding that has not as many rows as such a model.
        """
        if tuple(input_size) == self.input_size or positions.shape[1:] == self.pos_embed.shape[1:]:
            return positions
        old = PatchGrid.of(input_size, self.patch_size)
        rows = [self.num_condition_tokens, len(old)]
        if positions.shape[1] != sum(rows):
            raise ValueError(
                f"a position embedding for {old} has {sum(rows)} rows, got {positions.shape[1]}"
            )
        tokens, patches = positions.split(rows, dim=1)
        return torch.cat([tokens, self.grid.resize(patches, old)], dim=1)

    def forward(
        self, x: Tensor, t: Tensor, y: Conditioning = None, block_mask: Tensor | None = None
    ) -> Tensor:
        """Predicts the target for every pixel.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) timestep, integer or float, in the units of training (0 ... T - 1); a number or
                a tensor () is that of all images.
            y: (B,) labels of any integer dtype (`null_class` for none), or (B, cond_dim)
                vectors, or a `Condition` of that one part; None when unconditional.
            block_mask: (depth, B) bool, the images of which stochastic depth keeps each block's
                input in training; None draws them here.

        Returns:
            (B, 2C, H, W), prediction first, then the variance channels; (B, C, H, W) without
            `learn_sigma`.

        Raises:
            ValueError: a shape, dtype or label that the model was not built for.
        """
        t, y = batch_of_times(t, x), as_tensor(y)  # (B,) each, or y (B, cond_dim)
        dtype = dtype_of(self.patch_embed, x.dtype)
        check_input(x, t, (self.in_channels, *self.input_size), dtype)
        check_condition(y, len(x), self.num_classes, self.cond_dim, self.has_null_class)
        h = self.grid.flatten(self.patch_embed(x))  # (B, C, H, W) -> (B, J, D)
        time, given = self.time_embed(t, x.dtype), self._embed_condition(y)  # (B, D) each
        condition = time if given is None else time + given  # (B, D)
        if self.num_condition_tokens:
            tokens = [time] if given is None else [given, time]
            h = torch.cat([*(token[:, None] for token in tokens), h], dim=1)  # (B, L, D)
        h = h + self.pos_embed

        residual, skips, half = None, [], self.depth // 2
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing:
                block = partial(checkpoint, block, use_reentrant=False)
            skip = skips.pop() if i > half else None
            mask = None if block_mask is None else block_mask[i]
            h, residual = block(h, residual, skip, condition, mask)  # (B, L, D) each
            if i < half:
                skips.append(h)

        h = self.decoder(h, residual, condition)  # (B, L, p² 2C)
        return self.grid.unpatchify(h[:, self.num_condition_tokens :])  # (B, 2C, H, W)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_channels: int | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Classifier-free guidance in one batched pass: `dis_ssm.diffusion.guidance.guide`.

        Args:
            x: (2B, C, H, W), the same noisy images twice.
            t: (2B,), or one for all.
            y: (2B,) the labels, then the null class.
            cfg_scale: s; 1 is no guidance.
            cfg_channels: guide only so many leading channels (the released DiS: 3); None is all C.
            interval: (low, high) timesteps, both included, in which to guide; None is always.

        Returns:
            (2B, 2C or C, H, W), both halves alike; unguided and variance channels are the
            conditional pass's.

        Raises:
            ValueError: an odd batch, channels that there are not, and what `forward` raises.
        """
        from dis_ssm.diffusion.guidance import guide, within  # all else here needs no diffusion

        if len(x) % 2 or not len(x):
            raise ValueError(
                f"x must hold the same images twice, got {len(x)}: give cat[x, x], y cat[y, null]"
            )
        x = torch.cat([x.chunk(2)[0]] * 2)
        t = batch_of_times(t, x)
        conditional, null = self(x, t, y).chunk(2)
        channels = self.in_channels if cfg_channels is None else cfg_channels
        if not 0 <= channels <= self.in_channels:
            raise ValueError(f"cfg_channels must be 0 ... {self.in_channels}, got {cfg_channels}")
        inside = within(t.chunk(2)[0], interval)
        return torch.cat([guide(conditional, null, cfg_scale, channels, inside)] * 2)

    def _embed_condition(self, y: Tensor | None) -> Tensor | None:
        """(B,) labels or (B, cond_dim) vectors -> (B, D)."""
        if self.cond_embed is not None:
            return self.cond_embed(y.to(dtype_of(self.cond_embed, self.pos_embed.dtype)))
        if self.class_embed is None:
            return None
        y = y.long()
        if self.training and self.has_null_class and self.class_dropout_prob > 0:
            y = drop_labels(y, self.class_dropout_prob, self.null_class)
        return self.class_embed(y)
