"""DiS beside attention, against resolution: images/s and memory of training and of sampling.

    python experiments/benchmarks/throughput.py [--models DiS-S/2 DiT-S/2 U-ViT-S/2]
        [--sizes 16 32 64] [--tokens 1024] [--precision float32] [--threads 2] [--out FILE]

A training step is forward, mean square, backward and AdamW; sampling is one network evaluation, of
which a sample takes one a step, two with guidance. DiT is diffusers' class with one pair of
embedders, U-ViT `dis_ssm.models.uvit.UViT`. All contenders of a resolution take turns in one
process, at the same batch: as many images as hold `--tokens` patches of 2x2. "peak GB" is what
the tensors of one contender take, its weights and optimizer included. A PNG is drawn beside the
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_models import first_line, graphed
from gpu_suite import slug
from harness import MEASURED, processor, race, record, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dis_ssm.costs.operations import count, sketch
from dis_ssm.models.peers import build
from dis_ssm.ops import cpu

CHANNELS, CLASSES, PATCH = 4, 1000, 2
STEPS = 1000  # of the diffusion, the range of t
MODELS = ("DiS-S/2", "DiT-S/2", "U-ViT-S/2")
MODES = {"training": "training", "sampling": "sampling: one network evaluation"}  # titles
COLUMNS = {"images/s": "images/s", "peak GB": "peak memory (GB)"}


class Contender:
    """A model with what it takes to train it or to evaluate it."""

    def __init__(self, model: nn.Module, size: int, batch: int, device: torch.device, dtype):
        self.model, self.device, self.dtype = model.to(device), device, dtype
        self.x = torch.randn(batch, CHANNELS, size, size, device=device)
        self.t = torch.randint(STEPS, (batch,), device=device)
        self.y = torch.randint(CLASSES, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda"
        )

    def predict(self) -> torch.Tensor:
        half = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False):
            out = self.model(self.x, self.t, self.y)
        return getattr(out, "sample", out)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.predict().float().square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.predict()

    def runs(self, mode: str) -> Callable[[], None]:
        """What is timed; for sampling, the optimizer's state and the gradients are given up."""
        self.model.train(mode == "training")
        if mode == "training":
            return self.train
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        return self.evaluate

    def held_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)


def rise(run: Callable[[], None], device: torch.device) -> int:
    """Bytes by which the tensors' memory rises above its start while `run` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def compare(
    report: dict,
    names: list[str],
    size: int,
    batch: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
) -> None:
    """Adds a table of training and one of sampling; whoever fails is left out, and why."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    contenders = {}
    for name in names:
        torch.manual_seed(0)
        model = build(name, (size, size), CHANNELS, CLASSES)
        contenders[name] = Contender(model, size, batch, device, dtype)
    for mode in MODES:
        rows = report.setdefault(f"{mode}, {size}x{size} latents", {})
        calls = {}
        for name, contender in contenders.items():
            try:
                run = contender.runs(mode)
                run()
                contender.optimizer.zero_grad()
                peak = contender.held_bytes() + rise(run, device)
                calls[name] = graphed(run) if graph else run
                rows[name] = {"batch": batch, "peak GB": float(f"{peak / 1e9:.4g}")}
            except RuntimeError as reason:
                calls.pop(name, None)
                rows[name] = {"left out": first_line(reason)}
        for name, times in (race(calls, rounds, sync) if calls else {}).items():
            rows[name] |= {"images/s": round(1e3 * batch / times["ms"], 3), **times}
        calls.clear()
        gc.collect()


def draw(report: dict, path: Path) -> None:
    """Rows: training, sampling; columns: images/s, memory; against the side of the latents."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(f"{report['device']}, commit {report['commit']}, {report['date']}", fontsize=10)
    axes, sizes = figure.subplots(len(MODES), len(COLUMNS), sharex=True), report["sizes"]
    for (mode, title), line in zip(MODES.items(), axes, strict=True):
        tables = [report[f"{mode}, {size}x{size} latents"] for size in sizes]
        for (key, label), axis in zip(COLUMNS.items(), line, strict=True):
            for name in report["models"]:
                values = [table[name].get(key, float("nan")) for table in tables]
                axis.plot(sizes, values, "o-", label=name)
            scale = "log" if key == "images/s" else "linear"
            axis.set(xscale="log", yscale=scale, title=title, ylabel=label)
            axis.set_xticks(sizes, [f"{size}x{size}" for size in sizes])
            axis.xaxis.minorticks_off()
            if scale == "linear":
                axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("latents")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 64])
    for name, default in dict(tokens=1024, rounds=5, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs, not eager calls")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if on_gpu := device.type == "cuda":
        title = torch.cuda.get_device_name(device)
    else:
        title = f"{processor()}, {cpu.instruction_set()}, {options.threads} threads"
    out = options.out or MEASURED / f"throughput-{slug(title) if on_gpu else 'cpu'}.json"
    report = record(f"{title}, {options.precision}")
    report |= {"models": options.models, "sizes": options.sizes, "G multiply-adds": {}}
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    for size in options.sizes:
        image = (size, size), CHANNELS, CLASSES
        report["G multiply-adds"][f"{size}x{size}"] = {
            name: count(sketch(build, name, *image), *image)["multiply_adds"] / 1e9
            for name in options.models
        }
        batch = max(1, options.tokens * PATCH**2 // size**2)
        compare(report, options.models, size, batch, options.rounds, device, dtype, options.graph)
        for mode in MODES:
            print(f"{mode}, {size}x{size}:", json.dumps(report[f"{mode}, {size}x{size} latents"]))
    write(report, out)
    draw(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
