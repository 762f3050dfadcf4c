"""Times a whole training step of DiS-S/2 against DiT-S/2 and says where DiS spends it.

    python experiments/benchmarks/step.py [--batch 8] [--size 32] [--threads 2] [--out FILE]

Forward, mean-square loss, backward and AdamW on 4-channel latents, float32, both models in turn in
one process. DiT is diffusers' class with one pair of embedders. "kept" is what autograd holds
between forward and backward, with the fused mixer and with its operations one by one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import MEASURED, processor, race, record, write
from torch.profiler import ProfilerActivity, profile

from dis_ssm.costs.operations import kept_bytes
from dis_ssm.models.mixer import BiMamba
from dis_ssm.models.peers import build
from dis_ssm.ops import cpu

CHANNELS, CLASSES = 4, 1000
PRODUCTS = ("aten::addmm", "aten::addmm_", "aten::mm", "aten::bmm")


def models(size: int) -> dict:
    dis, peer = (build(name, (size, size), CHANNELS, CLASSES) for name in ("DiS-S/2", "DiT-S/2"))
    return {"DiS-S/2": (dis, dis), "DiT-S/2": (peer, lambda x, t, y: peer(x, t, y).sample)}


def training_step(model, predict, x, t, y):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        predict(x, t, y).square().mean().backward()
        optimizer.step()

    return step


def outside_products(step) -> dict:
    """Self time of the operators of one step: outside matrix products, and the largest of them."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(times.values())
    others = {name: time for name, time in times.items() if name not in PRODUCTS}
    largest = sorted(others, key=others.get, reverse=True)[:8]
    return {
        "share": round(sum(others.values()) / total, 3),
        "largest": {name: round(others[name] / total, 3) for name in largest},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=8, size=32, threads=2, rounds=7).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=MEASURED / "step-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    x = torch.randn(options.batch, CHANNELS, options.size, options.size)
    t = torch.randint(0, 1000, (options.batch,))
    y = torch.randint(0, CLASSES, (options.batch,))
    built = models(options.size)
    steps = {name: training_step(*pair, x, t, y) for name, pair in built.items()}
    report = record(f"{processor()}, {cpu.instruction_set()}, {options.threads} threads")
    report["parameters"] = {
        n: sum(p.numel() for p in m.parameters()) for n, (m, _) in built.items()
    }
    report["step"] = race(dict(reversed(steps.items())), options.rounds)
    report["DiS-S/2 outside matrix products"] = outside_products(steps["DiS-S/2"])
    dis = built["DiS-S/2"][0]
    fused = kept_bytes(dis, x, t, y)
    BiMamba.forward = BiMamba.op_by_op
    apart = kept_bytes(dis, x, t, y)
    report["kept MB"] = {"fused mixer": round(fused / 1e6, 1), "op by op": round(apart / 1e6, 1)}
    for name in ("step", "DiS-S/2 outside matrix products", "kept MB"):
        print(f"{name}: {report[name]}")
    write(report, options.out)


if __name__ == "__main__":
    main()
