"""Small sets that are read whole: scikit-learn's digits, MNIST's idx files, CIFAR-10."""

import gzip
import io
import math
import os
import pickle
import pickletools
import struct
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from dis_ssm.data.sources.base import Pixels
from dis_ssm.system.extras import how_to_install
from dis_ssm.system.reading import FileError, check_size, parsing, read_bytes, read_text

IDX_PREFIX = {"train": "train", "heldout": "t10k"}
CIFAR_SHAPE = (3, 32, 32)
MAX_ARRAY_BYTES = 2**32  # of an idx file; a CIFAR-10 archive unpacked is 0.2 GB
PIECE = 2**24


def digits(_: Path, split: str) -> Pixels:
    """scikit-learn's handwritten digits; of each class every third image is held out.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"source 'digits' needs scikit-learn: {how_to_install('demo')}"
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
    return Pixels("digits", images[keep], labels[keep], names)


def embedded(name: str) -> Path:
    """The folder of a data set that comes with the repository, or lies in DIS_SSM_DATA.

    Raises:
        ValueError: it is in neither.
    """
    given = os.environ.get("DIS_SSM_DATA")
    repository = Path(__file__).resolve().parents[4] / "experiments" / "data"
    for root in [*([Path(given)] if given else []), repository]:
        if (root / name).is_dir():
            return root / name
    where = f"is not in {given} (DIS_SSM_DATA)" if given else "does not come with the package"
    raise ValueError(
        f"source {name!r} {where}: clone the repository and set DIS_SSM_DATA to its "
        f"experiments/data, or give a folder of idx files"
    )


def idx_path(folder: Path, split: str, kind: str) -> Path | None:
    """The idx file of a split, `kind` "images" or "labels", compressed or not; None without."""
    stem = f"{IDX_PREFIX[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def idx_folder(folder: Path, split: str) -> Pixels:
    """MNIST's idx files; class names from classes.txt, one a line, or the label's digits.

    Raises:
        ValueError: a file is missing or damaged.
    """
    arrays = {}
    for kind in ("images", "labels"):
        path = idx_path(folder, split, kind)
        if path is None:
            raise ValueError(f"{folder} lacks {IDX_PREFIX[split]}-{kind}-idx?-ubyte[.gz]")
        arrays[kind] = _read_idx(path, ndim=3 if kind == "images" else 1)
    names = folder / "classes.txt"
    if names.is_file():
        class_names = read_text(names).splitlines()
    else:
        class_names = [str(k) for k in range(int(arrays["labels"].max()) + 1)]
    labels = arrays["labels"].astype(np.int64)
    return Pixels(folder.name, arrays["images"][:, None], labels, class_names)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """idx: two zero bytes, the type (8 = uint8), ndim, ndim big-endian int32 sizes, the data."""
    opener = gzip.open if path.suffix == ".gz" else open
    with parsing(f"cannot read {path}"), opener(path, "rb") as file:
        head = file.read(4 + 4 * ndim)
        *magic, dims = struct.unpack_from(">HBB", head)
        if magic != [0, 8] or dims != ndim:
            raise FileError(f"{path} is not an idx file of uint8 with {ndim} dimension(s)")
        shape = struct.unpack_from(f">{ndim}i", head, 4)
        size = math.prod(shape)
        check_size(size, MAX_ARRAY_BYTES)
        if min(shape) < 1:
            raise ValueError(f"its sizes are {shape}")
        body = np.frombuffer(_read_at_most(file, size), np.uint8)
        if body.size != size or file.read(1):
            raise ValueError(f"it does not hold the {size:,} bytes of its sizes {shape}")
    return body.reshape(shape).copy()


def _read_at_most(file, most: int) -> bytes:
    """Up to `most` bytes; takes memory for those that are there, not for those that are stated."""
    parts, left = [], most
    while left and (part := file.read(min(left, PIECE))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def cifar_home(folder: Path) -> Path | None:
    """The folder of CIFAR-10's batches, or the archive, at or directly in `folder`."""
    for home in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        signs = ("batches.meta.txt", "batches.meta", "data_batch_1.bin", "data_batch_1")
        if any((home / sign).is_file() for sign in signs):
            return home
    archives = (folder / f"cifar-10-{kind}.tar.gz" for kind in ("binary", "python"))
    return next((path for path in archives if path.is_file()), None)


def cifar(path: Path, split: str) -> Pixels:
    """Both of CIFAR-10's own formats, unpacked or not; heldout is its test batch.

    Binary: records of a label and 3 x 32 x 32 bytes. Python: pickled `data` and `labels`.

    Raises:
        ValueError: a file is missing, damaged, or not CIFAR-10's.
    """
    home = path if path.is_file() else cifar_home(path)
    stems = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    in_binary = [f"{stem}.bin" for stem in stems]
    content = _read_members(home, {*stems, *in_binary, "batches.meta", "batches.meta.txt"})
    binary = any(name.endswith((".bin", ".txt")) for name in content)
    names, meta = (in_binary, "batches.meta.txt") if binary else (stems, "batches.meta")
    if missing := [name for name in (*names, meta) if name not in content]:
        raise ValueError(
            f"{home} lacks CIFAR-10's {', '.join(missing)}: get the archive again (of archives "
            f"only CIFAR-10's own and zip files are read)"
        )
    if binary:
        class_names = content[meta].decode(errors="replace").strip().splitlines()
    else:
        class_names = _unpickle(content[meta], f"{home}: {meta}").get("label_names")
    if not class_names or not isinstance(class_names, list):
        raise ValueError(f"{home}: {meta} names no classes: it holds no list 'label_names'")
    parse = _cifar_binary if binary else _cifar_pickle
    parts = [parse(content[name], f"{home}: {name}") for name in names]
    sizes = [len(labels) for _, labels in parts]
    if min(sizes) != max(sizes):
        short = names[sizes.index(min(sizes))]
        raise ValueError(f"{home}: {short} is cut short, {min(sizes)} of {max(sizes)} images")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Pixels(str(path), images, labels, [_text(name) for name in class_names])


def _read_members(home: Path, wanted: set[str]) -> dict[str, bytes]:
    """The files of a folder or a tar archive that bear a wanted name."""
    if home.is_dir():
        paths = [path for path in home.iterdir() if path.name in wanted and path.is_file()]
        with parsing(f"cannot read CIFAR-10 in {home}"):
            return {path.name: read_bytes(path) for path in paths}
    found = {}
    with parsing(f"{home} is not a whole archive (get it again)"), gzip.open(home) as file:
        unpacked = _Bounded(file, MAX_ARRAY_BYTES)
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in wanted and member.isfile():
                    check_size(member.size)
                    found[name] = archive.extractfile(member).read()
            while unpacked.read(io.DEFAULT_BUFFER_SIZE):
                pass  # to the end, where gzip compares its checksum
    return found


class _Bounded:
    """A stream that fails beyond `most` bytes in all."""

    def __init__(self, file, most: int):
        self.file, self.left = file, most

    def read(self, size: int) -> bytes:
        check_size(size, self.left)
        part = self.file.read(size)
        self.left -= len(part)
        return part


def _cifar_binary(raw: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + int(np.prod(CIFAR_SHAPE))
    if not raw or len(raw) % record:
        raise ValueError(f"{where}: {len(raw)} bytes are not whole records of {record} bytes")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, *CIFAR_SHAPE), rows[:, 0].astype(np.int64)


def _cifar_pickle(raw: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(raw, where)
    try:
        _, shape, dtype, fortran, pixels = content["data"].state
        labels = np.array(content["labels"], np.int64)
        if _text(dtype.args[0]) != "u1" or fortran or not shape[0] == len(labels) > 0:
            raise ValueError(f"{dtype.args[0]} {shape}, {len(labels)} labels")
        return np.frombuffer(pixels, np.uint8).reshape(shape[0], *CIFAR_SHAPE), labels
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} holds no uint8 'data' of {'x'.join(map(str, CIFAR_SHAPE))} with 'labels': "
            f"{error}"
        ) from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _unpickle(raw: bytes, where: str) -> dict:
    try:
        _check_memo(raw)
        content = _InertUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise ValueError(f"{where} cannot be read safely: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no dictionary")
    return {_text(key): value for key, value in content.items()}


def _check_memo(raw: bytes) -> None:
    """ValueError for a pickle that numbers an object beyond its own length: the unpickler takes 16
    bytes for every number up to that."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(raw):
            raise ValueError(f"it numbers an object {argument:,}")


class _Inert:
    """Stands for NumPy's arrays and dtypes in a pickle: keeps what it is given, runs nothing."""

    state = None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Reads Python's own types and `_Inert`; any other name in the pickle is refused."""

    inert = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _latin1
        if (module, name) in self.inert:
            return _Inert
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")
