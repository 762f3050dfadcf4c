"""What is scored: sets of uint8 images of one size, read in order, a range at a time."""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dis_ssm.data import IMAGE_SUFFIXES, SPLITS, ImageDataset, open_dataset

ADM_IMAGES = "arr_0"  # the key of images in ADM's files
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)
UNREADABLE = (*DAMAGED, KeyError, RuntimeError, zipfile.BadZipFile)  # in archives; encrypted, too
CHANNELS = (1, 3)  # grey, RGB


class Images:
    """n images, uint8 (n, C, H, W), C 1 or 3. Subclasses give `_read`."""

    def __init__(self, name: str, kind: str, n: int, shape: tuple[int, int, int]):
        self.name, self.kind, self.n = name, kind, n
        self.channels, self.height, self.width = shape
        if n < 1 or min(shape) < 1 or self.channels not in CHANNELS:
            raise ValueError(f"{name}: need images, grey or RGB, got {n} of (C, H, W) {shape}")

    def __len__(self) -> int:
        return self.n

    def read(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1 as RGB, (n, 3, H, W): grey is repeated."""
        return self._read(start, min(stop, self.n)).expand(-1, max(CHANNELS), -1, -1)

    def describe(self) -> dict:
        size = {"images": self.n, "height": self.height, "width": self.width}
        return {"source": self.name, "kind": self.kind, **size}

    def _read(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


def open_images(
    source: str | Path | ImageDataset, split: str = "train", image_size: int | None = None
) -> Images:
    """A set of images that all have one size.

    - FILE.npz with ``arr_0``, uint8 (n, H, W, C), as ADM writes; streamed, never held as a whole;
    - a folder or FILE.zip of images, sub-folders included, in the order of their names, as RGB; of
      one with ``train/`` and ``heldout/``, the folder `split`;
    - with `image_size`, or for any other `source`: `dis_ssm.data.open_dataset` of it and `split`,
      which crops and scales images of any size.

    Raises ValueError for sources that are empty, damaged, of mixed sizes or not uint8, and for a
    `split` that the source does not have.
    """
    if isinstance(source, ImageDataset):
        return DatasetImages(source)
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"no file {path}")
        return NpzImages(path)
    if image_size is None and path.suffix == ".zip" and path.is_file():
        return ZipImages(path, split)
    if image_size is None and path.is_dir():
        paths = [p for p in _tree(path) if p.suffix.lower() in IMAGE_SUFFIXES]
        if kept := _of_split(path, paths, [p.relative_to(path).parts for p in paths], split):
            return FolderImages(path, kept)
        if not any(path.iterdir()):
            raise ValueError(f"{path} is empty: no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return DatasetImages(open_dataset(source, split, image_size, max_corrupt=0))


class DatasetImages(Images):
    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        shape = (dataset.channels, dataset.height, dataset.width)
        super().__init__(dataset.name, "data set", len(dataset), shape)

    def _read(self, start: int, stop: int) -> Tensor:
        images, _ = self.dataset.batch(range(start, stop))
        if images.dtype != torch.uint8:
            raise ValueError(f"{self.name} holds {images.dtype}, not uint8 images")
        return images


class EncodedImages(Images):
    """Image files: `read_bytes(key)` for each of `keys`, decoded in threads."""

    def __init__(self, name: str, kind: str, keys: list, read_bytes: Callable[..., bytes]):
        self.keys, self._read_bytes = keys, read_bytes
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        first = self._decode(keys[0], read_bytes(keys[0]))
        super().__init__(name, kind, len(keys), (first.shape[2], *first.shape[:2]))

    def _read(self, start: int, stop: int) -> Tensor:
        keys = self.keys[start:stop]
        arrays = list(self._threads.map(self._decode, keys, map(self._read_bytes, keys)))
        for key, array in zip(keys, arrays, strict=True):
            if array.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"{key} is {array.shape[0]}x{array.shape[1]}, {self.keys[0]} is "
                    f"{self.height}x{self.width}: give images of one size; image_size crops "
                    f"and scales those of a reference"
                )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    @staticmethod
    def _decode(key, raw: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(raw)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} is more than 8 bits a channel")
                return np.array(image.convert("RGB"))
        except (*DAMAGED, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read image {key}: {error}") from error


class FolderImages(EncodedImages):
    def __init__(self, folder: Path, paths: list[Path]):
        super().__init__(str(folder), "folder", paths, Path.read_bytes)


class ZipImages(EncodedImages):
    def __init__(self, path: Path, split: str):
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        names = sorted(
            name
            for name in self._zip.namelist()
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)
        )
        names = _of_split(path, names, [Path(name).parts for name in names], split)
        if not names:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
        super().__init__(str(path), "zip", names, self._member)

    def _member(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except UNREADABLE as error:
            raise ValueError(f"cannot read {name}: {error}") from error


class NpzImages(Images):
    """arr_0 of an .npz, read as a stream: going back starts again."""

    def __init__(self, path: Path):
        self.path, self._file = path, None
        shape, dtype = self._rewind()
        if len(shape) != 4 or dtype != np.uint8:
            raise ValueError(
                f"{path}: {ADM_IMAGES} is {dtype} {shape}: need uint8 (n, H, W, C), values 0 .. 255"
            )
        n, height, width, channels = shape
        self._bytes = math.prod(shape[1:])
        super().__init__(str(path), "npz", n, (channels, height, width))

    def _read(self, start: int, stop: int) -> Tensor:
        if start < self._at:
            self._rewind()
        try:
            self._skip(start - self._at)
            raw = bytearray(self._take(stop - start))
        except UNREADABLE as error:
            raise ValueError(f"{self.path}: {ADM_IMAGES} is damaged: {error}") from error
        self._at = stop
        shape = (stop - start, self.height, self.width, self.channels)
        return torch.frombuffer(raw, dtype=torch.uint8).view(shape).permute(0, 3, 1, 2)

    def _skip(self, images: int) -> None:
        for _ in range(images):
            self._take(1)

    def _take(self, images: int) -> bytes:
        raw = self._file.read(images * self._bytes)
        if len(raw) != images * self._bytes:
            raise EOFError(f"it ends within images {self._at} .. {self._at + images - 1}")
        return raw

    def _rewind(self) -> tuple[tuple[int, ...], np.dtype]:
        if ADM_IMAGES not in (keys := npz_keys(self.path)):
            has = ", ".join(sorted(keys))
            raise ValueError(f"{self.path} has no images ({ADM_IMAGES}), only {has}")
        self._at = 0
        try:
            self._file: IO[bytes] = zipfile.ZipFile(self.path).open(f"{ADM_IMAGES}.npy")
            version = np.lib.format.read_magic(self._file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = header(self._file)
        except UNREADABLE as error:
            raise ValueError(f"{self.path}: {ADM_IMAGES} is damaged: {error}") from error
        if dtype.hasobject:
            raise ValueError(f"{self.path}: {ADM_IMAGES} holds Python objects: need uint8 images")
        if fortran:
            raise ValueError(
                f"{self.path}: {ADM_IMAGES} is stored column by column: save "
                f"np.ascontiguousarray(images)"
            )
        return shape, dtype


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays in an .npz. ValueError when it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"cannot read {path}, or it was cut short: {error}") from error


def _of_split(path: Path, items: list, parts: list[tuple[str, ...]], split: str) -> list:
    """Those in the folder `split`, if there are folders of all splits."""
    if not set(SPLITS) <= {names[0] for names in parts}:
        if items and split != SPLITS[0]:
            raise ValueError(f"{path} has no split {split!r}: that takes {' and '.join(SPLITS)}")
        return items
    return [item for item, names in zip(items, parts, strict=True) if names[0] == split]


def _tree(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
