"""From latents to images: whether a run draws latents, and what decodes them."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dis_ssm.config import CONVERTED, Config
from dis_ssm.data.images import VISIBLE_CHANNELS, to_uint8
from dis_ssm.data.sources import SOURCES
from dis_ssm.encoders.vae import load_vae, vae_hash

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
from dis_ssm.data.latents import is_cache, latent_scale, read_manifest


def learned_latents(config: Config) -> bool:
    """Whether the model of a run draws latents: as its config says or, in runs of 0.1.0, as its
    data shows. Where that has gone, too, its grey or RGB channels are taken for images, with a
    warning."""
    model, data = config.model, config.data
    if model.in_channels not in VISIBLE_CHANNELS:
        return True
    if data.latents is not None:
        return data.latents
    if data.source in (CONVERTED, *SOURCES):
        return False
    if Path(data.source).expanduser().exists():
        return is_cache(data.source)
    if data.image_size is None:
        warnings.warn(
            f"{data.source} has gone and the run does not say whether it held images or latents: "
            f"it is taken for images; if it held latents, give --vae what decodes them",
            stacklevel=2,
        )
        return False
    return model.input_size != (data.image_size, data.image_size)


@torch.no_grad()
def decode(vae: "AutoencoderKL", z: Tensor, batch_size: int = 8) -> Tensor:
    """uint8 images (n, C, H, W), on the CPU, of `z` in model space: vae.decode(z / scale + shift).

    Rounded to nearest and clipped. ValueError when the VAE has other latent channels.
    """
    _check_channels(vae, z.shape[1])
    shift, scale = (value.to(vae.device) for value in latent_scale(vae.config))
    parts = [
        to_uint8(vae.decode((part.to(vae.device) / scale + shift).to(vae.dtype)).sample.float())
        for part in z.split(batch_size)
    ]
    return torch.cat([part.cpu() for part in parts])


def cached_vae(source: str | Path) -> str | None:
    """The VAE that the cache `source` names, if that is a folder which still exists."""
    if not is_cache(source):
        return None
    name = read_manifest(Path(source).expanduser())["vae"]["id"]
    return name if Path(name).is_dir() else None


def load_decoder(
    vae: str | Path, source: str | Path, channels: int, device: str | torch.device
) -> "AutoencoderKL":
    """`load_vae` for latents of so many channels, with a warning when `source` is a cache that was
    encoded with another encoder. ValueError when the VAE has other latent channels."""
    model = load_vae(vae, device)
    _check_channels(model, channels)
    try:
        latent_scale(model.config)
    except ValueError as error:
        raise ValueError(f"cannot use VAE {str(vae)!r}: {error}") from error
    if is_cache(source):
        known = read_manifest(Path(source).expanduser())["vae"]
        if any(known[name] != value for name, value in vae_hash(model).items()):
            warnings.warn(
                f"VAE {vae} is not the one that {source} was encoded with, {known['id']}",
                stacklevel=2,
            )
    return model


def _check_channels(vae: "AutoencoderKL", channels: int) -> None:
    wanted = vae.config.latent_channels
    if channels != wanted:
        raise ValueError(f"latents have {channels} channels but the VAE decodes {wanted}")
