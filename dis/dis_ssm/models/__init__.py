"""The backbones: DiS, and the peers that it is compared with."""

from dis_ssm.models.config import DiSConfig
from dis_ssm.models.dis import DiS
from dis_ssm.models.presets import DiS_models, create_model

__all__ = [
    "DiS",
    "DiSConfig",
    "DiS_models",
    "create_model",
]
