"""Kernels of both scan directions: what they cost at least, whether they are right, their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peers
import torch
from harness import error
from torch import Tensor

from dis_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan, selective_scan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {"values": 4e-6, "gradients": 4e-5}  # float32, of the largest entry
HALF_BOUNDS = {"values": 2, "gradients": 3}  # times the error of plain PyTorch in that dtype
HALF_FLOOR = 2e-5  # error that half precision is always allowed
PEER_BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# ---- floors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What the floors need: multiprocessors, the highest clock in Hz, bytes/s of its memory."""

    processors: int
    clock: float
    bandwidth: float


def describe(index: int) -> Gpu:
    """From the driver's attributes; memory moves two words a clock of its bus."""
    from cuda.bindings import driver

    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        code, value = driver.cuDeviceGetAttribute(kind, driver.CUdevice(index))
        if int(code):
            raise RuntimeError(f"CUDA: {code!r} for {name}")
        return value

    bus, memory_khz = attribute("GLOBAL_MEMORY_BUS_WIDTH"), attribute("MEMORY_CLOCK_RATE")
    return Gpu(
        attribute("MULTIPROCESSOR_COUNT"),
        1e3 * attribute("CLOCK_RATE"),
        2e3 * memory_khz * bus / 8,
    )


# Work of both directions per token and channel with N states. memory: tensors read or written.
# exp: special-function calls, 16 a clock and multiprocessor. issue: instructions, 128 likewise, an
# estimate scaled from N = 16. "recomputed" is a second evaluation of the decays.
WORK = {
    "scan, forward": lambda N: {"memory": 6, "exp": 2 * N + 6},
    "scan, backward": lambda N: {
        "memory": 12,
        "exp": 2 * N + 10,
        "exp, recomputed": 4 * N + 10,
        "issue": 660 * N / 16,
    },
    "convolution, forward": lambda N: {"memory": 3, "exp": 4},
    "convolution, backward": lambda N: {"memory": 4, "exp": 4},
}
FORMULAS = {
    "memory": "tensors * batch * length * channels * bytes / bandwidth",
    "exp": "calls * batch * length * channels / (16 * multiprocessors * clock)",
    "issue": "instructions * batch * length * channels / (128 * multiprocessors * clock)",
}


def floors(gpu: Gpu, kernel: str, name: str, shape: tuple, size: int) -> dict[str, float]:
    """Microseconds for `WORK` of (batch, length, channels, state), `size` bytes a value."""
    batch, length, channels, state = shape
    rates = {"memory": gpu.bandwidth / size}
    rates["exp"] = 16 * gpu.processors * gpu.clock
    rates["issue"] = 8 * rates["exp"]
    elements, work = batch * length * channels, WORK[f"{kernel}, {name}"](state)
    return {unit: short(1e6 * n * elements / rates[unit.split(",")[0]]) for unit, n in work.items()}


# ---- correctness -----------------------------------------------------------------------------


def scan_inputs(shape: tuple, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Of `bidirectional_selective_scan`; A, D and dt_bias are float32."""
    batch, length, channels, state = shape
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    inputs = {}
    for side in "fb":
        inputs |= {f"{n}_{side}": randn(batch, length, channels, dtype=dtype) for n in ("x", "dt")}
        inputs |= {f"{n}_{side}": randn(batch, length, state, dtype=dtype) for n in "BC"}
        inputs[f"A_{side}"] = -torch.exp(0.7 * randn(channels, state))
        inputs[f"D_{side}"], inputs[f"dt_bias_{side}"] = randn(channels), randn(channels) - 1
    return inputs | {"z": randn(batch, length, channels, dtype=dtype)}


def conv_inputs(shape: tuple, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, length, channels, _ = shape
    g = torch.Generator(device).manual_seed(0)
    sizes = {"x": (batch, length, channels)}
    sizes |= {f"weight_{side}": (channels, 4) for side in "fb"}
    sizes |= {f"bias_{side}": (channels,) for side in "fb"}
    inputs = {n: torch.randn(*size, generator=g, device=device) for n, size in sizes.items()}
    return inputs | {"x": inputs["x"].to(dtype)}


def one_direction(reverse: bool, backend: str, **inputs: Tensor) -> Tensor:
    side = "b" if reverse else "f"
    own = {n.removesuffix(f"_{side}"): t for n, t in inputs.items() if n.endswith(f"_{side}")}
    return selective_scan(**own, z=inputs["z"], reverse=reverse, backend=backend)


KERNELS = {
    "scan": {
        "both directions": (bidirectional_selective_scan, scan_inputs),
        "forward direction": (partial(one_direction, False), scan_inputs),
        "reverse direction": (partial(one_direction, True), scan_inputs),
    },
    "convolution": {"both directions": (bidirectional_causal_conv1d, conv_inputs)},
}


def outputs_and_gradients(function: Callable, inputs: dict[str, Tensor]) -> tuple[list, list]:
    """Outputs, and the gradients of their sum weighted with fixed random numbers."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator(outputs[0].device).manual_seed(1)
    weights = [torch.randn(y.shape, generator=g, device=y.device).bfloat16() for y in outputs]
    weights = [w.to(y.dtype) for w, y in zip(weights, outputs, strict=True)]  # exact in all dtypes
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    return [y.detach() for y in outputs], [g for g in gradients if g is not None]


def verify(function: Callable, inputs: dict[str, Tensor], backend: str) -> dict:
    """Largest errors of values and gradients, and the largest as a share of what is allowed."""
    kernel, plain = partial(function, backend=backend), partial(function, backend="reference")
    truth = outputs_and_gradients(plain, {n: t.double() for n, t in inputs.items()})
    found = outputs_and_gradients(kernel, inputs)
    half = any(t.dtype in DTYPES[1:] for t in inputs.values())
    base = outputs_and_gradients(plain, inputs) if half else truth
    row, shares = {}, []
    for part, tensors in zip(BOUNDS, zip(found, truth, base, strict=True), strict=True):
        rows = list(zip(*tensors, strict=True))
        errors = [error(value, exact) for value, exact, _ in rows]
        bounds = [BOUNDS[part]] * len(rows)
        if half:
            bounds = [max(HALF_BOUNDS[part] * error(b, t), HALF_FLOOR) for _, t, b in rows]
        row[part] = short(max(errors))
        shares += map(float.__truediv__, errors, bounds)
    return row | {"share of the bound": short(max(shares)), "passed": max(shares) <= 1}


def short(number: float) -> float | str:
    return float(f"{number:.4g}") if number < float("inf") else "not finite"


def check(rows: dict, kernel: str, device: torch.device, shapes: list[tuple]) -> None:
    """Adds a row of `verify` for every direction, dtype and shape of the kernel."""
    for name, (function, make) in KERNELS[kernel].items():
        for dtype in DTYPES:
            for shape in shapes:
                case = f"{kernel}, {name}, {shape}, {str(dtype).removeprefix('torch.')}"
                with torch.backends.cudnn.flags(allow_tf32=False):
                    rows[case] = verify(function, make(shape, dtype, device), device.type)


# ---- kernel times ----------------------------------------------------------------------------


class Stopwatch:
    """Seconds of one call: of the GPU between two events, elsewhere of the clock on the wall.

    The buffer written before each call empties the L2 cache, and keeps the GPU busy while the call
    is being launched.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.buffer = torch.empty(1 << 30, dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Callable) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        for _ in range(4):
            self.buffer.zero_()
        self.events[0].record()
        run()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3

    def copy_rate(self) -> float:
        """Bytes/s read plus written by a large copy."""
        half = self.buffer.numel() // 2
        seconds = [self(lambda: self.buffer[:half].copy_(self.buffer[half:])) for _ in range(9)]
        return 2 * half / statistics.median(seconds)


def take_turns(contenders: dict[str, Callable], rounds: int, stopwatch: Callable) -> dict:
    """Median microseconds, and the ratio to the first contender, median over the rounds."""
    for run in contenders.values():
        for _ in range(3):
            run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(stopwatch(run))
    first = next(iter(seconds.values()))
    rows = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        ratio = statistics.median(map(float.__truediv__, times, first))
        rows[name] = {"us": round(1e6 * middle, 1), "spread": round((high - low) / middle, 3)}
        rows[name]["ratio"] = round(ratio, 3)
    return rows


def passes(function: Callable, inputs: dict[str, Tensor]) -> dict[str, Callable]:
    """The forward pass without and with what training keeps, and the backward pass alone."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(y) for y in outputs]

    def backward():
        return torch.autograd.grad(outputs, list(leaves.values()), weights, retain_graph=True)

    return {
        "forward": torch.no_grad()(partial(function, **inputs)),
        "forward, training": partial(function, **leaves),
        "backward": backward,
    }


def check_peer(run: Callable, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ArithmeticError if the peer's values or gradients are wrong on a smaller batch."""
    inputs = scan_inputs((2, shape[1], 64, shape[3]), dtype, device)
    reference = partial(bidirectional_selective_scan, backend="reference")
    exact = {n: t.double() for n, t in inputs.items()}
    (y,), gradients = outputs_and_gradients(
        lambda **leaves: run(**{n: peers.to_mamba(n, t) for n, t in leaves.items()}).mT, inputs
    )
    (y_true,), truths = outputs_and_gradients(reference, exact)
    worst = max(map(error, [y, *gradients], [y_true, *truths]))
    if not worst <= PEER_BOUND[dtype]:
        raise ArithmeticError(f"wrong by {worst:.2g} of the maximum")


def time_kernel(
    report: dict,
    kernel: str,
    shape: tuple,
    dtype: torch.dtype,
    stopwatch: Stopwatch,
    gpu: Gpu,
    rounds: int = 25,
) -> None:
    """Adds every pass of both directions, a table each: contenders, floors, distance to them."""
    device, length = stopwatch.device, shape[1]
    case = f"{length} tokens, {str(dtype).removeprefix('torch.')}"
    function, make = KERNELS[kernel]["both directions"]
    inputs = make(shape, dtype, device)
    contenders = {"dis_ssm": passes(partial(function, backend=device.type), inputs)}
    if kernel == "scan":
        try:
            peer = peers.mamba_bidirectional()
            check_peer(peer, shape, dtype, device)
            theirs = {n: peers.to_mamba(n, t) for n, t in inputs.items()}
            contenders["mamba-ssm"] = passes(peer, theirs)
        except (ImportError, ArithmeticError, RuntimeError) as reason:
            report.setdefault("left out", {})[f"mamba-ssm, {case}"] = str(reason)
    for name in contenders["dis_ssm"]:
        runs = {contender: calls[name] for contender, calls in contenders.items()}
        rows = take_turns(runs, rounds, stopwatch)
        limits = floors(gpu, kernel, name.split(",")[0], shape, dtype.itemsize)
        ours, floor = rows["dis_ssm"], max(limits.values())
        ours |= {"floor": floor, "times the floor": round(ours["us"] / floor, 3), "floors": limits}
        table = report.setdefault(f"{kernel}, {name}", {})
        table |= {f"{case}, {contender}": row for contender, row in rows.items()}
