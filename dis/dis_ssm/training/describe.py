"""What a run would be: its resolved configuration and what it costs, before it starts."""

import torch

from dis_ssm.build import build_model, open_run
from dis_ssm.config import Config, to_toml
from dis_ssm.costs.operations import TRAINING_PASSES, forward_flops, training_memory
from dis_ssm.system.machine import pick_device
from dis_ssm.training.optimizer import parameter_groups


def describe(config: Config) -> str:
    """What `train(config)` would do: the resolved config as TOML, its sizes as comments.

    Where the data is not at hand, the config must say the model's shape itself.

    Raises:
        ValueError, ImportError: it does not, and the data cannot be opened; or the model cannot be
            built.
    """
    images = None
    try:
        config, dataset = open_run(config)
        images = len(dataset)
    except (ValueError, ImportError) as error:
        if None in (config.model.input_size, config.model.in_channels, config.model.num_classes):
            raise
        missing = str(error)
    settings = config.train
    with torch.device("meta"):
        model = build_model(config)
    groups = parameter_groups(model, settings.weight_decay)
    sizes = {g["name"]: sum(p.numel() for p in g["params"]) for g in groups}
    state, kept = training_memory(config)
    batch = settings.micro_batch_size or settings.batch_size
    counts = forward_flops(config)
    parts = ", ".join(f"{name.rpartition('.')[2]} {n / 1e9:.3f}" for name, n in counts.items())
    seen = settings.steps * settings.batch_size
    lines = [
        f"parameters: {sum(sizes.values()):,}, {sizes['matrices']:,} of them in matrices",
        f"tokens: {model.pos_embed.shape[1]}",
        f"GFLOPs of one image's forward pass: {sum(counts.values()) / 1e9:.3f} ({parts})",
        f"memory: {state / 1e9:.2f} GB for weights, gradients, average and AdamW, "
        f"{kept / 1e6:.1f} MB kept for each image: {(state + batch * kept) / 1e9:.2f} GB "
        f"for {batch} images in one process",
        f"steps: {settings.steps:,} of {settings.batch_size} images, {seen:,} in all, "
        f"{TRAINING_PASSES * sum(counts.values()) * seen / 1e18:.4g} EFLOP",
    ]
    if images is None:
        lines.append(f"epochs: unknown, the data is not here: {missing}")
    else:
        lines.append(f"epochs: {seen / images:.2f} of {images:,} images")
    lines.append(f"device: {pick_device(settings.device)}")
    return "\n".join([to_toml(config), *(f"# {line}" for line in lines)])
