"""Exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn

from dis_ssm.system.distributed import whole


class EMA:
    """Average of the floating-point entries of `model.state_dict()`, by name, in float32.

    Update n = 0, 1, ... is `e <- e + (1 - d)(theta - e)` with
    `d = min(decay, (1 + n) / (warmup + n))`. The second term keeps short runs from averaging in
    their initial weights: with `warmup` 10 it passes 0.99 at n = 890 and 0.9999 at n = 89,990.
    `warmup` 1 is a constant decay. Integer entries are copied. Source: Karras et al. 2018 for the
    average; the ramp is that of TensorFlow's ExponentialMovingAverage(num_updates).

    Raises:
        ValueError: `decay` is not in [0, 1), or `warmup` is below 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: int = 10):
        if not 0 <= decay < 1 or warmup < 1:
            raise ValueError(f"need 0 <= decay < 1 and warmup >= 1, got {decay} and {warmup}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.tensors = {name: _float32(t).clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights, after a step."""
        ramp = (1 + self.updates) / (self.warmup + self.updates)
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.tensors[name])
                values.append(_float32(value))
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - min(self.decay, ramp))
        self.updates += 1

    def whole(self) -> dict[str, Tensor]:
        """The averages, each gathered from all ranks where it is sharded. Called by all ranks."""
        return {name: whole(average) for name, average in self.tensors.items()}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
