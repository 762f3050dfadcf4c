"""What tests share: models with known answers, how a command ended, a folder's contents."""

import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

import torch

from dis_ssm.build import open_run
from dis_ssm.config import Config, DataConfig, ModelConfig, SampleConfig, TrainConfig
from dis_ssm.training.trainer import Trainer


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
    from dis_ssm.interop.released import _released_name
    from dis_ssm.models.dis import DiS

    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1}
    state = DiS(**sizes, num_classes=0).state_dict()
    released = {_released_name(name, 1): tensor for name, tensor in state.items()}
    return {n: t[:, None] if "conv1d" in n and t.dim() == 2 else t for n, t in released.items()}


# ---- models with known answers ----

MU, SCALE = 0.3, 0.5  # of the data


class GaussianDenoiser:
    """The exact predictor for data N(MU, SCALE²); `interpolation` fills the variance half."""

    def __init__(self, diffusion, interpolation=0.0):
        self.diffusion, self.interpolation = diffusion, interpolation
        self.timesteps = []

    def __call__(self, x, t, y):
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        self.timesteps.append(t[0].item())
        a = self.diffusion.alpha_bar.to(x.dtype)[t].reshape(-1, *[1] * (x.ndim - 1))
        x0 = MU + a.sqrt() * SCALE**2 / (a * SCALE**2 + 1 - a) * (x - a.sqrt() * MU)
        epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()
        output = self.diffusion.target(x0, epsilon, t)
        if self.diffusion.learn_sigma:
            output = torch.cat([output, torch.full_like(x, self.interpolation)], 1)
        return output


class LabelModel:
    """An arbitrary function of (x, t, y) with 2C channels that records its calls."""

    null_class = 3

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((len(x), t, y))
        label = 0 if y is None else (y if y.ndim == 1 else y.sum(1)).to(x).reshape(-1, 1, 1, 1)
        phase = t.to(x).reshape(-1, 1, 1, 1) / 100 + label
        return torch.cat([torch.sin(x + phase), torch.tanh(x * phase)], 1)


class PartsModel:
    """An arbitrary function of (x, t, y) with 2C channels, y a `Condition` of which it reads label
    and context; it records the conditions that it was given."""

    null_class = 3

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(y)
        told = y.context.to(x)
        if y.context_mask is not None:
            told = told * y.context_mask[..., None]
        told = told.sum((1, 2)) + (0 if y.label is None else y.label)
        phase = (t.to(x) / 100 + told).reshape(-1, 1, 1, 1)
        return torch.cat([torch.sin(x + phase), torch.tanh(x * phase)], 1)


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


# ---- a model to train ----


def tiny(out="unused", **settings):
    values = dict(steps=6, batch_size=8, micro_batch_size=3, lr=1e-3, warmup_steps=2, log_every=1)
    return Config(
        out=out,
        model=ModelConfig(hidden_size=16, depth=3, patch_size=4, d_state=4, drop_path=0.3),
        data=DataConfig(flip=True),
        train=TrainConfig(**(values | settings)),
        sample=SampleConfig(every=0),
    )


def trainer_of(config):
    return Trainer(open_run(config)[0])
