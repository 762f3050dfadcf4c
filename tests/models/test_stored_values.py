"""Names, initial weights, outputs and gradients of seeded models, as version 0.1.0 had them.

A checkpoint fits by its names and shapes, a run repeats by its random draws: both would be lost by
a change that every other test lets pass.
"""

import hashlib

import pytest
import torch

from dis_ssm import DiS

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_classes=5)

# names and shapes; projections of the weights, of the output, and of the gradients in training
STORED: dict[str, tuple[dict, str, float, float, float]] = {
    "classes": ({}, "d8a17911286731bf", 27.781168, 9.5354141, 5053.09),
    "unconditional": ({"num_classes": 0}, "68db48ecc1d425d2", 4.5814156, -10.493676, -158.60374),
    "vectors": (
        {"num_classes": 0, "cond_dim": 4},
        "9dcc12847aeea4e3",
        30.814128,
        -7.4980943,
        -49.703933,
    ),
    "no null class": (
        {"class_dropout_prob": 0.0},
        "dd837f1ee8627218",
        -8.1802714,
        12.900664,
        520.3258,
    ),
    "added skips": (
        {"skip": "add", "depth": 5},
        "a1afcdfcfaf54574",
        -41.727758,
        19.336115,
        1174.3488,
    ),
    "no skips": ({"skip": "none"}, "cf802d3746211d3b", 2.3465002, -2.937534, 1386.8739),
    "adaLN": (
        {"time_conditioning": "adaln"},
        "e7ca7216e4bebfe7",
        -3.4655129,
        -6.5020338,
        -1546.527,
    ),
    "adaLN, vectors": (
        {"time_conditioning": "adaln", "num_classes": 0, "cond_dim": 4},
        "84f8d3a3eed02ef2",
        40.061018,
        -3.6438318,
        354.09633,
    ),
    "no learned variance": (
        {"learn_sigma": False},
        "af44d728c17832e7",
        19.223892,
        13.006925,
        1595.0233,
    ),
    "oblong": (
        {"input_size": (8, 12), "in_channels": 5, "patch_size": 4},
        "29e9754847910c72",
        2.3751414,
        5.820287,
        -566.35797,
    ),
    "other mixer": (
        {"d_state": 5, "expand": 1, "d_conv": 3, "hidden_size": 24},
        "da7633bce2dbf47f",
        -57.994641,
        45.069019,
        98.840314,
    ),
    "stochastic depth": (
        {"drop_path": 0.4, "depth": 5},
        "b0831e9d274a6753",
        -40.719365,
        1.8317708,
        -1993.2446,
    ),
    "stochastic depth, adaLN": (
        {"drop_path": 0.4, "depth": 5, "time_conditioning": "adaln"},
        "90ac5b89d28d8441",
        -24.804425,
        -10.865962,
        902.85043,
    ),
}


def projection(tensors):
    """One number that every value and its place change, and the size of such numbers."""
    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    directions = torch.cos(0.1 + 0.7 * torch.arange(len(values), dtype=torch.float64))
    return float(values @ directions), float(values.norm())


def awaken(model):
    """Numbers where the initialisation puts zeros, so that outputs say something."""
    with torch.no_grad():
        for p in model.parameters():
            if (p == 0).all():
                p.copy_(0.2 * torch.sin(torch.arange(p.numel()) + 1.0).reshape(p.shape))
    return model


def computed(options):
    torch.manual_seed(5)
    model = DiS(**(TINY | options))
    state = model.state_dict()
    text = repr([(name, tuple(tensor.shape)) for name, tensor in state.items()])
    weights = projection(state.values())
    awaken(model)
    x = torch.randn(3, model.in_channels, *model.input_size)
    t = torch.tensor([0, 17, 999])
    y = torch.arange(3) if model.num_classes else None
    y = torch.randn(3, model.cond_dim) if model.cond_dim else y
    with torch.no_grad():
        out = model.eval()(x, t, y)
    mask = torch.arange(3 * model.depth).reshape(-1, 3) % 4 > 0
    model.train()(x, t, y, mask).square().sum().backward()
    gradients = projection(p.grad for p in model.parameters())
    return hashlib.sha256(text.encode()).hexdigest()[:16], weights, projection([out]), gradients


@pytest.mark.parametrize("name", STORED)
def test_a_seeded_model_is_what_it_was(name, monkeypatch):
    monkeypatch.setenv("DIS_SSM_BACKEND", "reference")
    options, shapes, *stored = STORED[name]
    found, *numbers = computed(options)
    assert found == shapes
    for (value, size), expected in zip(numbers, stored, strict=True):
        assert value == pytest.approx(expected, abs=1e-4 * size)
