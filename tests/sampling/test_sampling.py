"""Samplers against closed forms, diffusers and their own definitions.

Data N(MU, SCALE²) have an exact denoiser, so every chain is an affine recursion known on paper.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dis_ssm
from dis_ssm import DiS
from dis_ssm.diffusion.gaussian import PREDICTIONS, Diffusion
from dis_ssm.diffusion.guidance import guide, guided
from dis_ssm.sampling.samplers import ddim_invert, interpolate, sample
from dis_ssm.sampling.seeds import _image_seed, image_generators, image_noise
from dis_ssm.sampling.steps import respaced
from helpers import MU, SCALE, GaussianDenoiser, LabelModel, normal, seeded


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # these tensors are too small for two


def _posterior_coefficients(d, t, s):
    """On x0, on x_t, β̃ and β, from the products of the α's between s and t."""
    a_t = d.alpha_bar[t].item()
    a_s = d.alpha_bar[s].item() if s >= 0 else 1.0
    alpha = math.prod((1 - d.betas[s + 1 : t + 1]).tolist())
    on_x0 = math.sqrt(a_s) * (1 - alpha) / (1 - a_t)
    on_x_t = math.sqrt(alpha) * (1 - a_s) / (1 - a_t)
    return on_x0, on_x_t, (1 - alpha) * (1 - a_s) / (1 - a_t), 1 - alpha


# -- steps -------------------------------------------------------------------------------------


def test_respaced_timesteps_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(timestep_spacing="linspace")
    for steps in (2, 10, 27, 50, 61, 250, 999, 1000):
        scheduler.set_timesteps(steps)
        assert respaced(1000, steps) == scheduler.timesteps.tolist()[::-1]
    assert respaced(1000, 250)[:3] == [0, 4, 8] and respaced(1000, 250)[-1] == 999
    assert respaced(10, 10) == list(range(10))
    assert respaced(10, 1) == [9]


@pytest.mark.parametrize("steps", [0, 101, 1.5, [], [0, 100], [-1, 5], [3, 3], [5, 2], [0.5, 3]])
def test_bad_steps_are_errors(steps):
    d = Diffusion("linear", 100)
    with pytest.raises(ValueError, match=re.escape(f"got {steps}")):
        sample(GaussianDenoiser(d), d, normal(1, 1, 2, 2), steps=steps)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 7, 100, [2, 50, 97]])
def test_the_model_sees_original_timesteps_and_the_callback_every_state(sampler, steps):
    d = Diffusion("linear", 100)
    model, calls = GaussianDenoiser(d), []
    x = sample(
        model,
        d,
        normal(2, 1, 2, 2),
        steps=steps,
        sampler=sampler,
        callback=lambda i, t, x: calls.append((i, t, x)),
    )
    expected = (steps if isinstance(steps, list) else respaced(100, steps))[::-1]
    assert model.timesteps == expected == [t for _, t, _ in calls]
    assert [i for i, _, _ in calls] == list(range(len(expected)))
    assert torch.equal(calls[-1][2], x)


def test_one_step_is_the_denoised_noise():
    d = Diffusion("linear", 100)
    noise = normal(2, 1, 3, 3)
    t = torch.tensor([99, 99])
    x0, _ = d.predict(GaussianDenoiser(d)(noise, t, None)[:, :1], noise, t)
    for sampler in ("ddpm", "ddim"):
        got = sample(GaussianDenoiser(d), d, noise, steps=1, sampler=sampler)
        torch.testing.assert_close(got, x0)


# -- ancestral sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [100, 13])
def test_ancestral_chain_is_the_affine_recursion(prediction, steps):
    d = Diffusion("linear", 100, prediction)
    noise = normal(2, 1, 4, 4)
    got = sample(GaussianDenoiser(d, -0.4), d, noise, steps=steps, generator=seeded())

    g, x = seeded(), noise
    chain = [-1, *respaced(100, steps)]
    for s, t in list(itertools.pairwise(chain))[::-1]:
        a = d.alpha_bar[t].item()
        on_x0, on_x_t, small, large = _posterior_coefficients(d, t, s)
        x0 = MU + math.sqrt(a) * SCALE**2 / (a * SCALE**2 + 1 - a) * (x - math.sqrt(a) * MU)
        x = on_x0 * x0 + on_x_t * x
        if s >= 0:
            sigma = math.exp((0.3 * math.log(large) + 0.7 * math.log(small)) / 2)
            x = x + sigma * torch.randn(noise.shape, generator=g, dtype=noise.dtype)
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_samples_have_the_moments_of_the_recursion(variance):
    d = Diffusion("linear", 100, learn_sigma=False, variance=variance)
    x = sample(GaussianDenoiser(d), d, normal(1, 1, 150, 150), steps=40, generator=seeded())
    mean, second = 0.0, 1.0
    for s, t in list(itertools.pairwise([-1, *respaced(100, 40)]))[::-1]:
        a = d.alpha_bar[t].item()
        on_x0, on_x_t, small, large = _posterior_coefficients(d, t, s)
        slope = math.sqrt(a) * SCALE**2 / (a * SCALE**2 + 1 - a)
        mean = on_x0 * (MU + slope * (mean - math.sqrt(a) * MU)) + on_x_t * mean
        sigma2 = (small if variance == "fixed_small" else large) if s >= 0 else 0.0
        second = (on_x0 * slope + on_x_t) ** 2 * second + sigma2
    count = x.numel()
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(second / count))
    assert x.var().item() == pytest.approx(second, rel=5 * math.sqrt(2 / count))
    assert mean == pytest.approx(MU, abs=0.01) and second == pytest.approx(SCALE**2, rel=0.3)


def test_clipping_bounds_the_result():
    d = Diffusion("linear", 20)
    noise = normal(2, 1, 8, 8)
    assert sample(GaussianDenoiser(d), d, 3 * noise, steps=20).abs().max() > 1
    for sampler in ("ddpm", "ddim"):
        x = sample(GaussianDenoiser(d), d, 3 * noise, steps=20, sampler=sampler, clip_denoised=True)
        assert x.abs().max() <= 1


def test_precision_of_result_and_model_input():
    d = Diffusion("linear", 20)
    seen = set()

    def model(x, t, y):
        seen.add(x.dtype)
        return torch.cat([x, x], 1)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = sample(model, d, normal(1, 1, 2, 2, dtype=dtype), steps=3)
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert seen == {dtype} and not x.requires_grad
        seen.clear()


# -- DDIM --------------------------------------------------------------------------------------


def test_ddim_with_full_eta_is_ddpm_with_the_small_variance():
    d = Diffusion("cosine", 50, learn_sigma=False, variance="fixed_small")
    noise, model = normal(2, 1, 4, 4), GaussianDenoiser(d)
    ddim = sample(model, d, noise, steps=20, sampler="ddim", eta=1.0, generator=seeded())
    ddpm = sample(model, d, noise, steps=20, generator=seeded())
    torch.testing.assert_close(ddim, ddpm, rtol=1e-7, atol=1e-9)


def test_ddim_is_deterministic_and_has_a_closed_form():
    """√a x̂0 + √(1 - a) ε̂ is affine too; with many steps it maps N(0, 1) onto N(MU, SCALE²)."""
    d = Diffusion("linear", 1000)
    noise = normal(1, 1, 4, 4)
    x = sample(GaussianDenoiser(d), d, noise, steps=1000, sampler="ddim")
    torch.testing.assert_close(x, MU + SCALE * noise, rtol=0, atol=0.02)
    few = [sample(GaussianDenoiser(d), d, noise, steps=5, sampler="ddim") for _ in range(2)]
    assert torch.equal(*few)
    expected = noise
    for s, t in list(itertools.pairwise([-1, *respaced(1000, 5)]))[::-1]:
        a_t, a_s = d.alpha_bar[t].item(), d.alpha_bar[s].item() if s >= 0 else 1.0
        slope = math.sqrt(a_t) * SCALE**2 / (a_t * SCALE**2 + 1 - a_t)
        x0 = MU + slope * (expected - math.sqrt(a_t) * MU)
        epsilon = (expected - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
        expected = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * epsilon
    torch.testing.assert_close(few[0], expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_reconstructs_better_with_more_steps(prediction):
    d = Diffusion("linear", 1000, prediction)
    model = GaussianDenoiser(d)
    x0 = MU + SCALE * normal(2, 1, 4, 4)
    errors = []
    for steps in (10, 40, 160):
        noise = ddim_invert(model, d, x0, steps=steps)
        back = sample(model, d, noise, steps=steps, sampler="ddim")
        errors.append((back - x0).abs().max().item())
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2
    assert errors[2] < 0.05
    torch.testing.assert_close(noise, (x0 - MU) / SCALE, rtol=0, atol=0.05)
    noise = ddim_invert(model, d, x0, steps=40, iterations=8)
    back = sample(model, d, noise, steps=40, sampler="ddim")
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="got 0"):
        ddim_invert(model, d, x0, steps=40, iterations=0)


def test_inversion_reports_increasing_timesteps():
    d = Diffusion("linear", 100)
    seen = []
    ddim_invert(
        GaussianDenoiser(d),
        d,
        normal(1, 1, 2, 2),
        steps=4,
        callback=lambda i, t, x: seen.append((i, t)),
    )
    assert seen == [(0, 0), (1, 33), (2, 66), (3, 99)]


def test_interpolation_is_spherical_per_image():
    a, b = normal(2, 1, 8, 8, seed=1), normal(2, 1, 8, 8, seed=2)
    a, b = (torch.nn.functional.normalize(x.flatten(1)).reshape(x.shape) for x in (a, b))
    path = interpolate(a, b, [0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    middle = torch.nn.functional.normalize((a + b).flatten(1)).reshape(a.shape)
    torch.testing.assert_close(path[2], middle)
    torch.testing.assert_close(path.flatten(2).norm(dim=2), torch.ones(4, 2, dtype=a.dtype))
    angle = torch.acos((path[1] * a).flatten(1).sum(1)) / torch.acos((a * b).flatten(1).sum(1))
    torch.testing.assert_close(angle, torch.full((2,), 0.25, dtype=a.dtype))
    torch.testing.assert_close(interpolate(a, a, [0.3])[0], a)
    assert interpolate(a, -a, torch.tensor([0.5])).isfinite().all()
    with pytest.raises(ValueError, match="differ in shape"):
        interpolate(a, b[:1], [0.5])


# -- guidance ----------------------------------------------------------------------------------


def test_guidance_is_the_formula_in_one_batched_call():
    model = LabelModel()
    x, t, y = normal(2, 4, 2, 2), torch.tensor([10, 20]), torch.tensor([0, 2])
    conditional = model(x, t, y)
    unconditional = model(x, t, torch.tensor([3, 3]))
    for channels in (None, 4, 3):
        model.calls.clear()
        out = guided(model, 2.5, channels=channels)(x, t, y)
        (size, times, labels), *others = model.calls
        assert not others and size == 4
        assert times.tolist() == [10, 20, 10, 20] and labels.tolist() == [0, 2, 3, 3]
        count = channels or 4
        mix = unconditional + 2.5 * (conditional - unconditional)
        torch.testing.assert_close(out[:, :count], mix[:, :count])
        torch.testing.assert_close(out[:, count:], conditional[:, count:])
    explicit = guided(model, 2.5, null_class=1)(x, t, y)
    torch.testing.assert_close(
        explicit[:, :4], 2.5 * conditional[:, :4] - 1.5 * model(x, t, torch.tensor([1, 1]))[:, :4]
    )


def test_no_guidance_is_one_conditional_pass():
    model = LabelModel()
    assert guided(model, 1.0) is model
    d = Diffusion("linear", 50)
    sample(model, d, normal(2, 1, 2, 2), torch.tensor([0, 1]), steps=3)
    assert [size for size, _, _ in model.calls] == [2, 2, 2]


def test_guidance_interval():
    model, d = LabelModel(), Diffusion("linear", 100)
    noise, y = normal(2, 1, 2, 2), torch.tensor([0, 1])
    sample(model, d, noise, y, steps=[0, 20, 40, 60, 99], cfg_scale=3.0, cfg_interval=(20, 60))
    assert [size for size, _, _ in model.calls] == [2, 4, 4, 4, 2]
    t = torch.tensor([20, 19])
    out = guided(model, 3.0, interval=(20, 60))(noise, t, y)
    torch.testing.assert_close(out[:1], guided(model, 3.0)(noise, t, y)[:1])
    torch.testing.assert_close(out[1:], model(noise, t, y)[1:])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_means_the_same_for_every_prediction(prediction):
    """A model of any kind that says what an ε model says gives the same guided images."""
    epsilon_d = Diffusion("linear", 50)
    d = Diffusion("linear", 50, prediction)

    def converted(x, t, y):
        output, variance = LabelModel()(x, t, y).chunk(2, 1)
        x0, epsilon = epsilon_d.predict(output, x, t)
        return torch.cat([d.target(x0, epsilon, t), variance], 1)

    options = {"steps": 10, "cfg_scale": 2.0, "null_class": 3}
    noise, y = normal(2, 3, 2, 2), torch.tensor([0, 1])
    for channels in (None, 2):
        expected, got = (
            sample(model, diffusion, noise, y, cfg_channels=channels, generator=seeded(), **options)
            for model, diffusion in ((LabelModel(), epsilon_d), (converted, d))
        )
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_vector_conditions_need_a_null_vector():
    model = LabelModel()
    x, t, y = normal(2, 1, 2, 2), torch.tensor([5, 6]), normal(2, 3, seed=4)
    null = torch.tensor([0.1, 0.2, 0.3])
    out = guided(model, 2.0, null_class=null)(x, t, y)
    expected = 2 * model(x, t, y) - model(x, t, null.to(y).expand(2, 3))
    torch.testing.assert_close(out[:, :1], expected[:, :1])
    with pytest.raises(ValueError, match="must be one too, got 3"):
        guided(model, 2.0)(x, t, y)


def test_a_model_without_a_null_class_is_not_guided():
    sizes = dict(input_size=4, in_channels=1, hidden_size=8, depth=1, num_classes=3)
    model = DiS(**sizes, class_dropout_prob=0.0).eval()
    noise, y = normal(2, 1, 4, 4).float(), torch.tensor([0, 2])
    assert model.null_class == 3
    with pytest.raises(ValueError, match=r"needs null_class: the model has no null class"):
        sample(model, Diffusion(), noise, y, steps=2, cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"label 3 .*no null class.*without label dropout"):
        sample(model, Diffusion(), noise, y, steps=2, cfg_scale=2.0, null_class=3)


def test_both_ways_to_guide_agree():
    model = DiS(input_size=4, in_channels=1, hidden_size=8, depth=1, num_classes=3).double().eval()
    torch.nn.init.normal_(model.decoder.linear.weight)
    x, t, y = normal(3, 1, 4, 4), torch.tensor([3, 70, 900]), torch.tensor([0, 1, 2])
    assert torch.equal(guide(x, 3 * x, 1.0, channels=1), x)  # not to rounding
    options = {"interval": (50, 999)}
    for s in (1.0, 2.5):
        twice = [torch.cat([v, w]) for v, w in ((x, x), (t, t), (y, torch.full_like(y, 3)))]
        got = model.forward_with_cfg(*twice, s, **options)[:3]
        torch.testing.assert_close(got, guided(model, s, **options)(x, t, y))


def test_the_readme_example_runs_as_printed(monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]

    def tiny(name, **options):
        assert name in dis_ssm.DiS_models
        return DiS(hidden_size=8, depth=1, patch_size=4, **options)

    monkeypatch.setattr(dis_ssm, "create_model", tiny)
    names = {}
    exec(example, names)
    assert names["images"].shape == names["x0"].shape and names["images"].isfinite().all()
    assert names["model"].patch_embed.weight.grad.isfinite().all()


def test_bad_guidance_is_named():
    d, noise, y = Diffusion("linear", 50), normal(2, 2, 2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="y is None"):
        sample(LabelModel(), d, noise, steps=2, cfg_scale=2.0)
    with pytest.raises(ValueError, match="needs null_class"):
        sample(GaussianDenoiser(d), d, noise, y, steps=2, cfg_scale=2.0)
    with pytest.raises(ValueError, match="guide 3 of 2"):
        sample(LabelModel(), d, noise, y, steps=2, cfg_scale=2.0, cfg_channels=3)
    for interval in ((9, 3), 5, (math.nan, 3)):
        with pytest.raises(ValueError, match=re.escape(f"(low, high), got {interval}")):
            sample(LabelModel(), d, noise, y, steps=2, cfg_scale=2.0, cfg_interval=interval)
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"cfg_scale must be finite, got {scale}"):
            sample(LabelModel(), d, noise, y, steps=2, cfg_scale=scale)
    with pytest.raises(ValueError, match=r"\(3,\) for 2 images"):
        sample(LabelModel(), d, noise, torch.tensor([0, 1, 2]), steps=2)
    with pytest.raises(ValueError, match=r"y must be a tensor.*got \[0, 1\]"):
        sample(LabelModel(), d, noise, [0, 1], steps=2)
    with pytest.raises(ValueError, match=r"floating point.*int64"):
        sample(LabelModel(), d, noise.long(), y, steps=2)
    with pytest.raises(ValueError, match="or a list, got 3"):
        sample(LabelModel(), d, noise, y, steps=2, generator=3)


def test_bad_samplers_are_named():
    d, noise = Diffusion("linear", 50), normal(2, 1, 2, 2)
    for options, message in [
        ({"sampler": "euler"}, "got 'euler'"),
        ({"sampler": object()}, "diffusers scheduler"),
        ({"eta": 0.5}, "eta = 0.5"),
        ({"sampler": "ddim", "eta": 1.5}, "got 1.5"),
        ({"generator": [seeded()]}, "1 generators for 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(GaussianDenoiser(d), d, noise, steps=2, **options)


# -- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.7)])
def test_an_image_does_not_depend_on_its_batch(sampler, eta):
    d = Diffusion("linear", 50)

    def draw(indices):
        generators = image_generators(11, indices)
        noise = image_noise((1, 4, 4), generators, dtype=torch.float64)
        return sample(
            GaussianDenoiser(d), d, noise, steps=9, sampler=sampler, eta=eta, generator=generators
        )

    batch = draw(range(4))
    assert torch.equal(draw(range(4)), batch)
    for i in range(4):
        torch.testing.assert_close(draw([i])[0], batch[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(draw([3, 1]), batch[[3, 1]], rtol=1e-12, atol=1e-12)


def test_image_seeds_never_meet():
    """PyTorch's CPU generator keeps 32 bits of its seed; those must differ within a run."""
    count = 150_000  # 32-bit hashes of as many would meet 2.6 times on average
    low = [_image_seed(0, i) & 0xFFFFFFFF for i in range(count)]
    assert len(set(low)) == count
    assert abs(np.mean(low) / 2**32 - 0.5) < 0.02
    assert image_generators(0, [7])[0].initial_seed() == _image_seed(0, 7)
    firsts = {
        torch.randn(1, generator=g).item()
        for seed in range(20)
        for g in image_generators(seed, range(20))
    }
    assert len(firsts) == 400  # (seed, i) and (seed + 1, i - 1) are not the same image
    with pytest.raises(ValueError, match="-1"):
        image_generators(0, [-1])


def test_noise_and_steps_use_one_stream_without_repeating_it():
    generators = image_generators(0, [5])
    noise = image_noise((3, 4), generators)
    assert not torch.equal(noise, image_noise((3, 4), generators))
    assert torch.equal(noise, image_noise((3, 4), image_generators(0, [5])))
