"""The noise of image i, from (seed, i) alone."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dis_ssm.diffusion.process import draw


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator per image, seeded by a hash of (seed, index), index in [0, 2³²).

    Draw the noise with `image_noise` and hand the same generators on to `sample`. They are on the
    CPU, so that images agree across devices.

    PyTorch's CPU generator uses the low 32 bits of its seed only, and among 50,000 images hashed to
    32 bits two would likely share their noise. Here the low bits are a permutation of the index (a
    Feistel network keyed by the seed), so no two images of one seed can.

    Raises:
        ValueError: an index out of its range.
    """
    return [torch.Generator().manual_seed(_image_seed(seed, index)) for index in indices]


def image_noise(
    shape: Sequence[int],
    generators: list[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Starting noise (len(generators), *shape), image i drawn from generator i."""
    return draw(torch.randn, (len(generators), *shape), generators, device, dtype)


def _image_seed(seed: int, index: int) -> int:
    if not 0 <= index < 2**32:
        raise ValueError(f"the index of an image must lie in [0, 2**32), got {index}")

    def hashed(*key: int) -> int:
        return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest())

    left, right = index >> 16, index & 0xFFFF
    for turn in range(4):
        left, right = right, left ^ hashed(seed, turn, right) & 0xFFFF
    return hashed(seed, index) << 32 | left << 16 | right
