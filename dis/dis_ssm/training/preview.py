"""What a run shows while it trains: sample grids and scores of the averaged weights.

All ranks draw, each its share of the images, with a model of their own that nobody waits for.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dis_ssm.build import build_model
from dis_ssm.config import Config, DataConfig, SampleConfig, ScoreConfig
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.encoders.decoding import NO_VAE, decoder_name, find_decoder
from dis_ssm.sampling.grids import label_columns
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.storage.classes import grid_caption
from dis_ssm.system.distributed import World
from dis_ssm.training.averages import EMA
from dis_ssm.training.signals import Stopped, StopSignal

if TYPE_CHECKING:
    from dis_ssm.metrics.frechet import Gaussian


CHUNK = 64  # images an extractor sees at once
STOP = "stop"  # what ranks call to one another while they draw


class PreviewSampler:
    """Draws images from an `EMA`; latents are decoded by the VAE of the config or of the cache.

    Args:
        config: of the run, resolved.
        dataset: what it learns.
        world: the processes that draw together.

    Attributes:
        visible: whether there is a way to show what the model draws.

    Raises:
        ValueError: the VAE cannot be loaded, or has other latent channels than the model.
    """

    def __init__(self, config: Config, dataset: ImageDataset, world: World):
        self.config, self.world, self.class_names = config, world, dataset.class_names
        name = world.gather(decoder_name(config))[0]  # the same on machines without that folder
        self.decoder = find_decoder(config, name or NO_VAE, world.device)
        self.visible = self.decoder.visible

    def preview(self, ema: EMA, stop: StopSignal) -> tuple[Tensor, int]:
        """Images for a grid, uint8 (n, C, H, W) on every rank, and the grid's columns.

        Raises:
            Stopped: on all ranks alike, once `stop` of one of them has received a signal.
        """
        settings, classes = self.config.sample, range(self.config.model.num_classes)
        columns = label_columns(settings.num, list(classes))[1]
        own = self.draw(ema, settings.num, settings, stop)
        return torch.cat(self.world.gather(own)), columns

    def caption(self) -> str:
        """The names of the classes that a preview shows; empty without any."""
        classes = list(range(self.config.model.num_classes))
        return grid_caption(*label_columns(self.config.sample.num, classes), self.class_names)

    def draw(self, ema: EMA, num: int, settings: SampleConfig, stop: StopSignal) -> Tensor:
        """This rank's share of images 0 to num - 1, uint8 (n, C, H, W).

        Raises:
            Stopped: on all ranks alike, once `stop` of one of them has received a signal.
        """
        world, model = self.world, self.config.model
        averages = ema.whole()
        labels, _ = label_columns(num, list(range(model.num_classes)))
        share = range(num)[world.share(num)]
        drawn = share or range(1)  # a rank without a share draws one image for nobody
        labels = None if labels is None else labels[drawn.start : drawn.stop]

        def look_up() -> None:
            if stop.received:
                world.call(STOP)
            if stop.received or world.heard(STOP):
                raise _Interrupted

        images = None
        try:
            images = self._draw(averages, drawn, labels, settings, look_up)[: len(share)]
        except _Interrupted:
            pass
        if not all(world.gather(images is not None)):
            raise Stopped(stop.of_any(world))
        return images

    def _draw(self, averages, indices, labels, settings, callback) -> Tensor:
        with torch.device("meta"):
            model = build_model(self.config)
        model.load_state_dict(averages, assign=True)
        model.eval().requires_grad_(False)
        device, precision = self.world.device, self.config.train.precision
        pipeline = Pipeline(model, self.config, self.decoder, device, precision)
        return pipeline.draw(indices, labels, settings, callback=callback)


class _Interrupted(Exception):
    """This rank ends its drawing, as some rank has received a signal."""


class Scorer:
    """Fréchet distance between samples and a reference, on the features of an extractor.

    Args:
        settings: the extractor, the reference and how many samples.
        drawing: how the samples are drawn.
        data: where the images of the reference come from, unless the settings say.
        dataset: what the run learns, the reference unless the settings say.
        previews: draws the samples.

    Raises:
        ValueError: nothing can be seen, or the extractor or the reference cannot be used.
    """

    def __init__(
        self,
        settings: ScoreConfig,
        drawing: SampleConfig,
        data: DataConfig,
        dataset: ImageDataset,
        previews: PreviewSampler,
    ):
        self.settings, self.previews, self.world = settings, previews, previews.world
        self.drawing = dataclasses.replace(drawing, num=settings.num)
        from dis_ssm.metrics.extractors import open_extractor

        if not previews.visible:
            raise ValueError("score.every needs images: give data.vae, which decodes the latents")
        if settings.reference is None and dataset.latents:
            raise ValueError(
                "score.every with latents needs score.reference: images, or statistics of them"
            )
        with self.world.together():  # one rank alone downloads what must be downloaded
            if self.world.main:
                open_extractor(settings.extractor, weights=settings.weights)
        device = self.world.device
        self.extractor = open_extractor(settings.extractor, weights=settings.weights, device=device)
        self.reference = self._reference(dataset, data)
        found = self._features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
        if found != len(self.reference.mean):
            raise ValueError(
                f"score.reference {settings.reference} has {len(self.reference.mean)} features, "
                f"{settings.extractor} {found}: give statistics of the same extractor"
            )

    def score(self, ema: EMA, stop: StopSignal) -> dict[str, float | int | str]:
        """The distance of `score.num` samples and how it was made, on every rank.

        Raises:
            Stopped: on all ranks alike, once `stop` of one of them has received a signal.
        """
        from dis_ssm.metrics.frechet import FeatureStatistics, Gaussian

        settings, drawing = self.settings, self.drawing
        images = self.previews.draw(ema, settings.num, drawing, stop)
        own = [self._features(part) for part in images.split(CHUNK) if len(part)]
        features = torch.cat([part for parts in self.world.gather(own) for part in parts])
        found = FeatureStatistics().update(features)
        return {
            "frechet_distance": self.reference.distance(Gaussian(found.mean, found.cov())),
            "extractor": settings.extractor,
            "num": settings.num,
            "sampler": drawing.sampler,
            "steps": drawing.steps,
            "cfg_scale": drawing.cfg_scale,
            "seed": drawing.seed,
        }

    def _features(self, images: Tensor) -> Tensor:
        return self.extractor(images.expand(-1, 3, -1, -1))["pool"]

    def _reference(self, dataset: ImageDataset, data: DataConfig) -> "Gaussian":
        """Statistics from a file, or of the images named, of which each rank reads its share."""
        from dis_ssm.metrics.evaluator import open_reference
        from dis_ssm.metrics.frechet import FeatureStatistics, Gaussian

        settings = self.settings
        named = settings.reference or (dataset if settings.split == "train" else data.source)
        try:
            stored, images = open_reference(named, settings.split, data.image_size, data.background)
        except ValueError as error:
            raise ValueError(f"the reference of scores (score.reference): {error}") from error
        if stored:
            return stored.gaussians["pool"]
        found, share = FeatureStatistics(), self.world.share(len(images))
        for start in range(share.start, share.stop, CHUNK):
            found.update(self._features(images.read(start, min(start + CHUNK, share.stop))))
        first, *others = self.world.gather(found)
        for other in others:
            first.merge(other)
        return Gaussian(first.mean, first.cov())
