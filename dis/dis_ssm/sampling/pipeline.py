"""A trained model with all that it needs to draw: process, VAE, device, precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dis_ssm.build import build_diffusion, load_model
from dis_ssm.config import Config, SampleConfig
from dis_ssm.data.images import to_uint8
from dis_ssm.encoders.decoding import cached_vae, decode, learned_latents, load_decoder
from dis_ssm.encoders.vae import vae_scale
from dis_ssm.ops.dispatch import check_forced
from dis_ssm.sampling.draw import draw_samples

NO_VAE = "none"


@dataclass
class Artist:
    """A trained model, the VAE that decodes what it draws, or None, and how they compute."""

    model: nn.Module
    config: Config
    vae: Any
    device: torch.device
    precision: str

    @property
    def visible(self) -> bool:
        """Whether the results are images (uint8), not latents (float32)."""
        return bool(self.vae) or not learned_latents(self.config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, those that the VAE decodes if there is one."""
        model = self.config.model
        if not self.vae:
            return model.in_channels, *model.input_size
        height, width = (side * vae_scale(self.vae) for side in model.input_size)
        return self.vae.config.out_channels, height, width

    @torch.no_grad()
    def draw(
        self,
        indices: Sequence[int],
        labels: Tensor | None,
        settings: SampleConfig,
        **options: Any,
    ) -> Tensor:
        """Samples `indices`, (n, C, H, W), uint8 or latents; see `images.draw_samples`."""
        model = self.config.model
        shape = (model.in_channels, *model.input_size)
        diffusion = build_diffusion(self.config.diffusion)
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            arguments = (self.model, diffusion, shape, indices, labels, settings)
            samples = draw_samples(*arguments, **options)
        if self.vae:
            return decode(self.vae, samples)
        return to_uint8(samples) if self.visible else samples


def open_artist(
    checkpoint: Path,
    *,
    weights: str = "ema",
    vae: str | None = None,
    device: torch.device,
    precision: str = "float32",
    compiled: bool = False,
) -> Artist:
    """The artist of a checkpoint. `vae` is a folder, a hub id, "none", or None for the one of the
    run's config or latent cache, if there is one."""
    check_forced()
    model, config = load_model(checkpoint, weights=weights, device=device)
    source = config.data.source
    name = vae or config.data.vae or cached_vae(source)
    decoder = None
    if name and name != NO_VAE:
        decoder = load_decoder(name, source, config.model.in_channels, device)
    if compiled:
        model.compile()
    return Artist(model, config, decoder, device, precision)
