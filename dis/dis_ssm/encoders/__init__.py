"""First stages: a VAE, encoding with it and decoding."""

from dis_ssm.encoders.decoding import Decoder, decode, find_decoder
from dis_ssm.encoders.encoding import encode
from dis_ssm.encoders.vae import load_vae

__all__ = [
    "Decoder",
    "decode",
    "encode",
    "find_decoder",
    "load_vae",
]
