"""A trained model with all that it needs to draw images: process, decoder, device, precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dis_ssm.build import build_diffusion, load_model
from dis_ssm.condition import Conditioning
from dis_ssm.config import Config, SampleConfig
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.encoders.decoding import Decoder, find_decoder
from dis_ssm.ops.dispatch import check_forced
from dis_ssm.sampling.draw import draw_samples
from dis_ssm.storage.checkpoint import locate
from dis_ssm.system.distributed import World
from dis_ssm.system.machine import pick_device


@dataclass(frozen=True)
class Origin:
    """Where a pipeline was opened: the run, its checkpoint, which weights, the VAE asked for."""

    run: Path
    checkpoint: Path
    weights: str
    vae: str | None


@dataclass(frozen=True, eq=False)
class Pipeline:
    """From seeds and conditions to images.

    Args:
        model: in eval mode, on `device`.
        config: of the run that trained it, resolved.
        decoder: how its samples become images.
        device: where it computes.
        precision: "float32", or "bf16" for autocast.
        origin: the checkpoint it was opened from, if any.
    """

    model: nn.Module
    config: Config
    decoder: Decoder
    device: torch.device
    precision: str = "float32"
    origin: Origin | None = None

    @cached_property
    def diffusion(self) -> Diffusion:
        """The process that the model was trained for."""
        return build_diffusion(self.config.diffusion)

    @property
    def visible(self) -> bool:
        """Whether the results are images (uint8), not latents (float32)."""
        return self.decoder.visible

    @property
    def num_classes(self) -> int:
        """Classes that the model knows; 0 without labels."""
        return self.config.model.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the results."""
        return self.decoder.shape(self._drawn)

    @property
    def _drawn(self) -> tuple[int, int, int]:
        """(C, H, W) in model space."""
        height, width = self.config.model.input_size
        return self.config.model.in_channels, height, width

    @torch.no_grad()
    def draw(
        self, indices: Sequence[int], y: Conditioning, settings: SampleConfig, **options: Any
    ) -> Tensor:
        """Samples `indices`, (n, C, H, W), uint8 images or float32 latents, on the CPU.

        Sample i depends on (settings.seed, i) and its row of y; y and `options` as of
        `draw_samples`, which says what is raised.
        """
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            samples = draw_samples(
                self.model, self.diffusion, self._drawn, indices, y, settings, **options
            )
        return self.decoder.decode(samples)


def open_pipeline(
    path: str | Path,
    *,
    weights: str = "ema",
    vae: str | None = None,
    precision: str = "float32",
    compiled: bool = False,
    device: str | torch.device | None = None,
    world: World | None = None,
) -> Pipeline:
    """The pipeline of a run, whose newest complete checkpoint it takes, or of a checkpoint.

    Args:
        weights: "ema", averaged, or "model", as trained.
        vae: what decodes latents, see `find_decoder`.
        precision: "float32" or "bf16".
        compiled: compile the model, which pays off for thousands of images.
        device: of model and decoder; unset, that of `world`, or the best there is.
        world: processes that all call; they open the same checkpoint, should the run be in
            training.

    Raises:
        ValueError: there is no complete checkpoint (CheckpointError where it is damaged), or the
            VAE cannot be used.
    """
    check_forced()
    if world is None:
        run, checkpoint = locate(path)
    else:
        with world.together():
            found = locate(path)
        run, checkpoint = world.gather(found)[0]
    if device is None and world is not None:
        device = world.device
    device = pick_device(None if device is None else str(device))
    model, config = load_model(checkpoint, weights=weights, device=device)
    decoder = find_decoder(config, vae, device)
    if compiled:
        model.compile()
    return Pipeline(
        model, config, decoder, device, precision, Origin(run, checkpoint, weights, vae)
    )
