"""Image files in folders and zip files, labelled by class folder or by a table; CelebA."""

import io
import json
import operator
import os
import struct
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from dis_ssm.sources.base import NO_LABEL, SPLITS, Files, PerThread

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
LABEL_TABLE = "dataset.json"  # of StyleGAN and EDM: {"labels": [[name, label], ...]} or null
CELEBA_PARTITION = {"train": "0", "heldout": "1"}


class _Folder:
    """The tree below a folder; names are relative to it, with slashes."""

    def __init__(self, root: Path):
        self.root = root

    def folders(self, name: str) -> list[str]:
        if not (self.root / name).is_dir():
            return []
        with os.scandir(self.root / name) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

    def images(self, name: str, deep: bool) -> list[str]:
        found = []
        for base, folders, files in os.walk(self.root / name):
            if not deep:
                folders.clear()
            inner = Path(base).relative_to(self.root).as_posix()
            before = "" if inner == "." else f"{inner}/"
            found += [before + file for file in files if _is_image(file)]
        return sorted(found, key=_parts)

    def label_table(self, name: str) -> str | None:
        path = self.root / name / LABEL_TABLE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def files(self, names: list[str], labels, classes) -> Files:
        return FolderFiles(self.root, names, labels, classes)


class _Zip:
    """The tree inside a zip file, less one folder around everything."""

    def __init__(self, path: Path):
        self.root = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {i.filename: i for i in archive.infolist() if _counts(i.filename)}
                tops = {name.split("/")[0] for name in infos}
                around = f"{tops.pop()}/" if len(tops) == 1 else ""
                if any(name == around[:-1] for name in infos):
                    around = ""  # one image, not a folder
                self.infos = {name.removeprefix(around): info for name, info in infos.items()}
                self.tables = {
                    name.rpartition("/")[0]: archive.read(info).decode()
                    for name, info in self.infos.items()
                    if name.split("/")[-1] == LABEL_TABLE
                }
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole zip file: {error}; get it again") from error
        self.images_in, self.folders_in = defaultdict(list), defaultdict(set)
        for name in self.infos:
            folder, _, file = name.rpartition("/")
            if _is_image(file):
                self.images_in[folder].append(name)
        for folder in {name.rpartition("/")[0] for name in self.infos}:
            while folder:
                above, _, last = folder.rpartition("/")
                self.folders_in[above].add(last)
                folder = above

    def folders(self, name: str) -> list[str]:
        return sorted(f for f in self.folders_in[name] if not f.startswith("."))

    def images(self, name: str, deep: bool) -> list[str]:
        found = list(self.images_in[name])
        for folder in self.folders_in[name] if deep else ():
            found += self.images(f"{name}/{folder}" if name else folder, deep)
        return sorted(found, key=_parts)

    def label_table(self, name: str) -> str | None:
        return self.tables.get(name)

    def files(self, names: list[str], labels, classes) -> Files:
        return ZipFiles(self.root, names, [self.infos[name] for name in names], labels, classes)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _parts(name: str) -> list[str]:
    return name.split("/")


def _counts(name: str) -> bool:
    """Whether a zip's entry is a folder, an image or labels, and not what macOS adds."""
    *folders, file = name.split("/")
    if "__MACOSX" in folders or file.startswith("._"):
        return False
    return not file or _is_image(file) or file == LABEL_TABLE


def folder(path: Path, split: str) -> Files:
    return _arrange(_Folder(path), split)


def zip_file(path: Path, split: str) -> Files:
    return _arrange(_Zip(path), split)


def _arrange(tree: _Folder | _Zip, split: str) -> Files:
    """The images of `split`, labelled by class folder or by the table that lies beside them."""
    present = [name for name in SPLITS if name in tree.folders("")]
    if len(present) == 1:
        raise ValueError(
            f"{tree.root} has a sub-folder {present[0]!r} but not both of {SPLITS}: give its "
            f"images alone, or add the other"
        )
    if not present and split == "heldout":
        raise ValueError(
            f"{tree.root} has no held-out images: put them in {tree.root / 'heldout'} and the "
            f"others in {tree.root / 'train'}"
        )
    base, train = (split, "train") if present else ("", "")
    if tree.label_table(base) is not None:
        return tree.files(*_labels_by_table(tree, base, train))
    return tree.files(*_labels_by_folder(tree, base, tree.folders(train)))


def _labels_by_folder(tree, base: str, classes: list[str]):
    """`classes` are the sub-folders that count, in the order of their labels."""
    where, before = tree.root / base, f"{base}/" if base else ""
    loose, found = tree.images(base, deep=False), tree.folders(base)
    if stray := sorted(set(found) - set(classes)):
        raise ValueError(f"{where / stray[0]} is not a class of the train split: {classes}")
    if classes and loose:
        raise ValueError(
            f"{tree.root / loose[0]} lies beside class folders: move it into one of {classes}"
        )
    if not classes and not loose:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{where} is empty: no class folders and no images ({suffixes})")
    names, labels = loose, [NO_LABEL] * len(loose)
    for label, name in enumerate(classes):
        members = tree.images(before + name, deep=True)
        if not members and name in found:
            raise ValueError(f"class folder {where / name} is empty: fill it or remove it")
        names += members
        labels += [label] * len(members)
    if not names:
        raise ValueError(f"{where} holds no images")
    return names, labels, classes


def _labels_by_table(tree, base: str, train: str):
    table, counted = (_read_table(tree, name) for name in (base, train))
    names = tree.images(base, deep=True)
    if not names:
        raise ValueError(f"{tree.root / base} holds no images beside its {LABEL_TABLE}")
    if table is None:
        return names, [NO_LABEL] * len(names), []
    start = len(base) + 1 if base else 0
    if missing := [name for name in names if name[start:] not in table]:
        raise ValueError(f"{tree.root / base / LABEL_TABLE} has no label of {missing[0]}")
    classes = range(1 + max(counted.values(), default=-1) if counted else 0)
    return names, [table[name[start:]] for name in names], [str(k) for k in classes]


def _read_table(tree, base: str) -> dict[str, int] | None:
    where = tree.root / base / LABEL_TABLE
    try:
        pairs = json.loads(tree.label_table(base) or "null")["labels"]
        table = None if pairs is None else {str(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where} is not {{"labels": [[name, label], ...]}}: {error}') from error
    for name, label in (table or {}).items():
        if type(label) is not int or label < 0:
            raise ValueError(f"{where}: label {label!r} of {name} is not a class 0, 1, ...")
    return table


class FolderFiles(Files):
    """Files below `root`; `names` are relative, with slashes."""

    def __init__(self, root: Path, names: list[str], labels, class_names, crop: str = "center"):
        super().__init__(str(root), labels, class_names, crop)
        self.root, self.names = root, names

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def title(self, index: int) -> str:
        return str(self.root / self.names[index])


class ZipFiles(Files):
    """Members of a zip file, stored or deflated, read through one handle per thread.

    The directory is kept as 40 bytes an image, not as zipfile's objects per handle, which take
    gigabytes for ImageNet.
    """

    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    local_header = struct.Struct("<4s22x2H")  # signature, ..., lengths of the name and the extras

    def __init__(self, path: Path, names: list[str], infos: list[zipfile.ZipInfo], labels, classes):
        super().__init__(str(path), labels, classes)
        self.path, self.names, self.handles = path, names, PerThread()
        for info in infos:
            if info.flag_bits & 1 or info.compress_type not in self.methods:
                raise ValueError(
                    f"{path}: {info.filename} is encrypted or compressed by method "
                    f"{info.compress_type}: pack the images again with plain zip"
                )
        places = operator.attrgetter(
            "header_offset", "compress_size", "file_size", "compress_type", "CRC"
        )
        self.places = np.array([places(info) for info in infos], np.int64)

    def read(self, index: int) -> bytes:
        offset, packed, size, method, crc = self.places[index].tolist()
        file = self._file()
        file.seek(offset)
        signature, *lengths = self.local_header.unpack(file.read(self.local_header.size))
        file.seek(sum(lengths), os.SEEK_CUR)
        raw = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size + 1)
        if signature != b"PK\3\4" or len(raw) != size or zlib.crc32(raw) != crc:
            raise ValueError("its bytes do not have the checksum that the zip file states")
        return raw

    def _file(self) -> io.BufferedReader:
        if self.handles.key != os.getpid():  # a forked process must not share a file position
            self.handles.key, self.handles.value = os.getpid(), open(self.path, "rb")
        return self.handles.value

    def title(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"


def celeba_images(folder: Path) -> Path | None:
    places = (folder / "img_align_celeba", folder / "Img" / "img_align_celeba")
    return next((place for place in places if place.is_dir()), None)


def celeba(folder: Path, split: str) -> Files:
    """The aligned images of partition 0 (train) or 1 (heldout), without labels."""
    images = celeba_images(folder)
    lists = [folder / sub / "list_eval_partition.txt" for sub in ("", "Eval", "Anno")]
    partition = next((path for path in lists if path.is_file()), None)
    if partition is None:
        raise ValueError(
            f"{folder} has {images.name} but not CelebA's list_eval_partition.txt: put it beside, "
            f"or give {images} to train on every image with the usual crop"
        )
    names = []
    for number, line in enumerate(partition.read_text(encoding="utf-8").splitlines(), 1):
        name, _, part = line.strip().partition(" ")
        if line.strip() and part.strip() not in ("0", "1", "2"):
            raise ValueError(f"{partition}, line {number}: {line!r} is not a name and 0, 1 or 2")
        if part.strip() == CELEBA_PARTITION[split]:
            names.append(name)
    if not names:
        raise ValueError(f"{partition} lists no images of partition {CELEBA_PARTITION[split]}")
    present = set(os.listdir(images))
    if missing := [name for name in names if name not in present]:
        raise ValueError(
            f"{images} lacks {len(missing)} images, {missing[0]} the first: get it again"
        )
    return FolderFiles(images, sorted(names), [NO_LABEL] * len(names), (), crop="celeba")
