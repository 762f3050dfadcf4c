"""FID, sFID, Inception score, precision and recall of a set of images.

The definitions are those of ADM's evaluator (Dhariwal & Nichol 2021), computed in PyTorch, in one
pass over the images, by any number of processes.
"""

import contextlib
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.order import epoch_order
from dis_ssm.metrics.extractors import Extractor, open_extractor
from dis_ssm.metrics.features import SetFeatures, extract_features
from dis_ssm.metrics.frechet import Gaussian
from dis_ssm.metrics.manifold import Manifold
from dis_ssm.metrics.readers import Images, NpzImages, npz_keys, open_images
from dis_ssm.metrics.report import warnings_about
from dis_ssm.metrics.scores import Halving, frechet_score, halving, inception_score, manifold_scores
from dis_ssm.metrics.statistics import ADM_KEYS, StoredStatistics
from dis_ssm.system.distributed import World
from dis_ssm.system.files import check_writable
from dis_ssm.system.machine import device_name, pick_device, versions

REFERENCE_IMAGES = 10_000  # what ADM's reference files hold for precision and recall
SPLITS = 10
NEIGHBOURS = 3

Source = str | Path | ImageDataset


def evaluate_samples(
    samples: Source,
    reference: Source,
    *,
    extractor: str | Extractor = "inception",
    weights: str | Path | None = None,
    resize: int | None = None,
    batch_size: int = 64,
    world: World | None = None,
    split: str = "train",
    image_size: int | None = None,
    splits: int = SPLITS,
    neighbours: int = NEIGHBOURS,
    reference_images: int = REFERENCE_IMAGES,
    confidence: bool = True,
    save_reference: str | Path | None = None,
    progress: bool = False,
    background: str = "white",
) -> dict:
    """The scores of `samples` against `reference`, with all that they depend on.

    Args:
        samples: what `open_images` reads: .npz, .zip or folder of images of one size, a data set.
        reference: the same, or statistics as ADM's: .npz with mu, sigma, and perhaps mu_s, sigma_s
            and images, arr_0.
        extractor: a name, with `weights` and `resize` as `open_extractor` takes them, or an
            `Extractor`.
        batch_size: images in one pass of the network; another one rounds differently.
        world: None for this process alone, on the best device. All its processes must call.
        split: of a `reference` that `dis_ssm.data.open.open_dataset` opens.
        image_size: likewise: side in pixels that it is cropped and scaled to.
        splits: of the Inception score, consecutive in the order of the images.
        neighbours: k of precision and recall.
        reference_images: precision and recall take no more than so many images of the reference,
            a fixed random choice.
        confidence: standard errors and intervals, from repeated halves of the samples.
        save_reference: a new .npz for the statistics of the reference, as ADM's, with the images
            that precision and recall took.
        background: what image files with alpha are composed on, "white" or "black"; "drop" leaves
            out alpha, as ADM.
        progress: show bars.

    Returns:
        Plain data, the same in every process: {"scores": {name: {"value", "stderr", "interval"}},
        "unavailable": {name: why}, "warnings": [...], "settings", "samples", "reference", "run"}.
        Only "run" (device, processes, seconds, versions) may differ where the numbers are the same.
        Intervals are at 95 % and hold the choice of the samples: not that of the reference, nor the
        bias that a Fréchet distance has at finite n.

    Raises:
        ValueError: sources, weights or options that cannot be used, or statistics of another
            extractor.
        OSError: a file cannot be read or written.
        ImportError: the extractor's packages are not installed.
    """
    limits = {"batch_size": batch_size, "splits": splits, "neighbours": neighbours}
    for name, value in (limits | {"reference_images": reference_images}).items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    started = time.perf_counter()
    world = world or World(pick_device())
    with world.together():
        generated = open_images(samples, background=background)
        if len(generated) < 2:
            raise ValueError(f"{generated.name} has 1 image: a distance needs 2 or more")
        stored, real = open_reference(reference, split, image_size, background)
        if save_reference is not None:
            _check_savable(Path(save_reference), stored)
    extractor = _ready(extractor, weights, resize, world)
    with world.together():
        _check_comparable(generated, stored, real, extractor)

    options = {"splits": splits, "batch_size": batch_size, "world": world, "progress": progress}
    target = _reference_features(stored, real, extractor, reference_images, options)
    wanted = torch.full((len(generated),), target.features is not None)
    made = extract_features(generated, extractor, keep=wanted, **options)
    if save_reference is not None:
        with world.together():
            if world.main:
                _save(Path(save_reference), target, real, extractor)

    pairs = halving(len(generated), confidence, neighbours)
    scores, unavailable = _scores(made, target, extractor, neighbours, pairs, world)
    report = {
        "scores": scores,
        "unavailable": unavailable,
        "settings": {
            "extractor": extractor.protocol,
            "batch_size": batch_size,
            "background": background,
            "inception_score_splits": splits,
            "neighbours": neighbours,
            "precision_recall_references": 0 if target.features is None else len(target.features),
            "halves": 2 * len(pairs),
        },
        "samples": generated.describe(),
        "reference": target.description,
        "run": {
            "device": device_name(world.device),
            "processes": world.size,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": _versions(),
        },
    }
    report["warnings"] = warnings_about(report)
    return world.gather(report)[0]


@dataclass
class Target:
    """What samples are compared with.

    `features` are None without images; `chosen` says of which images they are.
    """

    gaussians: dict[str, Gaussian]
    features: Tensor | None
    chosen: Tensor | None
    description: dict[str, Any]


def _ready(extractor, weights, resize, world: World) -> Extractor:
    if isinstance(extractor, Extractor):
        if weights is not None or resize is not None:
            raise ValueError("weights and resize belong to the extractor that was given")
        return extractor
    options = {"weights": weights, "resize": resize, "device": world.device}
    opened = None
    with world.together():  # the first process may have to download the weights
        if world.main:
            opened = open_extractor(extractor, **options)
    with world.together():
        return opened or open_extractor(extractor, **options)


def open_reference(
    reference: Source, split: str, image_size: int | None, background: str = "white"
) -> tuple[StoredStatistics | None, Images | None]:
    """Statistics, images, or both, of what `evaluate_samples` takes as its reference.

    Raises:
        ValueError: it cannot be used.
    """
    path = None if isinstance(reference, ImageDataset) else Path(reference).expanduser()
    if path is None or path.suffix != ".npz" or not path.is_file():
        return None, open_images(reference, split, image_size, background)
    keys = npz_keys(path)
    stored = StoredStatistics.load(path) if ADM_KEYS["pool"][0] in keys else None
    if stored and not stored.has_images:
        return stored, None
    return stored, NpzImages(path)


def _check_comparable(
    generated: Images,
    stored: StoredStatistics | None,
    real: Images | None,
    extractor: Extractor,
) -> None:
    """ValueError now, not after the passes, where features cannot be compared."""
    made_by = ((stored and stored.protocol) or {}).get("extractor", {}).get("name", extractor.name)
    if made_by != extractor.name:
        raise ValueError(
            f"{stored.source} holds statistics of {made_by!r} features: use that extractor instead "
            f"of {extractor.name!r}"
        )
    sizes = _feature_sizes(extractor, generated)
    others = {}
    if real:
        others |= _feature_sizes(extractor, real)
    if stored:
        others |= {name: len(gaussian.mean) for name, gaussian in stored.gaussians.items()}
    for name in sizes.keys() & others.keys():
        if sizes[name] != others[name]:
            raise ValueError(
                f"{generated.name} and {stored.source if stored else real.name} have {sizes[name]} "
                f"and {others[name]} {name!r} features: give statistics of the extractor "
                f"{extractor.name!r}, or images of one size"
            )


def _feature_sizes(extractor: Extractor, images: Images) -> dict[str, int]:
    return {name: f.shape[1] for name, f in extractor(images.read(0, 1)).items()}


def _check_savable(path: Path, stored: StoredStatistics | None) -> None:
    if stored:
        raise ValueError(f"{stored.source} already holds statistics: do not save them as {path}")
    if path.suffix != ".npz":
        raise ValueError(f"cannot write statistics to {path}: give a name that ends in .npz")
    check_writable(path)


def _reference_features(
    stored: StoredStatistics | None,
    real: Images | None,
    extractor: Extractor,
    most: int,
    options: dict,
) -> Target:
    description = {"statistics": "computed", **(real.describe() if real else {})}
    if stored:
        known = stored.protocol or {}
        description |= {"source": stored.source, "statistics": "read", "protocol": stored.protocol}
        description |= {key: known.get(key) for key in ("images", "height", "width")}
        description |= {"precision_recall_images": len(real)} if real else {}
        if real:
            description |= {"height": real.height, "width": real.width}
    if real is None:
        return Target(stored.gaussians, None, None, description)
    chosen = torch.zeros(len(real), dtype=torch.bool)
    chosen[epoch_order(len(real), seed=0, epoch=0)[:most]] = True
    found = extract_features(real, extractor, keep=chosen, **options)
    if stored:
        return Target(stored.gaussians, found.features, chosen, description)
    if len(real) < 2:
        raise ValueError(f"{real.name} has 1 image: a distance needs 2 or more")
    gaussians = {name: found.statistics.gaussian(name) for name in found.statistics.names}
    return Target(gaussians, found.features, chosen, description)


def _scores(
    made: SetFeatures,
    target: Target,
    extractor: Extractor,
    neighbours: int,
    pairs: Halving,
    world: World,
) -> tuple[dict, dict]:
    """Scores by name, and why the others are not available."""
    scores, unavailable = {}, {}
    first = "fid" if extractor.name == "inception" else f"fd_{extractor.name}"
    for name, features in ((first, "pool"), ("sfid", "spatial")):
        if features not in made.statistics.names:
            unavailable[name] = f"the extractor {extractor.name} has no spatial features"
        elif features not in target.gaussians:
            unavailable[name] = f"the reference lacks {', '.join(ADM_KEYS[features])}"
        else:
            aim = target.gaussians[features]
            scores[name] = frechet_score(features, made, aim, pairs, world)
    if not made.statistics.has_logits:
        unavailable["inception_score"] = f"the extractor {extractor.name} has no logits"
    elif found := inception_score(made, pairs):
        scores["inception_score"] = found
    else:
        unavailable["inception_score"] = "there are fewer samples than splits"
    fewest = min(made.statistics.n, 0 if target.features is None else len(target.features))
    if target.features is not None and fewest > neighbours:
        real = Manifold(target.features, neighbours, world)
        return scores | manifold_scores(made, real, neighbours, pairs, world), unavailable
    why = "there are too few images" if target.features is not None else "the reference has no "
    why += "" if target.features is not None else "images (arr_0)"
    return scores, unavailable | {"precision": why, "recall": why}


def _save(path: Path, target: Target, real: Images, extractor: Extractor) -> None:
    protocol = {"extractor": extractor.protocol, **real.describe(), "versions": _versions()}
    chosen = torch.nonzero(target.chosen).flatten().tolist()
    images = torch.cat([real.read(i, i + 1) for i in chosen]).permute(0, 2, 3, 1)
    statistics = StoredStatistics(target.gaussians, protocol)
    statistics.save(path, np.ascontiguousarray(images.numpy()))


def _versions() -> dict[str, str]:
    """Of what the digits depend on, besides the machine."""
    found = versions() | {"numpy": np.__version__}
    for package in ("torch-fidelity", "timm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
