"""`DiSConfig`: the same names and defaults as `DiS` has, checked when it is made, and what rebuilds
a model."""

import dataclasses
import inspect
import pickle

import pytest

from dis_ssm import DiS
from dis_ssm.models.config import DiSConfig

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=3)


def test_the_config_has_the_models_arguments_in_their_order():
    ours, models = (inspect.signature(kind).parameters for kind in (DiSConfig, DiS))
    assert list(ours) == list(models)
    assert [p.default for p in ours.values()] == [p.default for p in models.values()]
    distinct = {name: object() for name in ours}
    with pytest.MonkeyPatch.context() as patch:  # each argument lands in the field of its name
        seen = []
        patch.setattr(DiSConfig, "__post_init__", lambda self: seen.append(self))
        with pytest.raises((TypeError, AttributeError)):
            DiS(**distinct)
    assert vars(seen[0]) == distinct


@pytest.mark.parametrize(
    "options",
    [{}, {"input_size": (8, 12), "num_classes": 4}, {"cond_dim": 5, "time_conditioning": "adaln"}],
)
def test_a_models_config_rebuilds_it(options):
    model = DiS(**(TINY | options))
    assert model.config == dataclasses.asdict(DiSConfig(**(TINY | options)))
    assert model.config | TINY | options == model.config  # as they were given
    again = DiS(**pickle.loads(pickle.dumps(model.config)))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1] and again.config == model.config


def test_the_config_is_checked_when_it_is_made_and_then_fixed():
    with pytest.raises(ValueError, match="depth must be odd, got 4"):
        DiSConfig(depth=4)
    with pytest.raises(ValueError, match="must be at least 1 and an integer, got '8'"):
        dataclasses.replace(DiSConfig(**TINY), hidden_size="8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiSConfig().depth = 3


def test_what_follows_from_the_options():
    plain, labels = DiSConfig(**TINY), DiSConfig(**TINY, num_classes=4, learn_sigma=False)
    assert (plain.grid.sides, plain.out_channels, plain.num_condition_tokens) == ((8, 8), 6, 1)
    assert not plain.conditional and not plain.has_null_class
    assert (labels.out_channels, labels.num_condition_tokens) == (3, 2)
    assert labels.conditional and labels.has_null_class
    vectors = DiSConfig(**TINY, cond_dim=4, time_conditioning="adaln")
    assert vectors.conditional and vectors.adaln and not vectors.num_condition_tokens
    assert not dataclasses.replace(labels, class_dropout_prob=0.0).has_null_class
