"""Training of a run: `train` begins, continues or extends it."""

from dis_ssm.training.loop import train

__all__ = [
    "train",
]
