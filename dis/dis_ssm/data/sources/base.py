"""What a source gives: `Pixels` in memory, or `Files` still encoded."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "heldout")
NO_LABEL = -1
MAX_HOLES = 1000  # classes without images that cost nothing: a few labels of ImageNet's


@dataclass(frozen=True)
class Pixels:
    """Images in memory, uint8 (n, C, H, W), and their labels, int64 (n,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]


class Files:
    """Encoded images. `labels` int64 (n,); `class_names` are (), with all labels `NO_LABEL`, where
    there are no classes, None where classes have numbers and no names; `crop` as in `data.CROPS`.

    Safe to read from several threads, after a fork, and in a process that unpickled it.
    """

    counted: np.ndarray | None = None  # labels of all splits, where these are not all
    left_out: str = ""  # a line that says which files beside the images are left out

    def __init__(
        self,
        name: str,
        labels,
        class_names: Sequence[str] | None = (),
        crop: str = "center",
    ):
        self.name, self.crop = name, crop
        self.class_names = None if class_names is None else tuple(class_names)
        self.labels = np.asarray(labels, np.int64)

    def used_labels(self) -> np.ndarray:
        """The distinct labels of all splits, sorted."""
        return np.unique(self.labels if self.counted is None else self.counted)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            OSError: its file is gone or may not be read.
            ValueError: it is damaged.
        """
        raise NotImplementedError

    def title(self, index: int) -> str:
        """Where the image lies, for people."""
        raise NotImplementedError


def number_classes(files: Files, relabel: bool = False) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels 0 .. K - 1, int64 (n,), and the K names of the classes.

    Without `relabel` labels stay, and without names K is 1 + the largest; there may be holes, but
    not more than `MAX_HOLES` or half of K. With it the labels that occur, in any split, are mapped
    to 0 .. K - 1 in their order, and a class without a name is named by the number it had.

    Raises:
        ValueError: a label is not one of the classes, or there are too many holes.
    """
    names = files.class_names
    if names == () or (names is not None and not relabel):
        return files.labels, names
    used = files.used_labels()
    top = int(used.max(initial=-1))
    if relabel:
        if wrong := [k for k in used.tolist() if k < 0 or (names and k >= len(names))]:
            raise ValueError(f"{files.name}: label {wrong[0]} is not a class 0, 1, ...")
        if len(strange := np.setdiff1d(files.labels, used)):
            raise ValueError(f"{files.name}: label {strange[0]} is not one of the train split")
        named = tuple(names[k] if names else str(k) for k in used.tolist())
        return np.searchsorted(used, files.labels), named
    holes = top + 1 - len(used)
    if holes > max(MAX_HOLES, (top + 1) // 2):
        raise ValueError(
            f"{files.name}: label {top} makes {top + 1:,} classes, {holes:,} of them without an "
            f"image: number the classes 0, 1, 2, ..., or have them numbered anew (data.relabel)"
        )
    return files.labels, tuple(map(str, range(top + 1)))


class PerThread(threading.local):
    """A value for each thread of each process; pickled, it arrives empty."""

    value = key = None

    def __reduce__(self):
        return PerThread, ()
