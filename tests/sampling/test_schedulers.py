"""diffusers' schedulers in the place of our samplers."""

import itertools

import pytest
import torch

from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.sampling.samplers import sample
from dis_ssm.sampling.seeds import image_generators
from dis_ssm.sampling.steps import respaced
from helpers import MU, SCALE, GaussianDenoiser, LabelModel, normal, seeded


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # these tensors are too small for two


def _scheduler(name, d, **options):
    import diffusers

    kind = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction", "score": "epsilon"}
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=d.num_steps,
        trained_betas=d.betas.tolist(),
        prediction_type=kind[d.prediction],
        **options,
    )
    scheduler.alphas_cumprod = d.alpha_bar.clone()
    return scheduler


def test_every_posterior_step_of_250_is_that_of_diffusers():
    d = Diffusion()
    scheduler = _scheduler(
        "DDPMScheduler",
        d,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(250)
    chain = [-1, *respaced(1000, 250)]
    x, output, z = normal(2, 1, 3, 3), normal(2, 2, 3, 3, seed=2), normal(2, 1, 3, 3, seed=7)
    for s, t in list(itertools.pairwise(chain))[::-1]:
        p = d.reverse(output, x, torch.tensor([t, t]), torch.tensor([s, s]))
        ours = p.mean + ((p.log_variance / 2).exp() * z if t > 0 else 0)
        theirs = scheduler.step(output, t, x, generator=seeded(7)).prev_sample
        torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_ddpm_scheduler_equals_our_chain(channels, learn_sigma):
    d = Diffusion("linear", 1000, "v", learn_sigma, "fixed_small")
    scheduler = _scheduler(
        "DDPMScheduler",
        d,
        variance_type="learned_range" if learn_sigma else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    model, noise = GaussianDenoiser(d, 0.3), normal(3, channels, 4, 4)
    theirs, ours = (
        sample(model, d, noise, steps=30, sampler=s, generator=image_generators(0, range(3)))
        for s in (scheduler, "ddpm")
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-8)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_scheduler_equals_our_ddim(prediction, eta):
    d = Diffusion("linear", 1000, prediction)
    scheduler = _scheduler("DDIMScheduler", d, clip_sample=False, timestep_spacing="leading")
    model, noise = GaussianDenoiser(d), normal(2, 4, 3, 3)
    options = {"eta": eta, "generator": seeded()}
    theirs = sample(model, d, noise, steps=20, sampler=scheduler, **options)
    options["generator"] = seeded()
    ours = sample(model, d, noise, steps=range(0, 1000, 50), sampler="ddim", **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "name, options",
    [
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_ode_schedulers_reach_the_closed_form(name, options):
    """The probability flow of Gaussian data is MU + SCALE · noise, all four channels of it."""
    d = Diffusion("linear", 1000)
    noise = normal(2, 4, 3, 3, dtype=torch.float32)
    x = sample(GaussianDenoiser(d), d, noise, steps=50, sampler=_scheduler(name, d, **options))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, MU + SCALE * noise, rtol=0, atol=0.1)


def test_schedulers_that_stop_between_timesteps_hand_on_float_t():
    d = Diffusion("linear", 1000, learn_sigma=False)
    seen = []

    def model(x, t, y):
        seen.append(t)
        return x

    scheduler = _scheduler("EulerDiscreteScheduler", d, timestep_spacing="linspace")
    callbacks = []
    sample(
        model,
        d,
        normal(2, 1, 2, 2, dtype=torch.float32),
        steps=5,
        sampler=scheduler,
        callback=lambda i, t, x: callbacks.append((i, t)),
    )
    assert [t[0].item() for t in seen] == [999, 749.25, 499.5, 249.75, 0]
    assert [t.dtype.is_floating_point for t in seen] == [False, True, True, True, False]
    assert callbacks == list(enumerate([999, 749.25, 499.5, 249.75, 0]))


def test_guidance_works_with_schedulers():
    d = Diffusion("linear", 1000)
    scheduler = _scheduler("DDIMScheduler", d, clip_sample=False)
    noise, y = normal(2, 1, 3, 3), torch.tensor([0, 1])
    theirs, ours = (
        sample(LabelModel(), d, noise, y, steps=s, sampler=sampler, cfg_scale=2.0)
        for s, sampler in ((10, scheduler), (range(0, 1000, 100), "ddim"))
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name, diffusion, options, message",
    [
        ("DDIMScheduler", {"prediction": "v"}, {}, "'epsilon'.*'v'"),
        ("DDIMScheduler", {"prediction": "score"}, {}, "'score'"),
        ("DDIMScheduler", {"schedule": "cosine"}, {}, "trained_betas"),
        ("DDIMScheduler", {"num_steps": 100}, {}, "of 100 steps"),
        ("FlowMatchEulerDiscreteScheduler", {}, {}, "prediction_type None"),
        ("DDPMScheduler", {"learn_sigma": False}, {"variance_type": "learned_range"}, "none"),
    ],
)
def test_schedulers_that_do_not_fit_are_named(name, diffusion, options, message):
    import diffusers

    d = Diffusion(**diffusion)
    if "beta_schedule" not in options and name != "FlowMatchEulerDiscreteScheduler":
        options = {"beta_start": 1e-4, "beta_end": 0.02, **options}
    scheduler = getattr(diffusers, name)(**options)
    with pytest.raises(ValueError, match=message):
        sample(GaussianDenoiser(d), d, normal(1, 1, 2, 2), steps=2, sampler=scheduler)


def test_options_a_scheduler_cannot_honour_are_named():
    d = Diffusion()
    noise, scheduler = normal(2, 1, 2, 2), _scheduler("DPMSolverMultistepScheduler", d)
    for options, message in [
        ({"eta": 0.5}, "has no eta"),
        ({"steps": 2000}, "got 2000"),
        ({"sampler": type(scheduler)}, "scheduler object, got <class"),
        ({"steps": [1, 2]}, r"got \[1, 2\]"),
        ({"clip_denoised": True}, "clip_sample"),
        ({"generator": [seeded()]}, "1 generators for 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(GaussianDenoiser(d), d, noise, **{"steps": 2, "sampler": scheduler, **options})
