"""Image sources and the order in which training reads them.

An `ImageDataset` gives uint8 images (C, H, W) and integer labels; `open_dataset` opens one by name
or folder. Splits are fixed: nothing here depends on a clock, a global generator or a file date.

=================  ==========================  ================================================
source             image                       "train" / "heldout"
=================  ==========================  ================================================
``digits``         1 x 8 x 8, 17 grey levels   1,195 / 602: within each class, in file order,
                   (scikit-learn, UCI)         images 0, 3, 6, ... are held out (same writers)
``fashion-mnist``  1 x 28 x 28                 6,000 / 1,000: the first 600 and 100 of each class
                   (embedded subset)           in the official train and test files
folder of idx      as in the files             ``train-*`` / ``t10k-*``
folder of images   3 x image_size x image_size  its sub-folders ``train`` and ``heldout`` if it has
                                               both; otherwise every image is "train"
=================  ==========================  ================================================
"""

import difflib
import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

SOURCES = ("digits", "fashion-mnist")
SPLITS = ("train", "heldout")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
IDX_PREFIX = {"train": "train", "heldout": "t10k"}
NO_LABEL = -1
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, zlib.error)  # as Pillow reports it


def open_dataset(
    source: str | Path, split: str = "train", image_size: int | None = None
) -> "ImageDataset":
    """Open `source`: a name of `SOURCES` or a folder (see the table above).

    A folder of images holds one sub-folder per class (sorted names are labels 0 .. K-1), or images
    and no sub-folders (unlabelled). It needs `image_size`; the other sources have a size of their
    own, and `image_size`, when given, must equal it. ``fashion-mnist`` is looked for in the folder
    that the environment variable DIS_SSM_DATA names, then in the repository's experiments/data.

    Raises ValueError for an unknown source, split or size, an empty or ambiguous folder and a
    damaged file; ImportError when ``digits`` lacks scikit-learn.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if str(source) == "digits":
        dataset = _digits(split)
    elif str(source) == "fashion-mnist":
        dataset = _idx_folder(_embedded("fashion-mnist"), split)
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise ValueError(_unknown_source(str(source)))
        if not _idx_path(folder, "train", "images"):
            return FolderDataset(folder, split, image_size)
        dataset = _idx_folder(folder, split)
    if image_size is not None and (dataset.height, dataset.width) != (image_size, image_size):
        raise ValueError(
            f"{source} images are {dataset.height}x{dataset.width} and are not resized: "
            f"leave image_size unset instead of {image_size}"
        )
    return dataset


class ImageDataset(Dataset):
    """Images of one size with labels: `ds[i]` is (uint8 array (C, H, W), int label).

    `labels` is an int64 tensor (n,), all `NO_LABEL` when `num_classes` is 0; `class_names[k]` names
    class k. Subclasses give `_images`.
    """

    def __init__(self, name: str, shape: Sequence[int], labels, class_names: Sequence[str] = ()):
        self.name = name
        self.channels, self.height, self.width = shape
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = tuple(class_names)
        allowed = range(self.num_classes) if self.num_classes else (NO_LABEL,)
        wrong = sorted(set(self.labels.tolist()) - set(allowed))
        if wrong:
            raise ValueError(f"{name}: label {wrong[0]} but there are {self.num_classes} classes")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        images, labels = self.batch([range(len(self))[index]])
        return images[0].numpy(), int(labels[0])

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `indices`: uint8 (n, C, H, W), int64 (n,)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._images(indices), self.labels[indices]

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class TensorDataset(ImageDataset):
    """Images held in memory as one uint8 tensor (n, C, H, W)."""

    def __init__(self, name: str, images, labels, class_names: Sequence[str] = ()):
        self.images = torch.as_tensor(images)
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        if len(labels) != len(self.images):
            raise ValueError(f"{name}: {len(self.images)} images but {len(labels)} labels")
        super().__init__(name, self.images.shape[1:], labels, class_names)

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images[indices]


class FolderDataset(ImageDataset):
    """Image files, decoded when asked for, as RGB after ADM's centre crop (`center_crop`).

    `paths` are in the order of (class, path). A file that cannot be decoded raises ValueError
    with its name. EXIF rotation is not applied and transparency is dropped, as in ADM.
    """

    def __init__(self, folder: Path, split: str, image_size: int | None):
        if image_size is None:
            raise ValueError(f"{folder} is a folder of images: say image_size, in pixels")
        if image_size < 1:
            raise ValueError(f"image_size {image_size} must be at least 1")
        present = [name for name in SPLITS if (folder / name).is_dir()]
        if len(present) == 1:
            raise ValueError(
                f"{folder} has a sub-folder {present[0]!r} but not both of {SPLITS}: give "
                f"{folder / present[0]} itself, or add the other"
            )
        if present:
            classes = [p.name for p in _class_folders(folder / "train")]
            folder = folder / split
        elif split == "heldout":
            raise ValueError(
                f"{folder} has no held-out images: put them in {folder / 'heldout'} and the "
                f"others in {folder / 'train'}"
            )
        else:
            classes = [p.name for p in _class_folders(folder)]
        self.paths, labels = _list_images(folder, classes)
        self.image_size = image_size
        channels = len(Image.new("RGB", (1, 1)).getbands())
        super().__init__(str(folder), (channels, image_size, image_size), labels, classes)

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        paths = [self.paths[i] for i in indices.tolist()]
        if len(paths) == 1:
            arrays = [self._read(paths[0])]
        else:
            with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1) or 1) as pool:
                arrays = list(pool.map(self._read, paths))
        empty = np.empty((0, self.image_size, self.image_size, self.channels), np.uint8)
        stacked = torch.from_numpy(np.stack(arrays) if arrays else empty)
        return stacked.permute(0, 3, 1, 2).contiguous()

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} is more than 8 bits a channel")
                return np.array(center_crop(image.convert("RGB"), self.image_size))
        except (*DAMAGED, Image.DecompressionBombError) as error:
            raise ValueError(
                f"cannot read image {path}: {error}; replace the file, or remove it and start "
                f"another run, because a run keeps to its images"
            ) from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of side `size` at the centre, after the shorter side is scaled to `size`.

    Halved with a box filter while the shorter side is at least 2 * size, then bicubic: the
    preprocessing of ADM (Dhariwal & Nichol 2021), which published ImageNet FIDs assume.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of 0 .. n-1, int64 (n,), that depends on nothing but the arguments.

    Sorts the raw PCG64 stream seeded by (seed, epoch), which NumPy promises never to change.
    """
    return _epoch_order(n, seed, epoch).clone()


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return torch.from_numpy(np.argsort(keys, kind="stable").astype(np.int64))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Indices of the global batch of `step` (0, 1, ...), int64 (batch_size,).

    Epochs follow one another without a gap: steps 0, 1, ... together read the infinite sequence
    `epoch_order(n, seed, 0), epoch_order(n, seed, 1), ...`, so that every image is seen once an
    epoch, a batch may span epochs (several when batch_size > n), and resuming needs only `step`.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n, batch_size >= 1 and step >= 0, got {n}, {batch_size}, {step}")
    start = step * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    order = torch.cat([_epoch_order(n, seed, epoch) for epoch in epochs])
    return order[start - epochs[0] * n :][:batch_size].clone()


def _digits(split: str) -> TensorDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "source 'digits' needs scikit-learn: pip install 'dis-ssm[demo]'"
        ) from error
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    top = bunch.images.max()  # 16: each value counts the ink in a 4x4 block of the scan
    images = np.rint(bunch.images * (255 / top)).astype(np.uint8)[:, None]
    rank_in_class = np.empty_like(labels)
    for label in np.unique(labels):
        members = labels == label
        rank_in_class[members] = np.arange(members.sum())
    keep = (rank_in_class % 3 == 0) == (split == "heldout")
    names = [str(name) for name in bunch.target_names]
    return TensorDataset("digits", images[keep], labels[keep], names)


def _embedded(name: str) -> Path:
    given = os.environ.get("DIS_SSM_DATA")
    repository = Path(__file__).resolve().parents[2] / "experiments" / "data"
    for root in [*([Path(given)] if given else []), repository]:
        if (root / name).is_dir():
            return root / name
    where = f"is not in {given} (DIS_SSM_DATA)" if given else "does not come with the package"
    raise ValueError(
        f"source {name!r} {where}: clone the repository and set DIS_SSM_DATA to its "
        f"experiments/data, or give a folder of idx files"
    )


def _idx_path(folder: Path, split: str, kind: str) -> Path | None:
    stem = f"{IDX_PREFIX[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def _idx_folder(folder: Path, split: str) -> TensorDataset:
    """MNIST's idx files; class names from classes.txt, one a line, or the label's digits."""
    arrays = {}
    for kind in ("images", "labels"):
        path = _idx_path(folder, split, kind)
        if path is None:
            raise ValueError(f"{folder} lacks {IDX_PREFIX[split]}-{kind}-idx?-ubyte[.gz]")
        arrays[kind] = _read_idx(path, ndim=3 if kind == "images" else 1)
    names = folder / "classes.txt"
    if names.is_file():
        class_names = names.read_text(encoding="utf-8").splitlines()
    else:
        class_names = [str(k) for k in range(int(arrays["labels"].max()) + 1)]
    labels = arrays["labels"].astype(np.int64)
    return TensorDataset(folder.name, arrays["images"][:, None], labels, class_names)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """idx: two zero bytes, the type (8 = uint8), ndim, ndim big-endian int32 sizes, the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        *magic, dims = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{ndim}i", raw, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if magic != [0, 8] or dims != ndim or body.size != np.prod(shape) or not body.size:
        raise ValueError(f"{path} is not an idx file of uint8 with {ndim} dimension(s)")
    return body.reshape(shape).copy()


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES)


def _list_images(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    """Paths and labels; `classes` are the sub-folders that count, in the order of their labels."""
    loose = _image_files(folder, "*")
    found = [p.name for p in _class_folders(folder)]
    if stray := sorted(set(found) - set(classes)):
        raise ValueError(f"{folder / stray[0]} is not a class of the train split: {classes}")
    if classes and loose:
        raise ValueError(f"{loose[0]} lies beside class folders: move it into one of {classes}")
    if not classes and not loose:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder} is empty: no class folders and no images ({suffixes})")
    paths, labels = loose, [NO_LABEL] * len(loose)
    for label, name in enumerate(classes):
        members = _image_files(folder / name, "**/*")
        if not members and name in found:
            raise ValueError(f"class folder {folder / name} is empty: fill it or remove it")
        paths += members
        labels += [label] * len(members)
    if not paths:
        raise ValueError(f"{folder} holds no images")
    return paths, labels


def _unknown_source(source: str) -> str:
    near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"unknown data source {source!r}{hint}: give one of {', '.join(SOURCES)} or an existing "
        f"folder of images"
    )
