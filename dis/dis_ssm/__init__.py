"""DiS: diffusion models with a bidirectional state-space (Mamba) backbone."""

from dis_ssm.models import DiS, DiS_models, create_model
from dis_ssm.version import __version__

__all__ = ["DiS", "DiS_models", "__version__", "create_model"]
