"""What surrounds training: one process per run folder, its log, the signals that end it."""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dis_ssm.checkpoint import drafted
from dis_ssm.images import make_grid

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Make the folder `run` and hold its lock, which the system frees when the process ends.

    ValueError when another process holds it, or when the folder is full of something else.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: give a folder for the run")
    own = (".lock", "config.json", "checkpoints", "log.jsonl")
    if run.is_dir() and any(run.iterdir()) and not any((run / name).exists() for name in own):
        raise ValueError(f"{run} is not empty and is not a run: give another folder")
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        _lock(file, run)
        yield


def _lock(file, run: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: two processes in one run go unnoticed
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{run} is being trained by another process") from error


class StopSignal:
    """`received` is the first SIGTERM or SIGINT inside the `with`; the second acts as usual.

    Outside the main thread, where signals cannot be caught, it stays None.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        signal.signal(number, self._previous[number])


class RunLog:
    """RUN/log.jsonl, RUN/tensorboard and RUN/samples, continued after `step`.

    A line holds the means since the line before it: loss, mse, vb (bits per dimension) and
    grad_norm (before clipping) over the steps that were finite, null without any; lr; images per
    second of training; epoch; nonfinite, the steps skipped so far; seconds of training so far.
    Lines beyond `step`, which a killed process had written, are removed.
    """

    def __init__(self, run: Path, step: int, meter: dict[str, float]):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.meter = run, {"images": 0, "interval": 0.0, "seconds": 0.0, "finite": 0}
        self.meter |= meter
        path = run / "log.jsonl"
        truncate_log(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._board.close()

    def add(self, metrics: dict[str, float], images: int, seconds: float) -> None:
        """Count one step, whose metrics enter the means unless one of them is not finite."""
        counts = {"images": images, "interval": seconds, "seconds": seconds}
        if all(math.isfinite(value) for value in metrics.values()):
            counts |= {"finite": 1} | {f"mean/{name}": value for name, value in metrics.items()}
        for name, value in counts.items():
            self.meter[name] = self.meter.get(name, 0) + value

    def write(
        self, step: int, epoch: float, lr: float, nonfinite: int, names: Iterator[str]
    ) -> dict[str, Any]:
        """Write the line of `step`, start new means, and return the line."""
        meter, finite = self.meter, self.meter["finite"]
        means = {name: meter[f"mean/{name}"] / finite if finite else None for name in names}
        rate = meter["images"] / meter["interval"]
        line = {"step": step, **means, "lr": lr, "images_per_second": round(rate, 2)}
        line |= {"epoch": round(epoch, 4), "nonfinite": nonfinite}
        line["seconds"] = round(meter["seconds"], 3)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        self.meter = {"images": 0, "interval": 0.0, "seconds": meter["seconds"], "finite": 0}
        return line

    def images(self, step: int, images: Tensor, columns: int) -> None:
        """Write a grid of samples to `preview_path` and to TensorBoard."""
        grid = make_grid(images, columns)
        path = preview_path(self.run, step)
        path.parent.mkdir(exist_ok=True)
        with drafted(path) as draft:
            grid.save(draft)
        self._board.add_image("samples", np.array(grid.convert("RGB")), step, dataformats="HWC")

    def sync(self) -> None:
        """Bring the log to disk, so that a checkpoint never outlives its lines."""
        os.fsync(self._file.fileno())
        self._board.flush()


def preview_path(run: Path, step: int) -> Path:
    return run / "samples" / f"step-{step:06d}.png"


def truncate_log(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a line that was half written ends what can be kept."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    with drafted(path) as draft:
        draft.write_text("".join(kept), encoding="utf-8")
