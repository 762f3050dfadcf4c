"""The five scores of a set of samples, each with its standard error from repeated halves."""

from typing import Any

from dis_ssm.metrics.features import SetFeatures
from dis_ssm.metrics.frechet import Gaussian
from dis_ssm.metrics.manifold import Manifold, precision_recall
from dis_ssm.metrics.statistics import ALL, HALVES, T_95, halves_error
from dis_ssm.system.distributed import World

Halving = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def halving(n: int, confidence: bool, neighbours: int) -> Halving:
    """The pairs of halves that n samples are cut into: none when a half would be too small."""
    smallest = n // 2 - len(ALL)
    return HALVES if confidence and smallest > max(1, neighbours) else ()


def score(value: float, halves: list[float] | None = None) -> dict[str, Any]:
    """{"value", "stderr", "interval"}: `halves` are the values on one half and the other in turn.

    The interval covers 95 % by Student's t over the 7 independent pairs.
    """
    if not halves:
        return {"value": value, "stderr": None, "interval": None}
    error = halves_error(list(zip(halves[::2], halves[1::2], strict=True)))
    interval = [value - T_95 * error, value + T_95 * error]
    return {"value": value, "stderr": error, "interval": interval}


def frechet_score(
    name: str, made: SetFeatures, aim: Gaussian, pairs: Halving, world: World
) -> dict:
    """Fréchet distance of the features `name`. The processes share the halves."""
    halves = [half for pair in pairs for half in pair]
    statistics = made.statistics
    shares = world.gather(
        [statistics.gaussian(name, h).distance(aim) for h in halves[world.rank :: world.size]]
    )
    values = [shares[i % world.size][i // world.size] for i in range(len(halves))]
    return score(statistics.gaussian(name).distance(aim), values)


def inception_score(made: SetFeatures, pairs: Halving) -> dict | None:
    """None when there are fewer images than splits."""
    whole = made.statistics.inception_score()
    if whole is None:
        return None
    halves = [made.statistics.inception_score(half) for pair in pairs for half in pair]
    values = None if None in halves else [mean for mean, _ in halves]
    return score(whole[0], values) | {"std_over_splits": whole[1]}


def manifold_scores(
    made: SetFeatures, reference: Manifold, k: int, pairs: Halving, world: World
) -> dict[str, dict]:
    """{"precision": score, "recall": score}."""

    def of(groups: tuple[int, ...]) -> tuple[float, float]:
        chosen = sum(made.statistics.groups == g for g in groups).bool()
        return precision_recall(reference, Manifold(made.features[chosen], k, world), world)

    whole, halves = of(ALL), [of(half) for pair in pairs for half in pair]
    return {
        name: score(whole[i], [half[i] for half in halves])
        for i, name in enumerate(("precision", "recall"))
    }
