"""One process a folder: locks that the system frees when their process ends."""

import contextlib
import errno
import warnings
from collections.abc import Iterator
from pathlib import Path

from dis_ssm.system.files import DRAFT

LOCK = ".lock"


def is_empty(folder: Path) -> bool:
    """Whether there is nothing but a lock and drafts, or no folder at all."""
    return not folder.is_dir() or all(
        path.name == LOCK or path.name.startswith(DRAFT) for path in folder.iterdir()
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which the system frees when the process ends.

    Raises:
        ValueError: another process holds it.
    """
    with (folder / LOCK).open("w") as file:
        _lock(file, folder)
        yield


def _lock(file, run: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: two processes in one run go unnoticed
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{run} is in use by another process") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        warnings.warn(
            f"{run}: this file system has no locks; start one run at a time", stacklevel=2
        )
