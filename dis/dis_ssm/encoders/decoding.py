"""From what a model draws to images: whether it can be seen, and by which decoder."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dis_ssm.config import CONVERTED, Config
from dis_ssm.data.images import VISIBLE_CHANNELS, to_uint8
from dis_ssm.data.latents import is_cache, latent_scale, read_manifest
from dis_ssm.data.sources import SOURCES
from dis_ssm.encoders.vae import load_vae, vae_hash, vae_scale

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NO_VAE = "none"  # the name that asks for the latents themselves


@dataclass(frozen=True, eq=False)
class Decoder:
    """How the samples of a run become images.

    Args:
        latents: whether the samples are latents, not images.
        vae: what decodes them; None for images, and where latents have no VAE.
    """

    latents: bool
    vae: "AutoencoderKL | None" = None

    @property
    def visible(self) -> bool:
        """Whether `decode` gives images."""
        return self.vae is not None or not self.latents

    def shape(self, drawn: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of what `decode` makes of a sample of shape `drawn`."""
        if self.vae is None:
            return drawn
        _, *sides = drawn
        height, width = (side * vae_scale(self.vae) for side in sides)
        return self.vae.config.out_channels, height, width

    def decode(self, samples: Tensor) -> Tensor:
        """uint8 images (n, C, H, W) of samples in model space; latents without a VAE stay float32.

        Raises:
            ValueError: the VAE has other latent channels.
        """
        if self.vae is not None:
            return decode(self.vae, samples)
        return to_uint8(samples) if self.visible else samples


def find_decoder(
    config: Config, vae: str | None = None, device: str | torch.device = "cpu"
) -> Decoder:
    """How the samples of a run become images: by the VAE that `decoder_name` finds, as they are
    where the run learned from images, or not at all.

    Args:
        config: of the run, resolved.
        vae: a folder, a hub id or "none" in place of the VAE of the run's config or latent cache.
        device: where the VAE computes.

    Raises:
        ValueError: the VAE cannot be loaded or has other latent channels than the model.
    """
    if name := decoder_name(config, vae):
        found = load_decoder(name, config.data.source, config.model.in_channels, device)
        return Decoder(True, found)
    return Decoder(_draws_latents(config))


def decoder_name(config: Config, vae: str | None = None) -> str | None:
    """Folder or hub id of the VAE that decodes a run's samples: `vae`, that of the run's config, or
    the one its latent cache names if that is a folder which still exists; None without any, for
    "none", and for a run that says that it learned from images unless `vae` is given."""
    data = config.data
    if vae is None and data.latents is False:
        return None
    name = vae or data.vae or _cached_vae(data.source)
    return None if name == NO_VAE else name


def _draws_latents(config: Config) -> bool:
    """As the config says or, in runs of 0.1.0, as the data shows. Where that has gone, too, grey or
    RGB channels are taken for images, with a warning."""
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
            stacklevel=3,
        )
        return False
    return model.input_size != (data.image_size, data.image_size)


@torch.no_grad()
def decode(vae: "AutoencoderKL", z: Tensor, batch_size: int = 8) -> Tensor:
    """uint8 images (n, C, H, W), on the CPU, of `z` in model space: vae.decode(z / scale + shift).

    Rounded to nearest and clipped.

    Raises:
        ValueError: the VAE has other latent channels.
    """
    _check_channels(vae, z.shape[1])
    shift, scale = (value.to(vae.device) for value in latent_scale(vae.config))
    parts = [
        to_uint8(vae.decode((part.to(vae.device) / scale + shift).to(vae.dtype)).sample.float())
        for part in z.split(batch_size)
    ]
    return torch.cat([part.cpu() for part in parts])


def _cached_vae(source: str | Path) -> str | None:
    """The VAE that the cache `source` names, if that is a folder which still exists."""
    if not is_cache(source):
        return None
    name = read_manifest(Path(source).expanduser())["vae"]["id"]
    return name if Path(name).is_dir() else None


def load_decoder(
    vae: str | Path, source: str | Path, channels: int, device: str | torch.device
) -> "AutoencoderKL":
    """`load_vae` for latents of so many channels, with a warning when `source` is a cache that was
    encoded with another encoder.

    Raises:
        ValueError: the VAE cannot be loaded, or has other latent channels.
    """
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
