"""Guidance and samplers: pure functions of (model, diffusion, noise, ...).

Letters as in `diffusion`: a_t = ᾱ_t, s < t the step after t, -1 being clean data. Models are plain
callables `model(x, t, y)`; put an nn.Module in eval mode first. Everything runs under no_grad, not
inference_mode, whose tensors neither every compiled model nor later training can use.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.diffusion.guidance import guide, within
from dis_ssm.diffusion.process import (
    Generators,
    Model,
    check_inputs,
    draw,
    tensor_of,
    working_dtype,
)

SAMPLERS = ("ddpm", "ddim")
DIFFUSERS_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
Callback = Callable[[int, int | float, Tensor], None]


@torch.no_grad()
def sample(
    model: Model,
    diffusion: Diffusion,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | Sequence[int] = 250,
    sampler="ddpm",
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

    "ddpm" draws x_s from p(x_s | x_t) of `Diffusion.reverse` (Ho et al. 2020; 250 steps are the
    published protocol); "ddim" sets x_s = √a_s x̂0 + √(1 - a_s - σ²) ε̂ + σ z with σ² = η² β̃ (Song et
    al. 2021, eq. 12), deterministic at η = 0, DDPM with "fixed_small" at η = 1. The last step adds
    no noise. Any diffusers scheduler of the same β and kind of prediction is a sampler too.

    Args:
        model: called in noise's dtype, with the original integer timestep (B,) int64 (float32 where
            a diffusers scheduler stops between timesteps).
        y: (B,) classes or (B, cond_dim) vectors.
        steps: how many, evenly spaced (`respaced`), or the increasing timesteps themselves.
        sampler: "ddpm", "ddim" or a diffusers scheduler object, which is copied and left unchanged.
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
    denoise = guided(
        model, cfg_scale, channels=cfg_channels, interval=cfg_interval, null_class=null_class
    )
    if not isinstance(sampler, str):
        if clip_denoised:
            raise ValueError("clip_denoised is the scheduler's own clip_sample: set it there")
        return _run_scheduler(
            sampler, denoise, diffusion, noise, y, steps, eta, generator, callback
        )
    if sampler not in SAMPLERS:
        raise ValueError(
            f"sampler must be {', '.join(SAMPLERS)} or a diffusers scheduler, got {sampler!r}"
        )
    if eta and sampler != "ddim":
        raise ValueError(f"eta = {eta} is an option of the ddim sampler, not of {sampler!r}")

    x = noise.to(working_dtype(noise))
    for i, (t, s) in enumerate(_descending(diffusion, steps)):
        t_batch, s_batch = (torch.full((len(x),), step, device=x.device) for step in (t, s))
        output = denoise(x.to(noise.dtype), t_batch, y)
        p = diffusion.reverse(output, x, t_batch, s_batch, clip_denoised)
        if sampler == "ddpm":
            x, sigma = p.mean, (p.log_variance / 2).exp()
        else:
            a_s = _alpha_bar(diffusion, s)
            variance = eta**2 * _posterior_variance(diffusion, t, s)
            x = a_s**0.5 * p.x0 + max(1 - a_s - variance, 0) ** 0.5 * p.epsilon
            sigma = variance**0.5
        if s >= 0 and (sampler == "ddpm" or eta):
            x = x + sigma * draw(torch.randn, x.shape, generator, x.device, x.dtype)
        if callback:
            callback(i, t, x)
    return x


@torch.no_grad()
def ddim_invert(
    model: Model,
    diffusion: Diffusion,
    x0: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | Sequence[int] = 250,
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """The noise (B, C, ...) that `sample(..., sampler="ddim")` with the same steps turns into x0.

    DDIM's step x_s = √a_s x̂0(x_t) + √(1 - a_s) ε̂(x_t) is solved for x_t by fixed-point iteration

        x_t ← √(a_t/a_s) (x_s - √(1 - a_s) ε̂) + √(1 - a_t) ε̂,  ε̂ = ε̂(x_t, t),

    from x_t = x_s. One iteration is the usual inversion (Song et al. 2021, §4.3), whose error falls
    with the number of steps; more converge to the exact inverse where the model is smooth enough.
    For guidance hand it a `guided` model. callback(i, t, x) is called with the x reached at t.
    """
    check_inputs(x0, y)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    x = x0.to(working_dtype(x0))
    for i, (t, s) in enumerate(reversed(_descending(diffusion, steps))):
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

    which keeps the norm that noise must have; linear where sin θ vanishes."""
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


# -- guidance ------------------------------------------------------------------------------------


def guided(
    model: Model,
    cfg_scale: float,
    *,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    null_class: int | Tensor | None = None,
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

    Raises:
        ValueError: y is None, the model has no null class, or scale, channels or interval make no
            sense.
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
    null, inner = null_class, unwrapped(model)
    if null is None and getattr(inner, "has_null_class", True):
        null = getattr(inner, "null_class", None)

    def guided_model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        count = x.shape[1] if channels is None else channels
        if not 0 <= count <= x.shape[1]:
            raise ValueError(f"cannot guide {channels} of {x.shape[1]} channels")
        nulls = _null_like(y, null, cfg_scale)
        inside = within(t, interval)
        if inside is not None and not inside.any():
            return model(x, t, y)
        output = tensor_of(model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nulls])))
        conditional, unconditional = output.to(working_dtype(output)).chunk(2)
        return guide(conditional, unconditional, cfg_scale, count, inside)

    return guided_model


def unwrapped(model: Model) -> Model:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while not hasattr(model, "null_class"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            break
        model = inner
    return model


def _null_like(y: Tensor | None, null: int | Tensor | None, cfg_scale: float) -> Tensor:
    if y is None:
        raise ValueError(f"cfg_scale = {cfg_scale} guides towards a condition, but y is None")
    if null is None:
        raise ValueError(
            f"cfg_scale = {cfg_scale} needs null_class: the model has no null class, as one that "
            f"was trained without label dropout, or does not name it"
        )
    if y.is_floating_point():
        if not isinstance(null, Tensor) or not null.is_floating_point():
            raise ValueError(f"y is a vector, so null_class must be one too, got {null!r}")
        return null.to(y).expand_as(y)
    return torch.as_tensor(null, dtype=torch.int64, device=y.device).expand_as(y)


# -- steps ---------------------------------------------------------------------------------------


def respaced(num_steps: int, steps: int) -> list[int]:
    """`steps` timesteps of 0 … T-1, increasing, evenly spaced and rounded, both ends included:
    those of guided-diffusion (but for ties) and of diffusers' "linspace". One step is T-1 alone.

    Raises:
        ValueError: steps outside [1, T].
    """
    if not 1 <= steps <= num_steps or steps % 1:
        raise ValueError(f"steps must be an integer in [1, {num_steps}], got {steps}")
    if steps == 1:
        return [num_steps - 1]
    return np.linspace(0, num_steps - 1, int(steps)).round().astype(int).tolist()


def _descending(diffusion: Diffusion, steps: int | Sequence[int]) -> list[tuple[int, int]]:
    """(t, s) from the noisiest step to the last, whose s is -1."""
    if not isinstance(steps, Iterable):
        steps = respaced(diffusion.num_steps, steps)
    chain = [-1, *map(int, steps)]
    if len(chain) < 2 or chain[-1] >= diffusion.num_steps:
        raise ValueError(f"timesteps must lie in [0, {diffusion.num_steps - 1}], got {chain[1:]}")
    if chain[1:] != list(steps) or any(t <= s for s, t in itertools.pairwise(chain)):
        raise ValueError(f"timesteps must be integers ≥ 0 that increase, got {list(steps)}")
    return list(zip(chain[:0:-1], chain[-2::-1], strict=True))


def _alpha_bar(diffusion: Diffusion, t: int) -> float:
    return 1.0 if t < 0 else diffusion.alpha_bar[t].item()


def _posterior_variance(diffusion: Diffusion, t: int, s: int) -> float:
    a_t, a_s = _alpha_bar(diffusion, t), _alpha_bar(diffusion, s)
    return (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)


# -- diffusers -----------------------------------------------------------------------------------


def _run_scheduler(scheduler, denoise, diffusion, noise, y, steps, eta, generator, callback):
    """The common loop of diffusers pipelines, on a copy of the scheduler."""
    scheduler = _fitted_scheduler(scheduler, diffusion)
    if isinstance(steps, Iterable):
        raise ValueError(f"a scheduler needs the number of steps, got {steps}")
    steps = len(respaced(diffusion.num_steps, steps))
    if isinstance(generator, list) and len(generator) != len(noise):
        raise ValueError(f"{len(generator)} generators for {len(noise)} images: give one per image")
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in accepted else {}
    if "eta" in accepted:
        options["eta"] = eta
    elif eta:
        raise ValueError(f"{type(scheduler).__name__} has no eta, got {eta}")
    learns_sigma = _learns_sigma(scheduler)

    scheduler.set_timesteps(steps, device=noise.device)
    x = noise.to(working_dtype(noise)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_t = (t.float() if t % 1 else t.long()).expand(len(x))
        output = denoise(scheduler.scale_model_input(x, t).to(noise.dtype), model_t, y)
        prediction, interpolation = diffusion.split(output, x)
        if learns_sigma:
            prediction = torch.cat([prediction, interpolation], 1)
        x = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
        if callback:
            callback(i, model_t[0].item(), x)
    return x.to(working_dtype(noise))


def _fitted_scheduler(scheduler, diffusion: Diffusion):
    """A copy of the scheduler, once it is clear that it describes the same process and prediction.

    Only DDPM schedulers can use a learned variance; others that are configured with one would cut
    the prediction to three channels, so their variance type is cleared.
    """
    name = type(scheduler).__name__
    parts = ("set_timesteps", "step", "config")
    if isinstance(scheduler, type) or not all(hasattr(scheduler, part) for part in parts):
        raise ValueError(
            f"sampler must be {', '.join(SAMPLERS)} or a diffusers scheduler object, got "
            f"{scheduler!r}"
        )
    kind = scheduler.config.get("prediction_type")
    if DIFFUSERS_PREDICTIONS.get(kind) != diffusion.prediction:
        raise ValueError(
            f"{name} has prediction_type {kind!r}, the diffusion predicts {diffusion.prediction!r}"
        )
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None or len(alpha_bar) != diffusion.num_steps:
        raise ValueError(f"{name} has no ᾱ of {diffusion.num_steps} steps: use num_train_timesteps")
    if not torch.allclose(alpha_bar.double().cpu(), diffusion.alpha_bar, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{name} has another noise schedule; give it trained_betas=diffusion.betas.tolist()"
        )
    scheduler = copy.deepcopy(scheduler)
    if _learns_sigma(scheduler):
        if not name.startswith("DDPM"):
            scheduler.register_to_config(variance_type=None)
        elif not diffusion.learn_sigma:
            raise ValueError(f"{name} expects a learned variance, the diffusion learns none")
    return scheduler


def _learns_sigma(scheduler) -> bool:
    return str(scheduler.config.get("variance_type")).startswith("learned")
