"""Times the selective scan against the PyTorch reference and, when installed, mamba-ssm's.

    python experiments/benchmarks/scan.py [--length 258] [--channels 768] [--out results.json]

All contenders run in turn in one process on the same tensors, after a warm-up, and are compared by
their medians. Results are checked against each other first: a wrong one is reported, not timed.
mamba-ssm is installed when its Python files are importable; its compiled parts are not needed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

from dis_ssm.ops import native, selective_scan

TOLERANCE = 1e-4  # of the largest entry


def mamba_reference():
    """mamba-ssm's selective_scan_ref, its compiled modules stubbed; None if not installed."""
    for name in ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops.triton.layer_norm"):
        stub = types.ModuleType(name)
        if name == "mamba_ssm":
            spec = importlib.util.find_spec(name)
            if spec is None:
                return None
            stub.__path__ = list(spec.submodule_search_locations)
        stub._layer_norm_fwd = None
        sys.modules.setdefault(name, stub)
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref


def contenders(batch: int, length: int, channels: int, state: int):
    """name -> (forward, forward and backward), all on the same numbers."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    inputs = dict(
        x=randn(batch, length, channels),
        dt=randn(batch, length, channels),
        A=-torch.arange(1.0, state + 1).repeat(channels, 1),
        B=randn(batch, length, state),
        C=randn(batch, length, state),
        D=torch.ones(channels),
        z=randn(batch, length, channels),
        dt_bias=torch.full((channels,), -4.0),
    )
    grad = randn(batch, length, channels)

    def pair(run, inputs, grad):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}

        def forward():
            with torch.no_grad():
                return run(**inputs)

        def training():
            for leaf in leaves.values():
                leaf.grad = None
            run(**leaves).backward(grad)

        return forward, training

    found = {
        "native": pair(lambda **k: selective_scan(**k, backend="cpu"), inputs, grad),
        "reference": pair(lambda **k: selective_scan(**k, backend="reference"), inputs, grad),
    }
    if ref := mamba_reference():
        swapped = {k: v.mT.contiguous() if v.ndim == 3 else v for k, v in inputs.items()}

        def run(x, dt, A, B, C, D, z, dt_bias):
            return ref(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

        forward, _ = pair(run, swapped, grad.mT.contiguous())
        found["mamba_ssm selective_scan_ref"] = forward, None  # its backward is quadratic in length
    return found


def check(found) -> None:
    truth = found["reference"][0]()
    for name, (forward, _) in found.items():
        y = forward()
        y = y if y.shape == truth.shape else y.mT
        error = ((y - truth).abs().max() / truth.abs().max()).item()
        if not error < TOLERANCE:
            raise SystemExit(f"{name} is wrong by {error:.2g} of the maximum: nothing was timed")


def measure(found, which: int, rounds: int) -> dict[str, float]:
    """Median seconds of each, one run of each in turn."""
    timed = {name: functions[which] for name, functions in found.items() if functions[which]}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=8, length=258, channels=768, state=16, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file; by default none is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    shape = (options.batch, options.length, options.channels, options.state)
    found = contenders(*shape)
    check(found)
    report = {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "device": f"{processor()}, {native.instruction_set()}, {options.threads} thread(s)",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "shape": dict(zip(("batch", "length", "channels", "state"), shape, strict=True)),
    }
    for which, part in enumerate(("forward", "forward and backward")):
        seconds = measure(found, which, options.rounds)
        report[part] = {
            name: {"ms": round(1e3 * s, 3), "times native": round(s / seconds["native"], 2)}
            for name, s in seconds.items()
        }
        for name, row in report[part].items():
            print(f"{part:21s} {name:30s} {row['ms']:9.2f} ms {row['times native']:7.2f} x native")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
