"""Other people's files: released checkpoints."""

from dis_ssm.interop.released import convert_file, from_released

__all__ = [
    "convert_file",
    "from_released",
]
