"""The optimizer: learning rates, groups of parameters, the moving average."""

import math

import pytest
import torch
from torch import nn

from dis_ssm.config import TrainConfig
from dis_ssm.training.averages import EMA
from dis_ssm.training.optimizer import learning_rate, parameter_groups
from helpers import tiny, trainer_of


def test_learning_rates():
    cosine = TrainConfig(steps=100, lr=1e-3, min_lr=1e-5, warmup_steps=10)
    assert learning_rate(0, cosine) == pytest.approx(1e-4)
    assert learning_rate(4, cosine) == pytest.approx(
        0.5 * (1e-5 + 0.99e-3 * (1 + math.cos(math.pi * 0.04)) / 2)
    )
    assert learning_rate(50, cosine) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(100, cosine) == pytest.approx(1e-5)
    rates = [learning_rate(n, cosine) for n in range(9, 100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 1e-5
    constant = TrainConfig(steps=100, lr=1e-3, lr_schedule="constant", warmup_steps=4)
    assert [learning_rate(n, constant) for n in (0, 1, 3, 99)] == [2.5e-4, 5e-4, 1e-3, 1e-3]
    assert learning_rate(0, TrainConfig(lr_schedule="constant", lr=1e-3)) == 1e-3


def test_groups_cover_every_parameter_once_and_decay_only_matrices():
    model = trainer_of(tiny()).model
    groups = {g["name"]: g for g in parameter_groups(model, 0.1)}
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert groups["matrices"]["weight_decay"] == 0.1 and groups["others"]["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = (
        {names[id(p)] for p in groups[group]["params"]} for group in ("matrices", "others")
    )
    for word in ("in_proj", "out_proj", "x_proj", "dt_proj.weight", "conv_weight", "patch_embed"):
        assert any(word in name for name in decayed), word
    for word in ("bias", "norm", "A_log", ".D", "pos_embed", "class_embed"):
        assert any(word in name for name in spared), word
        assert not any(word in name for name in decayed), word


def test_weight_decay_moves_only_the_matrices():
    config = tiny(weight_decay=0.5, lr=0.1, warmup_steps=0, lr_schedule="constant")
    trainer = trainer_of(config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    matrices = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
    for name, p in trainer.model.named_parameters():
        factor = 1 - 0.1 * 0.5 if id(p) in matrices else 1
        torch.testing.assert_close(p.detach(), factor * before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("warmup", [1, 10])
def test_ema_is_its_closed_form(warmup):
    model = nn.Linear(3, 2)
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    ema = EMA(model, decay=0.7, warmup=warmup)
    history = [model.weight.detach().double().clone()]
    for n in range(20):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
            model.count += 1
        ema.update(model)
        history.append(model.weight.detach().double().clone())
        decays = [min(0.7, (1 + i) / (warmup + i)) for i in range(n + 1)]
        weights = [math.prod(decays)]
        weights += [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(n + 1)]
        expected = sum(w * h for w, h in zip(weights, history, strict=True))
        torch.testing.assert_close(ema.tensors["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.tensors["count"] == 20 and ema.updates == 20
    own = model.weight.detach().clone()
    assert torch.equal(ema.whole()["weight"], ema.tensors["weight"])
    assert torch.equal(model.weight, own)


def test_ema_is_float32_whatever_the_model():
    model = nn.Linear(3, 2).bfloat16()
    ema = EMA(model, decay=0.999, warmup=1)
    with torch.no_grad():
        model.weight += 1
    ema.update(model)
    assert ema.tensors["weight"].dtype == torch.float32
    moved = ema.tensors["weight"] - (model.weight.float() - 1)
    torch.testing.assert_close(moved, torch.full((2, 3), 1e-3), rtol=0.1, atol=5e-3)
    assert (moved != 0).all()
