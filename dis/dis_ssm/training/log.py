"""What a run writes while it trains: log.jsonl, TensorBoard, pictures, scores."""

import json
import math
import os
import sys
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dis_ssm.sampling.grids import make_grid
from dis_ssm.storage.run import LOG, preview_path, score_path
from dis_ssm.system.extras import how_to_install
from dis_ssm.system.files import drafted, write_json

EXTENDED_FROM = "extended_from"
BOARD_GROUPS = {  # TensorBoard's tags are GROUP/name; the names are the log's
    "loss": ("loss", "mse", "vb", "loss_q1", "loss_q2", "loss_q3", "loss_q4"),
    "optimizer": ("lr", "grad_norm", "nonfinite"),
    "speed": ("images_per_second", "tflops", "mfu", "memory_gb", "data_wait"),
    "progress": ("epoch", "seconds", "eta_hours", EXTENDED_FROM),
}
SCORES = "score"  # the group of all other tags
GROUP_OF = {name: group for group, names in BOARD_GROUPS.items() for name in names}


class RunLog:
    """RUN/log.jsonl, RUN/tensorboard, RUN/samples and RUN/scores, continued after `step`.

    A line holds the means since the line before it: loss, mse, vb (bits per dimension), grad_norm
    (before clipping) and loss_q1 ... loss_q4 (by quarter of the process's time) over the steps that
    were finite, null without any; lr; images per second of training, over all processes; tflops,
    the operations of the model per second in 10^12, and mfu, their share of the devices' peak, null
    where that is unknown; memory_gb, the most that the main process has held; data_wait, the share
    of its time spent waiting for data; eta_hours, what is left at this rate; epoch; nonfinite, the
    steps skipped so far; seconds of training so far; extended_from, once, the former last step of
    a run that was extended.

    Args:
        run: the folder.
        step: the last one that is done; lines beyond it, which a killed process had written, are
            removed.
        sums: the running sums of the checkpoint of that step; empty for a new run.
        throughput: says how hard the machine works.
        main: whether this process writes; the others keep the same sums for the checkpoints.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        sums: dict[str, float],
        throughput: "ThroughputMeter",
        main: bool = True,
    ):
        self.run, self.throughput, self.main = run, throughput, main
        self.sums = {"images": 0, "interval": 0.0, "waited": 0.0, "seconds": 0.0} | sums
        self._file = self._board = self._wandb = None
        if main:
            from torch.utils.tensorboard import SummaryWriter

            path = run / LOG
            truncate_log(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        if self.main:
            self._file.close()
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def mirror(self, project: str, config: dict[str, Any]) -> None:
        """Send every line and picture to Weights & Biases too, continuing the run's own page.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb = require_wandb()
        identity = self.run / "wandb.id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        self._wandb = wandb.init(
            project=project,
            name=self.run.name,
            id=identity.read_text(encoding="utf-8"),
            dir=self.run,
            config=config,
            resume="allow",
        )

    def add(self, metrics: dict[str, float], images: int, seconds: float, waited: float) -> None:
        """Count one step, whose metrics enter the means unless one of them is not finite."""
        counts = {"images": images, "interval": seconds, "waited": waited, "seconds": seconds}
        if all(math.isfinite(value) for value in metrics.values()):
            for name, value in metrics.items():
                counts |= {f"sum/{name}": value, f"count/{name}": 1}
        for name, value in counts.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def write(
        self,
        step: int,
        epoch: float,
        lr: float,
        nonfinite: int,
        remaining: int,
        names: Iterable[str],
    ) -> dict[str, Any]:
        """Write the line of `step`, start new means, and return the line.

        Args:
            step: the step that was reached.
            epoch: how often the data was seen so far.
            lr: the learning rate of the step.
            nonfinite: the steps that were skipped so far.
            remaining: the images that are left to learn from.
            names: the metrics whose means it holds.
        """
        sums = self.sums
        line = {"step": step}
        for name in names:
            count = sums.get(f"count/{name}")
            line[name] = sums[f"sum/{name}"] / count if count else None
        rate = sums["images"] / sums["interval"]
        line |= {"lr": lr, "images_per_second": round(rate, 2), **self.throughput.read(rate)}
        line |= {"data_wait": round(sums["waited"] / sums["interval"], 4)}
        line |= {"eta_hours": round(remaining / rate / 3600, 4)}
        line |= {"epoch": round(epoch, 4), "nonfinite": nonfinite}
        line["seconds"] = round(sums["seconds"], 3)
        if EXTENDED_FROM in sums:
            line[EXTENDED_FROM] = sums[EXTENDED_FROM]
        self.sums = {"images": 0, "interval": 0.0, "waited": 0.0, "seconds": sums["seconds"]}
        if self.main:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._scalars(step, {k: v for k, v in line.items() if k != "step" and v is not None})
        return line

    def images(self, step: int, images: Tensor, columns: int, caption: str = "") -> None:
        """Write a grid of samples to `preview_path` and, with its caption, to TensorBoard."""
        if not self.main:
            return
        grid = make_grid(images, columns)
        path = preview_path(self.run, step)
        path.parent.mkdir(exist_ok=True)
        with drafted(path) as draft:
            grid.save(draft)
        self._board.add_image("samples", np.array(grid.convert("RGB")), step, dataformats="HWC")
        if caption:
            self._board.add_text("samples", caption, step)
        if self._wandb:
            self._wandb.log({"samples": require_wandb().Image(grid)}, step=step)

    def score(self, step: int, score: dict[str, Any]) -> None:
        """Write the score of `step` to `score_path` and to TensorBoard."""
        if not self.main:
            return
        path = score_path(self.run, step)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"step": step, **score})
        name = f"fd_{score['extractor']}_{score['num']}"
        self._scalars(step, {name: score["frechet_distance"]})

    def sync(self) -> None:
        """Bring the log to disk, so that a checkpoint never outlives its lines."""
        if self.main:
            os.fsync(self._file.fileno())
            self._board.flush()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{GROUP_OF.get(name, SCORES)}/{name}", value, step)
        if self._wandb:
            self._wandb.log(values, step=step)


@dataclass(frozen=True)
class ThroughputMeter:
    """How hard the machine works.

    Attributes:
        flops: operations of one image's training step.
        peak: FLOP/s of all devices together at most; None where that is unknown.
        device: whose memory is measured; of the CPU, the process's.
    """

    flops: int
    peak: float | None
    device: torch.device

    def read(self, images_per_second: float) -> dict[str, float | None]:
        """tflops, mfu and memory_gb of the log at this rate."""
        rate = self.flops * images_per_second
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = _resident()
        return {
            "tflops": round(rate / 1e12, 4),
            "mfu": round(rate / self.peak, 4) if self.peak else None,
            "memory_gb": round(held / 1e9, 3) if held else None,
        }


def _resident() -> int | None:
    """Bytes, at most so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_wandb() -> ModuleType:
    """The module.

    Raises:
        ImportError: it is missing; it says how to install it.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"train.wandb needs wandb: {how_to_install('wandb')}") from error
    return wandb


def truncate_log(path: Path, step: int) -> None:
    """Keep the lines up to `step` that can be read; a warning counts those that are lost, but for
    a last one, which a kill leaves half-written."""
    if not path.exists():
        return
    kept, lost = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                lost.append(number)
    if lost:
        warnings.warn(
            f"{path}: {len(lost)} lines are damaged and lost, the first is line {lost[0]}",
            stacklevel=2,
        )
    with drafted(path) as draft:
        draft.write_text("".join(kept), encoding="utf-8")
