"""Scores of a run's EMA model: class accuracy, Fréchet distance over pixels, bits per dimension.

The training never saw the held-out split. The classifier is fitted on it, samples are compared with
it, and its images are the ones whose likelihood is bounded. Every distance stands beside the same
distance between real images, at equal n, because its value at finite n is not zero.

Letters: n images (C, H, W), K classes; images are uint8, x in model space [-1, 1].
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dis_ssm.build import build_diffusion, load_model
from dis_ssm.config import Config, SampleConfig, sample_settings
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.images import to_model_space
from dis_ssm.data.open import open_dataset
from dis_ssm.data.order import epoch_order
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.metrics import (
    class_accuracy,
    frechet_of_features,
    pixel_features,
    require_scikit_learn,
)
from dis_ssm.ops.dispatch import check_forced
from dis_ssm.sampling.draw import draw_images, samples_name
from dis_ssm.sampling.grids import label_columns, save_images
from dis_ssm.sampling.seeds import image_generators
from dis_ssm.storage.checkpoint import identity, locate, read_state
from dis_ssm.system.files import check_writable
from dis_ssm.system.machine import device_name, pick_device, versions
from dis_ssm.system.progress import bar_interval
from dis_ssm.system.reading import FileError, read_json
from dis_ssm.system.tables import format_table

MAX_JUDGED = 5000  # real images that the classifier is fitted on, or checked on


def score_run(
    run: str | Path,
    *,
    num: int = 600,
    steps: int | None = None,
    sampler: str | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bound_images: int = 256,
    bound_terms: int = 32,
    device: str | None = None,
    keep: bool = False,
    reuse: bool = False,
    progress: bool = True,
) -> dict:
    """Draw `num` samples from the newest checkpoint of RUN and score them.

    Labels are balanced: image i has class i mod K and is drawn from (seed, i).

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images to draw.
        steps: of the sampler; unset, like `sampler`, `cfg_scale` and `batch_size`, as the run's
            [sample] section says.
        bound_images: held-out images whose bits per dimension are bounded.
        bound_terms: passes of the model for each of them, an even number; 0: no bound.
        device: a GPU if there is one, unless given.
        keep: write RUN/samples/NAME.npz as ADM does: arr_0 uint8 (n, H, W, C), arr_1 int64 labels.
        reuse: return the scores that RUN/scores has of the same checkpoint and settings, if any.
        progress: show bars.

    Returns:
        The scores (see `score_samples` and `bits_per_dim`) with how they were made: num, steps,
        sampler, cfg_scale, seed, checkpoint step, weights, device, versions, and "samples", the
        NAME that tells these samples from others of the run. The command writes them to
        `scores_path`.

    Raises:
        ValueError: a run without checkpoint or held-out images, samples that are not finite,
            guidance of a model without classes, or options that the sampler or the bound refuses.
        OSError: `keep` cannot write the samples.
        ImportError: the model has classes, and scikit-learn is not installed.
    """
    if num < 2:
        raise ValueError(f"num is {num}: a distance needs 2 samples or more")
    if bound_terms < 0 or bound_terms % 2 or bound_images < 1:
        raise ValueError(
            f"bound_terms is {bound_terms} and bound_images {bound_images}: give an even number of "
            f"terms (0: no bound) and at least one image"
        )
    started = time.perf_counter()
    check_forced()
    device = pick_device(device)
    run, checkpoint = locate(run)
    model, config = load_model(checkpoint, weights="ema", device=device)
    settings = sample_settings(
        config,
        num=num,
        steps=steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        seed=seed,
        batch_size=batch_size,
    )
    diffusion = build_diffusion(config.diffusion)
    train, heldout = (
        open_dataset(
            config.data.source,
            split,
            config.data.image_size,
            background=config.data.background,
            relabel=config.data.relabel,
        )
        for split in ("train", "heldout")
    )
    drawn = (config.model.in_channels, *config.model.input_size)
    shape = (heldout.channels, heldout.height, heldout.width)
    if shape != drawn:
        raise ValueError(
            f"{config.data.source} has images of shape {shape}, and {run} draws {drawn}: that is "
            f"not the data that it was trained on"
        )
    if min(len(train), len(heldout)) < 2:
        raise ValueError(f"{config.data.source}: a distance needs 2 images or more of each split")
    if bound_terms > (most := 2 * (diffusion.num_steps - 1)):
        raise ValueError(f"bound_terms is {bound_terms}: the diffusion allows at most {most}")
    made = provenance(config, checkpoint, settings, device)
    if bound_terms:
        bounded = min(bound_images, len(heldout))
        made |= {"bits_per_dim_images": bounded, "bits_per_dim_terms": bound_terms}
    kept = run / "samples" / f"{made['samples']}.npz"
    if reuse and (kept.exists() or not keep) and (known := _known(scores_path(run, made), made)):
        return known
    if keep:
        check_writable(kept)
    num_classes = heldout.num_classes if config.model.num_classes else 0
    if num_classes:
        require_scikit_learn()  # before the minutes of sampling, not after them

    labels, _ = label_columns(num, list(range(num_classes)))
    passes = settings.steps * -(-num // settings.batch_size)
    with _watched(model, passes, "sample", progress):
        samples = draw_images(model, diffusion, shape, range(num), labels, settings)
    if keep:
        save_images(samples, labels, kept)
    scores = score_samples(samples, labels, train, heldout)
    if bound_terms:
        scores |= bits_per_dim(
            model,
            diffusion,
            heldout,
            conditional=bool(num_classes),
            num=bound_images,
            terms=bound_terms,
            seed=seed,
            batch_size=settings.batch_size,
            progress=progress,
        )
    return scores | made | {"seconds": round(time.perf_counter() - started, 1)}


def provenance(
    config: Config, checkpoint: Path, settings: SampleConfig, device: torch.device
) -> dict[str, Any]:
    """What the scores of drawn samples depend on, and `samples_name` of them, as "samples"."""
    step = read_state(checkpoint)["step"]
    drawing = ("num", "sampler", "steps", "eta", "cfg_scale", "seed")
    return {
        "source": config.data.source,
        **{name: getattr(settings, name) for name in drawing},
        "weights": "ema",
        "checkpoint_step": step,
        "checkpoint": identity(checkpoint),
        "samples": samples_name(step, settings),
        "batch_size": settings.batch_size,
        "device": device_name(device),
        "versions": versions() | {"numpy": np.__version__},
    }


def _known(path: Path, made: dict[str, Any]) -> dict | None:
    """The scores in `path`, if they were made so."""
    try:
        scores = read_json(path)
    except FileError:
        return None
    if not isinstance(scores, dict) or any(scores.get(k) != v for k, v in made.items()):
        return None
    print(f"{path} already has these scores: remove it to compute them again", file=sys.stderr)
    return scores


def scores_path(run: Path, scores: dict) -> Path:
    """The file of these scores in RUN/scores; those of other samples or bounds have another."""
    name = scores["samples"]
    if "bits_per_dim_images" in scores:
        name += f"-bound-{scores['bits_per_dim_images']}x{scores['bits_per_dim_terms']}"
    return run / "scores" / f"{name}.json"


def score_samples(
    samples: torch.Tensor,
    labels: torch.Tensor | None,
    train: ImageDataset,
    heldout: ImageDataset,
) -> dict:
    """Scores of samples, uint8 (n, C, H, W), against two real sets.

    Returns:
        class_accuracy, fraction of samples that a classifier fitted on `heldout` puts into their
        class; class_accuracy_by_class; class_accuracy_real, the same of the images of `train`; all
        None when `labels` is None or `heldout` has fewer than two classes. fd_pixels, squared
        Fréchet distance over `pixel_features` between `fd_num` samples and held-out images;
        fd_pixels_real, between as many images of `train` and the same held-out ones.

    Raises:
        ValueError: there are fewer than 2 images of one kind.
        ImportError: scikit-learn is not installed.
    """
    n = min(len(samples), len(train), len(heldout))
    if n < 2:
        raise ValueError(f"a distance needs 2 images or more of each kind, got {n}")
    real, other = (_subset(dataset, n)[0] for dataset in (heldout, train))
    # labels come in turn, so the first n samples are as balanced as all of them
    features, real, other = (pixel_features(images) for images in (samples[:n], real, other))
    scores = {
        "class_accuracy": None,
        "class_accuracy_real": None,
        "class_accuracy_by_class": None,
        "fd_pixels": frechet_of_features(features, real),
        "fd_pixels_real": frechet_of_features(other, real),
        "fd_num": n,
    }
    if labels is not None and len(heldout.labels.unique()) > 1:
        fitted, checked = (_subset(d, min(len(d), MAX_JUDGED)) for d in (heldout, train))
        judged = class_accuracy(samples, labels, *fitted, *checked)
        scores["class_accuracy"] = judged["samples"]
        scores["class_accuracy_real"] = judged["real"]
        by_class = judged["by_class"].items()
        scores["class_accuracy_by_class"] = {heldout.class_names[k]: v for k, v in by_class}
    return scores


def bits_per_dim(
    model: nn.Module,
    diffusion: Diffusion,
    dataset: ImageDataset,
    *,
    conditional: bool,
    num: int = 256,
    terms: int = 32,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> dict:
    """The variational bound on `num` images of `dataset`, in bits per dimension, without guidance.

    The predicted x0 is clipped to [-1, 1] (Nichol & Dhariwal 2021). The bound is on the likelihood
    of images of 256 levels in [-1, 1]. Images that use fewer levels (the digits have 17) need log2
    of their number with no model at all, so only compare models of one data set.

    Returns:
        bits_per_dim, the mean over images of an unbiased estimate from `terms` timesteps each;
        bits_per_dim_stderr, its standard error, from the spread over images, which holds the choice
        of images, of timesteps and of noise; bits_per_dim_prior and bits_per_dim_decoder, L_T and
        L_0; bits_per_dim_levels, how many levels occur; bits_per_dim_images, bits_per_dim_terms.

    Raises:
        ValueError: the bound is not finite, or `variational_bound` refuses `terms`.
    """
    images, labels = _subset(dataset, min(num, len(dataset)))
    device = next(model.parameters()).device
    batches = torch.arange(len(images)).split(batch_size)
    with _watched(model, (terms + 1) * len(batches), "bound", progress):
        bounds = [
            diffusion.variational_bound(
                model,
                to_model_space(images[indices]).to(device),
                labels[indices].to(device) if conditional else None,
                num_terms=terms,
                generator=image_generators(seed, indices.tolist()),
                clip_denoised=True,
            )
            for indices in batches
        ]
    total, prior, decoder = (
        torch.cat([getattr(bound, name) for bound in bounds]).cpu().double()
        for name in ("total", "prior", "decoder")
    )
    if not torch.isfinite(total).all():
        raise ValueError("the bound is not finite: the model diverged")
    spread = total.std().item() / len(total) ** 0.5 if len(total) > 1 else None
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_stderr": spread,
        "bits_per_dim_prior": prior.mean().item(),
        "bits_per_dim_decoder": decoder.mean().item(),
        "bits_per_dim_levels": len(images.unique()),
        "bits_per_dim_images": len(total),
        "bits_per_dim_terms": terms,
    }


def format_scores(scores: dict) -> str:
    """The scores of `score_run` as text: a table, and a line on how they were made."""
    n, source = scores["fd_num"], scores.get("source", "")
    rows = [("score", "samples", "real images", "how")]
    if scores["class_accuracy"] is None:
        rows.append(("class accuracy", "-", "-", "not defined without two classes or more"))
    else:
        by_class = scores["class_accuracy_by_class"].items()
        worst = min(by_class, key=lambda item: item[1])
        rows.append(
            (
                "class accuracy",
                f"{scores['class_accuracy']:.3f}",
                f"{scores['class_accuracy_real']:.3f}",
                f"SVM fitted on held-out images; worst class {worst[0]}: {worst[1]:.3f}",
            )
        )
    rows.append(
        (
            "FD-pixels",
            f"{scores['fd_pixels']:.4f}",
            f"{scores['fd_pixels_real']:.4f}",
            f"to {n} held-out images; real: {n} training images",
        )
    )
    if "bits_per_dim" in scores:
        spread = scores["bits_per_dim_stderr"]
        rows.append(
            (
                "bits per dimension",
                f"{scores['bits_per_dim']:.3f}" + ("" if spread is None else f" ± {spread:.3f}"),
                "",
                f"bound, ± standard error, over {scores['bits_per_dim_images']} held-out images, "
                f"{scores['bits_per_dim_terms']} timesteps each; {scores['bits_per_dim_levels']} "
                f"of 256 levels occur",
            )
        )
    made = (
        f"{scores['num']} samples of {source}, {scores['sampler']} {scores['steps']} steps, "
        f"guidance {scores['cfg_scale']:g}, seed {scores['seed']}; {scores['weights']} weights of "
        f"step {scores['checkpoint_step']}; {scores['device']}, {scores['seconds']} s"
    )
    return f"{format_table(rows)}\n{made}"


@contextlib.contextmanager
def _watched(model: nn.Module, passes: int, name: str, progress: bool) -> Iterator[None]:
    """Count the model's passes on a progress bar; ValueError when an output is not finite."""

    def after_pass(module, inputs, output):
        if not torch.isfinite(output).all():
            raise ValueError(
                f"{name}: pass {bar.n + 1} of the model is not finite: training diverged, or "
                f"guidance is too strong"
            )
        bar.update()

    interval = bar_interval()
    bar = tqdm(total=passes, desc=name, unit="pass", mininterval=interval, disable=not progress)
    with bar:
        hook = model.register_forward_hook(after_pass)
        try:
            yield
        finally:
            hook.remove()


def _subset(dataset: ImageDataset, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed random choice of n images: the same for every run and seed."""
    return dataset.batch(epoch_order(len(dataset), seed=0, epoch=0)[:n])
