"""What DiS is told: a tensor, or a condition of one part; and names of samplers."""

import typing

import pytest
import torch

from dis_ssm import DiS
from dis_ssm.condition import Condition
from dis_ssm.config import Sampler
from dis_ssm.sampling import SAMPLERS

X, T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def model_of(**options):
    torch.manual_seed(0)
    model = DiS(4, in_channels=3, hidden_size=16, depth=1, **options)
    torch.nn.init.normal_(model.decoder.linear.weight)
    return model.eval()


def test_a_condition_of_a_label_is_the_label():
    model, y = model_of(num_classes=5), torch.tensor([4, 0])
    assert model(X, T, Condition(label=y)).equal(model(X, T, y))
    assert not model(X, T, y).equal(model(X, T, y.flip(0)))


def test_a_condition_of_a_vector_is_the_vector():
    model, y = model_of(cond_dim=6), torch.randn(2, 6)
    assert model(X, T, Condition(vector=y)).equal(model(X, T, y))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"vector": torch.ones(2, 6), "image": X}, "vector, image"),
        ({"label": torch.ones(2, dtype=torch.long), "vector": torch.ones(2, 6)}, "label, vector"),
        ({"context": torch.ones(2, 3, 6)}, "context"),
    ],
)
def test_other_parts_are_refused(parts, named):
    with pytest.raises(ValueError, match=f"y has {named}: this model takes a label or a vector"):
        model_of(cond_dim=6)(X, T, Condition(**parts))


def test_the_configuration_knows_every_sampler():
    assert typing.get_args(Sampler) == tuple(SAMPLERS)
