"""From a configuration, or a checkpoint, to what it describes: model, process, data set."""

import dataclasses
from pathlib import Path

import torch

from dis_ssm.config import SIZES, Config, resolve
from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.latents import LatentDataset
from dis_ssm.data.open import open_dataset
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.models import DiS, DiS_models, create_model
from dis_ssm.storage.checkpoint import (
    WEIGHTS,
    load_weights,
    locate,
    of_state,
    read_part,
    read_state,
    saved_config,
)


def load_model(
    path: str | Path, *, weights: str = "ema", device: str | torch.device | None = None
) -> tuple[DiS, Config]:
    """The model of a RUN folder (its newest complete checkpoint) or of a checkpoint folder.

    `weights` is "ema" or "model" (as trained); the model is in eval mode. Raises ValueError, and
    CheckpointError naming the file or tensor, when it is damaged or does not fit.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    _, folder = locate(path)
    state = read_state(folder)
    config = saved_config(folder, state)
    with of_state(folder):
        model = build_model(config)
    load_weights(model, read_part(folder, state, weights), folder / f"{weights}.safetensors")
    return model.to(device or "cpu").eval(), config


def start_from(model: DiS, path: str | Path) -> None:
    """Give `model` the averaged weights of a RUN or checkpoint, for fine-tuning.

    The position embedding is interpolated when the input size differs (`resize_positions`);
    everything else must fit. Raises ValueError and CheckpointError as `load_model`.
    """
    _, folder = locate(path)
    state = read_state(folder)
    tensors = read_part(folder, state, "ema")
    old = saved_config(folder, state).model.input_size
    tensors["pos_embed"] = model.resize_positions(tensors["pos_embed"], old)
    load_weights(model, tensors, folder / "ema.safetensors")


def open_run(config: Config) -> tuple[Config, ImageDataset]:
    """The config with what it takes from its data, and the data."""
    data = config.data
    dataset = open_dataset(
        data.source,
        "train",
        data.image_size,
        max_corrupt=data.max_corrupt,
        workers=data.workers,
        background=data.background,
        relabel=data.relabel,
    )
    shape = {name: getattr(dataset, name) for name in ("channels", "height", "width")}
    shape |= {"latents": isinstance(dataset, LatentDataset)}
    return resolve(config, num_classes=dataset.num_classes, **shape), dataset


def build_model(config: Config) -> DiS:
    """The DiS of a resolved config, with its initial weights."""
    values = dataclasses.asdict(config.model)
    name, sizes = values.pop("name"), {key: values.pop(key) for key in SIZES}
    given = [key for key, value in sizes.items() if value is not None]
    values["learn_sigma"] = config.diffusion.learn_sigma
    if name and given:
        raise ValueError(f"model.name {name!r} already says {', '.join(given)}: give one or other")
    if name:
        return create_model(name, **values)
    if len(given) < len(SIZES):
        lacking = ", ".join(key for key in SIZES if key not in given)
        raise ValueError(f"the model lacks {lacking}: give all of {', '.join(SIZES)}, or a name")
    return DiS(**sizes, **values)


def depth_of(config: Config) -> int:
    """The number of blocks."""
    model = config.model
    return model.depth or DiS_models[model.name].keywords["depth"]


def build_diffusion(config: Config) -> Diffusion:
    return Diffusion(**dataclasses.asdict(config.diffusion))
