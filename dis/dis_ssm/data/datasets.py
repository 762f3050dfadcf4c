"""What training sees: images of one size with labels, and the order in which they are read.

An `ImageDataset` gives uint8 images (C, H, W) and integer labels; `open_dataset` opens one by name,
folder or file. Splits are fixed: nothing here depends on a clock, a global generator or a file
date. `sources` knows the formats.

=====================  =========================  =================================================
source                 image                      "train" / "heldout"
=====================  =========================  =================================================
`digits`               1 x 8 x 8, 17 grey levels  1,195 / 602: within each class, in file order,
                       (scikit-learn, UCI)        images 0, 3, 6, ... are held out (same writers)
`fashion-mnist`        1 x 28 x 28                6,000 / 1,000: the first 600 and 100 of each
                       (embedded subset)          class in the official train and test files
folder of idx          as in the files            `train-*` / `t10k-*`
CIFAR-10, as released  3 x 32 x 32                its 50,000 training / 10,000 test images
CelebA folder          3 x size x size            partition 0, 162,770 / partition 1, 19,867
Hugging Face data set  3 x size x size            train / validation, or test where that is missing
folder or zip file     3 x size x size            its sub-folders `train` and `heldout` if it
of images                                         has both; otherwise every image is "train"
=====================  =========================  =================================================
"""

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dis_ssm.data.crops import CROPS
from dis_ssm.data.images import to_model_space
from dis_ssm.data.sources import NO_LABEL, Files
from dis_ssm.data.sources.base import number_classes
from dis_ssm.data.sources.decode import UnreadableImage, decode

DAMAGED = (ValueError, struct.error, zlib.error)  # a member of an archive
MAX_WORKERS = 8  # by default; decoding scales with cores until memory is the limit


class ImageDataset(Dataset):
    """Images of one size with labels: `ds[i]` is (uint8 array (C, H, W), int label).

    Training reads by `stored` what the data set stores, moves that to the device, and turns it by
    `to_model_space` into what the model learns, so that it need not know what the data is.

    Attributes:
        labels: int64 (n,), all `NO_LABEL` when `num_classes` is 0.
        class_names: the name of class k is `class_names[k]`.
        corrupt: the name of each image found unreadable, and the reason, by index; only
            `FileDataset` fills it.
        latents: whether the model learns latents, which a VAE decodes, and not images.
        crop: a key of `CROPS`, or None where nothing is resized.
        background: what alpha is composed on, or None where there is no alpha.

    Subclasses give `_images`.

    Raises:
        ValueError: a label is not one of the classes.
    """

    latents = False
    crop: str | None = None
    background: str | None = None

    def __init__(self, name: str, shape: Sequence[int], labels, class_names: Sequence[str] = ()):
        self.name = name
        self.channels, self.height, self.width = shape
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = tuple(class_names)
        self.corrupt: dict[int, str] = {}
        allowed = range(self.num_classes) if self.num_classes else (NO_LABEL,)
        wrong = sorted(set(self.labels.unique().tolist()) - set(allowed))
        if wrong:
            raise ValueError(f"{name}: label {wrong[0]} but there are {self.num_classes} classes")

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 without labels."""
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

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Like `batch` without the corrupt images, and the indices that were kept, int64 (m,)."""
        return *self.batch(indices), torch.as_tensor(indices, dtype=torch.int64)

    def stored(self, indices, flips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The data at `indices` as the data set stores it, and its labels.

        Args:
            indices: n integers.
            flips: bool (n,), which of them to mirror left to right.

        Returns:
            uint8 (n, C, H, W), and int64 (n,).
        """
        images, labels = self.batch(indices)
        return torch.where(flips[:, None, None, None], images.flip(-1), images), labels

    def to_model_space(self, data: torch.Tensor, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the model learns of `data` from `stored`, on any device.

        Args:
            data: as `stored` gives it.
            draw: gives standard normal noise of the shape and the device of the result; called
                only where the data is a distribution to draw from, as latents are.

        Returns:
            float32 (n, C, H, W); of images, `x / 127.5 - 1`.
        """
        return to_model_space(data)

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class TensorDataset(ImageDataset):
    """Images held in memory as one uint8 tensor (n, C, H, W).

    Raises:
        ValueError: there are more or fewer labels than images, or one is not of a class.
    """

    def __init__(self, name: str, images, labels, class_names: Sequence[str] = ()):
        self.images = torch.as_tensor(images)
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        if len(labels) != len(self.images):
            raise ValueError(f"{name}: {len(self.images)} images but {len(labels)} labels")
        super().__init__(name, self.images.shape[1:], labels, class_names)

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images[indices]


class FileDataset(ImageDataset):
    """Encoded images, decoded when asked for, as RGB after the source's crop (see `CROPS`).

    EXIF rotation is not applied, as in ADM. A corrupt image is one that is there but cannot be
    decoded to 8-bit RGB, or has more than `MAX_PIXELS` pixels, before or after it is scaled for the
    crop, or `MAX_FILE_BYTES` bytes. It is named in a warning and recorded in `corrupt`; `batch`
    gives the image and the label of the next readable index instead, `read` leaves it out.

    Args:
        files: the encoded images.
        image_size: the side of the crop, in pixels.
        max_corrupt: how many images may be corrupt; reading one more is an error.
        workers: threads that decode, which change no result; None: one a processor, at most 8.
        background: what images with alpha are composed on, "white" or "black", with one warning;
            "drop" leaves out alpha, as ADM does.
        relabel: map the labels that occur to 0 .. K - 1 in their order; without it, labels without
            names must have few holes (see `sources.base.number_classes`).

    Raises:
        ValueError: `max_corrupt` or `workers` is out of range, or the labels cannot be used; when
            read, more images than `max_corrupt` are corrupt, which are named, or a file is gone or
            may not be read.
    """

    def __init__(
        self,
        files: Files,
        image_size: int,
        max_corrupt: int = 10,
        workers: int | None = None,
        background: str = "white",
        relabel: bool = False,
    ):
        if max_corrupt < 0:
            raise ValueError(f"max_corrupt {max_corrupt} must be at least 0")
        if workers is not None and workers < 1:
            raise ValueError(f"workers {workers} must be at least 1")
        self.files, self.image_size, self.max_corrupt = files, image_size, max_corrupt
        self.crop, self.background = files.crop, background
        self._with_alpha: list[int] | None = []  # found so; None once that is said
        self.workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self._pool, self._process = None, None
        channels = len(Image.new("RGB", (1, 1)).getbands())
        shape = (channels, image_size, image_size)
        super().__init__(files.name, shape, *number_classes(files, relabel))

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `indices`: uint8 (n, C, H, W), int64 (n,); see the class."""
        images, kept, failed = self._decode(indices)
        for k in failed:
            kept[k] = self._next_readable(kept[k], images[k])
        return torch.from_numpy(images), self.labels[kept]

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Like `batch` without the corrupt images, and the indices that were kept, int64 (m,)."""
        images, indices, failed = self._decode(indices)
        keep = np.setdiff1d(np.arange(len(indices)), failed)
        kept = torch.tensor(indices, dtype=torch.int64)[keep]
        return torch.from_numpy(images[keep]), self.labels[kept], kept

    def _decode(self, indices) -> tuple[np.ndarray, list[int], list[int]]:
        """The images, the indices as 0 .. len - 1, and the positions that could not be read."""
        indices = [
            range(len(self))[i] for i in torch.as_tensor(indices, dtype=torch.int64).tolist()
        ]
        images = np.empty((len(indices), self.channels, self.height, self.width), np.uint8)
        if len(indices) < 2 or self.workers == 1:
            reasons = list(map(self._fill, indices, images))
        else:
            reasons = list(self._threads().map(self._fill, indices, images))
        failed = [k for k, reason in enumerate(reasons) if reason]
        for k in failed:
            self._note(indices[k], reasons[k])
        self._say_composed()
        return images, indices, failed

    def _say_composed(self) -> None:
        if self._with_alpha:
            title = self.files.title(min(self._with_alpha))
            self._with_alpha = None
            warnings.warn(composed_text(title, self.background), stacklevel=4)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._pool, self._process = ThreadPoolExecutor(self.workers), os.getpid()
        return self._pool

    def _fill(self, index: int, out: np.ndarray) -> str | None:
        """Decodes one image into `out` (C, H, W); returns why it cannot, if it cannot."""
        if index in self.corrupt:
            return self.corrupt[index]
        try:
            raw = self.files.read(index)
        except OSError as error:
            title = self.files.title(index)
            raise ValueError(f"cannot read image {title}: {error}; {REMEDY}") from error
        except DAMAGED as error:
            return f"{self.files.title(index)}: {error}"
        try:
            image, has_alpha = decode(raw, self.background)
            cropped = CROPS[self.crop](image, self.image_size)
        except UnreadableImage as error:
            return f"{self.files.title(index)}: {error}"
        except MemoryError as error:
            title = self.files.title(index)
            raise ValueError(f"cannot read image {title}: there is not enough memory") from error
        out[:] = np.asarray(cropped).transpose(2, 0, 1)
        if has_alpha and self._with_alpha is not None:
            self._with_alpha.append(index)
        return None

    def _note(self, index: int, reason: str) -> None:
        known = index in self.corrupt
        self.corrupt[index] = reason
        if len(self.corrupt) > self.max_corrupt:
            if self.max_corrupt == 0:
                raise ValueError(f"cannot read image {reason}; {REMEDY}")
            raise ValueError(
                f"{len(self.corrupt)} images of {self.name} cannot be read, more than max_corrupt "
                f"{self.max_corrupt}; {REMEDY}, or raise max_corrupt:\n"
                + "\n".join(self.corrupt.values())
            )
        if not known:
            warnings.warn(
                f"cannot read image {reason}; skipped, {len(self.corrupt)} of at most "
                f"{self.max_corrupt}",
                stacklevel=4,
            )

    def _next_readable(self, index: int, out: np.ndarray) -> int:
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if not (reason := self._fill(other, out)):
                return other
            self._note(other, reason)
        raise ValueError(f"no image of {self.name} can be read: {self.corrupt[index]}")


REMEDY = "replace the file, or remove it and start another run, because a run keeps to its images"


def composed_text(title: str, background: str) -> str:
    """What is said once of images with alpha, of which `title` is one."""
    return f"images with alpha are composed on {background} (data.background), {title} is one"
