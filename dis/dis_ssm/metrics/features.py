"""The features of a set of images, in one pass over it.

The pass leaves statistics of all features, and the pool features themselves where precision and
recall need them.
"""

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dis_ssm.metrics.extractors import Extractor
from dis_ssm.metrics.readers import Images
from dis_ssm.metrics.statistics import SetStatistics
from dis_ssm.system.distributed import World
from dis_ssm.system.prefetch import prefetch


@dataclass
class SetFeatures:
    """Of a set of images: `features` (m, d), float32, are the pool features that were kept."""

    statistics: SetStatistics
    features: Tensor


def extract_features(
    images: Images,
    extractor: Extractor,
    *,
    keep: Tensor,
    splits: int,
    batch_size: int,
    world: World,
    progress: bool = False,
) -> SetFeatures:
    """Compute the features of all images, all processes of `world` together.

    The processes take batches in turn and exchange the features; each then sums all of them in the
    order of the images, so the digits are the same for any number of processes.

    Args:
        images: n images.
        extractor: what computes the features.
        keep: bool (n,), the images whose pool features are kept.
        splits: of the Inception score.
        batch_size: images in one pass of the network.
        progress: show a bar.

    Raises:
        ValueError: an image cannot be read, or a feature is not finite.
    """
    n, step = len(images), batch_size * world.size
    statistics, kept = SetStatistics(n, splits), []
    starts = range(world.rank * batch_size, n, step)
    bar = tqdm(
        total=n, unit="image", desc=images.name, disable=not (progress and world.main), leave=False
    )
    batches = prefetch(lambda start: images.read(start, start + batch_size), starts)
    with bar, closing(batches):
        for turn in range(-(-n // step)):
            with world.together():
                features = None
                if turn < len(starts):
                    features = extractor(next(batches))
            for part in world.gather(features):
                if part is None:
                    continue
                where = slice(statistics.seen, statistics.seen + len(part["pool"]))
                statistics.update(part)
                kept.append(part["pool"][keep[where]])
                bar.update(where.stop - where.start)
    return SetFeatures(statistics, torch.cat(kept))
