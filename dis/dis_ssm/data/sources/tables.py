"""Data sets in the layout of Hugging Face: Parquet files, and Arrow as `save_to_disk` writes it."""

import contextlib
import importlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dis_ssm.data.sources.base import NO_LABEL, Files, PerThread
from dis_ssm.data.sources.walk import is_hidden
from dis_ssm.system.extras import how_to_install
from dis_ssm.system.reading import (
    FileError,
    check_regular,
    check_size,
    parse_json,
    parsing,
    read_json,
    reason,
)

HF_SPLITS = {"train": ("train",), "heldout": ("validation", "test")}
SPLIT_NAME = re.compile(r"(train|validation|test)(?![a-z0-9])")


def _need(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Hugging Face data sets need {module}: {how_to_install('data')}"
        ) from error


def _pick_split(where: Path, found: Sequence[str], split: str) -> str:
    for name in HF_SPLITS[split]:
        if name in found:
            return name
    raise ValueError(
        f"{where} has no {' or '.join(HF_SPLITS[split])} split for {split!r}, only "
        f"{', '.join(sorted(found))}"
    )


def _columns(schema, where) -> tuple[str, str | None, list[str] | None]:
    """Names of the image column and the label column (if any), and the class names (if known)."""
    images = [field.name for field in schema if _is_binary(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    image = "image" if "image" in images + texts else images[0] if len(images) == 1 else None
    if image is None or schema.names.count(image) > 1:
        raise ValueError(
            f"{where} has the columns {schema.names}: one of them must be 'image' and hold encoded "
            f"images, as bytes or {{bytes, path}}"
        )
    named = _stated_classes(schema.metadata or {}, where)
    classes = [name for name in named if name in schema.names]
    if "label" in schema.names:
        label = "label"
    elif len(classes) > 1:
        raise ValueError(f"{where} has the label columns {classes}: rename one of them to 'label'")
    else:
        label = classes[0] if classes else None
    return image, label, named.get(label)


def _is_binary(type_) -> bool:
    """Whether a column can hold encoded images: bytes, or {bytes, path}."""
    import pyarrow as pa

    if pa.types.is_struct(type_):
        inner = type_.get_field_index("bytes")
        return inner >= 0 and (_is_binary(type_[inner].type) or _is_text(type_[inner].type))
    if pa.types.is_dictionary(type_):
        return _is_binary(type_.value_type)
    kinds = ("binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in kinds)


def _is_text(type_) -> bool:
    """Some writers declare bytes as text; such a column must be called 'image'."""
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    kinds = ("string", "large_string", "string_view")
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in kinds)


def _stated_classes(metadata: dict[bytes, bytes], where) -> dict[str, list[str] | None]:
    """The ClassLabel columns that `datasets` notes in a schema, and the names of their classes."""
    where = f"{where}: its metadata 'huggingface'"
    stated = parse_json(metadata.get(b"huggingface", b"{}"), where)
    features = stated
    for field in ("info", "features"):
        if not isinstance(features, dict):
            break
        features = {} if features.get(field) is None else features[field]
    if not isinstance(features, dict):
        raise FileError(
            f"{where} is {str(stated)[:80]!r}, without the object info.features: write the file "
            f"again, or drop the metadata"
        )
    classes = {
        name: feature.get("names")
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    for name, names in classes.items():
        texts = isinstance(names, list) and all(isinstance(text, str) for text in names)
        if names is not None and not texts:
            raise FileError(f"{where} has info.features.{name}.names {str(names)[:80]}: no names")
    return classes


def _label_values(column, where) -> np.ndarray:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"{where}: the label column holds {column.type} with {column.null_count} empty rows, "
            f"not a class number in every row"
        )
    return column.to_numpy().astype(np.int64)


@contextlib.contextmanager
def _row_errors():
    """What Arrow raises for a damaged row, as an error that `Files.read` allows."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(reason(error)) from error


def _image_bytes(scalar) -> bytes:
    """The bytes of an Arrow scalar of any type that `_columns` takes."""
    if scalar.is_valid and hasattr(scalar, "keys"):
        scalar = scalar["bytes"]
    if scalar.is_valid and hasattr(scalar, "dictionary"):
        scalar = scalar.value
    if not scalar.is_valid:
        raise ValueError("the row holds no bytes (a path alone is not followed)")
    content = scalar.as_buffer()
    check_size(content.size)
    return content.to_pybytes()


def parquet_paths(folder: Path) -> list[Path]:
    """The Parquet files in a folder, in its `data` and in its folders of splits, sorted."""
    places = (folder, folder / "data", *(folder / s for names in HF_SPLITS.values() for s in names))
    found = {path for place in places for path in place.glob("*.parquet")}
    return sorted(path for path in found if path.is_file() and not is_hidden(path.name))


def parquet(path: Path, split: str) -> Files:
    """Parquet shards, read in place; one file, or a folder without split names, is "train".

    Raises:
        ValueError: there is no such split, a shard is missing or damaged, or the columns are no
            images with labels.
        ImportError: pyarrow is not installed.
    """
    _need("pyarrow")
    shards = paths = [path] if path.is_file() else parquet_paths(path)
    named = defaultdict(list)
    for shard in paths if path.is_dir() else ():
        starts = (SPLIT_NAME.match(name) for name in shard.relative_to(path).parts[::-1])
        named[next((start[1] for start in starts if start), "")].append(shard)
    if "" in named and len(named) > 1:
        raise ValueError(f"{named[''][0]} is of no split: name it train-..., or remove it")
    if named and "" not in named:
        shards = named[_pick_split(path, list(named), split)]
    elif split == "heldout":
        _pick_split(path, ["train"], split)
    _check_complete(shards)
    return ParquetFiles(path, shards, paths)


def _check_complete(shards: list[Path]) -> None:
    """ValueError unless all `...-k-of-n` are there, and all in one folder."""
    if len({shard.parent for shard in shards}) > 1:
        raise ValueError(f"{shards[0]} and {shards[-1]} are one split: give one of their folders")
    numbers = defaultdict(set)
    for found in (re.match(r"(.*-)(\d+)-of-(\d+)", shard.name) for shard in shards):
        if found:
            numbers[found[1], int(found[3])].add(int(found[2]))
    for (start, count), present in numbers.items():
        if missing := sorted(set(range(count)) - present):
            names = ", ".join(f"{start}{k:05d}-of-{count:05d}.parquet" for k in missing[:3])
            raise ValueError(f"{shards[0].parent} lacks {names}: get {len(missing)} files again")


def _open_parquet(path: Path):
    import pyarrow.parquet

    check_regular(path)
    with parsing(f"{path} is not a whole Parquet file (get it again)"):
        return pyarrow.parquet.ParquetFile(path, memory_map=True)


class ParquetFiles(Files):
    """Rows of Parquet files, read by row group, of which each thread keeps the last one.

    Quick in the order of the rows; out of order each image costs its row group, in which
    `datasets` puts about a hundred. Methods as of `Files`.

    Raises:
        ValueError: the shards differ, hold no images, or have no usable columns.
    """

    def __init__(self, path: Path, shards: list[Path], all_shards: list[Path]):
        self.shards, self.held = shards, PerThread()
        columns, labels, groups = set(), [], []
        for k, shard in enumerate(shards):
            with _open_parquet(shard) as file:
                self.image, label, names = _columns(file.schema_arrow, shard)
                columns.add((self.image, label, names and tuple(names)))
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                groups += [(k, g, size) for g, size in enumerate(sizes)]
                labels.append(_label_column(file, label, shard))
        if len(columns) > 1:
            raise ValueError(f"{path}: shards differ in their columns or class names: {columns}")
        self.groups = np.array(groups, np.int64).reshape(-1, 3)
        self.starts = np.cumsum(np.r_[0, self.groups[:, 2]])
        self.label, self.all_shards = label, all_shards
        super().__init__(str(path), np.concatenate(labels), names if label else ())
        if not len(self.labels):
            raise ValueError(f"{path} holds no images")

    def used_labels(self) -> np.ndarray:
        """The distinct labels, sorted; a class that only the other split has counts as well."""
        found = []
        for shard in self.all_shards:
            with _open_parquet(shard) as file:
                found.append(np.unique(_label_column(file, self.label, shard)))
        return np.unique(np.concatenate(found))

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        with _row_errors():
            if self.held.key != k:
                shard, group, _ = self.groups[k].tolist()
                with _open_parquet(self.shards[shard]) as file:
                    table = file.read_row_group(group, columns=[self.image], use_threads=False)
                self.held.key, self.held.value = k, table.column(self.image)
            return _image_bytes(self.held.value[index - int(self.starts[k])])

    def title(self, index: int) -> str:
        """What a message calls an image."""
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard = self.groups[k, 0]
        first = self.starts[np.flatnonzero(self.groups[:, 0] == shard)[0]]
        return f"{self.shards[shard]}, row {index - first}"


def _label_column(file, label: str | None, where: Path) -> np.ndarray:
    if label is None:
        return np.full(file.metadata.num_rows, NO_LABEL)
    with parsing(f"{where}: column {label!r} is damaged"):
        column = file.read([label]).column(0)
    return _label_values(column, where)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder, of a `DatasetDict` or of a `Dataset`."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def arrow(path: Path, split: str) -> Files:
    """What `save_to_disk` wrote, memory-mapped; one data set without splits is all "train".

    Raises:
        ValueError: there is no such split, the folder is damaged, or the columns are no images with
            labels.
        ImportError: datasets is not installed.
    """
    datasets = _need("datasets")
    for file in path.glob("**/*.arrow"):
        check_regular(file)
    for file in path.glob("**/*.json"):
        if not isinstance(read_json(file), dict):
            raise FileError(f"{file} holds no object: get it again")
    with parsing(f"{path} is not a whole save_to_disk folder"):
        found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        return ArrowFiles(path, found[_pick_split(path, list(found), split)], list(found.values()))
    if split == "heldout":
        _pick_split(path, ["train"], split)
    return ArrowFiles(path, found, [found])


class ArrowFiles(Files):
    """Rows of a memory-mapped `datasets.Dataset`, encoded as they are stored.

    Methods as of `Files`.

    Raises:
        ValueError: the data set holds no images, or has no usable columns.
    """

    def __init__(self, path: Path, dataset, all_splits: list):
        self.image, self.label, names = _columns(dataset.features.arrow_schema, path)
        self.name, self.all_splits = str(path), all_splits
        super().__init__(str(path), self._labels(dataset), names if self.label else ())
        if not len(self.labels):
            raise ValueError(f"{path} holds no images")
        self.rows = dataset.select_columns([self.image]).with_format("arrow")

    def used_labels(self) -> np.ndarray:
        """The distinct labels, sorted; a class that only another split has counts as well."""
        return np.unique(np.concatenate([self._labels(dataset) for dataset in self.all_splits]))

    def _labels(self, dataset) -> np.ndarray:
        if self.label is None:
            return np.full(len(dataset), NO_LABEL)
        if self.label not in dataset.column_names:
            raise ValueError(f"{self.name}: a split has no column {self.label!r}")
        table = dataset.select_columns([self.label]).with_format("arrow")[:]
        return _label_values(table.column(0), self.name)

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        with _row_errors():
            return _image_bytes(self.rows[index].column(0)[0])

    def title(self, index: int) -> str:
        """What a message calls an image."""
        return f"{self.name}, row {index}"
