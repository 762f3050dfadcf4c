"""Continuing a run from its newest intact checkpoint, where its config, data and machine allow."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

from dis_ssm.config import Config, differences
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.storage.checkpoint import (
    STATE,
    CheckpointError,
    clean_drafts,
    newest_intact,
    saved_config,
)
from dis_ssm.storage.run import check_log
from dis_ssm.system.machine import versions
from dis_ssm.training.log import EXTENDED_FROM
from dis_ssm.training.trainer import PARTS, Trainer

COUNTS = ("nonfinite", "nonfinite_in_a_row", "ema_updates", "images")  # of a trainer's state


def extended(config: Config, steps: int) -> Config:
    """`config` with its last step at `steps`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def resume(trainer: Trainer, dataset: ImageDataset, extends: bool = False) -> dict[str, float]:
    """Restore the newest intact checkpoint of the trainer's run, if it has one.

    Args:
        trainer: fresh; its config says the run, and how it is to be continued.
        dataset: what the run learns from.
        extends: whether more steps than the run was begun with are no contradiction.

    Returns:
        The running sums of the log, empty for a new run.

    Raises:
        ValueError: the run was trained with other settings or data.
        CheckpointError: no checkpoint is intact.
    """
    run = trainer.config.out
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
    """CheckpointError naming what is missing or wrong in a trainer's state."""
    sound = {name: type(state.get(name)) is int and state[name] >= 0 for name in COUNTS}
    sound |= {name: isinstance(state.get(name), dict) for name in ("machine", "meter")}
    meter = state["meter"] if sound["meter"] else {}
    for name, value in meter.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        sound[f"meter.{name}"] = number and math.isfinite(value)
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        raise CheckpointError(f"{path}: trainer.{wrong[0]} is missing or wrong: restore it")
