"""Precision and recall of samples by nearest-neighbour manifolds (Kynkäänniemi et al. 2019)."""

import torch
from torch import Tensor

from dis_ssm.system.distributed import World

ROWS = 512  # a row block against all columns is what one process computes at a time
COLUMNS = 8192
ROUNDING = 1e-12  # of |u|^2 + |v|^2: distances below it are those of equal vectors


class Manifold:
    """The union of balls around features (n, d), each reaching to its k-th nearest other feature.

    Distances are squared and in float64; rows are shared among the processes of `world`, all of
    which call this.

    Raises:
        ValueError: there are fewer than k + 1 features.
    """

    def __init__(self, features: Tensor, k: int, world: World):
        if features.dim() != 2 or len(features) <= k:
            raise ValueError(f"{len(features)} images: a radius to neighbour {k} needs more")
        self.features = features
        self.radii = torch.cat(
            _by_block(
                len(features),
                world,
                lambda rows: (
                    squared_distances(features[rows], features, world.device)
                    .topk(k + 1, dim=1, largest=False)  # the nearest of all is the feature itself
                    .values[:, -1]
                    .cpu()
                ),
            )
        )


def precision_recall(reference: Manifold, samples: Manifold, world: World) -> tuple[float, float]:
    """Fractions of samples inside the reference's manifold, and of references inside the samples'.

    A point on the surface of a ball is inside, as in ADM.
    """
    radii = samples.radii.to(world.device)

    def compare(rows: slice) -> tuple[Tensor, Tensor]:
        squared = squared_distances(reference.features[rows], samples.features, world.device)
        reach = reference.radii[rows].to(squared.device)
        covered = (squared <= reach[:, None]).any(0)
        return covered.cpu(), (squared <= radii).any(1).cpu()

    blocks = _by_block(len(reference.features), world, compare)
    covered = torch.stack([samples_in for samples_in, _ in blocks]).any(0)
    recalled = torch.cat([references_in for _, references_in in blocks])
    return covered.double().mean().item(), recalled.double().mean().item()


def squared_distances(u: Tensor, v: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """|u_i - v_j|^2 in float64, (n, m), on `device`; exactly 0 between equal vectors."""
    u = u.to(device, torch.float64)
    parts = []
    for part in v.split(COLUMNS):
        part = part.to(device, torch.float64)
        norms = u.square().sum(1)[:, None] + part.square().sum(1)
        squared = norms - 2 * (u @ part.T)
        parts.append(squared.where(squared > ROUNDING * norms, 0.0))
    return torch.cat(parts, 1)


def _by_block(n: int, world: World, compute) -> list:
    """compute(rows) for every block of rows, in order; the processes take blocks in turn."""
    blocks = [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
    shares = world.gather([compute(rows) for rows in blocks[world.rank :: world.size]])
    return [shares[i % world.size][i // world.size] for i in range(len(blocks))]
