"""Classifier-free guidance of any model(x, t, y).

Letters: B images; x (B, C, ...), t (B,), y what the model is told (`dis_ssm.condition`); out_y and
out_∅ the model's outputs for y and for the null condition ∅, (B, C or 2C, ...).
"""

import math
from typing import Any

import torch
from torch import Tensor

from dis_ssm.condition import Condition, Conditioning, cat
from dis_ssm.diffusion.process import Model, tensor_of, working_dtype


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    cfg_scale: float,
    channels: int,
    inside: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance of model outputs (Ho & Salimans 2021), out_∅ + s (out_y - out_∅).

    Args:
        conditional: out_y (B, C or 2C, ...).
        unconditional: out_∅, of the same shape.
        cfg_scale: s; at 1 the result is `conditional` itself.
        channels: so many leading channels are guided; the others stay conditional.
        inside: (B,) bool, which images are guided, all when None; the others stay conditional.
    """
    if cfg_scale == 1:
        return conditional
    towards, away = conditional[:, :channels], unconditional[:, :channels]
    result = away + cfg_scale * (towards - away)
    if inside is not None:
        result = torch.where(inside.reshape(-1, *[1] * (result.ndim - 1)), result, towards)
    return torch.cat([result, conditional[:, channels:]], dim=1)


def within(t: Tensor, interval: tuple[float, float] | None) -> Tensor | None:
    """Which timesteps lie in (low, high), both included: bool like t; None without an interval."""
    return None if interval is None else (t >= interval[0]) & (t <= interval[1])


def guided(
    model: Model,
    cfg_scale: float,
    *,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    null_class: int | Tensor | None = None,
    null_parts: tuple[str, ...] = (),
) -> Model:
    """`model` under classifier-free guidance (Ho & Salimans 2021), again a model(x, t, y):

        out = out_∅ + cfg_scale (out_y - out_∅)

    on the first `channels` of x's C channels (all by default); other channels and the variance half
    stay conditional. Both passes are one call on cat[x, x], cat[y, null]. At fixed x_t every target
    is an affine function of ε and the two weights sum to 1, so guiding ε, x0, v or the score is the
    same thing and the rule needs no conversion.

    Args:
        cfg_scale: 1 returns the model itself.
        interval: (low, high), both included: the timesteps that are guided. At others the output is
            conditional; a batch wholly outside costs one pass.
        null_class: the null label, `model.null_class` by default. For vectors y the null vector
            (cond_dim,), which must be given.
        null_parts: of a `Condition`, the parts that ∅ lacks, all by default (see `Condition.null`);
            the others, such as the small image of a cascade, are the same in both passes.

    Raises:
        ValueError: scale, channels, interval or parts make no sense, y is None, or its null is not
            known.
    """
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be finite, got {cfg_scale}")
    match interval:
        case None:
            pass
        case (low, high) if low <= high:
            pass
        case _:
            raise ValueError(f"the guidance interval must be (low, high), got {interval}")
    if cfg_scale == 1:
        return model
    if null_class is None:
        null_class = _null_class(model)

    def guided_model(x: Tensor, t: Tensor, y: Conditioning) -> Tensor:
        count = x.shape[1] if channels is None else channels
        if not 0 <= count <= x.shape[1]:
            raise ValueError(f"cannot guide {channels} of {x.shape[1]} channels")
        null = _null_like(y, null_class, null_parts, cfg_scale)
        inside = within(t, interval)
        if inside is not None and not inside.any():
            return model(x, t, y)
        output = tensor_of(model(torch.cat([x, x]), torch.cat([t, t]), cat([y, null])))
        conditional, unconditional = output.to(working_dtype(output)).chunk(2)
        return guide(conditional, unconditional, cfg_scale, count, inside)

    return guided_model


def _null_class(model: Model) -> Any:
    """The null class of a model, or of the one inside DataParallel, DistributedDataParallel,
    AveragedModel and torch.compile; None without one."""
    inner: Any = model
    while not hasattr(inner, "null_class"):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if wrapped is None:
            return None
        inner = wrapped
    return inner.null_class if getattr(inner, "has_null_class", True) else None


def _null_like(
    y: Conditioning,
    null_class: int | Tensor | None,
    null_parts: tuple[str, ...],
    cfg_scale: float,
) -> Tensor | Condition:
    """∅ with the rows of y."""
    if y is None:
        raise ValueError(f"cfg_scale = {cfg_scale} guides towards a condition, but y is None")
    is_whole = isinstance(y, Condition)
    needed = not is_whole or (y.label is not None and (not null_parts or "label" in null_parts))
    if needed and null_class is None:
        raise ValueError(
            f"cfg_scale = {cfg_scale} needs null_class: the model has no null class, as one that "
            f"was trained without label dropout, or does not name it"
        )
    if is_whole:
        return y.null(*null_parts, null_class=null_class)
    if null_parts:
        raise ValueError(
            f"null_parts {', '.join(null_parts)} are of a Condition, but y is a tensor"
        )
    if y.is_floating_point():
        if not isinstance(null_class, Tensor) or not null_class.is_floating_point():
            raise ValueError(f"y is a vector, so null_class must be one too, got {null_class!r}")
        return null_class.to(y).expand_as(y)
    return torch.as_tensor(null_class, dtype=torch.int64, device=y.device).expand_as(y)
