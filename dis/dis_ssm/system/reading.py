"""Files from outside: regular files only, of a bounded size, and one error for what is wrong."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PIXELS = 89_478_485  # of an image; where Pillow, too, begins to suspect a decompression bomb
MAX_FILE_BYTES = 4 * MAX_PIXELS  # of an encoded image or a table: the largest image, uncompressed


class FileError(ValueError):
    """A file from outside is not what it should be; the message names it."""


@contextlib.contextmanager
def parsing(what: object) -> Iterator[None]:
    """Whatever fails inside becomes FileError("`what`: ..."): parsers of damaged files raise almost
    anything, RecursionError and KeyError among it."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What went wrong, also where the exception itself has no words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if str(error).strip("' ") else type(error).__name__


def parse_json(text: str | bytes, where: object) -> Any:
    """FileError naming `where` for what is no JSON in UTF-8, too deep, or names a key twice."""
    with parsing(f"{where} is not valid JSON"):
        return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice")
    return found


def check_regular(path: Path) -> None:
    """FileError for a FIFO, a socket or a device, without opening it: reading could hang."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is not a regular file"
        raise FileError(f"{path} {kind if path.exists() else 'does not exist'}: it is not read")


def read_bytes(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file. OSError if it cannot be had, ValueError if it is no regular
    file (which is never waited for) or larger than `most` bytes."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        check_size(status.st_size, most)
        raw = file.read(most + 1) if status.st_size == 0 else file.read()
    check_size(len(raw), most)
    return raw


def read_text(path: Path) -> str:
    """A text file in UTF-8; FileError naming it."""
    with parsing(f"cannot read {path}"):
        return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """FileError naming it for a file that is missing, irregular, too large, or no JSON in UTF-8."""
    return parse_json(read_text(path), path)


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(size: int, most: int = MAX_FILE_BYTES) -> None:
    """ValueError for a file of more than `most` bytes."""
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than {most:,}")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
