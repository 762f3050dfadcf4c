"""One step of training, in one process or many, as a function of (seed, step) and the state before.

Every rank takes its share of the global batch (`dis_ssm.training.batches`), and whether a step is
skipped is decided from sums over all ranks, so that all decide alike.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dis_ssm.build import build_diffusion, build_model, depth_of, start_from
from dis_ssm.condition import Conditioning
from dis_ssm.config import Config
from dis_ssm.diffusion.process import Process
from dis_ssm.storage.checkpoint import (
    complete_checkpoints,
    load_part,
    optimizer_tensors,
    save_checkpoint,
)
from dis_ssm.system.distributed import World, reducing, spread, whole
from dis_ssm.system.machine import pick_device
from dis_ssm.system.seeds import derive_seed
from dis_ssm.training.averages import EMA
from dis_ssm.training.batches import Batch
from dis_ssm.training.optimizer import build_optimizer, learning_rate

PARTS = ("model", "ema", "optimizer")  # of a checkpoint that can be continued
QUARTERS = 4  # of the process's time, whose losses are logged apart


class Update(NamedTuple):
    """What a step found, the same on every rank.

    Attributes:
        metrics: the losses, means over the global batch; grad_norm, before clipping; and loss_q1
            to loss_q4, the mean loss in each quarter of the process's time that occurred.
        signal: the number of the signal that any rank has received, or None.
    """

    metrics: dict[str, float]
    signal: int | None


class Trainer:
    """Model, average, optimizer and counters of a run; `update` is one optimizer step.

    Args:
        config: resolved, as `open_run` returns it.
        world: the processes that train together; None: this one alone, on the config's device.
        process: what to train the model for; None: the one of the config.

    Raises:
        ValueError: the batch does not divide among the processes, or the model cannot be built.
        CheckpointError: `train.init` is damaged or does not fit.
    """

    def __init__(self, config: Config, world: World | None = None, process: Process | None = None):
        settings = config.train
        world = world or World(pick_device(settings.device))
        self.config, self.world, self.device = config, world, world.device
        self.step = self.nonfinite = self.nonfinite_in_a_row = 0
        if settings.batch_size % world.size:
            raise ValueError(
                f"train.batch_size {settings.batch_size} does not divide among {world.size} "
                f"processes: give a multiple of {world.size}"
            )
        torch.manual_seed(derive_seed("weights", settings.seed))
        self.model = build_model(config)
        if settings.init and not world.gather(complete_checkpoints(config.out))[0]:
            start_from(self.model, settings.init)
        self.model.to(self.device).train()
        self.model.class_dropout_prob = 0.0  # the batches come with dropped labels
        self.model.set_grad_checkpointing(settings.grad_checkpointing)
        torch.backends.cudnn.deterministic = True
        sharded = world.size > 1 and settings.parallel == "fsdp"
        if settings.compile and sharded:
            for block in self.model.blocks:
                block.compile()
        self.forward = spread(self.model, world, settings.parallel)
        if settings.compile and not sharded:
            self.forward.compile()
        self.process: Process = process or build_diffusion(config.diffusion)
        self.ema = EMA(self.model, settings.ema_decay, settings.ema_warmup)
        self.optimizer = build_optimizer(self.model, settings)
        if isinstance(self.forward, DistributedDataParallel):
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """DDP orders its buckets, and with them its sums, after a first backward pass: an idle one
        before step 0 lets a resumed run sum as one that never stopped."""
        model, device = self.config.model, self.device
        n = self.config.train.batch_size // self.world.size
        n = min(n, self.config.train.micro_batch_size or n)
        x = torch.zeros(n, model.in_channels, *model.input_size, device=device)
        t = self.process.draw_times(n, torch.Generator()).to(device)
        y = torch.zeros(n, dtype=torch.int64, device=device) if model.num_classes else None
        mask = None
        if model.drop_path:
            mask = torch.ones(depth_of(model), n, dtype=torch.bool, device=device)
        (0 * self.predict(x, t, y, mask).sum()).backward()
        self.optimizer.zero_grad()

    def update(self, batch: Batch, signal: int | None = None) -> Update:
        """One step on the mean loss of the global batch; skipped and counted unless all is finite.

        Args:
            batch: this rank's share.
            signal: the number of the signal that this rank has received, if any.
        """
        settings, world = self.config.train, self.world
        self.optimizer.zero_grad()
        means, quarters = self.accumulate(batch)
        limit = settings.grad_clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        means["grad_norm"] = norm
        values = torch.stack([mean.float() for mean in means.values()]) / world.size
        received = [float(signal or 0) if rank == world.rank else 0.0 for rank in range(world.size)]
        parts = [values, *quarters, torch.tensor(received, device=self.device)]
        summed = world.sum(torch.cat(parts)).cpu().split([len(part) for part in parts])
        values, sums, counts, signals = (part.tolist() for part in summed)
        if all(map(math.isfinite, values)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, settings)
            self.optimizer.step()
            self.ema.update(self.model)
            self.nonfinite_in_a_row = 0
        else:
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
        self.step += 1
        metrics = dict(zip(means, values, strict=True))
        for i, (total, n) in enumerate(zip(sums, counts, strict=True), 1):
            if n:
                metrics[f"loss_q{i}"] = total / n
        return Update(metrics, int(max(signals)) or None)

    def accumulate(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the mean loss, a micro-batch at a time.

        Returns:
            The mean losses of this rank, and float32 (2, `QUARTERS`): the sums of the loss by
            quarter of the process's time, and how many images are in each.
        """
        total, settings = len(batch.x), self.config.train
        size = settings.micro_batch_size or total
        means: dict[str, Tensor] = {}
        quarters = torch.zeros(2, QUARTERS, device=self.device)
        for start, part in zip(range(0, total, size), batch.slices(size), strict=True):
            with reducing(self.forward, wanted=start + size >= total):
                model = partial(self.predict, block_mask=part.block_mask)
                losses = self.process.training_losses(model, part.x, part.t, part.y, part.noise)
                shares = {name: loss.sum() / total for name, loss in losses.items()}
                shares["loss"].backward()
            for name, share in shares.items():
                means[name] = means.get(name, 0) + share.detach()
            quarter = F.one_hot(self.process.bin_times(part.t, QUARTERS), QUARTERS).float()
            loss = losses["loss"].detach().float()
            quarters += torch.stack([loss, torch.ones_like(loss)]) @ quarter
        return means, quarters

    def predict(
        self, x: Tensor, t: Tensor, y: Conditioning, block_mask: Tensor | None = None
    ) -> Tensor:
        """The model's forward pass, at the precision of the config."""
        half = self.config.train.precision == "bf16"
        # each weight is used once a pass: a cache of casts would only hold memory
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.forward(x, t, y, block_mask)

    def reached(self, every: int) -> bool:
        """Whether the step is a multiple of `every`, 0 being never, or the last."""
        last = self.config.train.steps
        return bool(every and self.step and (self.step % every == 0 or self.step == last))

    def machine(self) -> dict[str, Any]:
        """What sums in another order when it changes."""
        settings = self.config.train
        names = ("parallel", "micro_batch_size", "compile", "grad_checkpointing")
        found = {"device": self.device.type, "threads": torch.get_num_threads()}
        found |= {"processes": self.world.size} | {name: getattr(settings, name) for name in names}
        return found

    def save(self, meter: dict[str, float], images: int) -> None:
        """Write a checkpoint of this step, with the log's running sums and the number of images.

        Raises:
            OSError, CheckpointError: it cannot be written; the older ones stay as they are.
        """
        state = {
            "nonfinite": self.nonfinite,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "ema_updates": self.ema.updates,
            "images": images,
            "machine": self.machine(),
            "meter": meter,
        }
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.whole(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        config = self.config
        save_checkpoint(config.out, self.step, parts, config, state, config.train.keep, self.world)

    def restore(self, folder: Path, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint that `newest_intact` returned."""
        load_part(folder, saved, "model", self.model.state_dict())
        load_part(folder, saved, "ema", self.ema.tensors)
        load_part(folder, saved, "optimizer", optimizer_tensors(self.optimizer, self.model))
        self.step = saved["step"]
        self.ema.updates = saved["trainer"]["ema_updates"]
        self.nonfinite = saved["trainer"]["nonfinite"]
        self.nonfinite_in_a_row = saved["trainer"]["nonfinite_in_a_row"]
