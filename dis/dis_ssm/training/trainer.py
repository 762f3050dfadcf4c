"""Training, in one process or many: a step is a function of (seed, step) and the state before it.

Every rank takes its share of the global batch (`dis_ssm.training.batches`), and whatever is
decided, to skip a step, to stop, to save, is decided from sums over all ranks, so that all decide
alike.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dis_ssm.build import build_diffusion, build_model, depth_of, open_run, start_from
from dis_ssm.config import RUN_CONFIG, Config, ScoreConfig, differences, to_dict
from dis_ssm.costs.operations import peak_flops, training_flops
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.ops.dispatch import check_forced
from dis_ssm.storage.checkpoint import (
    STATE,
    CheckpointError,
    clean_drafts,
    complete_checkpoints,
    load_part,
    newest_intact,
    optimizer_tensors,
    save_checkpoint,
    saved_config,
)
from dis_ssm.storage.classes import keep_class_names
from dis_ssm.storage.run import check_log, exclusive, preview_path, score_path
from dis_ssm.system.distributed import World, join_world, reducing, spread, whole
from dis_ssm.system.files import write_json
from dis_ssm.system.machine import pick_device, versions
from dis_ssm.system.seeds import derive_seed
from dis_ssm.training.averages import EMA
from dis_ssm.training.batches import Batch, batches
from dis_ssm.training.log import EXTENDED_FROM, Gauge, RunLog, require_wandb
from dis_ssm.training.optimizer import build_optimizer, learning_rate
from dis_ssm.training.preview import Painter, Scorer, Stopped
from dis_ssm.training.signals import StopSignal

PARTS = ("model", "ema", "optimizer")
COUNTS = ("nonfinite", "nonfinite_in_a_row", "ema_updates", "images")  # of a trainer's state
QUARTERS = 4  # of the timesteps, whose losses are logged apart
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}, ETA {remaining}"
BAR_WIDTH = 100  # columns, in a narrower terminal fewer
LOGGED = ("loss", "mse", "vb", "grad_norm", *(f"loss_q{i + 1}" for i in range(QUARTERS)))


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: the run, its step, and the signal that stopped it early, if one did."""

    run: Path
    step: int
    stopped_by: int | None = None


def train(config: Config, *, extend: int | None = None) -> Outcome:
    """Train until `config.train.steps`, or continue the run in `config.out` where it stopped.

    Under torchrun the processes train one model together; the global batch, and so the result to
    rounding, stays the same. A continued run equals an uninterrupted one bit for bit on the same
    devices, with the same threads and versions; otherwise it continues with a warning. `extend`
    continues a run to that step, beyond its `train.steps`: the learning rate's schedule then ends
    there, and the next line of the log has the former end as "extended_from". On a signal of
    `runs.SIGNALS` the current step ends, is saved, and this returns. Raises ValueError for settings
    that contradict the data or the saved run, FloatingPointError after `max_nonfinite` non-finite
    steps in a row (the state is saved first), CheckpointError when no checkpoint is intact.
    """
    limit = timedelta(minutes=config.train.timeout_minutes)
    with join_world(config.train.device, limit + timedelta(minutes=1)) as world:
        return _run(config, extend, world)


def extended(config: Config, steps: int) -> Config:
    """`config` with its last step at `steps`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _run(config: Config, extend: int | None, world: World) -> Outcome:
    check_forced()
    with contextlib.ExitStack() as stack:
        if extend is not None:
            config = extended(config, extend)
            if not world.gather(complete_checkpoints(config.out))[0]:
                raise ValueError(f"{config.out} has no checkpoint to extend: leave out --extend")
        if config.train.wandb and world.main:
            require_wandb()
        config, dataset = open_run(config)
        trainer = Trainer(config, world)  # before the folder is made: what is refused leaves none
        painter = Painter(config, dataset, world)
        scorer = Scorer(config, dataset, painter) if config.score.every else None
        run, steps = config.out, config.train.steps
        with world.together():
            if world.main:
                stack.enter_context(exclusive(run))
        stop = stack.enter_context(StopSignal())
        meter = _resume(trainer, run, dataset, extend is not None)
        if world.main:
            _announce(trainer, dataset, painter.visible)
        # a process killed between saving a step and drawing it still owes the preview
        if trainer.step < steps or any(_due(trainer, painter, scorer)):
            gauge = Gauge(training_flops(config), peak_flops(config, world), world.device)
            log = stack.enter_context(RunLog(run, trainer.step, meter, gauge, world.main))
            if config.train.wandb and world.main:
                log.mirror(config.train.wandb, to_dict(config))
            show = partial(_show, trainer, log, painter, scorer, stop)
            show()
            if trainer.step < steps and not trainer.stopped_by:
                _train(trainer, dataset, stop, log, show)
        if trainer.nonfinite and world.main:
            counts = f"{trainer.nonfinite:,} of {trainer.step:,}"
            print(f"{counts} steps were not finite and were skipped")
        return Outcome(run, trainer.step, trainer.stopped_by if trainer.step < steps else None)


class Trainer:
    """Model, average, optimizer and counters of a run; `update` is one optimizer step."""

    def __init__(self, config: Config, world: World | None = None):
        settings = config.train
        world = world or World(pick_device(settings.device))
        self.config, self.world, self.device = config, world, world.device
        self.step = self.nonfinite = self.nonfinite_in_a_row = 0
        self.stopped_by: int | None = None
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
        self.model.class_dropout_prob = 0.0  # `read_batch` has dropped the labels
        self.model.set_grad_checkpointing(settings.grad_checkpointing)
        torch.backends.cudnn.deterministic = True
        sharded = world.size > 1 and settings.parallel == "fsdp"
        if settings.compile and sharded:
            for block in self.model.blocks:
                block.compile()
        self.forward = spread(self.model, world, settings.parallel)
        if settings.compile and not sharded:
            self.forward.compile()
        self.diffusion = build_diffusion(config)
        self.ema = EMA(self.model, settings.ema_decay, settings.ema_warmup)
        self.optimizer = build_optimizer(self.model, settings)
        if isinstance(self.forward, DistributedDataParallel):
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """DDP orders its buckets, and with them its sums, after a first backward pass: an idle one
        before step 0 lets a resumed run sum as one that never stopped."""
        config, device = self.config, self.device
        n = config.train.batch_size // self.world.size
        n = min(n, config.train.micro_batch_size or n)
        x = torch.zeros(n, config.model.in_channels, *config.model.input_size, device=device)
        t = torch.zeros(n, dtype=torch.int64, device=device)
        keep = torch.ones(depth_of(config), n, dtype=torch.bool, device=device)
        drops = config.model.drop_path > 0
        y = t if config.model.num_classes else None
        (0 * self.predict(x, t, y, keep if drops else None).sum()).backward()
        self.optimizer.zero_grad()

    def update(self, batch: Batch, stop: int | None = None) -> dict[str, float]:
        """One step on the mean loss of the global batch; skipped and counted unless all is finite.

        `batch` is this rank's share. `stop` is the signal this rank has received; `stopped_by` is
        then set on every rank.
        """
        settings, world = self.config.train, self.world
        self.optimizer.zero_grad()
        means, quarters = self.accumulate(batch)
        limit = settings.grad_clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        means["grad_norm"] = norm
        values = torch.stack([mean.float() for mean in means.values()]) / world.size
        received = [float(stop or 0) if rank == world.rank else 0.0 for rank in range(world.size)]
        parts = [values, *quarters, torch.tensor(received, device=self.device)]
        summed = world.sum(torch.cat(parts)).cpu().split([len(part) for part in parts])
        values, sums, counts, signals = (part.tolist() for part in summed)
        self.stopped_by = int(max(signals)) or None
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
        return metrics

    def accumulate(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the mean loss, a micro-batch at a time.

        The mean losses of this rank, and (2, `QUARTERS`): sums of the loss by quarter of the
        timesteps, and how many they are.
        """
        total, settings = len(batch.x), self.config.train
        size = settings.micro_batch_size or total
        means: dict[str, Tensor] = {}
        quarters = torch.zeros(2, QUARTERS, device=self.device)
        for start, part in zip(range(0, total, size), batch.slices(size), strict=True):
            with reducing(self.forward, wanted=start + size >= total):
                losses = self.diffusion.training_losses(
                    partial(self.predict, keep=part.keep), part.x, part.t, part.y, part.noise
                )
                shares = {name: loss.sum() / total for name, loss in losses.items()}
                shares["loss"].backward()
            for name, share in shares.items():
                means[name] = means.get(name, 0) + share.detach()
            quarter = F.one_hot(part.t * QUARTERS // self.diffusion.num_steps, QUARTERS).float()
            loss = losses["loss"].detach().float()
            quarters += torch.stack([loss, torch.ones_like(loss)]) @ quarter
        return means, quarters

    def predict(self, x: Tensor, t: Tensor, y: Tensor | None, keep: Tensor | None) -> Tensor:
        half = self.config.train.precision == "bf16"
        # each weight is used once a pass: a cache of casts would only hold memory
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.forward(x, t, y, keep)

    def received(self, stop: StopSignal) -> int | None:
        """The signal that any rank has received."""
        return max(number or 0 for number in self.world.gather(stop.received)) or None

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


def _announce(trainer: Trainer, dataset: ImageDataset, visible: bool) -> None:
    config, world = trainer.config, trainer.world
    if trainer.step >= config.train.steps:
        print(f"{config.out} is done: {trainer.step} of {config.train.steps} steps")
        return
    write_json(config.out / RUN_CONFIG, to_dict(config))
    if config.model.num_classes:
        keep_class_names(config.out, dataset.class_names)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    where = trainer.device.type + (f" x {world.size}" if world.size > 1 else "")
    print(
        f"{config.out}: {parameters:,} parameters, {len(dataset):,} images, steps "
        f"{trainer.step:,} to {config.train.steps:,} on {where}",
        flush=True,
    )
    if config.sample.every and not visible:
        print("no previews: latents are shown by their VAE, give data.vae", flush=True)
    if not config.score.every and config.score != ScoreConfig():
        print("no scores: score.every is 0, so the other settings of score do nothing", flush=True)


def _resume(trainer: Trainer, run: Path, dataset: ImageDataset, extends: bool) -> dict[str, float]:
    """Restore the newest intact checkpoint, if any; the log's running sums."""
    with trainer.world.together():
        if trainer.world.main:
            clean_drafts(run)
            check_log(run)
    found = newest_intact(run, PARTS, trainer.world)
    if found is None:
        return {}
    folder, saved = found
    _check_saved(saved["trainer"], folder / STATE)
    old, images, steps = saved_config(folder, saved), len(dataset), trainer.config.train.steps
    former = old.train.steps
    if extends and steps > former:
        old = extended(old, steps)
    if dataset.background is None:  # nothing has alpha
        same = {"background": trainer.config.data.background}
        old = dataclasses.replace(old, data=dataclasses.replace(old.data, **same))
    changed = differences(old, trainer.config)
    if saved["trainer"]["images"] != images:
        changed.append(f"images in data.source: {saved['trainer']['images']} -> {images}")
    if changed:
        longer = f", --extend {steps} to move the last step" if steps > former else ""
        raise ValueError(
            f"{run} was trained with other settings ({'; '.join(changed)}): give those again to "
            f"continue it{longer}, or another --out to start a new run; --train.init {run} starts "
            f"that from this one's averaged weights"
        )
    before, now = saved["trainer"]["machine"] | saved["versions"], trainer.machine() | versions()
    moved = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if moved and trainer.world.main:
        warnings.warn(f"{run} continues, though not bit for bit: {', '.join(moved)}", stacklevel=2)
    trainer.restore(folder, saved)
    meter = saved["trainer"]["meter"]
    if old.train.steps == former:
        return meter
    if trainer.world.main:
        print(
            f"{run} is extended from {former:,} to {steps:,} steps: the learning rate's schedule "
            f"ends there",
            flush=True,
        )
    return meter | {EXTENDED_FROM: former}


def _check_saved(state: dict[str, Any], path: Path) -> None:
    """CheckpointError naming what is missing in a trainer's state, or cannot be."""
    sound = {name: type(state.get(name)) is int and state[name] >= 0 for name in COUNTS}
    sound |= {name: isinstance(state.get(name), dict) for name in ("machine", "meter")}
    meter = state["meter"] if sound["meter"] else {}
    for name, value in meter.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        sound[f"meter.{name}"] = number and math.isfinite(value)
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        raise CheckpointError(f"{path}: trainer.{wrong[0]} is missing, or cannot be: restore it")


def _train(
    trainer: Trainer, dataset: ImageDataset, stop: StopSignal, log: RunLog, show: Callable[[], None]
) -> None:
    config, settings, world = trainer.config, trainer.config.train, trainer.world
    limit = timedelta(minutes=settings.timeout_minutes)
    bar = tqdm(
        total=settings.steps,
        initial=trainer.step,
        bar_format=BAR,
        ncols=min(BAR_WIDTH, shutil.get_terminal_size((BAR_WIDTH, 1)).columns),
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
        disable=not world.main,
    )

    def save() -> None:
        log.sync()
        trainer.save(log.meter, len(dataset))

    stream = batches(config, dataset, trainer.step, world)
    with bar, contextlib.closing(stream):
        clock = time.perf_counter()
        for batch in stream:
            waited = time.perf_counter() - clock
            with world.step(trainer.step + 1, limit):
                metrics = trainer.update(batch, stop.received)
            log.add(metrics, settings.batch_size, time.perf_counter() - clock, waited)
            if trainer.reached(settings.log_every):
                epoch = trainer.step * settings.batch_size / len(dataset)
                rate = learning_rate(trainer.step - 1, settings)
                remaining = (settings.steps - trainer.step) * settings.batch_size
                line = log.write(trainer.step, epoch, rate, trainer.nonfinite, remaining, LOGGED)
                bar.set_postfix_str(_pace(line), refresh=False)
            bar.update()
            diverged = trainer.nonfinite_in_a_row >= settings.max_nonfinite
            saves = trainer.reached(settings.save_every) or diverged or trainer.stopped_by
            if saves:
                save()
            if diverged:
                raise FloatingPointError(
                    f"loss or gradient not finite in {trainer.nonfinite_in_a_row} steps in a row; "
                    f"step {trainer.step} is saved in {config.out}. Start a new run with a "
                    f"train.lr below {settings.lr}"
                )
            if saves and not trainer.stopped_by:  # a signal may have come while saving
                trainer.stopped_by = trainer.received(stop)
            if not trainer.stopped_by:
                show()
                if trainer.stopped_by and not saves:
                    save()
            if trainer.stopped_by:
                return
            clock = time.perf_counter()


def _pace(line: dict[str, Any]) -> str:
    """What the progress bar shows of a line of the log."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}, {line['images_per_second']:.4g} images/s"


def _show(
    trainer: Trainer, log: RunLog, painter: Painter, scorer: Scorer | None, stop: StopSignal
) -> None:
    """Draw and score the step where that is due; `stopped_by` is set if a signal came meanwhile."""
    draws, scores = _due(trainer, painter, scorer)
    try:
        if draws:
            log.images(trainer.step, *painter.preview(trainer.ema, stop), painter.caption())
        if scores:
            log.score(trainer.step, scorer.score(trainer.ema, stop))
    except Stopped:
        trainer.stopped_by = trainer.received(stop)


def _due(trainer: Trainer, painter: Painter, scorer: Scorer | None) -> tuple[bool, bool]:
    """Whether the step that was reached has a preview, and a score, that are not there yet."""
    config, step = trainer.config, trainer.step

    def missing(path: Path) -> bool:
        return not trainer.world.gather(path.exists())[0]

    draws = painter.visible and trainer.reached(config.sample.every)
    scores = scorer is not None and trainer.reached(config.score.every)
    return (
        draws and missing(preview_path(config.out, step)),
        scores and missing(score_path(config.out, step)),
    )
