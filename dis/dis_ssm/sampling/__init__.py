"""From noise to samples: samplers, whole sets, pictures."""

from dis_ssm.sampling.samplers import SAMPLERS, ddim, ddim_invert, ddpm, interpolate, sample
from dis_ssm.sampling.steps import respaced

__all__ = [
    "SAMPLERS",
    "ddim",
    "ddim_invert",
    "ddpm",
    "interpolate",
    "respaced",
    "sample",
]
