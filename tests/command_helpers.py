"""What tests of whole commands share: how one ended, a folder's contents, a model to convert."""

import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

import torch


class Outcome(NamedTuple):
    """How a command line ended; `status` is None where its work began and was not let to go on."""

    status: int | None
    out: str
    err: str

    @property
    def problem(self) -> str | None:
        """What is wrong with how it was refused or accepted."""
        if "Traceback" in self.err:
            return "a traceback"
        if self.status is None:
            return None
        if self.status == 0:
            return None if self.out.strip() else "exit status 0 and nothing said"
        errors = self.err.count("dis-ssm: error:")
        return None if errors == 1 or "For full helptext" in self.err else f"{errors} errors"


class Began(BaseException):
    """The command took its arguments and started to compute."""


class Late(BaseException):
    """The command took too long."""


def contents(folder: Path) -> dict[str, tuple]:
    """Mode, and size and time of change of what is no folder, by path."""
    found = {}
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(base, name)
            status = os.lstat(path)
            size = None if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
            found[path] = (status.st_mode, size)
    return found


def tidy(before: dict[str, tuple], after: dict[str, tuple]) -> None:
    """Remove what has come since."""
    for path in sorted(after.keys() - before.keys()):
        if os.path.lexists(path):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def released_weights() -> dict[str, torch.Tensor]:
    """A released model of one block, all zero, by the names that its conversion asks for."""
    from dis_ssm.convert import _released_name
    from dis_ssm.model import DiS

    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1}
    state = DiS(**sizes, num_classes=0).state_dict()
    released = {_released_name(name, 1): tensor for name, tensor in state.items()}
    return {n: t[:, None] if "conv1d" in n and t.dim() == 2 else t for n, t in released.items()}
