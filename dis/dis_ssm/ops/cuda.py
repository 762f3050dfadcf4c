"""The CUDA kernels: compiled by NVRTC at first use, cached on disk, launched on torch's stream.

The sources in `kernels/cuda` need neither nvcc nor torch's headers. One program holds the kernels
for one I/O type and one state size; its cubin is kept beside the CPU library, under a name that
hashes sources, options, architecture and compiler version. `cuda.core` is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re

import torch
from torch import Tensor

from dis_ssm.ops import nvrtc, reference
from dis_ssm.ops.cuda_abi import MAX_PLANES, Conv, ConvSide, Plane, Rows, Scan, ScanDirection, Sums
from dis_ssm.ops.tensors import ConvInputs, Filter, ScanInputs, ScanTensors, as_returned

IO_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_STATE = 64
CHUNK, STEP = 16, 4  # tokens between two kept states, and of a backward step; scan.cu's


# ---- whether they run ------------------------------------------------------------------------


@functools.cache
def missing() -> str | None:
    """None if this machine has what the kernels need, else what it lacks, in one line."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    return nvrtc.missing_packages()


class _Passing(Exception):
    """Why the kernels cannot be tried now, though they may later."""


def why_not() -> str | None:
    """None if the kernels run and give the reference's numbers on a small problem, else why.

    The answer is one line and is kept for the process, unless the reason is one that passes: no
    free memory, or a CUDA graph that is being captured.
    """
    try:
        return _lasting_reason()
    except _Passing as reason:
        return str(reason)


@functools.cache
def _lasting_reason() -> str | None:
    try:
        if reason := missing():
            return reason
        if torch.cuda.is_current_stream_capturing():
            raise _Passing(_CAPTURING)
        error = _largest_error()
    except _Passing:
        raise
    except Exception as failure:
        message = nvrtc.one_line(failure)
        for pattern, reason in _PASSING.items():
            if re.search(pattern, message, re.IGNORECASE):
                raise _Passing(reason) from None
        return f"the kernels do not run here ({_versions()}): {message}"
    if not error < 1e-4:
        return f"the kernels are wrong by {error:.2g} ({_versions()})"
    return None


_CAPTURING = "they were never run before this CUDA graph is captured; run the model once before"
_PASSING = {
    r"out.of.memory|alloc.failed|MemoryError": "no GPU memory was free to try them",
    r"captur": _CAPTURING,
}


def _versions() -> str:
    """What a GPU's failure depends on, as far as it is known."""
    found = []
    for name, ask in (
        ("", torch.cuda.get_device_name),
        ("cuda-core ", lambda: importlib.metadata.version("cuda-core")),
        ("NVRTC ", lambda: "{}.{}".format(*nvrtc.version())),
    ):
        with contextlib.suppress(Exception):  # it may be the failure itself
            found.append(name + ask())
    return ", ".join(found)


def _largest_error(device: str = "cuda") -> float:
    """Of values and gradients of a small problem, convolutions before a scan, against float64.

    Relative to the largest entry of each tensor; NaN if any is.
    """
    with torch.inference_mode(False), torch.autocast("cuda", enabled=False):
        numbers = _self_check_numbers()
        with torch.no_grad():
            found = _by_kernels(*(t.to(device, torch.float32) for t in numbers))
        with torch.enable_grad():
            exact = _by_reference(*(t.to(device) for t in numbers))
        pairs = zip(found, exact, strict=True)
        errors = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs])
    return errors.max().item()


def _self_check_numbers() -> list[Tensor]:
    """dout, x, z, and for each direction weight, dt, A, B, C, D, dt_bias; float64 on the CPU."""
    tokens, states, rates, channels = (2, 67, 70), (2, 67, 16), (70, 16), (70,)
    direction = [(70, 4), tokens, rates, states, states, channels, channels]
    drawn = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64, "device": "cpu"}
    numbers = [torch.randn(shape, **drawn) for shape in (tokens, *direction, *direction, tokens)]
    x, *directions, z = [-t.abs() if t.shape == rates else t for t in numbers]
    return [x, x, z, *directions]


def _by_kernels(
    dout, x, z, w_f, dt_f, A_f, B_f, C_f, D_f, bias_f, w_b, dt_b, A_b, B_b, C_b, D_b, bias_b
) -> list[Tensor]:
    """y and the gradients of all tensors but dout, in their order."""
    filters = (w_f, None, w_b, None, True, False)
    x_f, x_b = conv_forward(x, *filters)
    inputs = (x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z)
    y, pregate, kept = scan_forward(*inputs, True, False, True)
    d_f, d_b, dz = ScanInputs.from_flat(*scan_backward(dout, pregate, kept, *inputs, True, False))
    dx, dw_f, _, dw_b, _ = conv_backward(d_f.x, d_b.x, x, *filters)
    (_, *d_f), (_, *d_b) = d_f, d_b
    return [y, dx, dz, dw_f, *d_f, dw_b, *d_b]


def _by_reference(dout, *tensors) -> list[Tensor]:
    """What `_by_kernels` returns, by autograd over plain PyTorch."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, z, w_f, dt_f, A_f, B_f, C_f, D_f, bias_f, w_b, dt_b, A_b, B_b, C_b, D_b, bias_b = leaves
    x_f, x_b = reference.bidirectional_causal_conv1d(x, w_f, w_b)
    y = reference.bidirectional_selective_scan(
        x_f, x_b, dt_f, dt_b, A_f, A_b, B_f, B_b, C_f, C_b, D_f, D_b, z, bias_f, bias_b
    )
    y.backward(dout)
    return [y.detach(), *(t.grad for t in leaves)]


# ---- arguments -------------------------------------------------------------------------------


class _Call:
    """What every op needs: the I/O type, the launch, and tensors kept alive behind pointers."""

    def __init__(self, source: str, x: Tensor, **macros: int):
        self.source, self.device, self.io = source, x.device, x.dtype
        self.macros = {"IO": IO_TYPES[x.dtype], **macros}
        self.keep, self.planes = [], []

    def rows(self, x: Tensor | None) -> Rows:
        if x is None:
            return Rows(None, 0, 0)
        x = x.to(self.io)
        size = x.element_size()
        if not (x.stride(-1) == 1 or x.shape[-1] == 1) or x.stride(1) * size >= 2**31:
            x = x.contiguous()
        self.keep.append(x)
        return Rows(x.data_ptr(), x.stride(0) * size, x.stride(1) * size)

    def vector(self, x: Tensor | None) -> int | None:
        return None if x is None else self.pointer(x.float().contiguous())

    def pointer(self, x: Tensor | None) -> int | None:
        self.keep.append(x)
        return None if x is None else x.data_ptr()

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.io, device=self.device)

    def partial(self, rows: int, like: Tensor | None, dtype: torch.dtype) -> tuple:
        """A workspace of partial results and the tensor that `sum` fills from it."""
        if like is None:
            return None, None
        partial = self.empty(rows, *like.shape, dtype=torch.float32)
        out = self.empty(*like.shape, dtype=dtype)
        as_io = int(dtype is self.io)
        self.planes.append(
            Plane(self.pointer(partial), self.pointer(out), rows, out.numel(), as_io)
        )
        return partial.data_ptr(), out

    def sum(self) -> None:
        size = max((plane.size for plane in self.planes), default=0)
        if size:
            sums = Sums((Plane * MAX_PLANES)(*self.planes))
            self.launch("sum_partials", (-(-size // 128), len(self.planes), 1), 128, sums)

    def launch(self, name: str, grid: tuple, block: int, arguments, shared: int = 0, **macros):
        if all(grid):
            macros = self.macros | macros
            nvrtc.launch(self.source, name, macros, grid, block, shared, arguments, self.device)


# ---- the scan --------------------------------------------------------------------------------

FORWARD_THREADS, FORWARD_TILE = 64, 8  # scan_forward.cuh's
FULL = 128  # channels: a multiple of those of any block
FEW_WARPS = 4  # an SM; with fewer in the wide kernel a channel gets several lanes


def _scan(given: ScanInputs, dt_softplus: bool, reverse: bool, keeps: bool) -> tuple[_Call, Scan]:
    x, z, directions = given.f.x, given.z, given.directions()
    _, state = given.f.A.shape
    states = next(n for n in (16, 32, 64) if state <= n)
    warps = backward_warps(states, x.itemsize, *_shared_memory(x.device))
    known = {
        "SOFTPLUS": dt_softplus,
        "GATED": z is not None,
        "SKIPS": any(tensors.D is not None for tensors in directions),
        "KEEPS": keeps,
        "FULL": x.shape[2] % FULL == 0,
        "ALIGNED": True,
    }
    known = {name: int(value) for name, value in known.items()}
    call = _Call("scan", x, STATES=states, WARPS=warps, **known)
    scan = Scan(*x.shape, state, len(directions))
    for i, tensors in enumerate(directions):
        scan.direction[i] = ScanDirection(
            x=call.rows(tensors.x),
            dt=call.rows(tensors.dt),
            B=call.rows(tensors.B),
            C=call.rows(tensors.C),
            A=call.vector(tensors.A),
            D=call.vector(tensors.D),
            dt_bias=call.vector(tensors.dt_bias),
            reverse=(i == 1) != reverse,
        )
    scan.z = call.rows(z)
    return call, scan


def backward_shared(states: int, warps: int, io_bytes: int) -> int:
    """Bytes of shared memory of scan_backward (scan_backward.cuh: BLOCK_FLOATS, WARP_FLOATS)."""
    row, ring, sums = 32 + max(2 * states, 32), CHUNK // STEP, 8 * 128 + 12
    warp = 4 * (CHUNK * row + STEP * 64 + ring * states * 32 + sums) + 8 * CHUNK * 32 * io_bytes
    return 4 * 2 * states * (CHUNK + 4) + 4 * CHUNK * states * io_bytes + warps * warp


def backward_warps(states: int, io_bytes: int, block_limit: int, sm_limit: int) -> int:
    """Warps of a block: as many as possible on an SM, at most 8 (registers), in large blocks."""

    def resident(warps):
        shared = backward_shared(states, warps, io_bytes)
        return 0 if shared > block_limit else min(sm_limit // (shared + 1024) * warps, 8)

    return max((4, 2, 1), key=resident)


def _aligned(scan: Scan, states: int, io_bytes: int) -> bool:
    """Whether every row that scan_backward copies begins and ends on a border of 16 bytes, and
    a chunk of them lies within 2^31 bytes."""
    directions = scan.direction[: scan.directions]
    rows = [scan.z, scan.dout, *(row for d in directions for row in (d.x, d.dt, d.B, d.C))]
    numbers = [n for r in rows for n in (r.data or 0, r.batch_stride, r.row_stride)]
    near = all(r.row_stride * CHUNK < 2**31 for r in rows)
    even = all(n % 16 == 0 for n in (*numbers, scan.channels * io_bytes))
    return near and even and scan.state == states


@functools.cache
def _shared_memory(device: torch.device) -> tuple[int, int]:
    """Bytes a block may ask for, and bytes of a multiprocessor."""
    from cuda.bindings import driver

    names = driver.CUdevice_attribute
    limits = []
    for name in (
        names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
    ):
        result = driver.cuDeviceGetAttribute(name, driver.CUdevice(device.index))
        nvrtc.check(result)
        limits.append(result[1])
    return limits[0], limits[1]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def scan_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """`dis_ssm::scan` on a GPU: same arguments and results as `scan_op`."""
    *tensors, dt_softplus, reverse, save = arguments
    given = ScanInputs.from_flat(*tensors)
    call, scan = _scan(given, dt_softplus, reverse, save)
    x, z, two = given.f.x, given.z, scan.directions == 2
    batch, length, channels = x.shape
    states = call.macros["STATES"]
    wide_warps = batch * channels * (states // 16) / 2 / 32
    apart = wide_warps < FEW_WARPS * _processors(x.device)
    out = call.empty(*x.shape)
    keep_sum = save and z is not None
    total = call.empty(*(x.shape if keep_sum or (two and not apart) else (0,)), dtype=torch.float32)
    chunks = -(-length // CHUNK)
    shape = (scan.directions, batch, chunks, scan.state, channels) if save else (0,)
    kept = call.empty(*shape, dtype=torch.float32)
    scan.out = call.pointer(out)
    scan.pregate = total.data_ptr() if total.numel() else None
    for direction, plane in zip(scan.direction, kept if save else (), strict=False):
        direction.states = plane.data_ptr()
    shared = 2 * FORWARD_TILE * 2 * states * 4
    if length and apart:
        planes = call.empty(*((2, *x.shape) if two else (0,)), dtype=torch.float32)
        scan.y = planes.data_ptr()
        width = FORWARD_THREADS * 4 // states
        grid = (batch, -(-channels // width), scan.directions)
        call.launch("scan_forward_apart", grid, FORWARD_THREADS, scan, shared)
        if two:
            call.launch("scan_combine", (-(-x.numel() // 256), 1, 1), 256, scan)
    elif length:
        grid = (batch, -(-channels // (2 * FORWARD_THREADS * 16 // states)), 1)
        call.launch(
            "scan_forward_both" if two else "scan_forward", grid, FORWARD_THREADS, scan, shared
        )
    return out, total if keep_sum else call.empty(0, dtype=torch.float32), kept


def scan_backward(dout: Tensor, pregate: Tensor, states: Tensor, *arguments) -> list[Tensor]:
    """`dis_ssm::scan_backward` on a GPU: same arguments and results as `scan_backward_op`."""
    *tensors, dt_softplus, reverse = arguments
    given = ScanInputs.from_flat(*tensors)
    call, scan = _scan(given, dt_softplus, reverse, True)
    x = given.f.x
    batch, length, channels = x.shape
    warps, size = call.macros["WARPS"], call.macros["STATES"]
    groups = -(-channels // (32 * warps))
    scan.dout = call.rows(dout)
    scan.pregate = call.pointer(pregate.contiguous()) if pregate.numel() else None
    dz = None if given.z is None else call.empty(*x.shape)
    scan.dz = call.pointer(dz)
    rows, directions = batch if length else 0, []
    blocks, states = scan.direction[: scan.directions], states.contiguous()
    for direction, tensors, kept in zip(blocks, given.directions(), states, strict=True):
        direction.states = call.pointer(kept)
        dx, ddt = call.empty(*x.shape), call.empty(*x.shape)
        direction.dx, direction.ddt = call.pointer(dx), call.pointer(ddt)
        direction.dB, dB = call.partial(groups, tensors.B, call.io)
        direction.dC, dC = call.partial(groups, tensors.C, call.io)
        direction.dA, dA = call.partial(rows, tensors.A, torch.float32)
        direction.dD, dD = call.partial(rows, tensors.D, torch.float32)
        direction.ddt_bias, ddt_bias = call.partial(rows, tensors.dt_bias, torch.float32)
        directions.append(ScanTensors(dx, ddt, dA, dB, dC, dD, ddt_bias))
    df, *db = directions
    grads = ScanInputs(df, *(db or [None]), dz)
    if length:
        aligned = int(_aligned(scan, size, call.io.itemsize))
        call.macros |= {"ALIGNED": aligned, "FULL": call.macros["FULL"] & aligned}
        shared = backward_shared(size, warps, call.io.itemsize)
        call.launch("scan_backward", (batch, groups, scan.directions), 32 * warps, scan, shared)
    call.sum()
    return as_returned(grads.flat(), given.flat(), x)


# ---- the convolution -------------------------------------------------------------------------

CONV_THREADS = 128
SEGMENTS = 258, 130, 64  # tokens of a thread, at most


def _conv(given: ConvInputs, silu: bool, reverse: bool) -> tuple[_Call, Conv, list[ConvSide]]:
    """The call, its arguments, and the side of each direction that is given."""
    call = _Call("conv", given.x, K=given.f.weight.shape[1], SILU=int(silu))
    conv = Conv(*given.x.shape)
    conv.x = call.rows(given.x)
    sides = [conv.future, conv.past] if reverse else [conv.past, conv.future]
    sides = sides[: len(given.directions())]
    for side, (weight, bias) in zip(sides, given.directions(), strict=True):
        side.weight, side.bias = call.vector(weight), call.vector(bias)
    call.macros |= {"PAST": int(bool(conv.past.weight)), "FUTURE": int(bool(conv.future.weight))}
    return call, conv, sides


def _segment(conv: Conv, choices: tuple[int, ...], device: torch.device) -> int:
    """Tokens of a thread: equal parts of the length, the longest that leave no processor idle."""
    groups = conv.batch * -(-conv.channels // (2 * CONV_THREADS))
    parts = [max(-(-conv.length // size), 1) for size in choices]
    enough = [n for n in parts if groups * n >= 2 * _processors(device)]
    return max(-(-conv.length // (enough or parts[-1:])[0]), 1)


def _launch_conv(call: _Call, name: str, conv: Conv, rows: list[Rows]) -> None:
    """With two channels a thread where every row is aligned to them."""
    pair = 2 * call.io.itemsize
    numbers = [n for r in rows for n in (r.data or 0, r.batch_stride, r.row_stride)]
    each = 2 if conv.channels % 2 == 0 and all(n % pair == 0 for n in numbers) else 1
    call.macros["EACH"] = each
    groups = -(-conv.channels // (each * CONV_THREADS))
    grid = (conv.batch * -(-conv.length // conv.segment), groups, 1)
    call.launch(name, grid, CONV_THREADS, conv)


def conv_forward(x, weight_f, bias_f, weight_b, bias_b, silu, reverse) -> list[Tensor]:
    """`dis_ssm::conv` on a GPU: same arguments and results as `conv_op`."""
    given = ConvInputs.from_flat(x, weight_f, bias_f, weight_b, bias_b)
    call, conv, sides = _conv(given, silu, reverse)
    conv.segment = _segment(conv, SEGMENTS[1:], x.device)
    outputs = [call.empty(*x.shape) for _ in sides]
    for side, y in zip(sides, outputs, strict=True):
        side.y = call.pointer(y)
    _launch_conv(call, "conv_forward", conv, [conv.x])
    return outputs


def conv_backward(dy_f, dy_b, x, weight_f, bias_f, weight_b, bias_b, silu, reverse) -> list[Tensor]:
    """`dis_ssm::conv_backward` on a GPU: same arguments and results as `conv_backward_op`."""
    given = ConvInputs.from_flat(x, weight_f, bias_f, weight_b, bias_b)
    call, conv, sides = _conv(given, silu, reverse)
    conv.segment = _segment(conv, SEGMENTS, x.device)
    dx = call.empty(*x.shape)
    conv.dx = call.pointer(dx)
    segments, filters = x.shape[0] * -(-x.shape[1] // conv.segment), []
    for side, (weight, bias), dy in zip(sides, given.directions(), (dy_f, dy_b), strict=False):
        side.dy = call.rows(dy)
        side.dweight, dweight = call.partial(segments, weight, torch.float32)
        side.dbias, dbias = call.partial(segments, bias, torch.float32)
        filters.append(Filter(dweight, dbias))
    grads = ConvInputs(dx, *filters)
    _launch_conv(call, "conv_backward", conv, [conv.x, *(side.dy for side in sides)])
    call.sum()
    return as_returned(grads.flat(), given.flat(), x)
