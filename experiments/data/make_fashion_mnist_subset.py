"""Make fashion-mnist/*.gz, the first n images of each class of the original idx files.

    python make_fashion_mnist_subset.py /usr/share/datasets/fashion-mnist

The folder given is that of Debian's package dataset-fashion-mnist, or any copy of the originals.
"""

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 600, "t10k": 100}
OUT = Path(__file__).parent / "fashion-mnist"


def read(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = struct.unpack_from(f">{ndim}i", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def write(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    data = gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0)
    path.write_bytes(data)
    content = hashlib.sha256(header + array.tobytes()).hexdigest()
    print(f"{path.name}: {array.shape}, {len(data)} bytes, sha256 of the content {content}")


def main(source: Path) -> None:
    for split, n in PER_CLASS.items():
        names = [f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"]
        images, labels = (read(source / name) for name in names)
        first = [np.flatnonzero(labels == label)[:n] for label in np.unique(labels)]
        chosen = np.sort(np.concatenate(first))
        for name, array in zip(names, (images, labels), strict=True):
            write(OUT / name, array[chosen])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
