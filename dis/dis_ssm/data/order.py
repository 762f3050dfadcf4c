"""The order in which training reads its images: a function of (seed, epoch) alone."""

from functools import lru_cache

import numpy as np
import torch


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of 0 .. n-1, int64 (n,), that depends on nothing but the arguments.

    Sorts the raw PCG64 stream seeded by (seed, epoch), which NumPy promises never to change.
    """
    return _epoch_order(n, seed, epoch).clone()


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return torch.from_numpy(np.argsort(keys, kind="stable").astype(np.int64))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Indices of the global batch of `step` (0, 1, ...), int64 (batch_size,).

    Epochs follow one another without a gap: steps 0, 1, ... together read the infinite sequence
    `epoch_order(n, seed, 0), epoch_order(n, seed, 1), ...`, so that every image is seen once an
    epoch, a batch may span epochs (several when batch_size > n), and resuming needs only `step`.

    Raises:
        ValueError: `n` or `batch_size` is below 1, or `step` below 0.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n, batch_size >= 1 and step >= 0, got {n}, {batch_size}, {step}")
    start = step * batch_size
    stop = start + batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    orders = (
        _epoch_order(n, seed, epoch)[max(start - epoch * n, 0) : stop - epoch * n]
        for epoch in epochs
    )
    return torch.cat(list(orders))
