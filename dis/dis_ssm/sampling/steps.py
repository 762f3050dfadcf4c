"""Which timesteps a sampler visits, and what it calls after each."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

Callback: TypeAlias = Callable[[int, int | float, Tensor], object]  # (i, t, x)


def respaced(num_steps: int, steps: int) -> list[int]:
    """`steps` timesteps of 0 … T-1, T = `num_steps`: increasing, evenly spaced and rounded, both
    ends included. They are those of guided-diffusion (but for ties) and of diffusers' "linspace".
    One step is T-1 alone.

    Raises:
        ValueError: steps is no integer in [1, T].
    """
    if not 1 <= steps <= num_steps or steps % 1:
        raise ValueError(f"steps must be an integer in [1, {num_steps}], got {steps}")
    if steps == 1:
        return [num_steps - 1]
    return np.linspace(0, num_steps - 1, int(steps)).round().astype(int).tolist()


def descending(num_steps: int, steps: int | Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (t, s) from the noisiest step t to the last, s the step after t; the last s is -1.

    Args:
        num_steps: T.
        steps: how many, evenly spaced (`respaced`), or the increasing timesteps themselves.

    Raises:
        ValueError: timesteps that are no integers, do not increase or lie outside [0, T).
    """
    if not isinstance(steps, Iterable):
        steps = respaced(num_steps, steps)
    chain = [-1, *map(int, steps)]
    if len(chain) < 2 or chain[-1] >= num_steps:
        raise ValueError(f"timesteps must lie in [0, {num_steps - 1}], got {chain[1:]}")
    if chain[1:] != list(steps) or any(t <= s for s, t in itertools.pairwise(chain)):
        raise ValueError(f"timesteps must be integers ≥ 0 that increase, got {list(steps)}")
    return list(zip(chain[:0:-1], chain[-2::-1], strict=True))
