"""The one door to data: `open_dataset` opens a name, a folder or a file."""

import warnings
from pathlib import Path

from dis_ssm.data import sources
from dis_ssm.data.datasets import FileDataset, ImageDataset, TensorDataset
from dis_ssm.data.latents import MANIFEST, is_cache, open_cache
from dis_ssm.data.sources import SOURCES, SPLITS
from dis_ssm.data.sources.decode import check_background
from dis_ssm.storage.checkpoint import CheckpointError, locate
from dis_ssm.system.reading import parse_json, read_bytes


def open_dataset(
    source: str | Path,
    split: str = "train",
    image_size: int | None = None,
    max_corrupt: int = 10,
    workers: int | None = None,
    background: str = "white",
    relabel: bool = False,
) -> ImageDataset:
    """Open `source`: a name of `SOURCES`, a folder or a file (see docs/data.md).

    A folder or zip file of images holds one sub-folder per class (sorted names are labels
    0 .. K-1), or images and no sub-folders (unlabelled), or StyleGAN's dataset.json with the
    labels. Image files need `image_size`, in pixels; the other sources have a size of their own,
    and `image_size`, when given, must equal it. `fashion-mnist` is looked for in the folder that
    the environment variable DIS_SSM_DATA names, then in the repository's experiments/data. A folder
    with a manifest.json is a cache of latents, of the split that it was made from. Files that are
    left out because they are no images, or hidden, are named in a warning.

    Args:
        source: the name, folder or file.
        split: "train" or "heldout".
        image_size: the side of the crop, in pixels.
        max_corrupt, workers, background, relabel: as of `FileDataset`.

    Raises:
        ValueError: the source, split, size or background is unknown, a folder is empty, ambiguous
            or a run, or a file is damaged.
        ImportError: a library is missing; it says how to install it.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    check_background(background)
    if str(source) not in SOURCES and is_cache(source):
        return _open_latents(Path(source).expanduser() / MANIFEST, split, image_size)
    kind, path = sources.recognise(source)
    if kind == "folder":
        refuse_run(path)
    if kind not in sources.IN_MEMORY:
        _check_size(path, image_size)
        files = sources.OPENERS[kind](path, split)
        if files.left_out:
            warnings.warn(files.left_out, stacklevel=2)
        return FileDataset(files, image_size, max_corrupt, workers, background, relabel)
    pixels = sources.OPENERS[kind](path, split)
    dataset = TensorDataset(pixels.name, pixels.images, pixels.labels, pixels.class_names)
    if image_size is not None and (dataset.height, dataset.width) != (image_size, image_size):
        raise ValueError(
            f"{source} images are {dataset.height}x{dataset.width} and are not resized: "
            f"leave image_size unset instead of {image_size}"
        )
    return dataset


def refuse_run(path: Path) -> None:
    """Check that `path` is no run and no checkpoint: what lies in one is no data set.

    Raises:
        ValueError: it is one.
    """
    try:
        run, _ = locate(path)
    except CheckpointError:
        run = path
    except ValueError:
        return
    raise ValueError(
        f"{path} is a run, not images: give images, such as those that dis-ssm sample {run} "
        f"--num 600 --png --out NAME.npz draws"
    )


def _open_latents(manifest: Path, split: str, image_size: int | None) -> ImageDataset:
    made = parse_json(read_bytes(manifest), f"{manifest} is no manifest of a latent cache: it")
    if not isinstance(made, dict):
        raise ValueError(f"{manifest} is no manifest of a latent cache: it is no object")
    made = {"split": made.get("split", split), "image_size": made.get("image_size", image_size)}
    for name, wanted in (("split", split), ("image_size", image_size)):
        if wanted not in (None, made[name]):
            raise ValueError(
                f"{manifest.parent} was encoded with {name} {made[name]!r}, not {wanted!r}: encode "
                f"another cache"
            )
    return open_cache(manifest.parent)


def _check_size(path: Path, image_size: int | None) -> None:
    if image_size is None:
        what = "a folder" if path.is_dir() else "a file"
        raise ValueError(f"{path} is {what} of images: say image_size (--image-size), in pixels")
    if image_size < 1:
        raise ValueError(f"image_size {image_size} must be at least 1")
