"""First stages: a VAE, encoding with it and decoding."""

from dis_ssm.encoders.encoding import encode
from dis_ssm.encoders.vae import load_vae

__all__ = [
    "encode",
    "load_vae",
]
