"""DiS: a diffusion backbone of bidirectional Mamba blocks (arXiv 2402.05608), top to bottom.

Letters: B batch, C image channels, H, W image size, p patch, J = HW / p² patches, D hidden size,
L tokens = J + condition tokens, K classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dis_ssm.diffusion.guidance import guide, within
from dis_ssm.models.config import DiSConfig
from dis_ssm.models.mixer import BiMamba, Direction, dtype_of
from dis_ssm.ops.norm import add_rms_norm
from dis_ssm.system.nearest import nearest


def timestep_features(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features ``[cos(t w) | sin(t w)]``, w_i = 10000^(-i / (dim/2)): (B, dim).

    Computed in float32 or wider, whatever ``dtype`` is asked for.
    """
    half, wide = dim // 2, torch.promote_types(dtype, torch.float32)
    w = torch.exp(torch.arange(half, device=t.device, dtype=wide) * (-math.log(10_000) / half))
    angles = t.to(wide)[:, None] * w
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2)).to(dtype)


class RMSNorm(nn.Module):
    """The residual stream, once h is added to it, and its normalised value: `add_rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(h, residual, self.weight, self.eps)


class Block(nn.Module):
    """One residual step: ``residual += h; h = mixer(norm(residual))``.

    Deep blocks first merge the output of their mirror shallow block. The residual stream is
    float32. With ``adaln`` the norm is the paper's ablation ``y_s * LayerNorm(h) + y_b``, with
    (y_s, y_b) a linear map of the condition.
    """

    def __init__(self, mixer: BiMamba, dim: int, skip: str, adaln: bool, drop_path: float):
        super().__init__()
        self.skip_mode, self.drop_path = skip, drop_path
        self.skip_linear = nn.Linear(2 * dim, dim) if skip == "concat" else None
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) if adaln else RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if adaln else None
        self.mixer = mixer

    def forward(
        self,
        h: Tensor,
        residual: Tensor | None,
        skip: Tensor | None,
        condition: Tensor | None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h, skip, residual (B, L, D), the last None before the first block; condition (B, D);
        keep (B,) bool."""
        if self.skip_linear is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        elif self.skip_mode == "add":
            h = h + skip
        if self.training and self.drop_path and residual is not None:
            kept = 1 - self.drop_path
            if keep is None:
                keep = h.new_empty(h.shape[0]).bernoulli_(kept)
            h = h * keep[:, None, None].to(h.dtype) / kept
        if self.modulation is None:
            normed, residual = self.norm(h, residual)
        else:
            wide = torch.promote_types(h.dtype, torch.float32)
            residual = h.to(wide) if residual is None else residual + h
            scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
            normed = scale * self.norm(residual) + shift
        return self.mixer(normed.to(dtype_of(self.mixer.in_proj, normed.dtype))), residual


class Decoder(nn.Module):
    """RMSNorm, affine-free LayerNorm, shift and scale if conditional, linear to pixels."""

    def __init__(self, dim: int, out_features: int, conditional: bool):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if conditional else None
        self.linear = nn.Linear(dim, out_features)

    def forward(self, h: Tensor, residual: Tensor, condition: Tensor | None) -> Tensor:
        normed, _ = self.norm(h, residual)
        h = F.layer_norm(normed, normed.shape[-1:], eps=1e-6)
        if self.modulation is not None:
            shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        return self.linear(h.to(dtype_of(self.linear, h.dtype)))


class DiS(nn.Module):
    """Predicts a diffusion target from a noisy image or latent.

    Args:
        input_size: side of a square input, or (height, width), in pixels or latent cells.
        patch_size: p; must divide both sides.
        in_channels: C.
        hidden_size: D. depth: number of blocks, odd.
        num_classes: K; 0 is unconditional.
        learn_sigma: also predict C channels of variance interpolation.
        d_state, expand, d_conv: of the mixer (:class:`dis_ssm.models.mixer.BiMamba`).
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
        self.input_size, self.patch_size = config.sides, patch_size
        self.in_channels, self.out_channels = in_channels, config.out_channels
        self.learn_sigma = learn_sigma
        self.hidden_size, self.depth = hidden_size, depth
        self.num_classes, self.cond_dim = num_classes, cond_dim
        self.has_null_class, self.class_dropout_prob = config.has_null_class, class_dropout_prob
        self.num_condition_tokens = config.num_condition_tokens
        self.grad_checkpointing = False

        height, width = config.sides
        tokens = height * width // patch_size**2 + self.num_condition_tokens

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_embed = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.SiLU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.class_embed = self.cond_embed = None
        if num_classes:
            self.class_embed = nn.Embedding(num_classes + self.has_null_class, hidden_size)
        elif cond_dim is not None:
            self.cond_embed = nn.Linear(cond_dim, hidden_size)
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
        self.decoder = Decoder(
            hidden_size,
            patch_size**2 * config.out_channels,
            config.conditional and not config.adaln,
        )
        init_weights(self)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class": ``num_classes``.

        Its row exists where ``has_null_class`` is true: with ``class_dropout_prob`` > 0.
        """
        return self.num_classes

    def resize_positions(self, positions: Tensor, input_size: tuple[int, int]) -> Tensor:
        """A position embedding (1, tokens, D) learned at `input_size`, made to fit this model.

        The grid of patches is interpolated bicubically; the rows of the condition tokens stay.
        """
        (height, width), p = input_size, self.patch_size
        if (height, width) == self.input_size or positions.shape[1:] == self.pos_embed.shape[1:]:
            return positions
        tokens, patches = positions.split(
            [self.num_condition_tokens, height * width // p**2], dim=1
        )
        grid = rearrange(patches, "1 (h w) d -> 1 d h w", h=height // p)
        size = tuple(side // p for side in self.input_size)
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
        return torch.cat([tokens, rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Predicts the target for every pixel.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) timestep, integer or float, in the units of training (0 ... T - 1); a number or
                a tensor () is that of all images.
            y: (B,) labels of any integer dtype (``null_class`` for none), or (B, cond_dim)
                vectors; None when unconditional.
            keep: (depth, B) bool, the block inputs that stochastic depth spares in training; None
                draws them here.

        Returns:
            (B, 2C, H, W), prediction first, then the variance channels; (B, C, H, W) without
            ``learn_sigma``.

        Raises:
            ValueError: a shape, dtype or label that the model was not built for.
        """
        t = torch.as_tensor(t, device=x.device)
        t = t.expand(len(x)) if t.ndim == 0 else t
        self._check(x, t, y)
        h = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        time = self.time_embed(
            timestep_features(t, self.hidden_size, dtype_of(self.time_embed, x.dtype))
        )
        label = self._embed_condition(y)
        condition = time if label is None else time + label
        if self.num_condition_tokens:
            tokens = [time] if label is None else [label, time]
            h = torch.cat([*(token[:, None] for token in tokens), h], dim=1)
        h = h + self.pos_embed

        residual, skips, half = None, [], self.depth // 2
        for i, block in enumerate(self.blocks):
            step = (
                partial(checkpoint, block, use_reentrant=False)
                if self.grad_checkpointing
                else block
            )
            skip, spared = skips.pop() if i > half else None, None if keep is None else keep[i]
            h, residual = step(h, residual, skip, condition, spared)
            if i < half:
                skips.append(h)
        h = self.decoder(h, residual, condition)[:, self.num_condition_tokens :]
        p, (height, width) = self.patch_size, self.input_size
        return rearrange(
            h, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, w=width // p, p=p, q=p
        )

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_channels: int | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Classifier-free guidance in one batched pass: :func:`guide`.

        Args:
            x: (2B, C, H, W), the same noisy images twice; t: (2B,).
            y: (2B,) the labels, then the null class.
            cfg_scale: s; 1 is no guidance.
            cfg_channels: guide only so many leading channels (the released DiS: 3); None is all C.
            interval: (low, high) timesteps, both included, in which to guide; None is always.

        Returns:
            (2B, 2C or C, H, W), both halves alike; unguided and variance channels are the
            conditional pass's.
        """
        if len(x) % 2 or not len(x):
            raise ValueError(
                f"x must hold the same images twice, got {len(x)}: give cat[x, x], y cat[y, null]"
            )
        x = torch.cat([x.chunk(2)[0]] * 2)
        t = torch.as_tensor(t, device=x.device)
        t = t.expand(len(x)) if t.ndim == 0 else t
        conditional, null = self(x, t, y).chunk(2)
        channels = self.in_channels if cfg_channels is None else cfg_channels
        if not 0 <= channels <= self.in_channels:
            raise ValueError(f"cfg_channels must be 0 ... {self.in_channels}, got {cfg_channels}")
        inside = within(t.chunk(2)[0], interval)
        return torch.cat([guide(conditional, null, cfg_scale, channels, inside)] * 2)

    def _embed_condition(self, y: Tensor | None) -> Tensor | None:
        if self.cond_embed is not None:
            return self.cond_embed(y.to(dtype_of(self.cond_embed, self.pos_embed.dtype)))
        if self.class_embed is None:
            return None
        y = y.long()
        if self.training and self.has_null_class and self.class_dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device, dtype=torch.float32)
            drop = drop < self.class_dropout_prob
            y = torch.where(drop, self.null_class, y)
        return self.class_embed(y)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        expected = (self.in_channels, *self.input_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(
                f"x must be (batch, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        weights = dtype_of(self.patch_embed, x.dtype)
        if x.dtype != weights and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x is {x.dtype} and the model {weights}: give x.to({weights})")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        if self.num_classes == 0 and self.cond_dim is None:
            if y is not None:
                raise ValueError("y was given to an unconditional model (num_classes=0)")
            return
        shape = x.shape[:1] if self.cond_dim is None else (x.shape[0], self.cond_dim)
        if y is None:
            raise ValueError(
                f"y is missing: this model needs {'labels' if self.num_classes else 'vectors'}"
            )
        if y.shape != shape:
            raise ValueError(f"y must have shape {tuple(shape)}, got {tuple(y.shape)}")
        if self.class_embed is not None:
            _check_labels(y, self.class_embed.num_embeddings, self.num_classes)


def _check_labels(y: Tensor, rows: int, num_classes: int) -> None:
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {y.dtype}")
    if y.device.type != "cpu" or type(y) is not Tensor or torch.compiler.is_compiling():
        return  # the embedding itself traps; a check here would wait for the device
    if torch._C._functorch.is_functorch_wrapped_tensor(y):
        return  # its numbers are not to be seen inside a transform
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < rows:
        wrong = int(y[(y < 0) | (y >= rows)][0])
        hint = ""
        if wrong == num_classes:
            hint = "; it has no null class, having been built without label dropout"
        raise ValueError(f"label {wrong} is out of range: the model knows 0 ... {rows - 1}{hint}")


@torch.no_grad()
def init_weights(model: DiS) -> None:
    """Draws every parameter.

    ==========================================  ===============================================
    Linear, patch convolution                   Xavier uniform, bias 0
    time MLP, class table, positions            N(0, 0.02²), bias 0
    convolution (per direction)                 U(±width^-1/2), bias likewise
    x_proj                                      U(±I^-1/2)
    dt_proj weight                              U(±R^-1/2)
    dt_proj bias                                softplus⁻¹(exp(U(log 1e-3, log 1e-1)))
    A_log, D                                    log(1 ... N), 1
    in_proj; out_proj                           U(±D^-1/2); U(±I^-1/2) / sqrt(depth)
    norm weights                                1
    adaLN in the blocks                         weight 0, bias 1 (scale) and 0 (shift)
    decoder's modulation and final linear       0
    ==========================================  ===============================================
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    for parameter in (model.time_embed[0].weight, model.time_embed[2].weight, model.pos_embed):
        nn.init.normal_(parameter, std=0.02)
    if model.class_embed is not None:
        nn.init.normal_(model.class_embed.weight, std=0.02)
    for block in model.blocks:
        mixer = block.mixer
        _uniform(mixer.in_proj.weight, mixer.in_proj.in_features)
        _uniform(mixer.out_proj.weight, mixer.d_inner)
        mixer.out_proj.weight /= math.sqrt(model.depth)
        _init_direction(mixer.forward_scan)
        _init_direction(mixer.backward_scan)
        if block.modulation is not None:
            nn.init.zeros_(block.modulation.weight)
            block.modulation.bias.copy_(torch.arange(2).repeat_interleave(model.hidden_size) == 0)
    zero = [model.decoder.linear, model.decoder.modulation]
    for linear in filter(None, zero):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _uniform(parameter: Tensor, fan_in: int) -> None:
    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


def _init_direction(d: Direction) -> None:
    _uniform(d.conv_weight, d.conv_weight.shape[1])
    _uniform(d.conv_bias, d.conv_weight.shape[1])
    _uniform(d.x_proj.weight, d.x_proj.in_features)
    _uniform(d.dt_proj.weight, d.dt_proj.in_features)
    # Δ between 0.001 and 0.1, its logarithm uniform
    dt = torch.empty_like(d.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    d.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    d.A_log.copy_(
        torch.arange(1, d.A_log.shape[1] + 1, dtype=torch.float32).log().expand_as(d.A_log)
    )
    nn.init.ones_(d.D)


_SIZES = {
    "S": dict(hidden_size=368, depth=25),
    "B": dict(hidden_size=768, depth=25),
    "M": dict(hidden_size=768, depth=49),
    "L": dict(hidden_size=1024, depth=49),
    "H": dict(hidden_size=1536, depth=49),
}

DiS_models = {
    f"DiS-{size}/{patch}": partial(DiS, patch_size=patch, **kwargs)
    for size, kwargs in _SIZES.items()
    for patch in (2, 4, 8)
}


def create_model(name: str, **kwargs) -> DiS:
    """Builds a row of the paper's Table 1, ``"DiS-S/2"`` ... ``"DiS-H/8"``.

    Args:
        name: a key of ``DiS_models``.
        kwargs: any argument of :class:`DiS`.

    Raises:
        ValueError: unknown name, with near matches.
    """
    if name not in DiS_models:
        name = str(name)
        near = nearest(name, DiS_models) or DiS_models
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return DiS_models[name](**kwargs)
