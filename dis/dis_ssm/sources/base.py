"""What a source gives: `Pixels` in memory, or `Files` still encoded."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "heldout")
NO_LABEL = -1


@dataclass(frozen=True)
class Pixels:
    """Images in memory, uint8 (n, C, H, W), and their labels, int64 (n,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]


class Files:
    """Encoded images. `labels` int64 (n,), `NO_LABEL` without classes; `crop` as in `data.CROPS`.

    Safe to read from several threads, after a fork, and in a process that unpickled it.
    """

    def __init__(self, name: str, labels, class_names: Sequence[str] = (), crop: str = "center"):
        self.name, self.class_names, self.crop = name, tuple(class_names), crop
        self.labels = np.asarray(labels, np.int64)

    def read(self, index: int) -> bytes:
        """The encoded image. OSError or ValueError when it cannot be had."""
        raise NotImplementedError

    def title(self, index: int) -> str:
        """Where the image lies, for people."""
        raise NotImplementedError


class PerThread(threading.local):
    """A value for each thread of each process; pickled, it arrives empty."""

    value = key = None

    def __reduce__(self):
        return PerThread, ()
