"""Run folders and checkpoints on disk: complete and unaltered, or refused by name."""

from dis_ssm.storage.checkpoint import CheckpointError, save_checkpoint

__all__ = [
    "CheckpointError",
    "save_checkpoint",
]
