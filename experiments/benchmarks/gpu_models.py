"""Training steps and network evaluations of DiS and DiT: images/s and peak memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from harness import race
from step import CHANNELS, CLASSES

from dis_ssm.models.mixer import BiMamba
from dis_ssm.models.peers import build

STEPS = 1000  # of the diffusion, the range of t


def task(model, training: bool, size: int, batch: int, device: torch.device) -> Callable:
    """A training step (mean square, AdamW) or a network evaluation, under bf16 autocast."""
    x = torch.randn(batch, CHANNELS, size, size, device=device)
    t = torch.randint(STEPS, (batch,), device=device)
    y = torch.randint(CLASSES, (batch,), device=device)

    def predict():
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            out = model(x, t, y)
        return getattr(out, "sample", out)

    if not training:
        model.eval()
        return torch.no_grad()(predict)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.train().parameters(), lr=1e-4, fused=True, capturable=on_gpu
    )

    def step():
        optimizer.zero_grad()
        predict().float().square().mean().backward()
        optimizer.step()

    return step


def graphed(run: Callable) -> Callable:
    """`run` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def op_by_op() -> Iterator[None]:
    fused, BiMamba.forward = BiMamba.forward, BiMamba.op_by_op
    try:
        yield
    finally:
        BiMamba.forward = fused


def compile_blocks(model, backend: str) -> None:
    for block in getattr(model, "blocks", None) or model.transformer_blocks:
        block.compile(backend=backend)


def time_model(
    report: dict,
    name: str,
    size: int,
    variants: tuple[str, ...],
    device: torch.device,
    batch: int = 32,
    rounds: int = 5,
    build: Callable = build,
    compiler: str = "inductor",
) -> None:
    """Adds images/s and peak memory of training steps and network evaluations, a table each.

    A variant is "eager", "op by op" (the mixer's ops one by one), "graph" (one CUDA graph),
    "compiled" (torch.compile, block by block) or "compiled, graph". What fails is noted.
    """
    for training in (True, False):
        mode = "training" if training else "sampling"
        rows = report.setdefault(f"{mode}, {size}x{size} latents", {})
        _release(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        torch.manual_seed(0)
        model = build(name, (size, size), CHANNELS, CLASSES).to(device)
        run = task(model, training, size, batch, device)
        for variant in variants:
            title = f"{name}, {variant}"
            try:
                rows[title] = measure(model, run, variant, device, batch, rounds, compiler)
                if "peak GB" in rows[title]:
                    rows[title]["peak GB"] = round(rows[title]["peak GB"] - before / 1e9, 2)
            except Exception as reason:
                rows[title] = {"left out": first_line(reason)}
            _release(device)
        del model, run
        torch.compiler.reset()


def measure(model, run, variant: str, device, batch: int, rounds: int, compiler: str) -> dict:
    on_gpu = device.type == "cuda"
    if "graph" in variant and not on_gpu:
        raise ValueError("CUDA graphs need a GPU")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with op_by_op() if variant == "op by op" else contextlib.nullcontext():
        if "compiled" in variant:
            compile_blocks(model, compiler)
        final = graphed(run) if "graph" in variant else run
        sync = torch.cuda.synchronize if on_gpu else lambda: None
        milliseconds = race({"": final}, rounds, sync)[""]["ms"]
    row = {"images/s": round(1e3 * batch / milliseconds, 2), "ms": milliseconds}
    if on_gpu:
        row["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def first_line(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0][:200]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
