"""One pass over a set of images: statistics of all features, and the pool features themselves
where precision and recall need them."""

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
class Scanned:
    """`features` (m, d), float32, are those of the images that were to be kept."""

    statistics: SetStatistics
    features: Tensor


def scan(
    images: Images,
    extractor: Extractor,
    *,
    keep: Tensor,
    splits: int,
    batch_size: int,
    world: World,
    progress: bool = False,
) -> Scanned:
    """Features of all `images`; `keep`, bool (n,), says of which to keep the pool features.

    The processes take batches in turn and show one another the features; each then sums all of
    them in the order of the images, so the digits are the same for any number of processes.
    Raises ValueError when an image cannot be read or a feature is not finite.
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
    return Scanned(statistics, torch.cat(kept))
