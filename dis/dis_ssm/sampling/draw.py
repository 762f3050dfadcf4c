"""Numbered samples of a model: sample i depends on (seed, i) and on its condition alone.

Images are (n, C, H, W); model space is float32 in [-1, 1].
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dis_ssm.condition import Conditioning, rows, take, to
from dis_ssm.config import SampleConfig
from dis_ssm.data.images import to_uint8
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.sampling.samplers import sample
from dis_ssm.sampling.seeds import image_generators, image_noise


def samples_name(
    step: int, settings: SampleConfig, weights: str = "ema", classes: tuple[int, ...] = ()
) -> str:
    """What tells one set of samples of a run from another, as the name of its file."""
    parts = ["step", step, settings.sampler, settings.steps, "cfg", f"{settings.cfg_scale:g}"]
    if settings.cfg_channels is not None:
        parts += ["channels", settings.cfg_channels]
    if settings.cfg_interval is not None:
        parts += ["in", *(f"{t:g}" for t in settings.cfg_interval)]
    parts += ["eta", f"{settings.eta:g}"] if settings.eta else []
    parts += [] if weights == "ema" else [weights]
    parts += ["classes", *classes] if classes else []
    return "-".join(map(str, [*parts, "num", settings.num, "seed", settings.seed]))


def draw_images(*arguments: Any, **options: Any) -> Tensor:
    """`draw_samples` as uint8."""
    return to_uint8(draw_samples(*arguments, **options))


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    diffusion: Diffusion,
    shape: tuple[int, int, int],
    indices: Sequence[int],
    y: Conditioning,
    settings: SampleConfig,
    *,
    progress: bool = False,
    callback: Callable[[], object] = lambda: None,
) -> Tensor:
    """Samples `indices` of `shape` (C, H, W) on the CPU, float32 in model space, not clipped.

    All noise of sample i comes from generator i, seeded by (settings.seed, i), so a sample does not
    depend on the others. Warns of samples that are not finite.

    Args:
        model: used as it is, on its device; put it in eval mode first.
        y: one row for each of `indices`, on any device; None for a model without conditions.
        settings: sampler, steps, guidance, seed and the size of a batch.
        progress: show a bar.
        callback: called after each sampling step of each batch.

    Raises:
        ValueError: y has not one row for each index, or as `sample`.
    """
    if y is not None and rows(y) != len(indices):
        raise ValueError(f"y has {rows(y)} rows for {len(indices)} images: give one per image")
    device = next(model.parameters()).device
    places = torch.arange(len(indices)).split(settings.batch_size)
    parts = [torch.empty(0, *shape)]

    def stepped(*_) -> None:
        bar.update()
        callback()

    with tqdm(total=settings.steps * len(places), unit="step", disable=not progress) as bar:
        for place in places:
            generators = image_generators(settings.seed, [indices[i] for i in place.tolist()])
            images = sample(
                model,
                diffusion,
                image_noise(shape, generators, device),
                to(take(y, place), device),
                steps=settings.steps,
                sampler=settings.sampler,
                eta=settings.eta,
                cfg_scale=settings.cfg_scale,
                cfg_channels=settings.cfg_channels,
                cfg_interval=settings.cfg_interval,
                generator=generators,
                callback=stepped,
                clip_denoised=settings.clip_denoised,
            )
            parts.append(images.cpu())
    images = torch.cat(parts)
    if wrong := (~images.isfinite()).flatten(1).any(1).sum().item():
        warnings.warn(f"{wrong} of {len(indices)} images are not finite", stacklevel=2)
    return images
