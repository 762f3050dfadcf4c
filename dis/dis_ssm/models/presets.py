"""The models of the paper's Table 1, by name."""

from functools import partial

from dis_ssm.models.dis import DiS
from dis_ssm.system.nearest import did_you_mean

_SIZES = {
    "S": dict(hidden_size=368, depth=25),
    "B": dict(hidden_size=768, depth=25),
    "M": dict(hidden_size=768, depth=49),
    "L": dict(hidden_size=1024, depth=49),
    "H": dict(hidden_size=1536, depth=49),
}

DiS_models = {
    f"DiS-{size}/{patch}": partial(DiS, patch_size=patch, **kwargs)
    for size, kwargs in _SIZES.items()
    for patch in (2, 4, 8)
}


def create_model(name: str, **kwargs) -> DiS:
    """Builds a row of the paper's Table 1, `"DiS-S/2"` ... `"DiS-H/8"`.

    Args:
        name: a key of `DiS_models`.
        kwargs: any argument of `DiS`.

    Returns:
        The model with its initial weights.

    Raises:
        ValueError: unknown name, with near matches.
    """
    if name not in DiS_models:
        name = str(name)
        raise ValueError(f"unknown model {name!r}; {did_you_mean(name, DiS_models)}")
    return DiS_models[name](**kwargs)
