"""Where images come from: folders, archives and data sets in the form they are published in.

`recognise` names the kind of a source, and `OPENERS[kind](path, split)` opens it: as `Pixels`
(small images, decoded, in memory; the kinds in `IN_MEMORY`) or as `Files` (encoded images, read one
at a time from where they lie). Nothing is downloaded, unpacked to disk or copied to a cache, and no
code that a file holds is run.
"""

from collections.abc import Callable
from pathlib import Path

from dis_ssm.data.sources import arrays, files, tables
from dis_ssm.data.sources.base import NO_LABEL, SPLITS, Files, Pixels
from dis_ssm.data.sources.walk import IMAGE_SUFFIXES
from dis_ssm.system.nearest import did_you_mean
from dis_ssm.system.reading import check_regular

__all__ = ["IMAGE_SUFFIXES", "NO_LABEL", "SOURCES", "SPLITS", "Files", "Pixels"]

SOURCES = ("digits", "fashion-mnist")

FOLDER_KINDS: dict[str, Callable[[Path], object]] = {  # the first that fits
    "idx": lambda folder: arrays.idx_path(folder, "train", "images"),
    "cifar": arrays.cifar_home,
    "celeba": files.celeba_images,
    "arrow": tables.is_saved,
    "parquet": tables.parquet_paths,
    "folder": lambda folder: True,
}
FILE_KINDS = {".zip": "zip", ".parquet": "parquet", ".tar.gz": "cifar", ".tgz": "cifar"}
IN_MEMORY = frozenset({"digits", "idx", "cifar"})
OPENERS: dict[str, Callable[[Path, str], Pixels | Files]] = {
    "digits": arrays.digits,
    "idx": arrays.idx_folder,
    "cifar": arrays.cifar,
    "celeba": files.celeba,
    "arrow": tables.arrow,
    "parquet": tables.parquet,
    "zip": files.zip_file,
    "folder": files.folder,
}


def recognise(source: str | Path) -> tuple[str, Path]:
    """The kind of `source` (a key of `OPENERS`) and its path.

    Raises:
        ValueError: it is no name, folder or file of a known kind.
    """
    if str(source) == "digits":
        return "digits", Path("digits")
    if str(source) == "fashion-mnist":
        return "idx", arrays.embedded("fashion-mnist")
    path = Path(source).expanduser()
    if path.is_dir():
        return next(kind for kind, test in FOLDER_KINDS.items() if test(path)), path
    if not path.exists():
        raise ValueError(_unknown_source(str(source)))
    check_regular(path)
    for suffix, kind in FILE_KINDS.items():
        if path.name.lower().endswith(suffix):
            return kind, path
    raise ValueError(
        f"{path} is no data source: give a folder, or a file that ends in {', '.join(FILE_KINDS)}"
    )


def _unknown_source(source: str) -> str:
    return (
        f"unknown data source {source!r}: {did_you_mean(source, SOURCES)} (or give an existing "
        f"folder or archive of images)"
    )
