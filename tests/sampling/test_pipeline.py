"""Pipelines, which decoder shows a run's samples, and conditions of several parts on their way."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dis_ssm.condition import Condition
from dis_ssm.config import CONVERTED, Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.encoders.decoding import Decoder, decoder_name, find_decoder
from dis_ssm.sampling.draw import draw_samples
from dis_ssm.sampling.pipeline import Pipeline, open_pipeline
from dis_ssm.sampling.samplers import ddim, ddpm, sample
from dis_ssm.sampling.seeds import image_generators, image_noise
from dis_ssm.sampling.steps import descending
from helpers import PartsModel, normal

SHAPE = (1, 4, 4)


class PartsModule(nn.Module):
    """`PartsModel` with a parameter, whose device says where to draw."""

    null_class = PartsModel.null_class

    def __init__(self):
        super().__init__()
        self.zero, self.inner = nn.Parameter(torch.zeros(())), PartsModel()

    def forward(self, x, t, y):
        return self.inner(x + self.zero, t, y)


def condition(n: int) -> Condition:
    return Condition(
        label=torch.arange(n) % 3, context=normal(n, 2, 5, dtype=torch.float32, seed=3)
    )


# -- conditions of several parts -----------------------------------------------------------------


def by_hand(diffusion, noise, y, settings, generators) -> torch.Tensor:
    """One pass for y and one for its null at each step, and the step by its formula."""
    model, x = PartsModel(), noise
    null = Condition(label=torch.full_like(y.label, 3), context=torch.zeros_like(y.context))
    for t, s in descending(diffusion.num_steps, settings.steps):
        t_batch, s_batch = torch.full((len(x),), t), torch.full((len(x),), s)
        conditional, unconditional = model(x, t_batch, y), model(x, t_batch, null)
        epsilon = unconditional + settings.cfg_scale * (conditional - unconditional)
        output = torch.cat([epsilon[:, :1], conditional[:, 1:]], 1)
        p = diffusion.reverse(output, x, t_batch, s_batch)
        a_s = 1.0 if s < 0 else diffusion.alpha_bar[s].item()
        if settings.sampler == "ddim":
            x = a_s**0.5 * p.x0 + (1 - a_s) ** 0.5 * p.epsilon
        else:
            x = p.mean
            if s >= 0:
                z = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
                x = x + (p.log_variance / 2).exp() * z
    return x


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_of_two_parts_are_those_made_by_hand(sampler):
    """Guided, drawn in batches of 2, as `by_hand` draws each of them alone."""
    diffusion, y, indices = Diffusion("linear", 50), condition(5), [7, 0, 2, 11, 3]
    settings = SampleConfig(sampler=sampler, steps=6, cfg_scale=2.5, seed=4, batch_size=2)
    model = PartsModule()
    images = draw_samples(model, diffusion, SHAPE, indices, y, settings)
    assert [len(told) for told in model.inner.calls[::6]] == [4, 4, 2]
    for i, index in enumerate(indices):
        generators = image_generators(4, [index])
        noise = image_noise(SHAPE, generators)
        alone = by_hand(diffusion, noise, y[i : i + 1], settings, generators)
        assert_close(images[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, sampler", [("ddpm", ddpm), ("ddim", ddim)])
def test_sample_is_the_function_of_that_name(name, sampler):
    diffusion, y, noise = Diffusion("linear", 50), condition(3), normal(3, *SHAPE)
    arguments = (PartsModel(), diffusion, noise, y)
    drawn = [
        draw(*arguments, steps=7, generator=torch.Generator().manual_seed(2))
        for draw in (sampler, lambda *given, **options: sample(*given, sampler=name, **options))
    ]
    assert drawn[0].equal(drawn[1])


def test_a_condition_reaches_the_model_of_a_scheduler():
    from diffusers import DDIMScheduler

    diffusion, y, noise = Diffusion("linear", 50, learn_sigma=True), condition(3), normal(3, *SHAPE)
    options = {"trained_betas": diffusion.betas.tolist(), "clip_sample": False}
    scheduler = DDIMScheduler(50, timestep_spacing="linspace", **options)
    found = sample(PartsModel(), diffusion, noise, y, steps=50, sampler=scheduler, cfg_scale=2.0)
    own = sample(PartsModel(), diffusion, noise, y, steps=50, sampler="ddim", cfg_scale=2.0)
    assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_one_per_image_are_refused():
    settings = SampleConfig(steps=2)
    for y in (condition(3), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="y has 3 rows for 2 images"):
            draw_samples(PartsModule(), Diffusion(), SHAPE, [0, 1], y, settings)


# -- pipelines and decoders ----------------------------------------------------------------------


def config_of(channels: int = 3, **data) -> Config:
    model = ModelConfig(in_channels=channels, input_size=(4, 4), num_classes=3)
    return Config(
        model=model, data=DataConfig(**data), diffusion=DiffusionConfig(schedule="linear")
    )


def test_a_pipeline_draws_what_draw_samples_draws():
    config, y = config_of(1, latents=False), condition(4)
    settings = SampleConfig(steps=3, cfg_scale=2.0, batch_size=3)
    pipeline = Pipeline(PartsModule(), config, Decoder(latents=False), torch.device("cpu"))
    samples = draw_samples(PartsModule(), pipeline.diffusion, SHAPE, range(4), y, settings)
    images = pipeline.draw(range(4), y, settings)
    assert images.equal(((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    latents = dataclasses.replace(pipeline, decoder=Decoder(latents=True))
    assert latents.draw(range(4), y, settings).equal(samples)
    assert (pipeline.visible, latents.visible) == (True, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipeline.precision = "bf16"


@pytest.mark.parametrize(
    "config, vae, name",
    [
        (config_of(source="digits"), None, None),
        (config_of(4, source="gone", latents=True), None, None),
        (config_of(4, source="gone", latents=True, vae="own"), None, "own"),
        (config_of(4, source="gone", latents=True, vae="own"), "other", "other"),
        (config_of(4, source="gone", latents=True, vae="own"), "none", None),
        (config_of(4, source="gone", latents=True, vae="none"), None, None),
        (config_of(source="gone", vae="own"), None, "own"),  # a run of 0.1.0
        (config_of(source="digits", latents=False, vae="own"), None, None),
        (config_of(source="digits", latents=False), "other", "other"),
    ],
)
def test_the_decoder_is_the_one_that_is_named_first(config, vae, name):
    assert decoder_name(config, vae) == name


@pytest.mark.parametrize(
    "config, visible",
    [
        (config_of(latents=False), True),
        (config_of(source=CONVERTED), True),
        (config_of(latents=True), False),
        (config_of(4, latents=False), False),  # neither grey nor RGB
        (config_of(source="gone", image_size=4), True),
        (config_of(source="gone", image_size=32), False),
    ],
)
def test_samples_without_a_decoder_are_seen_where_they_are_images(config, visible):
    decoder = find_decoder(config)
    assert decoder.vae is None and decoder.visible is visible
    assert decoder.shape((3, 4, 4)) == (3, 4, 4)


def test_a_pipeline_is_of_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a run with a complete checkpoint nor"):
        open_pipeline(tmp_path)
