"""Any diffusers scheduler as a sampler."""

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dis_ssm.condition import Conditioning
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.diffusion.process import Generators, Model, check_inputs, working_dtype
from dis_ssm.sampling.steps import Callback, respaced

DIFFUSERS_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


def is_scheduler(sampler: Any) -> bool:
    """Whether it is an object with the interface of a diffusers scheduler, not its class."""
    parts = ("set_timesteps", "step", "config")
    return not isinstance(sampler, type) and all(hasattr(sampler, part) for part in parts)


@torch.no_grad()
def run_scheduler(
    model: Model,
    diffusion: Diffusion,
    noise: Tensor,
    y: Conditioning = None,
    *,
    scheduler: Any,
    steps: int = 250,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The common loop of diffusers' pipelines, from noise (B, C, ...), on a copy of the scheduler.

    At each of the scheduler's timesteps it scales x for the model, asks the model and lets the
    scheduler make its step from the prediction. The model is called in noise's dtype with t (B,)
    int64, or float32 where the scheduler stops between timesteps.

    Args:
        scheduler: an object of the diffusion's β and kind of prediction; it is left unchanged.
        steps: how many.
        eta: handed to schedulers that take it.
        generator: handed to schedulers that take one; see `sample`.
        callback: called as callback(i, t, x) after step i, which went from timestep t to x.

    Returns:
        (B, C, ...) float32 (float64 from float64).

    Raises:
        ValueError: a scheduler of another process or prediction, a list of steps, an eta that the
            scheduler does not take, generators that are not one per image, or what the model
            returns does not fit.
    """
    check_inputs(noise, y)
    scheduler = _fitted_scheduler(scheduler, diffusion)
    if isinstance(steps, Iterable):
        raise ValueError(f"a scheduler needs the number of steps, got {steps}")
    steps = len(respaced(diffusion.num_steps, steps))
    if isinstance(generator, list) and len(generator) != len(noise):
        raise ValueError(f"{len(generator)} generators for {len(noise)} images: give one per image")
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
    if "eta" in accepted:
        options["eta"] = eta
    elif eta:
        raise ValueError(f"{type(scheduler).__name__} has no eta, got {eta}")
    learns_sigma = _learns_sigma(scheduler)

    scheduler.set_timesteps(steps, device=noise.device)
    x = noise.to(working_dtype(noise)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_t = (t.float() if t % 1 else t.long()).expand(len(x))
        output = model(scheduler.scale_model_input(x, t).to(noise.dtype), model_t, y)
        prediction, interpolation = diffusion.split(output, x)
        if learns_sigma:
            prediction = torch.cat([prediction, interpolation], 1)
        x = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
        if callback:
            callback(i, model_t[0].item(), x)
    return x.to(working_dtype(noise))


def _fitted_scheduler(scheduler: Any, diffusion: Diffusion) -> Any:
    """A copy of the scheduler, once it is clear that it describes the same process and prediction.

    Only DDPM schedulers can use a learned variance; others that are configured with one would cut
    the prediction to three channels, so their variance type is cleared.
    """
    name = type(scheduler).__name__
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


def _learns_sigma(scheduler: Any) -> bool:
    return str(scheduler.config.get("variance_type")).startswith("learned")
