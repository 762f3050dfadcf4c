"""The backbones: DiS, and the peers that it is compared with."""

from dis_ssm.models.dis import DiS, DiS_models, create_model

__all__ = [
    "DiS",
    "DiS_models",
    "create_model",
]
