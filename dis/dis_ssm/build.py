"""From a configuration, or a checkpoint, to what it describes: model, process, data set."""

import dataclasses
from pathlib import Path

import torch

from dis_ssm.config import SIZES, Config, DiffusionConfig, ModelConfig, resolve
from dis_ssm.data.datasets import ImageDataset
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

    Args:
        path: the folder.
        weights: "ema", the average, or "model", as trained.
        device: where the weights go; None: the CPU.

    Returns:
        The model in eval mode, and the config of the run.

    Raises:
        ValueError: `weights` is something else, or `path` is neither.
        CheckpointError: a file or a tensor, which it names, is damaged or does not fit.
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
    everything else must fit.

    Raises:
        ValueError, CheckpointError: as `load_model`.
    """
    _, folder = locate(path)
    state = read_state(folder)
    tensors = read_part(folder, state, "ema")
    old = saved_config(folder, state).model.input_size
    tensors["pos_embed"] = model.resize_positions(tensors["pos_embed"], old)
    load_weights(model, tensors, folder / "ema.safetensors")


def open_run(config: Config) -> tuple[Config, ImageDataset]:
    """The config with what it takes from its data, and the data.

    Raises:
        ValueError: the data cannot be opened, or contradicts the config.
    """
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
    shape |= {"latents": dataset.latents}
    return resolve(config, num_classes=dataset.num_classes, **shape), dataset


def build_model(config: Config) -> DiS:
    """The DiS of a resolved config, with its initial weights.

    Raises:
        ValueError: the sizes are not all given, or given twice, or do not fit one another.
    """
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


def depth_of(model: ModelConfig) -> int:
    """The number of blocks."""
    return model.depth or DiS_models[model.name].keywords["depth"]


def build_diffusion(settings: DiffusionConfig) -> Diffusion:
    """The process that the section describes."""
    return Diffusion(**dataclasses.asdict(settings))
