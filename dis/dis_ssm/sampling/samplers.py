"""Samplers: a function each, pure functions of (model, diffusion, noise, y, ...).

Letters as in `diffusion`: a_t = ᾱ_t, s < t the step after t, -1 being clean data. Models are plain
callables `model(x, t, y)`; put an nn.Module in eval mode first. For guidance hand a sampler a
`guided` model, as `sample` does.

Everything runs under no_grad, not inference_mode, whose tensors neither every compiled model nor
later training can use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dis_ssm.condition import Conditioning
from dis_ssm.diffusion.gaussian import Diffusion, Reverse
from dis_ssm.diffusion.guidance import guided
from dis_ssm.diffusion.process import Generators, Model, check_inputs, draw, working_dtype
from dis_ssm.sampling.schedulers import is_scheduler, run_scheduler
from dis_ssm.sampling.steps import Callback, descending


def sample(
    model: Model,
    diffusion: Diffusion,
    noise: Tensor,
    y: Conditioning = None,
    *,
    steps: int | Sequence[int] = 250,
    sampler: Any = "ddpm",
    eta: float = 0.0,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    null_class: int | Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """Draw images from noise (B, C, ...): float32 (float64 from float64), model space, unclipped.

    `ddpm` (250 steps are the published protocol), `ddim`, or any diffusers scheduler of the same β
    and kind of prediction (`run_scheduler`), under classifier-free guidance (`guided`).

    Args:
        model: called in noise's dtype, with the original integer timestep (B,) int64 (float32 where
            a diffusers scheduler stops between timesteps).
        y: (B,) classes, (B, cond_dim) vectors or a `Condition` of B rows, on noise's device.
        steps: how many, evenly spaced (`respaced`), or the increasing timesteps themselves.
        sampler: "ddpm", "ddim" or a diffusers scheduler object, which is copied and left unchanged.
        eta: of "ddim" and of schedulers that take it, in [0, 1].
        cfg_scale, cfg_channels, cfg_interval, null_class: see `guided`.
        generator: of the noise drawn on the way: one, or a list, one per image, and then an image
            does not depend on the batch it is drawn in. None is PyTorch's global generator.
        callback: called as callback(i, t, x) after step i, which went from timestep t to x.
        clip_denoised: clip x̂0 to [-1, 1] at every step ("ddpm" and "ddim"; pixel space only).

    Raises:
        ValueError: an unknown sampler, steps out of range, options that do not go together, a
            scheduler that does not fit the diffusion, or what `guided` and the model raise.
    """
    check_inputs(noise, y)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    model = guided(
        model, cfg_scale, channels=cfg_channels, interval=cfg_interval, null_class=null_class
    )
    options: dict[str, Any] = {"steps": steps, "generator": generator, "callback": callback}
    if isinstance(sampler, str) and sampler in SAMPLERS:
        if sampler == "ddim":
            options["eta"] = eta
        elif eta:
            raise ValueError(f"eta = {eta} is an option of the ddim sampler, not of {sampler!r}")
        options["clip_denoised"] = clip_denoised
        return SAMPLERS[sampler](model, diffusion, noise, y, **options)
    if not is_scheduler(sampler):
        names = ", ".join(SAMPLERS)
        raise ValueError(
            f"sampler must be {names} or a diffusers scheduler object, got {sampler!r}"
        )
    if clip_denoised:
        raise ValueError("clip_denoised is the scheduler's own clip_sample: set it there")
    return run_scheduler(model, diffusion, noise, y, scheduler=sampler, eta=eta, **options)


@torch.no_grad()
def ddpm(
    model: Model,
    diffusion: Diffusion,
    noise: Tensor,
    y: Conditioning = None,
    *,
    steps: int | Sequence[int] = 250,
    generator: Generators = None,
    callback: Callback | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_s is drawn from p(x_s | x_t), the normal
    distribution of `Diffusion.reverse`, and the last step takes its mean.

    Arguments, result and errors as of `sample`.
    """
    check_inputs(noise, y)
    x = noise.to(working_dtype(noise))  # (B, C, ...)
    for i, (t, s) in enumerate(descending(diffusion.num_steps, steps)):
        p = _reverse(model, diffusion, x, (t, s), y, noise.dtype, clip_denoised)
        x = p.mean
        if s >= 0:
            sigma = (p.log_variance / 2).exp()
            x = x + sigma * draw(torch.randn, x.shape, generator, x.device, x.dtype)
        if callback:
            callback(i, t, x)
    return x


@torch.no_grad()
def ddim(
    model: Model,
    diffusion: Diffusion,
    noise: Tensor,
    y: Conditioning = None,
    *,
    steps: int | Sequence[int] = 250,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12), with z ~ N(0, I) and β̃ the posterior variance of t → s:

        x_s = √a_s x̂0 + √(1 - a_s - σ²) ε̂ + σ z,  σ² = η² β̃.

    Deterministic at η = 0 and DDPM with "fixed_small" at η = 1. The last step adds no noise.
    Arguments, result and errors as of `sample`.
    """
    check_inputs(noise, y)
    x = noise.to(working_dtype(noise))  # (B, C, ...)
    for i, (t, s) in enumerate(descending(diffusion.num_steps, steps)):
        p = _reverse(model, diffusion, x, (t, s), y, noise.dtype, clip_denoised)
        a_s = _alpha_bar(diffusion, s)
        variance = eta**2 * _posterior_variance(diffusion, t, s)
        x = a_s**0.5 * p.x0 + max(1 - a_s - variance, 0) ** 0.5 * p.epsilon
        if s >= 0 and eta:
            x = x + variance**0.5 * draw(torch.randn, x.shape, generator, x.device, x.dtype)
        if callback:
            callback(i, t, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim}


@torch.no_grad()
def ddim_invert(
    model: Model,
    diffusion: Diffusion,
    x0: Tensor,
    y: Conditioning = None,
    *,
    steps: int | Sequence[int] = 250,
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """The noise (B, C, ...) that `ddim` with the same steps turns into x0.

    DDIM's step x_s = √a_s x̂0(x_t) + √(1 - a_s) ε̂(x_t) is solved for x_t by fixed-point iteration

        x_t ← √(a_t/a_s) (x_s - √(1 - a_s) ε̂) + √(1 - a_t) ε̂,  ε̂ = ε̂(x_t, t),

    from x_t = x_s. One iteration is the usual inversion (Song et al. 2021, §4.3), whose error falls
    with the number of steps; more converge to the exact inverse where the model is smooth enough.

    Args:
        iterations: fixed-point iterations a step, each one pass of the model.
        callback: called as callback(i, t, x) with the x reached at t.

    Raises:
        ValueError: no iteration, steps out of range, or inputs that do not fit together.
    """
    check_inputs(x0, y)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    x = x0.to(working_dtype(x0))
    for i, (t, s) in enumerate(reversed(descending(diffusion.num_steps, steps))):
        t_batch = torch.full((len(x),), t, device=x.device)
        a_t, a_s = _alpha_bar(diffusion, t), _alpha_bar(diffusion, s)
        x_s = x
        for _ in range(iterations):
            output, _ = diffusion.split(model(x.to(x0.dtype), t_batch, y), x)
            _, epsilon = diffusion.predict(output, x, t_batch)
            rescaled = (a_t / a_s) ** 0.5 * (x_s - (1 - a_s) ** 0.5 * epsilon)
            x = rescaled + (1 - a_t) ** 0.5 * epsilon
        if callback:
            callback(i, t, x)
    return x


def interpolate(a: Tensor, b: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Spherical interpolation from noise a to noise b, both (B, ...), per image: (n, B, ...) for n
    weights, with θ the angle between a and b

        (sin((1 - w) θ) a + sin(w θ) b) / sin θ   (Song et al. 2021, appendix D.5),

    which keeps the norm that noise must have; linear where sin θ vanishes.

    Raises:
        ValueError: a and b differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} differ in shape")
    flat_a, flat_b = (x.flatten(1).to(working_dtype(a)) for x in (a, b))
    w = torch.as_tensor(weights, dtype=flat_a.dtype, device=a.device).reshape(-1, 1, 1)
    theta = torch.cosine_similarity(flat_a, flat_b).clamp(-1, 1).acos()[:, None]
    degenerate = theta.sin() < 1e-6
    scale = theta.sin().masked_fill(degenerate, 1)
    on_a = torch.where(degenerate, 1 - w, ((1 - w) * theta).sin() / scale)
    on_b = torch.where(degenerate, w, (w * theta).sin() / scale)
    return (on_a * flat_a + on_b * flat_b).reshape(len(w), *a.shape).to(a.dtype)


def _reverse(
    model: Model,
    diffusion: Diffusion,
    x: Tensor,
    step: tuple[int, int],
    y: Conditioning,
    dtype: torch.dtype,
    clip_denoised: bool,
) -> Reverse:
    """p(x_s | x_t) for `step` (t, s), the model called in `dtype`."""
    t, s = (torch.full((len(x),), value, device=x.device) for value in step)
    return diffusion.reverse(model(x.to(dtype), t, y), x, t, s, clip_denoised)


def _alpha_bar(diffusion: Diffusion, t: int) -> float:
    return 1.0 if t < 0 else diffusion.alpha_bar[t].item()


def _posterior_variance(diffusion: Diffusion, t: int, s: int) -> float:
    """β̃ of the step t → s."""
    a_t, a_s = _alpha_bar(diffusion, t), _alpha_bar(diffusion, s)
    return (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
