"""Scores of images that a run draws while they are scored, against any reference."""

from pathlib import Path
from typing import Any

import torch

from dis_ssm.condition import take
from dis_ssm.config import SampleConfig, sample_settings
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.sources.base import NO_LABEL
from dis_ssm.metrics import evaluate_samples
from dis_ssm.metrics.run_scores import provenance
from dis_ssm.sampling.grids import label_columns
from dis_ssm.sampling.pipeline import Pipeline, open_pipeline
from dis_ssm.system.distributed import World


class DrawnDataset(ImageDataset):
    """Images that `pipeline` draws when they are read; image i depends on (seed, i, class)."""

    def __init__(self, name: str, pipeline: Pipeline, settings: SampleConfig):
        self.pipeline, self.settings = pipeline, settings
        self.classes = label_columns(settings.num, list(range(pipeline.num_classes)))[0]
        super().__init__(name, pipeline.shape, torch.full((settings.num,), NO_LABEL))

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pipeline.draw(indices.tolist(), take(self.classes, indices), self.settings)


def evaluate_drawn(
    run: str | Path,
    reference: str | Path | None,
    *,
    num: int = 600,
    steps: int | None = None,
    sampler: str | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    split: str | None = None,
    image_size: int | None = None,
    background: str | None = None,
    vae: str | None = None,
    world: World,
    **options: Any,
) -> dict:
    """Draw `num` samples from the newest checkpoint of RUN and score them as `evaluate_samples`.

    Without a `reference`, it is the data of the run, and `split` held-out unless given. What is
    unset is as the run's config says; `batch_size` is that of drawing and of the extractor, `vae`
    decodes latents (`find_decoder`), and `options` are those of `evaluate_samples`, which opens
    reference and extractor before anything is drawn. All processes of `world` call; each draws its
    share.

    Returns:
        The report, with "drawn": checkpoint, sampler, steps, guidance, seed, VAE if given.

    Raises:
        ValueError: a run that draws latents no VAE decodes, or learned from latents where no
            reference is given, and as `evaluate_samples`.
    """
    pipeline = open_pipeline(run, vae=vae, world=world)
    config, run = pipeline.config, pipeline.origin.run
    if not pipeline.visible:
        raise ValueError(
            f"{run} draws latents and no VAE decodes them: give --vae a folder or hub id"
        )
    if reference is None and pipeline.decoder.latents:
        raise ValueError(f"{run} learned from latents: give a REFERENCE, images or statistics")
    settings = sample_settings(
        config,
        num=num,
        steps=steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        seed=seed,
        batch_size=batch_size,
    )
    made = provenance(config, pipeline.origin.checkpoint, settings, world.device) | (
        {"vae": vae} if vae else {}
    )
    if not str(reference or "").endswith(".npz"):
        image_size = image_size or config.data.image_size
    report = evaluate_samples(
        DrawnDataset(f"{run}/{made['samples']}", pipeline, settings),
        config.data.source if reference is None else reference,
        batch_size=min(num, settings.batch_size),
        split=split or ("heldout" if reference is None else "train"),
        image_size=image_size,
        background=background or config.data.background,
        world=world,
        **options,
    )
    return report | {"drawn": made}
