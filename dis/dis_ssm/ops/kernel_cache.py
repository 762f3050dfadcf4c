"""Where compiled kernels are kept, and whose may be run.

A kernel is machine code: whoever can write it is whoever runs it. The cache is `$DIS_SSM_CACHE`,
or `dis_ssm` in `$XDG_CACHE_HOME` or `~/.cache`. What lies there is used only if it and its
folder belong to this user or to root and nobody else can write them; otherwise kernels are compiled
anew in another folder, and one line says why. Files end in the SHA-256 of their contents, against
damage, and appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

log = logging.getLogger("dis_ssm")

T = TypeVar("T")

DRAFT = "draft-"
DRAFT_LIFE = 3600  # seconds; nothing compiles for so long
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIGEST = hashlib.sha256().digest_size


class BackendError(RuntimeError):
    """Kernels cannot run here; the message says why and what would help."""


def fingerprint(options: str, sources: Path) -> str:
    """Of what compiled kernels depend on: compiler options, and all files in a folder."""
    key = hashlib.sha256(options.encode())
    for path in sorted(sources.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def obtain(name: str, make: Callable[[Path], None], load: Callable[[Path, bytes], T]) -> T:
    """The kernels that are kept under a name, compiled if they are not.

    Args:
        name: the file's name, with the `fingerprint` of what it is made from.
        make: compiles kernels that load to the path it is given.
        load: gets path and contents of a file. Kept kernels that it refuses with an OSError are
            compiled anew.

    Returns:
        What `load` returns.

    Raises:
        BackendError: no folder can be written. What `make` raises is passed on.
    """
    path, data = find(name)
    if data is not None:
        try:
            return load(path, data)
        except OSError as error:
            say_once(f"{path} does not load ({error}) and is compiled anew")
    try:
        return _compile(path, make, load)
    except OSError as error:
        say_once(f"compiled kernels are not kept in {path.parent}: {error}")
    folder = private_folder()
    try:
        return _compile(folder / name, make, load)
    except OSError as error:
        remedy = "set DIS_SSM_CACHE to a folder that can be written"
        raise BackendError(f"cannot write kernels to {folder}: {error}; {remedy}") from None


def _compile(path: Path, make: Callable[[Path], None], load: Callable[[Path, bytes], T]) -> T:
    with draft(path) as unfinished:
        make(unfinished)
        return load(unfinished, unfinished.read_bytes())


def find(name: str) -> tuple[Path, bytes | None]:
    """Where the file `name` is, and its contents; None if it must be made there."""
    for folder in _folders():
        reason = _unusable(folder)
        if reason is None:
            _remove_old_drafts(folder)
            path = folder / name
            data = read(path)
            if data is not None or os.access(folder, os.W_OK):
                return path, data
            reason = f"{folder} is not writable"
        say_once(f"compiled kernels are not kept in {folder}: {reason}")
    path = private_folder() / name
    return path, read(path)


def read(path: Path) -> bytes | None:
    """The contents of a kernel's file without their digest; None if it is missing, damaged, or
    could have been written by others. The folder must have been found by `find`."""
    try:
        fd = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        if reason := _foreign(path, status):
            say_once(f"{reason}: it is not run, but compiled anew")
            return None
        data = file.read()
    whole = hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]
    return data[:-_DIGEST] if whole else None


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to be filled, which then gets its digest and replaces it.

    Raises:
        OSError: the folder cannot be written.
    """
    unfinished = path.with_name(f"{DRAFT}{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        yield unfinished
        with open(unfinished, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        unfinished.chmod(stat.S_IMODE(unfinished.stat().st_mode) & ~_OTHERS)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def report() -> str:
    """The folder that new kernels go to, and why it is not another."""
    refused = []
    for folder in _folders():
        reason = _unusable(folder)
        if reason is None and not os.access(folder, os.W_OK):
            reason = f"{folder} is not writable"
        if reason is None:
            return "; ".join([f"compiled kernels are kept in {folder}", *refused])
        refused.append(f"not in {folder}: {reason}")
    return "; ".join(["compiled kernels are kept for the life of a process only", *refused])


def _folders() -> list[Path]:
    """The folder that the environment names, then the user's own."""
    named = os.environ.get("DIS_SSM_CACHE")
    bases = [os.environ.get("XDG_CACHE_HOME"), "~/.cache"]
    folders = [Path(named)] if named else []
    folders += [Path(base) / "dis_ssm" for base in bases if base][:1]
    found = []
    for folder in folders:
        with contextlib.suppress(RuntimeError):  # there is no home
            found.append(Path(os.path.realpath(folder.expanduser())))
    return list(dict.fromkeys(found))


def _unusable(folder: Path) -> str | None:
    """Why kernels in `folder`, made if need be, cannot be trusted or kept; None if they can."""
    try:
        for missing in (p for p in (*reversed(folder.parents), folder) if not p.exists()):
            missing.mkdir(mode=0o755, exist_ok=True)
        for path in (folder, *folder.parents):
            status = path.lstat()
            sticky = path != folder and status.st_mode & stat.S_ISVTX
            if reason := _foreign(path, status, may_be_shared=bool(sticky)):
                return reason
    except OSError as error:
        return str(error)
    return None


def _foreign(path: Path, status: os.stat_result, may_be_shared: bool = False) -> str | None:
    """Why others than this user and root could have put what is at `path`; None if not."""
    if not hasattr(os, "geteuid"):  # Windows keeps its cache in the user's profile
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user (uid {status.st_uid})"
    if status.st_mode & _OTHERS and not may_be_shared:
        return f"{path} can be written by others (`chmod go-w {path}` would mend it)"
    return None


def _remove_old_drafts(folder: Path) -> None:
    """What processes killed while they compiled have left."""
    for path in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > DRAFT_LIFE:
                path.unlink()


def private_folder() -> Path:
    """A folder of this process's own, removed at its end."""
    return Path(_private_folder().name)


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dis_ssm-")


@functools.cache
def say_once(message: str) -> None:
    """One warning, the first time in this process."""
    log.warning("dis_ssm: %s", message)
