"""What is scored: sets of uint8 images of one size, read in order, a range at a time."""

import math
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dis_ssm.data.datasets import ImageDataset, composed_text
from dis_ssm.data.open import open_dataset, refuse_run
from dis_ssm.data.sources import SOURCES
from dis_ssm.data.sources.base import Files
from dis_ssm.data.sources.decode import check_background, check_pixels, decode
from dis_ssm.data.sources.files import image_files
from dis_ssm.data.sources.walk import IMAGE_SUFFIXES
from dis_ssm.system.reading import check_regular, parsing

ADM_IMAGES = "arr_0"  # the key of images in ADM's files
CHANNELS = (1, 3)  # grey, RGB
DEFLATE_RATIO = 1040  # deflate shrinks nothing further


class Images:
    """n images, uint8 (n, C, H, W), C 1 or 3.

    `background` is what alpha is composed on, None where there is no alpha. Subclasses define
    `_read`.

    Raises:
        ValueError: there are no images, or they are neither grey nor RGB.
    """

    background: str | None = None

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
        """Source, kind, number and size of the images, for the report."""
        size = {"images": self.n, "height": self.height, "width": self.width}
        composed = {"background": self.background} if self.background else {}
        return {"source": self.name, "kind": self.kind, **size, **composed}

    def _read(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


def open_images(
    source: str | Path | ImageDataset,
    split: str = "train",
    image_size: int | None = None,
    background: str = "white",
) -> Images:
    """A set of images that all have one size.

    - FILE.npz with `arr_0`, uint8 (n, H, W, C), as ADM writes; streamed, never held as a whole;
    - a folder or FILE.zip of images, sub-folders included, in the order of their names, as RGB; of
      one with `train/` and `heldout/`, the folder `split`;
    - with `image_size`, or for any other `source`: `dis_ssm.data.open.open_dataset` of it and
      `split`, which crops and scales images of any size.

    Encoded images with alpha are composed on `background`, as in
    `dis_ssm.data.datasets.FileDataset`.

    Raises:
        ValueError: the source is empty, damaged, of mixed sizes or not uint8, or does not have the
            `split`.
    """
    check_background(background)
    if isinstance(source, ImageDataset):
        return DatasetImages(source)
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        check_regular(path)
        return NpzImages(path)
    is_folder = str(source) not in SOURCES and path.is_dir()
    zipped = path.suffix.lower() == ".zip" and path.exists()
    if is_folder:
        refuse_run(path)
    if image_size is None and (zipped or is_folder):
        if files := image_files(path, split):
            return EncodedImages(files, "folder" if is_folder else "zip", background)
        if not is_folder or not any(path.iterdir()):
            raise ValueError(f"{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    options = {"max_corrupt": 0, "background": background, "relabel": True}
    return DatasetImages(open_dataset(source, split, image_size, **options))


class DatasetImages(Images):
    """The images of a data set, in its order."""

    def __init__(self, dataset: ImageDataset):
        self.dataset, self.background = dataset, dataset.background
        shape = (dataset.channels, dataset.height, dataset.width)
        super().__init__(dataset.name, "data set", len(dataset), shape)

    def _read(self, start: int, stop: int) -> Tensor:
        images, _ = self.dataset.batch(range(start, stop))
        if images.dtype != torch.uint8:
            raise ValueError(f"{self.name} holds {images.dtype}, not uint8 images")
        return images


class EncodedImages(Images):
    """Image files of one size, decoded in threads."""

    def __init__(self, files: Files, kind: str, background: str):
        self.files, self.background, self._said = files, background, False
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        if files.left_out:
            warnings.warn(files.left_out, stacklevel=3)
        first, _ = self._decode(0)
        n, shape = len(files.labels), (first.shape[2], *first.shape[:2])
        super().__init__(files.name, kind, n, shape)

    def _read(self, start: int, stop: int) -> Tensor:
        arrays = []
        for index, (array, has_alpha) in enumerate(
            self._threads.map(self._decode, range(start, stop)), start
        ):
            if array.shape[:2] != (self.height, self.width):
                title, first = map(self.files.title, (index, 0))
                raise ValueError(
                    f"{title} is {array.shape[0]}x{array.shape[1]}, {first} is "
                    f"{self.height}x{self.width}: give images of one size; image_size crops "
                    f"and scales those of a reference"
                )
            if has_alpha and not self._said:
                self._said = True
                text = composed_text(self.files.title(index), self.background)
                warnings.warn(text, stacklevel=3)
            arrays.append(array)
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def _decode(self, index: int) -> tuple[np.ndarray, bool]:
        with parsing(f"cannot read image {self.files.title(index)}"):
            image, has_alpha = decode(self.files.read(index), self.background)
            return np.array(image), has_alpha


class NpzImages(Images):
    """arr_0 of an .npz, read as a stream: going back starts again."""

    def __init__(self, path: Path):
        self.path, self._file = path, None
        header = self._rewind()
        shape, dtype = header.shape, header.dtype
        if len(shape) != 4 or dtype != np.uint8:
            raise ValueError(
                f"{path}: {ADM_IMAGES} is {dtype} {shape}: need uint8 (n, H, W, C), values 0 .. 255"
            )
        if header.fortran:
            raise ValueError(
                f"{path}: {ADM_IMAGES} is stored column by column: save "
                f"np.ascontiguousarray(images)"
            )
        n, height, width, channels = shape
        if channels not in CHANNELS and height in CHANNELS:
            raise ValueError(
                f"{path}: {ADM_IMAGES} is (n, C, H, W), {shape}: need (n, H, W, C), save "
                f"images.transpose(0, 2, 3, 1)"
            )
        super().__init__(str(path), "npz", n, (channels, height, width))
        with parsing(f"{path}: {ADM_IMAGES}"):
            check_pixels(width, height)
        self._bytes = math.prod(shape[1:])

    def _read(self, start: int, stop: int) -> Tensor:
        if start < self._at:
            self._rewind()
        with parsing(f"{self.path}: {ADM_IMAGES} is damaged"):
            self._skip(start - self._at)
            raw = bytearray(self._take(stop - start))
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

    def _rewind(self) -> "NpyHeader":
        if ADM_IMAGES not in (keys := npz_keys(self.path)):
            has = ", ".join(sorted(keys))
            raise ValueError(f"{self.path} has no images ({ADM_IMAGES}), only {has}")
        self._at = 0
        with parsing(f"{self.path}: {ADM_IMAGES} is damaged"):
            self._file, header = open_npy(zipfile.ZipFile(self.path), ADM_IMAGES)
        return header


class NpyHeader(NamedTuple):
    """What the header of an .npy file says: `fortran` is the order of its numbers."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def open_npy(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], NpyHeader]:
    """The array `name` of an .npz, as a stream that has come to its numbers, and its header.

    Raises:
        ValueError: the header is of Python objects, or of a size that the file cannot hold.
        Exception: for a damaged file, whatever zipfile and NumPy raise.
    """
    info = archive.getinfo(f"{name}.npy")
    file = archive.open(info)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read_header:
        raise ValueError(f"its format {version} is not known")
    header = NpyHeader(*read_header[version](file))
    if header.dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded (Python objects, pickled): need numbers")
    size = math.prod(header.shape) * header.dtype.itemsize
    if min(header.shape, default=0) < 0 or info.file_size != file.tell() + size:
        raise ValueError(
            f"its {info.file_size} bytes are not those of {header.dtype} {header.shape}"
        )
    packed = os.fstat(archive.fp.fileno()).st_size
    if size > DEFLATE_RATIO * packed:
        raise ValueError(f"{size:,} bytes cannot be in a file of {packed:,}")
    return file, header


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays in an .npz.

    Raises:
        FileError: it is no such file.
    """
    check_regular(path)
    with parsing(f"cannot read {path}, or it was cut short"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}
