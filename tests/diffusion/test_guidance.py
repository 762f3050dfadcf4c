"""Guidance towards a condition of several parts, against its formula."""

import pytest
import torch
from torch.testing import assert_close

from dis_ssm.condition import Condition, cat
from dis_ssm.diffusion.guidance import guided
from helpers import PartsModel, normal

X, T = normal(3, 1, 4, 4), torch.tensor([3, 40, 90])
Y = Condition(
    label=torch.tensor([0, 1, 2]),
    context=normal(3, 2, 4, seed=2),
    context_mask=torch.tensor([[True, False], [True, True], [True, False]]),
)


def by_hand(model, y: Condition, null: Condition, scale: float) -> torch.Tensor:
    conditional, unconditional = model(X, T, y), model(X, T, null)
    prediction = unconditional[:, :1] + scale * (conditional[:, :1] - unconditional[:, :1])
    return torch.cat([prediction, conditional[:, 1:]], 1)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_every_part_is_guided(scale):
    model = PartsModel()
    null = Condition(
        label=torch.full((3,), 3), context=torch.zeros(3, 2, 4), context_mask=Y.context_mask & False
    )
    out = guided(model, scale)(X, T, Y)
    assert len(model.calls) == 1 and len(model.calls[0]) == 6
    assert_close(out, by_hand(model, Y, null, scale))
    explicit = guided(model, scale, null_class=1)(X, T, Y)
    assert_close(explicit, by_hand(model, Y, Y.null(null_class=1), scale))


@pytest.mark.parametrize("parts", [("label",), ("context",), ("label", "context")])
def test_parts_are_guided_alone(parts):
    model = PartsModel()
    out = guided(model, 3.0, null_parts=parts)(X, T, Y)
    assert_close(out, by_hand(model, Y, Y.null(*parts, null_class=3), 3.0))


def test_images_outside_the_interval_stay_conditional():
    model = PartsModel()
    out = guided(model, 3.0, interval=(20, 60))(X, T, Y)
    assert_close(out[1:2], guided(model, 3.0)(X, T, Y)[1:2])
    assert_close(out[::2], model(X, T, Y)[::2])


def test_nulls_that_are_not_known_are_named():
    def model(x, t, y):
        return cat([x, x])

    with pytest.raises(ValueError, match="needs null_class"):
        guided(model, 2.0)(X, T, Y)
    with pytest.raises(ValueError, match="no 'text'"):
        guided(PartsModel(), 2.0, null_parts=("text",))(X, T, Y)
    with pytest.raises(ValueError, match="of a Condition, but y is a tensor"):
        guided(PartsModel(), 2.0, null_parts=("label",))(X, T, Y.label)
    context = Condition(context=Y.context)
    for parts in ((), ("context",)):
        guided(PartsModel(), 2.0, null_parts=parts)(X, T, context)
    assert_close(
        guided(lambda x, t, y: PartsModel()(x, t, y), 2.0)(X, T, context),
        by_hand(PartsModel(), context, context.null(), 2.0),
    )
