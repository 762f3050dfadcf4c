"""Times the CPU selective scan against plain PyTorch, other packages and the exponential alone.

    python experiments/benchmarks/scan.py [--lengths 66 258 1026] [--threads 1] [--out FILE]

One direction with D, gate, bias and softplus; "both directions" is one call for two such scans.
All contenders run in turn in one process on the same tensors and are compared round by round.
Their values and gradients are checked first; a wrong one ends the run. mamba-ssm's reference and
mambapy take part when they are installed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import peers
import torch
from harness import MEASURED, error, processor, race, record, require, write

from dis_ssm.ops import bidirectional_selective_scan, cpu, selective_scan

BOUND = 2e-5  # error allowed, of the largest entry


def make_inputs(batch: int, length: int, channels: int, state: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    return dict(
        x=randn(batch, length, channels),
        dt=randn(batch, length, channels),
        A=-torch.arange(1.0, state + 1).repeat(channels, 1),
        B=randn(batch, length, state),
        C=randn(batch, length, state),
        D=torch.ones(channels),
        z=randn(batch, length, channels),
        dt_bias=torch.full((channels,), -4.0),
    )


def kernel(**inputs):
    return selective_scan(**inputs, backend="cpu")


def kernel_both(x, dt, A, B, C, D, z, dt_bias):
    return bidirectional_selective_scan(
        x, x, dt, dt, A, A, B, B, C, C, D, D, z, dt_bias, dt_bias, backend="cpu"
    )


def forward(run, inputs):
    def call():
        with torch.no_grad():
            return run(**inputs)

    return call


def training(run, inputs, grad):
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}

    def call():
        for leaf in leaves.values():
            leaf.grad = None
        y = run(**leaves)
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    return call


def exponentials(count: int):
    """`count` of the kernel's own exp2 in the first-level cache, on one thread; checked."""
    exp2 = cpu.library().dis_ssm_exp2
    grid = torch.linspace(-120, 120, 1 << 16)
    exact = grid.double().exp2()
    exp2(grid.data_ptr(), grid.data_ptr(), grid.numel(), 1.0, 1)
    require("exp2", ((grid.double() - exact) / exact).abs().max().item(), 1e-6)
    values, out = torch.linspace(0, 1, 4096), torch.empty(4096)
    sizes = values.numel(), -0.3, count // values.numel()
    return lambda: exp2(values.data_ptr(), out.data_ptr(), *sizes)


def compare(shape: tuple, rounds: int) -> dict:
    inputs = make_inputs(*shape)
    grad = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    others = {"lean PyTorch loop": peers.lean_training}
    if shape[1] <= 300:  # the rest take minutes or tens of GB beyond
        others |= {"mambapy": peers.mambapy(), "dis_ssm reference": _reference}
    others = {name: run for name, run in others.items() if run}

    truth = training(_reference, {n: t.double() for n, t in inputs.items()}, grad.double())()
    steps = {"kernel": training(kernel, inputs, grad)}
    steps |= {name: training(run, inputs, grad) for name, run in others.items()}
    for name, step in steps.items():
        for value, exact in zip(step(), truth, strict=True):
            require(name, error(value, exact), BOUND)

    scans = {"kernel": kernel, "kernel, both directions": kernel_both, **others}
    scans["lean PyTorch loop"] = peers.lean
    if reference := peers.mamba_reference():
        scans["mamba-ssm selective_scan_ref"] = reference
    scans = {name: forward(run, inputs) for name, run in scans.items()}
    for name, run in scans.items():
        if name != "kernel, both directions":
            require(name, error(run(), truth[0]), BOUND)
    scans["as many exponentials"] = exponentials(math.prod(shape))
    steps["kernel, both directions"] = training(kernel_both, inputs, grad)
    return {"forward": race(scans, rounds), "forward and backward": race(steps, rounds)}


def _reference(**inputs):
    return selective_scan(**inputs, backend="reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=8, channels=768, state=16, threads=1, rounds=9).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[66, 258, 1026])
    parser.add_argument("--out", type=Path, default=MEASURED / "scan-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    isa, threads = cpu.instruction_set(), options.threads
    report = record(f"{processor()}, {isa}, {threads} thread{'s' * (threads > 1)}")
    print(report["device"])
    for length in options.lengths:
        shape = (options.batch, length, options.channels, options.state)
        found = compare(shape, options.rounds)
        for row in found["forward"].values():
            row["G state-steps/s"] = round(math.prod(shape) / row["ms"] / 1e6, 2)
        found["forward"]["kernel, both directions"]["G state-steps/s"] *= 2
        report[f"(batch, length, channels, state) = {shape}"] = found
        for part, rows in found.items():
            for name, row in rows.items():
                line = f"{length:5d} {part:21s} {name:29s}"
                print(line + f" {row['ms']:9.2f} ms {row['ratio']:7.2f} x kernel")
    write(report, options.out)


if __name__ == "__main__":
    main()
