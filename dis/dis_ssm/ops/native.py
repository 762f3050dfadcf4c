"""The CPU kernels: compiled at first use, cached on disk, called through ctypes.

The sources in ``kernels/cpu`` have a plain C interface, so they need neither torch's headers nor
its ABI: one compiler call of a few seconds serves every torch. The library is kept in
``$DIS_SSM_CACHE`` (default ``dis_ssm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``) under a name that
hashes sources, flags and instruction set, so machines of different kinds can share the folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("dis_ssm")

SOURCES = Path(__file__).resolve().parent.parent / "kernels" / "cpu"
FLAGS = "-std=c++17 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math".split()
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma".split(),
    "avx2": "-mavx2 -mfma".split(),
    "baseline": [],
}
_DIGEST = hashlib.sha256().digest_size


class BackendError(RuntimeError):
    """The native kernels cannot run here; the message says why and what would help."""


def instruction_set() -> str:
    """The widest instruction set of this processor, or the one named by ``$DIS_SSM_CPU_ISA``."""
    if wanted := os.environ.get("DIS_SSM_CPU_ISA"):
        if wanted not in ISA_FLAGS:
            raise ValueError(f"DIS_SSM_CPU_ISA={wanted!r}: choose one of {', '.join(ISA_FLAGS)}")
        return wanted
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ISA_FLAGS else "baseline"


def cache_dir() -> Path:
    """Where compiled kernels are kept; a folder of this process's own where there is no home."""
    try:
        if folder := os.environ.get("DIS_SSM_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dis_ssm"
    except RuntimeError:
        return Path(_private_folder().name)


def _compiler() -> list[str]:
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BackendError("no C++ compiler found; install g++ or clang++, or set CXX")


def _compile(isa: str, target: Path) -> None:
    """Compiles to a neighbour of ``target`` and renames, with the file's SHA-256 as a trailer."""
    compiler = _compiler()
    fd, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(fd)
    try:
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        for openmp in (["-fopenmp"], []):
            command = [*compiler, *FLAGS, *ISA_FLAGS[isa], *openmp, *sources, "-o", name]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise BackendError(f"cannot run the compiler {compiler[0]!r}: {error}") from None
            if result.returncode == 0:
                break
        else:
            reason = " / ".join(result.stderr.strip().splitlines()[-2:])
            raise BackendError(f"{compiler[0]} could not compile the CPU kernels: {reason}")
        with open(name, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _intact(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        BackendError: there is no compiler, or it failed.
    """
    if platform.system() == "Windows":
        raise BackendError("the CPU kernels need GCC or Clang on Linux or macOS")
    isa = instruction_set()
    key = hashlib.sha256(" ".join([*FLAGS, *ISA_FLAGS[isa], platform.machine()]).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    name = f"cpu-{isa}-{key.hexdigest()[:16]}.so"
    folder = cache_dir()
    path = folder / name
    if not _intact(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} is not writable")
        except OSError as error:
            log.warning(
                "dis_ssm: cannot cache compiled kernels (%s); using a temporary folder", error
            )
            folder = Path(_private_folder().name)
        path = folder / name
        try:
            _compile(isa, path)
        except OSError as error:
            raise BackendError(f"cannot write the compiled kernels to {folder}: {error}") from None
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"cannot load {path}: {error}; delete it to rebuild") from None
    for name in ("scan", "conv", "norm"):
        for direction in ("forward", "backward"):
            function = getattr(lib, f"dis_ssm_{name}_{direction}")
            function.argtypes = [ctypes.c_void_p, ctypes.c_int]
    numbers = (ctypes.c_int64, ctypes.c_float, ctypes.c_int64)
    lib.dis_ssm_exp2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *numbers]
    lib.dis_ssm_chunk.restype = ctypes.c_int64
    return lib


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dis_ssm-")


@functools.cache
def why_not() -> str | None:
    """None if the native kernels run here, else the reason."""
    try:
        library()
    except BackendError as error:
        return str(error)
    return None


def _after_fork() -> None:
    torch.set_num_threads(1)  # an OpenMP team does not survive a fork: a child would wait forever


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(function: str, arguments: ctypes.Structure) -> None:
    """Calls a kernel on ``torch.get_num_threads()`` threads (one in a forked child)."""
    kernel = getattr(library(), f"dis_ssm_{function}")
    code = kernel(ctypes.byref(arguments), torch.get_num_threads())
    if code == 1:
        raise MemoryError(f"{function} ran out of memory")
    assert code == 0, f"{function} returned {code}"


def float_rows(x: Tensor) -> Tensor:
    """x as float32 with unit stride along the last axis, copied only if it must be."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor | None) -> Rows:
    """A (batch, length, channels) float32 tensor whose last stride is 1."""
    if x is None:
        return Rows(None, 0, 0)
    assert x.dtype is torch.float32 and (x.stride(-1) == 1 or x.shape[-1] <= 1)
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def pointer(x: Tensor | None) -> int | None:
    """A contiguous float32 tensor."""
    assert x is None or (x.dtype is torch.float32 and x.is_contiguous())
    return None if x is None else x.data_ptr()


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    ]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class ScanDirection(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in ("x", "dt", "B", "C")),
        *_pointers("A", "D", "dt_bias", "states"),
        *_pointers("dx", "ddt", "dB", "dC", "dA", "dD", "ddt_bias"),
        *_integers("reverse"),
    ]


class Scan(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "length", "channels", "state", "directions", "softplus"),
        ("direction", ScanDirection * 2),
        ("z", Rows),
        ("dout", Rows),
        *_pointers("out", "pregate", "dz"),
    ]


class ConvDirection(ctypes.Structure):
    _fields_ = [
        *_pointers("weight", "bias", "y"),
        ("dy", Rows),
        *_pointers("dweight", "dbias"),
        *_integers("reverse"),
    ]


class Conv(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "length", "channels", "width", "directions", "silu"),
        ("direction", ConvDirection * 2),
        ("x", Rows),
        *_pointers("dx"),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        *_integers("rows", "width"),
        ("eps", ctypes.c_float),
        *_pointers("h", "residual", "weight", "stream", "normed", "rstd"),
        *_pointers("dnormed", "dstream", "dx", "dweight"),
    ]
