"""The Gaussian diffusion process, and the guidance of any model."""

from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.diffusion.guidance import guide, guided, within

__all__ = [
    "Diffusion",
    "guide",
    "guided",
    "within",
]
