"""Data sets in the layout of Hugging Face: Parquet files, and Arrow as `save_to_disk` writes it."""

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dis_ssm.extras import how_to_install
from dis_ssm.sources.base import NO_LABEL, Files, PerThread

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
    import pyarrow as pa

    def holds_bytes(type_) -> bool:
        if pa.types.is_struct(type_):
            return type_.get_field_index("bytes") >= 0
        return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)

    images = [field.name for field in schema if holds_bytes(field.type)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None:
        raise ValueError(
            f"{where} has the columns {schema.names}: one of them must be 'image' and hold encoded "
            f"images, as bytes or {{bytes, path}}"
        )
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stated.get("info", {}).get("features", {})
    classes = [
        n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
    ]
    if "label" in schema.names:
        label = "label"
    elif len(classes) > 1:
        raise ValueError(f"{where} has the label columns {classes}: rename one of them to 'label'")
    else:
        label = classes[0] if classes else None
    return image, label, features[label].get("names") if label in classes else None


def _label_values(column, where) -> np.ndarray:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"{where}: the label column holds {column.type} with {column.null_count} empty rows, "
            f"not a class number in every row"
        )
    return column.to_numpy().astype(np.int64)


def _image_bytes(value) -> bytes:
    raw = value.get("bytes") if isinstance(value, dict) else value
    if raw is None:
        raise ValueError("the row holds no bytes (a path alone is not followed)")
    return raw


def parquet_paths(folder: Path) -> list[Path]:
    places = (folder, folder / "data", *(folder / s for names in HF_SPLITS.values() for s in names))
    return sorted({path for place in places for path in place.glob("*.parquet")})


def parquet(path: Path, split: str) -> Files:
    """Parquet shards, read in place; one file, or a folder without split names, is "train"."""
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
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}; get it again") from error


class ParquetFiles(Files):
    """Rows of Parquet files, read by row group, of which each thread keeps the last one.

    Quick in the order of the rows; out of order each image costs its row group, in which
    `datasets` puts about a hundred.
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
        if label and names is None:  # a class that only the other split has counts as well
            count = 1 + max(_largest_label(shard, label) for shard in all_shards)
            names = [str(k) for k in range(count)]
        self.groups = np.array(groups, np.int64).reshape(-1, 3)
        self.starts = np.cumsum(np.r_[0, self.groups[:, 2]])
        super().__init__(str(path), np.concatenate(labels), names or ())
        if not len(self.labels):
            raise ValueError(f"{path} holds no images")

    def read(self, index: int) -> bytes:
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self.held.key != k:
            shard, group, _ = self.groups[k].tolist()
            with _open_parquet(self.shards[shard]) as file:
                table = file.read_row_group(group, columns=[self.image], use_threads=False)
            self.held.key, self.held.value = k, table.column(self.image)
        return _image_bytes(self.held.value[index - int(self.starts[k])].as_py())

    def title(self, index: int) -> str:
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard = self.groups[k, 0]
        first = self.starts[np.flatnonzero(self.groups[:, 0] == shard)[0]]
        return f"{self.shards[shard]}, row {index - first}"


def _label_column(file, label: str | None, where: Path) -> np.ndarray:
    if label is None:
        return np.full(file.metadata.num_rows, NO_LABEL)
    return _label_values(file.read([label]).column(0), where)


def _largest_label(shard: Path, label: str) -> int:
    with _open_parquet(shard) as file:
        return int(_label_column(file, label, shard).max(initial=-1))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder, of a `DatasetDict` or of a `Dataset`."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def arrow(path: Path, split: str) -> Files:
    """What `save_to_disk` wrote, memory-mapped; one data set without splits is all "train"."""
    datasets = _need("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole save_to_disk folder: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = found[_pick_split(path, list(found), split)]
    elif split == "heldout":
        _pick_split(path, ["train"], split)
    return ArrowFiles(path, found)


class ArrowFiles(Files):
    """Rows of a memory-mapped `datasets.Dataset`, encoded as they are stored."""

    def __init__(self, path: Path, dataset):
        self.image, label, names = _columns(dataset.features.arrow_schema, path)
        if label is None:
            labels = np.full(len(dataset), NO_LABEL)
        else:
            table = dataset.select_columns([label]).with_format("arrow")[:]
            labels = _label_values(table.column(0), path)
            names = names or [str(k) for k in range(1 + labels.max(initial=-1))]
        super().__init__(str(path), labels, names or ())
        if not len(labels):
            raise ValueError(f"{path} holds no images")
        self.rows = dataset.select_columns([self.image]).with_format("arrow")

    def read(self, index: int) -> bytes:
        return _image_bytes(self.rows[index].column(0)[0].as_py())

    def title(self, index: int) -> str:
        return f"{self.name}, row {index}"
