"""The CPU kernels: compiled at first use, cached on disk, called through ctypes.

The sources in `kernels/cpu` have a plain C interface (`dis_ssm.ops.cpu_abi`), so they need neither
torch's headers nor its ABI: one compiler call of a few seconds serves every torch. The library is
kept in `dis_ssm.ops.kernel_cache` under a name that hashes sources, flags and instruction set, so
that one user's machines of different kinds can share the folder.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from dis_ssm.ops import kernel_cache
from dis_ssm.ops.cpu_abi import Rows
from dis_ssm.ops.kernel_cache import BackendError

SOURCES = Path(__file__).resolve().parent.parent / "kernels" / "cpu"
FLAGS = "-std=c++17 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math".split()
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma".split(),
    "avx2": "-mavx2 -mfma".split(),
    "baseline": [],
}
CHUNK = 32  # tokens between two kept states of the scan; scan.cpp's


def instruction_set() -> str:
    """The widest instruction set of this processor, or the one named by `$DIS_SSM_CPU_ISA`."""
    if wanted := os.environ.get("DIS_SSM_CPU_ISA"):
        if wanted not in ISA_FLAGS:
            raise ValueError(f"DIS_SSM_CPU_ISA={wanted!r}: choose one of {', '.join(ISA_FLAGS)}")
        return wanted
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ISA_FLAGS else "baseline"


def _compiler() -> list[str]:
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BackendError("no C++ compiler found; install g++ or clang++, or set CXX")


def _compile(isa: str, target: Path) -> None:
    compiler = _compiler()
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    for openmp in (["-fopenmp"], []):
        command = [*compiler, *FLAGS, *ISA_FLAGS[isa], *openmp, *sources, "-o", str(target)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise BackendError(f"cannot run the compiler {compiler[0]!r}: {error}") from None
        if result.returncode == 0:
            return _try_out(target, compiler[0])
    reason = " / ".join(result.stderr.strip().splitlines()[-2:])
    raise BackendError(
        f"{compiler[0]} could not compile the CPU kernels: {reason}; "
        "set CXX to another compiler and try again"
    )


def _open(path: Path) -> ctypes.CDLL:
    """The library with its functions declared; OSError if it is not what the sources say."""
    lib = ctypes.CDLL(str(path))
    try:
        for name in ("scan", "conv", "norm"):
            for direction in ("forward", "backward"):
                function = getattr(lib, f"dis_ssm_{name}_{direction}")
                function.argtypes = [ctypes.c_void_p, ctypes.c_int]
        numbers = (ctypes.c_int64, ctypes.c_float, ctypes.c_int64)
        lib.dis_ssm_exp2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *numbers]
        lib.dis_ssm_chunk.restype = ctypes.c_int64
        chunk = lib.dis_ssm_chunk()
    except AttributeError as error:
        raise OSError(str(error)) from None
    if chunk != CHUNK:
        raise OSError(f"its chunks are {chunk} tokens, not {CHUNK}")
    return lib


def _try_out(path: Path, compiler: str) -> None:
    try:
        _open(path)
    except OSError as error:
        raise BackendError(
            f"what {compiler} made of the CPU kernels does not load: {error}; "
            "set CXX to a C++ compiler and try again"
        ) from None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. A failure is not kept: the next call tries again.

    Raises:
        BackendError: there is no compiler, or it failed.
    """
    if platform.system() == "Windows":
        raise BackendError("the CPU kernels need GCC or Clang on Linux or macOS")
    isa = instruction_set()
    options = " ".join([*FLAGS, *ISA_FLAGS[isa], platform.machine()])
    return kernel_cache.obtain(
        f"cpu-{isa}-{kernel_cache.fingerprint(options, SOURCES)}.so",
        make=functools.partial(_compile, isa),
        load=lambda path, _: _open(path),
    )


def why_not() -> str | None:
    """None if the native kernels run here, else the reason.

    A failure is remembered in this process for the compiler that failed, as `$CXX` and `$PATH`
    name it, and not on disk.
    """
    return _why_not(os.environ.get("CXX"), os.environ.get("PATH"))


@functools.cache
def _why_not(cxx: str | None, path: str | None) -> str | None:
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
    """Calls a kernel on `torch.get_num_threads()` threads (one in a forked child)."""
    kernel = getattr(library(), f"dis_ssm_{function}")
    code = kernel(ctypes.byref(arguments), torch.get_num_threads())
    if code == 1:
        raise MemoryError(f"{function} ran out of memory")
    if code:
        raise RuntimeError(f"{function} returned {code}")


def float_rows(x: Tensor) -> Tensor:
    """x as float32 with unit stride along the last axis, copied only if it must be."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def empty(shape: tuple[int, ...]) -> Tensor:
    """Memory that a kernel will fill."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def rows(x: Tensor | None, shape: tuple[int, ...]) -> Rows:
    """A (batch, length, channels) float32 tensor of this shape whose last stride is 1."""
    if x is None:
        return Rows(None, 0, 0)
    _check(x, shape, x.stride(-1) == 1 or shape[-1] <= 1)
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def pointer(x: Tensor | None, shape: tuple[int, ...]) -> int | None:
    """A contiguous float32 tensor of this shape."""
    if x is None:
        return None
    _check(x, shape, x.is_contiguous())
    return x.data_ptr()


def _check(x: Tensor, shape: tuple[int, ...], dense: bool) -> None:
    """What a kernel may read and write depends on it: raised, never asserted."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not dense:
        kind = f"{x.dtype} on {x.device} with strides {x.stride()}"
        raise RuntimeError(f"a CPU kernel takes dense float32 tensors, got {kind}")
    if x.shape != shape:
        raise ValueError(f"a CPU kernel got shape {tuple(x.shape)} where {tuple(shape)} is needed")
    if x.numel() and not x.data_ptr():
        raise ValueError("a tensor's memory has been freed, by what shards or offloads it")
