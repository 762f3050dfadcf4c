"""What each training step learns from: read ahead, and drawn from (seed, step) alone.

Everything random in step n comes from generators seeded by (seed, n) and is drawn for the whole
global batch, of which a process takes its share and then slices (micro-batches). So the same images
meet the same noise whatever the number of processes and the size of the slices, and nothing but the
step number must be saved to resume.

Letters: B images of a batch, its share or a slice of it; data (C, H, W) in model space.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dis_ssm.build import depth_of
from dis_ssm.condition import Conditioning, take
from dis_ssm.config import ModelConfig, TrainConfig
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.order import batch_indices
from dis_ssm.diffusion.process import Process
from dis_ssm.system.distributed import ALONE, World
from dis_ssm.system.prefetch import prefetch
from dis_ssm.system.seeds import derive_seed

AHEAD = 2  # batches read while a step computes


@dataclass(frozen=True)
class Batch:
    """What one step learns from, on the device.

    Attributes:
        x: float32 (B, C, H, W), in model space.
        y: what the model is told, labels (B,) of which the dropped ones are already null; or None.
        t: (B,), times as the process counts them.
        noise: like x, standard normal.
        block_mask: bool (blocks, B), False where stochastic depth leaves out a block; None: all
            blocks are in.
    """

    x: Tensor
    y: Conditioning
    t: Tensor
    noise: Tensor
    block_mask: Tensor | None = None

    def slices(self, size: int) -> Iterator["Batch"]:
        """The same in parts of `size` images; the last may be smaller."""
        for start in range(0, len(self.x), size):
            part = slice(start, start + size)
            mask = None if self.block_mask is None else self.block_mask[:, part]
            yield Batch(self.x[part], take(self.y, part), self.t[part], self.noise[part], mask)


@dataclass(frozen=True)
class HostBatch:
    """A share of a batch on its way to the device: data as the data set stores it, no noise yet.

    The other attributes are those of `Batch`.
    """

    step: int
    data: Tensor
    y: Conditioning
    t: Tensor
    block_mask: Tensor | None


class BatchLoader:
    """The batches of a run: `stream` gives them one after another, each in two stages.

    `read` does what the host can do ahead, in a thread; `finish` does the rest on the device.

    Args:
        dataset: what to learn.
        process: draws the times of training.
        model: how many blocks and classes there are, and how often they are dropped.
        settings: batch size, seed and number of steps.
        flip: whether half of the images are mirrored left to right.
        world: the processes that share each batch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        process: Process,
        model: ModelConfig,
        settings: TrainConfig,
        *,
        flip: bool = False,
        world: World = ALONE,
    ):
        self.dataset, self.process, self.world = dataset, process, world
        self.model, self.settings = model, settings
        self.flipped = 0.5 if flip else 0
        self.drop_rates: Tensor | None = None
        if model.drop_path:
            self.drop_rates = torch.linspace(0, model.drop_path, depth_of(model))[:, None]

    def stream(self, first: int) -> Iterator[Batch]:
        """The batches of step `first` to the last, read while the steps before them compute."""
        steps = range(first, self.settings.steps)
        with closing(prefetch(self.read, steps, AHEAD)) as host_batches:
            for host_batch in host_batches:
                yield self.finish(host_batch)

    def read(self, step: int) -> HostBatch:
        """This process's share of the data, labels, times and dropped blocks of `step`."""
        model, world = self.model, self.world
        n, seed = self.settings.batch_size, self.settings.seed
        share = world.share(n)
        generator = torch.Generator().manual_seed(derive_seed("batch", seed, step))
        t = self.process.draw_times(n, generator)[share]
        dropped, flipped = torch.rand(2, n, generator=generator)[:, share]
        indices = batch_indices(len(self.dataset), n, seed, step)[share]
        data, y = self.dataset.stored(indices, flipped < self.flipped)
        if model.num_classes:
            y = torch.where(dropped < model.class_dropout_prob, model.num_classes, y)
        mask = None
        if self.drop_rates is not None:
            drawn = torch.rand(len(self.drop_rates), n, generator=generator)
            mask = (drawn >= self.drop_rates)[:, share]
        host_batch = HostBatch(step, data, y if model.num_classes else None, t, mask)
        if world.device.type == "cuda":  # so that the copy to the device is asynchronous
            return _each(Tensor.pin_memory, host_batch)
        return host_batch

    def finish(self, host_batch: HostBatch) -> Batch:
        """The same on the device, where the noise is drawn: latents have noise of their own."""
        device, n = self.world.device, self.settings.batch_size
        moved = _each(lambda tensor: tensor.to(device, non_blocking=True), host_batch)
        shape = (self.dataset.channels, self.dataset.height, self.dataset.width)
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed("noise", self.settings.seed, host_batch.step))

        def draw() -> Tensor:
            whole = torch.randn(n, *shape, generator=generator, device=device)
            return whole[self.world.share(n)]

        noise = draw()
        x = self.dataset.to_model_space(moved.data, draw)
        return Batch(x, moved.y, moved.t, noise, moved.block_mask)


def _each(function: Callable[[Tensor], Tensor], host_batch: HostBatch) -> HostBatch:
    """The same with `function` of every tensor."""
    values = pytree.tree_map_only(Tensor, function, vars(host_batch))
    return HostBatch(**values)
