"""From noise to samples: samplers, whole sets, pictures."""

from dis_ssm.sampling.samplers import SAMPLERS, ddim_invert, interpolate, sample

__all__ = [
    "SAMPLERS",
    "ddim_invert",
    "interpolate",
    "sample",
]
