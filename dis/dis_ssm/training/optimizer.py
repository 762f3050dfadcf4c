"""AdamW as the paper trains with it: which parameters decay, and the rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from dis_ssm.config import TrainConfig


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, its state made at once, as its first step would make it."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        fused=True if device.type in ("cpu", "cuda") else None,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, settings: TrainConfig) -> float:
    """The rate of update `step` = 0, 1, ...: `min(1, (step + 1) / warmup_steps)` times lr, or times
    `min_lr + (lr - min_lr) (1 + cos(pi step / steps)) / 2` for the cosine schedule."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return warmup * settings.lr
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return warmup * (settings.min_lr + (settings.lr - settings.min_lr) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups that cover every trainable parameter once: "matrices", the weights of linear
    layers and convolutions, with weight decay; "others" without: biases, norms, A_log, D, position
    and class embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith("weight") and parameter.ndim > 1 and id(parameter) not in tables
            (matrices if decays else others).append(parameter)
    return [
        {"name": "matrices", "params": matrices, "weight_decay": weight_decay},
        {"name": "others", "params": others, "weight_decay": 0.0},
    ]
