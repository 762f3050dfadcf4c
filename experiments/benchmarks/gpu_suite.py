"""Checks and times the CUDA kernels, then trains and samples DiS beside DiT, on one GPU.

    python experiments/benchmarks/gpu_suite.py [--out FILE] [--minutes 9]

First every kernel is compared with the float64 reference; one that is wrong is not timed and the
exit code is 1. Kernel times come from CUDA events behind a flush of the L2 cache, contenders in
turn, and stand beside the floors of `gpu_kernels.WORK`. Model times are wall-clock times of whole
training steps and network evaluations. A section starts only while its estimated time is left and
is cut off at the end; the JSON says what was left out and why. A PNG is drawn beside it.

mamba-ssm takes part when its kernels can be imported (`peers.mamba_bidirectional` has a recipe
that builds only those), DiT when diffusers can. No network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import gpu_kernels
import gpu_models
import plots
import torch
from gpu_kernels import Gpu, Stopwatch
from harness import MEASURED, record, write

from dis_ssm.ops import cuda

RESERVE = 15  # seconds kept for writing and drawing
SHAPES = [(2, 33, 130, 16), (3, 65, 7, 5), (1, 18, 770, 40), (16, 66, 3072, 16)]
BATCH, WIDTH, STATE = 32, 3072, 16
TIMED = [(66, torch.bfloat16), (258, torch.bfloat16), (1026, torch.bfloat16), (258, torch.float32)]
CAPTURED, COMPILED = ("eager", "graph"), ("compiled", "compiled, graph")
APART = ("eager", "op by op", "graph")
MODELS = [  # name, side of the latents, variants, seconds it may take
    ("DiS-S/2", 32, APART, 30),
    ("DiT-S/2", 32, CAPTURED, 20),
    ("DiS-B/2", 32, APART, 30),
    ("DiT-B/2", 32, CAPTURED, 20),
    ("DiS-H/2", 32, APART, 60),
    ("DiT-XL/2", 32, CAPTURED, 30),
    ("DiS-S/2", 32, COMPILED, 80),
    ("DiT-S/2", 32, COMPILED, 60),
    ("DiS-S/2", 64, CAPTURED, 30),
    ("DiT-S/2", 64, CAPTURED, 30),
    ("DiS-B/2", 64, CAPTURED, 40),
    ("DiT-B/2", 64, CAPTURED, 40),
    ("DiS-H/2", 32, COMPILED, 100),
    ("DiT-XL/2", 32, COMPILED, 80),
    ("DiS-B/2", 32, COMPILED, 80),
    ("DiT-B/2", 32, COMPILED, 60),
    ("DiS-H/2", 64, CAPTURED, 60),
    ("DiT-XL/2", 64, CAPTURED, 60),
]


class TimeUp(BaseException):
    """Not an Exception, so that what a section catches does not hold up the end."""


class Budget:
    """Starts sections while there is time for them and notes what was left out."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.left_out: dict[str, str] = {}

    def run(self, title: str, estimate: float, section: Callable, *arguments) -> None:
        """`section(*arguments)`, if `estimate` seconds are left; its errors are noted."""
        start = time.monotonic()
        left = self.end - start
        if left < estimate:
            self.left_out[title] = f"may take {estimate} s, {max(left, 0):.0f} s were left"
            return
        try:
            with alarm(left):
                section(*arguments)
        except TimeUp:
            self.left_out[title] = f"cut off after {time.monotonic() - start:.0f} s"
        except Exception as reason:
            self.left_out[title] = gpu_models.first_line(reason)
        print(f"{time.monotonic() - start:6.1f} s  {title}", self.left_out.get(title, ""))


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(signum, frame):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    report: dict,
    stopwatch: Stopwatch,
    gpu: Gpu,
    budget: Budget,
    shapes=SHAPES,
    timed=TIMED,
    sizes=(BATCH, WIDTH, STATE),
    models=MODELS,
    time_model: Callable = gpu_models.time_model,
) -> bool:
    """Fills `report`; True if every kernel is right."""
    report["left out"] = budget.left_out
    device, right = stopwatch.device, []
    batch, width, state = sizes
    report["correctness"] = cases = {}
    for kernel in gpu_kernels.KERNELS:
        title = f"correctness of the {kernel}"
        budget.run(title, 10, gpu_kernels.check, cases, kernel, device, shapes)
        wrong = [case for case in cases if case.startswith(kernel) and not cases[case]["passed"]]
        for case in wrong:
            print(f"wrong: {case}: {cases[case]}")
        if title not in budget.left_out and not wrong:
            right.append(kernel)
    for kernel in gpu_kernels.KERNELS:
        for length, dtype in timed:
            shape = batch, length, width, state
            title = f"{kernel}, {shape}, {str(dtype).removeprefix('torch.')}"
            if kernel not in right:
                budget.left_out[title] = f"the {kernel} is wrong or was not checked"
                continue
            arguments = report, kernel, shape, dtype, stopwatch, gpu
            budget.run(title, 15, gpu_kernels.time_kernel, *arguments)
    for name, size, variants, seconds in models:
        title = f"{name}, {size}x{size} latents, {' and '.join(variants)}"
        if len(right) < len(gpu_kernels.KERNELS):
            budget.left_out[title] = "a kernel is wrong or was not checked"
            continue
        budget.run(title, seconds, time_model, report, name, size, variants, device)
    return len(right) == len(gpu_kernels.KERNELS)


def versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda or "none", "driver": "unknown"}
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (match := re.search(r"\s(\d+\.\d+[.\d]*)\s", driver.read_text())):
        found["driver"] = match[1]
    for package in ("diffusers", "mamba-ssm", "cuda-core", "nvidia-cuda-nvrtc"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def slug(device: str) -> str:
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: runs/benchmarks/gpu-DEVICE.json")
    parser.add_argument("--minutes", type=float, default=9)
    options = parser.parse_args()
    if reason := cuda.missing():
        raise SystemExit(f"gpu_suite.py needs a GPU and the CUDA kernels: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    out = options.out or MEASURED / f"gpu-{slug(name)}.json"

    gpu, stopwatch = gpu_kernels.describe(device.index), Stopwatch(device)
    report = record(name)
    report["versions"] |= versions()
    report["gpu"] = asdict(gpu) | {"copy, bytes/s": round(stopwatch.copy_rate())}
    report["floors"] = gpu_kernels.FORMULAS
    right = False
    try:
        budget = Budget(60 * options.minutes - RESERVE - (time.monotonic() - start))
        right = run(report, stopwatch, gpu, budget)
    finally:
        report["seconds"] = round(time.monotonic() - start)
        write(report, out)
    for line in plots.lines(report):
        print(line)
    try:
        print(plots.draw(report, out.with_suffix(".png")))
    except (ImportError, ValueError) as reason:
        print(f"no PNG: {reason}")
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
