"""NVRTC: compiles CUDA sources for the GPU at hand, keeps them on disk, launches their kernels.

`cuda.core` and `cuda.bindings` are imported on first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import textwrap
from pathlib import Path

import torch

from dis_ssm.ops import kernel_cache
from dis_ssm.ops.kernel_cache import BackendError

SOURCES = Path(__file__).resolve().parent.parent / "kernels" / "cuda"
INSTALL = "pip install 'dis-ssm[cuda]'"


def missing_packages() -> str | None:
    """What is missing to compile and launch kernels, and how to install it; None if nothing is."""
    try:
        core = importlib.metadata.version("cuda-core")
    except importlib.metadata.PackageNotFoundError:
        return f"cuda-core is missing; {INSTALL}"
    if int(core.split(".")[0]) < 1:
        return f"cuda-core {core} is too old; pip install --upgrade 'cuda-core>=1.0'"
    major = int(torch.version.cuda.split(".")[0])
    remedy = f"pip install 'cuda-core[cu{major}]>=1.0'"
    try:
        found = version()
    except Exception as error:
        return f"NVRTC does not load ({one_line(error)}); {remedy}"
    if found[0] != major:
        nvrtc = "{}.{}".format(*found)
        return f"torch is built for CUDA {torch.version.cuda}, but NVRTC is {nvrtc}; {remedy}"
    return None


def one_line(error: Exception) -> str:
    """Type and text of an error in one line of at most 400 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


@functools.cache
def version() -> tuple[int, int]:
    """(major, minor) of NVRTC.

    Raises:
        BackendError: NVRTC does not answer.
    """
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if int(error):
        raise BackendError(f"NVRTC failed with {error!r}")
    return major, minor


def compile_cubin(source: str, arch: str, macros: dict[str, int], log_to=None) -> bytes:
    """`source`.cu for `arch` ("sm_90"); `log_to` collects ptxas' resource report.

    Raises:
        BackendError: the compiler refused; the message holds its first lines.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=source,
        arch=arch,
        std="c++17",
        include_path=str(SOURCES),
        define_macro=[(name, str(value)) for name, value in macros.items()],
        ptxas_options=None if log_to is None else ["-v"],
    )
    try:
        program = Program((SOURCES / f"{source}.cu").read_text(), "c++", options)
        return bytes(program.compile("cubin", logs=log_to).code)
    except Exception as error:
        reason = " / ".join(str(error).strip().splitlines()[:8])
        raise BackendError(f"NVRTC could not compile {source}.cu for {arch}: {reason}") from error


def cached_cubin(source: str, arch: str, macros: dict[str, int]) -> bytes:
    """What `compile_cubin` returns, from the disk if it is kept there."""
    options = repr((source, arch, sorted(macros.items()), version()))
    return kernel_cache.obtain(
        f"cuda-{source}-{arch}-{kernel_cache.fingerprint(options, SOURCES)}.cubin",
        make=lambda path: path.write_bytes(compile_cubin(source, arch, macros)),
        load=lambda _, cubin: cubin,
    )


@functools.cache
def _module(source: str, arch: str, macros: tuple):
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cached_cubin(source, arch, dict(macros)), name=source)


@functools.cache
def _kernel(source: str, name: str, device: int, macros: tuple, shared: int) -> int:
    """The handle of a kernel that may use `shared` bytes on this device."""
    from cuda.bindings import driver

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    kernel = _module(source, arch, macros).get_kernel(name)
    handle = driver.CUkernel(int(kernel.handle))
    if shared > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuKernelSetAttribute(attribute, shared, handle, driver.CUdevice(device)))
    _keep.append(kernel)
    return int(handle)


_keep: list = []  # kernels behind the handles


def check(result: tuple) -> None:
    """RuntimeError unless a call of the CUDA driver returned success."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]!r}")


def _ensure_context(device: torch.device) -> None:
    """A thread that has not called CUDA's runtime yet, autograd's say, has no current context."""
    from cuda.bindings import driver

    if not int(driver.cuCtxGetCurrent()[1]):
        error, context = driver.cuDevicePrimaryCtxRetain(device.index)
        check((error,))
        check(driver.cuCtxSetCurrent(context))


def launch(source, name, macros, grid, block, shared, arguments, device) -> None:
    """One kernel on torch's current stream of `device`; `arguments` is passed by value."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        _ensure_context(device)
        kernel = _kernel(source, name, device.index, tuple(sorted(macros.items())), shared)
        stream = torch.cuda.current_stream(device).cuda_stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        function = driver.CUfunction(kernel)
        check(
            driver.cuLaunchKernel(
                function, *grid, block, 1, 1, shared, stream, ctypes.addressof(parameters), 0
            )
        )
