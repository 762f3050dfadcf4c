"""Files that a reader sees whole or not at all."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRAFT = ".draft-"


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never a part."""
    with drafted(path) as draft:
        write_text(draft, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A draft beside `path`, which takes its name at the end or, after an error, is removed.

    A link is written through; what is no regular file (a device, a pipe) is an OSError. The file
    has the mode that the umask gives, whoever wrote the draft. The folder is made if need be.
    """
    path = _target(path)
    draft = path.with_name(DRAFT + path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with usual_mode(draft):
            yield draft
        os.replace(draft, path)
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # such as a full disk
    finally:
        draft.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file that writing `path` replaces. OSError unless it is regular, or not there yet."""
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise OSError(f"cannot write {path}: it is {what}")
    return path


@contextlib.contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give `path`, written inside, the mode of a file that open() makes: safetensors' is 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def check_writable(path: Path) -> None:
    """OSError now if writing `path`, in a folder that may have to be made, would fail later."""
    path = _target(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    draft = folder / (DRAFT + path.name)
    try:
        draft.touch()
        draft.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 and flush it to the disk; not atomic."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, where the system can."""
    if os.name == "nt":  # neither folders nor files opened for reading can be flushed there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
