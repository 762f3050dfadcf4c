"""Between the model's numbers and pictures: uint8, numbered sets of samples, grids.

Images are (n, C, H, W); model space is float32 in [-1, 1].
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dis_ssm.checkpoint import drafted
from dis_ssm.config import SampleConfig
from dis_ssm.diffusion import Diffusion
from dis_ssm.sampling import image_generators, image_noise, sample

HALF_RANGE = 127.5  # of uint8
GAP = 2  # pixels between the cells of a grid
VISIBLE = 64  # smaller images are enlarged to at least this many pixels a side
MAX_COLUMNS = 32
VISIBLE_CHANNELS = (1, 3)  # grey, RGB
FORMATS = (".png", ".npz")


def to_model_space(images: Tensor) -> Tensor:
    """uint8 -> float32, x / 127.5 - 1."""
    return images.float() / HALF_RANGE - 1


def to_uint8(x: Tensor) -> Tensor:
    """Inverse of `to_model_space`, rounded to nearest and clipped; black where not a number."""
    return ((x.nan_to_num(-1) + 1) * HALF_RANGE).round().clamp(0, 2 * HALF_RANGE).to(torch.uint8)


def label_columns(num: int, classes: list[int]) -> tuple[Tensor | None, int]:
    """Labels (num,) that fill a grid row by row with one class a column, and its column count.

    Without classes there are no labels and the grid is about square, as with more classes than
    `MAX_COLUMNS`.
    """
    columns = len(classes) if 0 < len(classes) <= MAX_COLUMNS else math.ceil(math.sqrt(num))
    if not classes:
        return None, columns
    return torch.tensor(classes)[torch.arange(num) % len(classes)], min(num, columns)


def samples_name(
    step: int, settings: SampleConfig, weights: str = "ema", classes: tuple[int, ...] = ()
) -> str:
    """What tells one set of samples of a run from another, as the name of its file."""
    parts = ["step", step, settings.sampler, settings.steps, "cfg", f"{settings.cfg_scale:g}"]
    if settings.cfg_channels is not None:
        parts += ["channels", settings.cfg_channels]
    if settings.cfg_interval is not None:
        parts += ["in", *(f"{t:g}" for t in settings.cfg_interval)]
    parts += ["eta", f"{settings.eta:g}"] if settings.eta else []
    parts += [] if weights == "ema" else [weights]
    parts += ["classes", *classes] if classes else []
    return "-".join(map(str, [*parts, "num", settings.num, "seed", settings.seed]))


def draw_images(*arguments, **options) -> Tensor:
    """`draw_samples` as uint8."""
    return to_uint8(draw_samples(*arguments, **options))


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    diffusion: Diffusion,
    shape: tuple[int, int, int],
    indices: Sequence[int],
    labels: Tensor | None,
    settings: SampleConfig,
    *,
    progress: bool = False,
    callback: Callable[[], None] = lambda: None,
) -> Tensor:
    """Samples `indices` of `shape` (C, H, W) on the CPU, float32 in model space, not clipped.

    Sample i depends on (settings.seed, i): all its noise comes from generator i. labels are int64,
    one for each of `indices`, or None. The model is used as it is; put it in eval mode first. Calls
    `callback` after each sampling step. Warns of samples that are not finite.
    """
    device = next(model.parameters()).device
    places = torch.arange(len(indices)).split(settings.batch_size)
    parts = [torch.empty(0, *shape)]

    def stepped(*_) -> None:
        bar.update()
        callback()

    with tqdm(total=settings.steps * len(places), unit="step", disable=not progress) as bar:
        for place in places:
            generators = image_generators(settings.seed, [indices[i] for i in place.tolist()])
            images = sample(
                model,
                diffusion,
                image_noise(shape, generators, device),
                None if labels is None else labels[place].to(device),
                steps=settings.steps,
                sampler=settings.sampler,
                eta=settings.eta,
                cfg_scale=settings.cfg_scale,
                cfg_channels=settings.cfg_channels,
                cfg_interval=settings.cfg_interval,
                generator=generators,
                callback=stepped,
                clip_denoised=settings.clip_denoised,
            )
            parts.append(images.cpu())
    images = torch.cat(parts)
    if wrong := (~images.isfinite()).flatten(1).any(1).sum().item():
        warnings.warn(f"{wrong} of {len(indices)} images are not finite", stacklevel=2)
    return images


def make_grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """uint8 images, row by row, on white; nearest-neighbour enlarged `scale` times.

    `scale` None enlarges to at least `VISIBLE` pixels a side.
    """
    n, channels, height, width = images.shape
    if channels not in VISIBLE_CHANNELS:
        raise ValueError(f"a grid shows grey or RGB images, not {channels} channels")
    scale = scale or max(1, math.ceil(VISIBLE / max(height, width)))
    height, width = height * scale, width * scale
    rows = math.ceil(n / columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    canvas = np.full(size, 2 * HALF_RANGE, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        cell = image.repeat(scale, 0).repeat(scale, 1)
        canvas[top : top + height, left : left + width] = cell
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: give a name that ends in {' or '.join(FORMATS)}")


def save_images(images: Tensor, labels: Tensor | None, path: Path, columns: int = 1) -> None:
    """Write uint8 images as a grid (.png) or as ADM's arrays (.npz): arr_0 (n, H, W, C), arr_1 the
    labels; float samples keep (n, C, H, W). The folder is made if need be; a reader sees a whole
    file or none."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path) as draft:
        if path.suffix == ".npz":
            whole = images.permute(0, 2, 3, 1) if images.dtype == torch.uint8 else images
            arrays = [whole.contiguous()] + ([] if labels is None else [labels])
            np.savez_compressed(draft, *(array.numpy() for array in arrays))
        else:
            make_grid(images, columns).save(draft)
