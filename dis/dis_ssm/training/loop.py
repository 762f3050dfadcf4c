"""Training of a run, from its configuration to its last step: the loop and what it does between.

Whatever is decided, to stop, to save, to draw, is decided from what all ranks have said to one
another, so that all decide alike.
"""

import contextlib
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dis_ssm.build import open_run
from dis_ssm.config import RUN_CONFIG, Config, ScoreConfig, to_dict
from dis_ssm.costs.operations import peak_flops, training_flops
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.ops.dispatch import check_forced
from dis_ssm.storage.checkpoint import complete_checkpoints
from dis_ssm.storage.classes import keep_class_names
from dis_ssm.storage.run import exclusive, preview_path, score_path
from dis_ssm.system.distributed import World, join_world
from dis_ssm.system.files import write_json
from dis_ssm.system.progress import bar_interval
from dis_ssm.training.batches import BatchLoader
from dis_ssm.training.log import RunLog, ThroughputMeter, require_wandb
from dis_ssm.training.optimizer import learning_rate
from dis_ssm.training.preview import PreviewSampler, Scorer
from dis_ssm.training.resume import extended, resume
from dis_ssm.training.signals import Stopped, StopSignal
from dis_ssm.training.trainer import QUARTERS, Trainer

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
    devices, with the same threads and versions; otherwise it continues with a warning. On one of
    the `signals.SIGNALS` the current step ends, is saved, and this returns.

    Args:
        config: the whole run.
        extend: continue the run to this step, beyond its `train.steps`. The schedule of the
            learning rate then ends there, and the next line of the log has the former last step as
            "extended_from".

    Raises:
        ValueError: the settings contradict the data or the saved run.
        FloatingPointError: `max_nonfinite` steps in a row were not finite; the state is saved.
        CheckpointError: no checkpoint is intact.
        OSError: the disk is full.
    """
    limit = timedelta(minutes=config.train.timeout_minutes)
    with join_world(config.train.device, limit + timedelta(minutes=1)) as world:
        return _train(config, extend, world)


def _train(config: Config, extend: int | None, world: World) -> Outcome:
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
        previews = PreviewSampler(config, dataset, world)
        scorer = None
        if config.score.every:
            scorer = Scorer(config.score, config.sample, config.data, dataset, previews)
        with world.together():
            if world.main:
                stack.enter_context(exclusive(config.out))
        stop = stack.enter_context(StopSignal())
        sums = resume(trainer, dataset, extend is not None)
        if world.main:
            _announce(trainer, dataset, previews.visible)
        signal = None
        owes = preview_is_due(trainer, previews) or score_is_due(trainer, scorer)
        if trainer.step < config.train.steps or owes:
            flops, peak = training_flops(config), peak_flops(config.train.precision, world)
            throughput = ThroughputMeter(flops, peak, world.device)
            log = RunLog(config.out, trainer.step, sums, throughput, world.main)
            stack.enter_context(log)
            if config.train.wandb and world.main:
                log.mirror(config.train.wandb, to_dict(config))
            signal = Loop(trainer, dataset, log, previews, scorer, stop).run()
        if trainer.nonfinite and world.main:
            counts = f"{trainer.nonfinite:,} of {trainer.step:,}"
            print(f"{counts} steps were not finite and were skipped")
        early = trainer.step < config.train.steps
        return Outcome(config.out, trainer.step, signal if early else None)


class Loop:
    """The steps of a run, and what is logged, saved, drawn and scored between them.

    Args:
        trainer: at the step to continue from.
        dataset: what it learns.
        log: of the run, continued after that step.
        previews: draws what the model has learned so far.
        scorer: scores that; None: no scores.
        stop: whether this process is to stop.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: ImageDataset,
        log: RunLog,
        previews: PreviewSampler,
        scorer: Scorer | None,
        stop: StopSignal,
    ):
        self.trainer, self.dataset, self.log = trainer, dataset, log
        self.previews, self.scorer, self.stop = previews, scorer, stop
        self.config, self.settings, self.world = trainer.config, trainer.config.train, trainer.world
        self.saved = trainer.step

    def run(self) -> int | None:
        """Train to the last step; the number of the signal that ended it before, or None.

        Raises:
            FloatingPointError: too many steps in a row were not finite; the state is saved.
            OSError, CheckpointError: a checkpoint cannot be written.
        """
        try:
            self.preview()  # a process killed between saving a step and drawing it still owes both
            self.score()
            self.steps()
        except Stopped as stopped:
            if self.trainer.step > self.saved:
                self.save()
            return stopped.signal
        return None

    def steps(self) -> None:
        """Every step that is left. Raises Stopped after one that is saved, or while drawing."""
        trainer, settings, config = self.trainer, self.settings, self.config
        if trainer.step >= settings.steps:
            return
        limit = timedelta(minutes=settings.timeout_minutes)
        loader = BatchLoader(
            self.dataset,
            trainer.process,
            config.model,
            settings,
            flip=config.data.flip,
            world=self.world,
        )
        batches = loader.stream(trainer.step)
        with self._progress() as bar, contextlib.closing(batches):
            clock = time.perf_counter()
            for batch in batches:
                waited = time.perf_counter() - clock
                with self.world.step(trainer.step + 1, limit):
                    metrics, signal = trainer.update(batch, self.stop.received)
                took = time.perf_counter() - clock
                self.log.add(metrics, settings.batch_size, took, waited)
                if trainer.reached(settings.log_every):
                    bar.set_postfix_str(_pace(self.write_line()), refresh=False)
                bar.update()
                diverged = trainer.nonfinite_in_a_row >= settings.max_nonfinite
                if trainer.reached(settings.save_every) or diverged or signal:
                    self.save()
                    signal = signal or self.stop.of_any(self.world)  # it may have come meanwhile
                if diverged:
                    raise FloatingPointError(
                        f"loss or gradient not finite in {trainer.nonfinite_in_a_row} steps in a "
                        f"row; step {trainer.step} is saved in {config.out}. Start a new run with "
                        f"a train.lr below {settings.lr}"
                    )
                if signal:
                    raise Stopped(signal)
                self.preview()
                self.score()
                clock = time.perf_counter()

    def write_line(self) -> dict[str, Any]:
        """Write the line of this step to the log, and return it."""
        trainer, settings = self.trainer, self.settings
        epoch = trainer.step * settings.batch_size / len(self.dataset)
        rate = learning_rate(trainer.step - 1, settings)
        remaining = (settings.steps - trainer.step) * settings.batch_size
        return self.log.write(trainer.step, epoch, rate, trainer.nonfinite, remaining, LOGGED)

    def save(self) -> None:
        """Write a checkpoint of this step, after the log."""
        self.log.sync()
        self.trainer.save(self.log.sums, len(self.dataset))
        self.saved = self.trainer.step

    def preview(self) -> None:
        """Draw a grid of samples, if this step owes one. Raises Stopped on all ranks alike."""
        if preview_is_due(self.trainer, self.previews):
            images, columns = self.previews.preview(self.trainer.ema, self.stop)
            self.log.images(self.trainer.step, images, columns, self.previews.caption())

    def score(self) -> None:
        """Score samples, if this step owes that. Raises Stopped on all ranks alike."""
        if score_is_due(self.trainer, self.scorer):
            self.log.score(self.trainer.step, self.scorer.score(self.trainer.ema, self.stop))

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.settings.steps,
            initial=self.trainer.step,
            bar_format=BAR,
            ncols=min(BAR_WIDTH, shutil.get_terminal_size((BAR_WIDTH, 1)).columns),
            mininterval=bar_interval(),
            disable=not self.world.main,
        )


def preview_is_due(trainer: Trainer, previews: PreviewSampler) -> bool:
    """Whether the step that was reached has a preview that is not there yet; alike on all ranks."""
    if not (previews.visible and trainer.reached(trainer.config.sample.every)):
        return False
    path = preview_path(trainer.config.out, trainer.step)
    return not trainer.world.gather(path.exists())[0]


def score_is_due(trainer: Trainer, scorer: Scorer | None) -> bool:
    """Whether the step that was reached has a score that is not there yet; alike on all ranks."""
    if scorer is None or not trainer.reached(trainer.config.score.every):
        return False
    path = score_path(trainer.config.out, trainer.step)
    return not trainer.world.gather(path.exists())[0]


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


def _pace(line: dict[str, Any]) -> str:
    """What the progress bar shows of a line of the log."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}, {line['images_per_second']:.4g} images/s"
