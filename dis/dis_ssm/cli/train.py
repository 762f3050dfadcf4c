"""dis-ssm train"""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from dis_ssm.config import RUN_CONFIG, Config, load_config, named_configs
from dis_ssm.storage.run import is_run

INTERRUPTED = 128 + signal.SIGINT


def base_of(source: str) -> Config:
    """The configuration that a file, a name, or a run has."""
    folder = Path(source)
    if source in named_configs() or not is_run(folder):
        return load_config(source)
    return dataclasses.replace(load_config(folder / RUN_CONFIG), out=folder)


def train_command(base: Config) -> Callable[..., int]:
    """The train command, whose flags start from `base`."""

    def train(
        config: Annotated[Config, tyro.conf.arg(name="")] = base,
        extend: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Train a model, or continue the run in --out: the same command again resumes exactly.

        CONFIG comes first: a TOML file, the name of one (NAMES), or a run to continue; flags
        override it.

        Args:
            extend: continue a run to this step, beyond its train.steps; its learning rate's
                schedule then ends there.
            dry_run: print the resolved config and its sizes, write nothing.
        """
        from dis_ssm.training import train as run_training
        from dis_ssm.training.describe import describe
        from dis_ssm.training.resume import extended

        if dry_run:
            print(describe(config if extend is None else extended(config, extend)))
            return 0
        outcome = run_training(config, extend=extend)
        if os.environ.get("RANK", "0") != "0":
            return 0
        again = f"at step {outcome.step}; run the same command again to continue"
        if outcome.stopped_by is None:
            print(f"trained: {outcome.run}; draw with: dis-ssm sample {outcome.run}")
        else:
            print(f"stopped: {outcome.run} {again}")
        return INTERRUPTED if outcome.stopped_by == signal.SIGINT else 0

    train.__doc__ = train.__doc__.replace("NAMES", ", ".join(named_configs()))
    return train
