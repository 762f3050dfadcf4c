"""The initial weights of DiS."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dis_ssm.models.blocks import AddRMSNorm
from dis_ssm.models.mixer import Direction

if TYPE_CHECKING:
    from dis_ssm.models.dis import DiS


@torch.no_grad()
def init_weights(model: DiS) -> None:
    """Draws every parameter.

    | parameter                             | value                                            |
    | ------------------------------------- | ------------------------------------------------ |
    | Linear, patch convolution             | Xavier uniform, bias 0                           |
    | time MLP, class table, positions      | N(0, 0.02²), bias 0                              |
    | convolution (per direction)           | U(±width^-1/2), bias likewise                    |
    | x_proj                                | U(±I^-1/2)                                       |
    | dt_proj weight                        | U(±R^-1/2)                                       |
    | dt_proj bias                          | softplus⁻¹(exp(U(log 1e-3, log 1e-1)))           |
    | A_log, D                              | log(1 ... N), 1                                  |
    | in_proj; out_proj                     | U(±D^-1/2); U(±I^-1/2) / sqrt(depth)             |
    | norm weights                          | 1                                                |
    | adaLN in the blocks                   | weight 0, bias 1 (scale) and 0 (shift)           |
    | decoder's modulation and final linear | 0                                                |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, AddRMSNorm):
            nn.init.ones_(module.weight)
    for parameter in (model.time_embed[0].weight, model.time_embed[2].weight, model.pos_embed):
        nn.init.normal_(parameter, std=0.02)
    if model.class_embed is not None:
        nn.init.normal_(model.class_embed.weight, std=0.02)
    for block in model.blocks:
        mixer = block.mixer
        _uniform(mixer.in_proj.weight, mixer.in_proj.in_features)
        _uniform(mixer.out_proj.weight, mixer.d_inner)
        mixer.out_proj.weight /= math.sqrt(model.depth)
        _init_direction(mixer.forward_scan)
        _init_direction(mixer.backward_scan)
        if block.modulation is not None:
            nn.init.zeros_(block.modulation.weight)
            block.modulation.bias.copy_(torch.arange(2).repeat_interleave(model.hidden_size) == 0)
    zero = [model.decoder.linear, model.decoder.modulation]
    for linear in filter(None, zero):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _uniform(parameter: Tensor, fan_in: int) -> None:
    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


def _init_direction(d: Direction) -> None:
    _uniform(d.conv_weight, d.conv_weight.shape[1])
    _uniform(d.conv_bias, d.conv_weight.shape[1])
    _uniform(d.x_proj.weight, d.x_proj.in_features)
    _uniform(d.dt_proj.weight, d.dt_proj.in_features)
    # Δ between 0.001 and 0.1, its logarithm uniform
    dt = torch.empty_like(d.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    d.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    d.A_log.copy_(
        torch.arange(1, d.A_log.shape[1] + 1, dtype=torch.float32).log().expand_as(d.A_log)
    )
    nn.init.ones_(d.D)
