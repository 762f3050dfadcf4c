"""What each training step learns from: read ahead, and drawn from (seed, step) alone.

Everything random in step n comes from generators seeded by (seed, n) and is drawn for the whole
global batch, of which a process takes its share and then slices (micro-batches). So the same images
meet the same noise whatever the number of processes and the size of the slices, and nothing but the
step number must be saved to resume.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dis_ssm.build import depth_of
from dis_ssm.config import Config
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.order import batch_indices
from dis_ssm.system.distributed import ALONE, World
from dis_ssm.system.prefetch import prefetch
from dis_ssm.system.seeds import derive_seed

AHEAD = 2  # batches read while a step computes


@dataclass(frozen=True)
class Batch:
    """What one step learns from: data x (B, C, H, W) in model space, labels y (B,), the dropped
    ones already null, or None, timesteps t (B,), noise like x, and keep (blocks, B), which blocks
    stochastic depth spares, or None."""

    x: Tensor
    y: Tensor | None
    t: Tensor
    noise: Tensor
    keep: Tensor | None = None

    def slices(self, size: int) -> Iterator["Batch"]:
        for start in range(0, len(self.x), size):
            stop = start + size
            yield Batch(
                self.x[start:stop],
                None if self.y is None else self.y[start:stop],
                self.t[start:stop],
                self.noise[start:stop],
                None if self.keep is None else self.keep[:, start:stop],
            )


@dataclass(frozen=True)
class Reading:
    """A share of a batch on its way to the device: data as the data set stores it."""

    step: int
    data: Tensor
    y: Tensor | None
    t: Tensor
    keep: Tensor | None


def read_batch(config: Config, dataset: ImageDataset, step: int, world: World = ALONE) -> Reading:
    """This rank's share of the data, labels, timesteps and dropped blocks of `step`."""
    settings, model = config.train, config.model
    n, seed, share = settings.batch_size, settings.seed, world.share(settings.batch_size)
    generator = torch.Generator().manual_seed(derive_seed("batch", seed, step))
    t = torch.randint(config.diffusion.num_steps, (n,), generator=generator)[share]
    dropped, flipped = torch.rand(2, n, generator=generator)[:, share]
    indices = batch_indices(len(dataset), n, seed, step)[share]
    mirrored = flipped < (0.5 if config.data.flip else 0)
    data, y = dataset.stored(indices, mirrored)
    if model.num_classes:
        y = torch.where(dropped < model.class_dropout_prob, model.num_classes, y)
    keep = None
    if model.drop_path:
        rates = torch.linspace(0, model.drop_path, depth_of(config))[:, None]
        keep = (torch.rand(len(rates), n, generator=generator) >= rates)[:, share]
    reading = [data, y if model.num_classes else None, t, keep]
    if world.device.type == "cuda":  # so that the copy to the device is asynchronous
        reading = [None if value is None else value.pin_memory() for value in reading]
    return Reading(step, *reading)


def finish_batch(
    config: Config, dataset: ImageDataset, reading: Reading, world: World = ALONE
) -> Batch:
    """The same on the device, where the noise is drawn: latents have noise of their own."""
    moved = {
        field.name: value.to(world.device, non_blocking=True)
        for field in dataclasses.fields(reading)
        if isinstance(value := getattr(reading, field.name), Tensor)
    }
    n, shape = config.train.batch_size, (dataset.channels, dataset.height, dataset.width)
    generator = torch.Generator(world.device)
    generator.manual_seed(derive_seed("noise", config.train.seed, reading.step))

    def draw() -> Tensor:
        whole = torch.randn(n, *shape, generator=generator, device=world.device)
        return whole[world.share(n)]

    noise = draw()
    x = dataset.to_model_space(moved["data"], draw)
    return Batch(x, moved.get("y"), moved["t"], noise, moved.get("keep"))


def batches(
    config: Config, dataset: ImageDataset, first: int, world: World = ALONE
) -> Iterator[Batch]:
    """The batches of step `first` to the last, read while the steps before them compute."""
    read = partial(read_batch, config, dataset, world=world)
    with closing(prefetch(read, range(first, config.train.steps), AHEAD)) as readings:
        for reading in readings:
            yield finish_batch(config, dataset, reading, world)
