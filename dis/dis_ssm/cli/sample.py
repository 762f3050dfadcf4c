"""dis-ssm sample"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dis_ssm.cli.messages import print_warning
from dis_ssm.config import MOST_IMAGES, Sampler, sample_settings
from dis_ssm.storage.classes import class_labels, class_names
from dis_ssm.system.distributed import join_world
from dis_ssm.system.files import check_writable

NUM = 100  # images, unless asked for more or fewer
LARGEST_GRID = 1000  # images
LONGEST_NAME = 200  # of a file; systems allow 255 bytes, drafts included


def sample(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    *,
    num: int | None = None,
    per_class: int | None = None,
    classes: tuple[str, ...] = (),
    cfg_scale: float | None = None,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    steps: int | None = None,
    sampler: Sampler | None = None,
    eta: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    labels: Literal["balanced", "random"] = "balanced",
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    precision: Literal["float32", "bf16"] = "float32",
    compile: bool = False,
    device: str | None = None,
    png: bool = False,
    out: Path | None = None,
) -> int:
    """Draw images from a trained model; image i depends on (seed, i, class).

    A grid (.png) has one class a column. A set (.npz, as ADM's evaluator reads it) may be of any
    size and be drawn under torchrun by any number of processes; run the same command again to
    finish one that was interrupted. Latents are decoded by a VAE; without one they are written as
    they are, float32 (n, C, H, W).

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images; 100 if neither this nor per-class is given.
        per_class: how many images of each class.
        classes: which classes, names or numbers; all if none is given.
        cfg_scale: guidance, 1 for none; unset, like the next seven, as the run's config says.
        cfg_channels: guide the first so many channels only.
        cfg_interval: guide between these timesteps only.
        labels: of a set: as many of each class (balanced), or drawn uniformly (random).
        weights: averaged (ema) or as trained.
        vae: folder or hub id of the VAE that decodes; none for the latents themselves; unset, that
            of the run's config, or the one its latent cache names if that is a folder.
        compile: compile the model first; pays off for thousands of images.
        png: write each image of a set to a folder of PNG files too.
        out: NAME.png or NAME.npz; by default in the run's samples folder, named after the step and
            these options, a grid up to 1000 images.
    """
    from dis_ssm.sampling.grids import check_format
    from dis_ssm.sampling.pipeline import open_pipeline
    from dis_ssm.sampling.sets import draw_grid, draw_set, plan_samples

    if out:
        check_format(out)
    with join_world(device) as world:
        pipeline = open_pipeline(
            run,
            weights=weights,
            vae=vae,
            precision=precision,
            compiled=compile,
            world=world,
        )
        config, folder = pipeline.config, pipeline.origin.run
        if out and out.suffix == ".png" and not pipeline.visible:
            raise ValueError(
                f"{run} draws latents of {config.model.in_channels} channels, and showing them "
                f"needs a VAE: give --vae a folder or hub id, or --out a name that ends in .npz"
            )
        if not pipeline.visible and vae is None and world.main:
            print_warning(
                f"{run} draws latents and no VAE is known that decodes them, so the latents are "
                f"written: give --vae a folder or hub id for images, or --vae none to write latents"
            )
        settings = sample_settings(
            config,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
            cfg_interval=cfg_interval,
            steps=steps,
            sampler=sampler,
            eta=eta,
            seed=seed,
            batch_size=batch_size,
        )
        known = range(config.model.num_classes)
        chosen = class_labels(classes, class_names(folder), len(known))
        num = _count(num, per_class, len(chosen or known))
        if png and not pipeline.visible:
            raise ValueError(f"--png: {run} draws latents, and showing them needs --vae")
        settings = dataclasses.replace(settings, num=num)
        plan = plan_samples(pipeline, settings, labels=labels, classes=chosen, png=png)
        if out is None:
            is_grid = pipeline.visible and num <= LARGEST_GRID and world.size == 1 and not png
            out = folder / "samples" / (plan.name + (".png" if is_grid else ".npz"))
            if len(out.name) > LONGEST_NAME:
                raise ValueError(f"{len(classes)} classes are too many for a file name: give --out")
        check_writable(out)
        if out.suffix == ".png":
            if world.size > 1 or labels == "random" or png:
                raise ValueError(
                    f"{out} is a grid, drawn by one process with a class a column: give --out a "
                    f"name that ends in .npz for a set"
                )
            draw_grid(pipeline, plan, out)
        else:
            draw_set(pipeline, plan, out, world)
        if world.main:
            print(out)
    return 0


def _count(num: int | None, per_class: int | None, classes: int) -> int:
    if num is not None and per_class is not None:
        raise ValueError(f"--num {num} and --per-class {per_class}: give one of them")
    if per_class is not None and not classes:
        raise ValueError(f"--per-class {per_class}: this model has no classes, give --num")
    wanted = NUM if num is None and per_class is None else (num or (per_class or 0) * classes)
    if not 1 <= wanted <= MOST_IMAGES:
        raise ValueError(f"{wanted} images: ask for 1 to {MOST_IMAGES:,}")
    return wanted
