"""The run folder: what tells one from other folders, who holds it, where its files lie."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dis_ssm.config import RUN_CONFIG
from dis_ssm.system.locks import is_empty, locked
from dis_ssm.system.reading import FileError, check_regular, read_json

LOG = "log.jsonl"


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Make the folder `run` and hold its lock.

    Raises:
        ValueError: it is a file, full of something else, or held by another process.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: give a folder for the run")
    if not (is_empty(run) or is_run(run)):
        raise ValueError(f"{run} is not empty and is not a run: give another folder")
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        yield


def is_run(folder: Path) -> bool:
    """Whether it holds checkpoints, a log or the configuration of a run (not of anything else)."""
    if (folder / "checkpoints").is_dir() or (folder / LOG).is_file():
        return True
    try:
        config = read_json(folder / RUN_CONFIG)
    except FileError:
        return False
    return isinstance(config, dict) and {"model", "diffusion", "train"} <= config.keys()


def preview_path(run: Path, step: int) -> Path:
    """Where the grid of samples of `step` lies."""
    return run / "samples" / f"step-{step:06d}.png"


def score_path(run: Path, step: int) -> Path:
    """Where the score of `step` lies, taken while training."""
    return run / "scores" / f"training-{step:06d}.json"


def check_log(run: Path) -> None:
    """Check that the log of a run, if there is one, is a regular file: reading another could hang.

    Raises:
        FileError: it is not.
    """
    if (run / LOG).exists():
        check_regular(run / LOG)
