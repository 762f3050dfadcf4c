"""The Gaussian diffusion process, and the guidance of any model."""

from dis_ssm.diffusion.gaussian import Diffusion

__all__ = [
    "Diffusion",
]
