"""Image files in folders and zip files, labelled by class folder or by a table; CelebA."""

import io
import operator
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from dis_ssm.data.sources.base import NO_LABEL, SPLITS, Files, PerThread
from dis_ssm.data.sources.walk import (
    IMAGE_SUFFIXES,
    LABEL_TABLE,
    Listing,
    ZipListing,
    normal_name,
    read_table,
    walk_folder,
    walk_zip,
)
from dis_ssm.system.reading import check_size, parse_json, read_bytes, read_text

CELEBA_PARTITION = {"train": "0", "heldout": "1"}
LARGEST = 2**63 - 1  # of an int64; a zip file may state more


def folder(path: Path, split: str) -> Files:
    """The images of a split in a folder, labelled by class folder or by the table beside them.

    Raises:
        ValueError: there are none, or it is not clear how they are labelled.
    """
    return _arrange(walk_folder(path), split)


def zip_file(path: Path, split: str) -> Files:
    """The same of a zip file.

    Raises:
        ValueError: as `folder`, or the file is damaged.
    """
    return _arrange(walk_zip(path), split)


def image_files(path: Path, split: str) -> Files | None:
    """All images of a folder or a zip file, in the order of their names and without labels; of one
    with folders of all splits, those of `split`. None where there are no images.

    Raises:
        ValueError: there are no splits and `split` is not the first.
    """
    found = walk_folder(path) if path.is_dir() else walk_zip(path)
    both = all(found.below(name) for name in SPLITS)
    names = found.below(split) if both else found.images
    if not names:
        return None
    if not both and split != SPLITS[0]:
        raise ValueError(f"{path} has no split {split!r}: that takes {' and '.join(SPLITS)}")
    return _open(found, names, [NO_LABEL] * len(names), ())


def _open(found: Listing, names: list[str], labels, class_names) -> Files:
    if isinstance(found, ZipListing):
        infos = [found.infos[name] for name in names]
        files = ZipFiles(found.root, names, infos, labels, class_names)
    else:
        files = FolderFiles(found.root, names, labels, class_names)
    files.left_out = found.summary()
    return files


def _arrange(found: Listing, split: str) -> Files:
    """The images of `split`, labelled by class folder or by the table that lies beside them."""
    present = [name for name in SPLITS if name in found.subfolders("")]
    if len(present) == 1:
        raise ValueError(
            f"{found.root} has a sub-folder {present[0]!r} but not both of {SPLITS}: give its "
            f"images alone, or add the other"
        )
    if not present and split == "heldout":
        raise ValueError(
            f"{found.root} has no held-out images: put them in {found.root / 'heldout'} and the "
            f"others in {found.root / 'train'}"
        )
    base, train = (split, "train") if present else ("", "")
    if base in found.tables:
        return _labels_by_table(found, base, train)
    return _labels_by_folder(found, base, found.subfolders(train))


def _labels_by_folder(found: Listing, base: str, classes: list[str]) -> Files:
    """`classes` are the sub-folders that count, in the order of their labels."""
    where, start = found.root / base, len(base) + 1 if base else 0
    names, present = found.below(base), set(found.subfolders(base))
    if stray := sorted(present - set(classes)):
        raise ValueError(f"{where / stray[0]} is not a class of the train split: {classes}")
    loose = [name for name in names if "/" not in name[start:]]
    if classes and loose:
        raise ValueError(
            f"{found.root / loose[0]} lies beside class folders: move it into one of {classes}"
        )
    if not classes and not loose:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{where} is empty: no class folders and no images ({suffixes})")
    if not classes:
        return _open(found, names, [NO_LABEL] * len(names), ())
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name[start:].partition("/")[0]] for name in names]
    if empty := sorted(present - {classes[label] for label in set(labels)}):
        raise ValueError(f"class folder {where / empty[0]} is empty: fill it or remove it")
    if not names:
        raise ValueError(f"{where} holds no images")
    return _open(found, names, labels, classes)


def _labels_by_table(found: Listing, base: str, train: str) -> Files:
    table, counted = (_read_table(found, name) for name in (base, train))
    names, start = found.below(base), len(base) + 1 if base else 0
    if not names:
        raise ValueError(f"{found.root / base} holds no images beside its {LABEL_TABLE}")
    if table is None:
        return _open(found, names, [NO_LABEL] * len(names), ())
    if missing := [name for name in names if name[start:] not in table]:
        raise ValueError(f"{found.root / base / LABEL_TABLE} has no label of {missing[0]}")
    files = _open(found, names, [table[name[start:]] for name in names], None)
    files.counted = np.fromiter((counted or {}).values(), np.int64)
    return files


def _read_table(found: Listing, base: str) -> dict[str, int] | None:
    where = found.root / base / LABEL_TABLE
    if base not in found.tables:
        return None
    content = parse_json(read_table(found, base), where)
    pairs = content.get("labels", False) if isinstance(content, dict) else False
    if pairs is None:
        return None
    table: dict[str, int] = {}
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f'{where} is not {{"labels": [[name, label], ...]}}')
        name, label = normal_name(pair[0]), pair[1]
        if type(label) is not int or not 0 <= label <= LARGEST:
            raise ValueError(f"{where}: label {label!r} of {name} is not a class 0, 1, ...")
        if table.setdefault(name, label) != label:
            raise ValueError(f"{where} gives {name} the labels {table[name]} and {label}")
    return table


class FolderFiles(Files):
    """Files below `root`; `names` are relative, with slashes. Methods as of `Files`."""

    def __init__(self, root: Path, names: list[str], labels, class_names, crop: str = "center"):
        super().__init__(str(root), labels, class_names, crop)
        self.root, self.names = root, names

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        return read_bytes(self.root / self.names[index])

    def title(self, index: int) -> str:
        """What a message calls an image."""
        return str(self.root / self.names[index])


class ZipFiles(Files):
    """Members of a zip file, stored or deflated, read through one handle per thread.

    The directory is kept as 40 bytes an image, not as zipfile's objects per handle, which take
    gigabytes for ImageNet. Methods as of `Files`.

    Raises:
        ValueError: a member is encrypted or compressed by another method.
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
        stated = ((min(number, LARGEST) for number in places(info)) for info in infos)
        self.places = np.array([tuple(numbers) for numbers in stated], np.int64)

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        offset, packed, size, method, crc = self.places[index].tolist()
        check_size(max(packed, size))
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
        """What a message calls an image."""
        return f"{self.path}: {self.names[index]}"


def celeba_images(folder: Path) -> Path | None:
    """The folder of CelebA's aligned images, at or below `folder`; None without."""
    places = (folder / "img_align_celeba", folder / "Img" / "img_align_celeba")
    return next((place for place in places if place.is_dir()), None)


def celeba(folder: Path, split: str) -> Files:
    """CelebA's aligned images of partition 0 (train) or 1 (heldout), without labels.

    Raises:
        ValueError: the list of partitions or an image that it names is missing.
    """
    images = celeba_images(folder)
    lists = [folder / sub / "list_eval_partition.txt" for sub in ("", "Eval", "Anno")]
    partition = next((path for path in lists if path.is_file()), None)
    if partition is None:
        raise ValueError(
            f"{folder} has {images.name} but not CelebA's list_eval_partition.txt: put it beside, "
            f"or give {images} to train on every image with the usual crop"
        )
    names = []
    for number, line in enumerate(read_text(partition).splitlines(), 1):
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
