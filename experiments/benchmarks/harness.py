"""What every benchmark here shares: fair timing, a correctness gate, and a dated record."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TURN = 0.1  # seconds, or one call if that is longer
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
RESULTS = Path(__file__).resolve().parent.parent / "results"
MEASURED = Path("runs/benchmarks")  # where new numbers go: those of `RESULTS` are kept

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports every start on stderr


def race(contenders: dict[str, Callable], rounds: int, sync: Callable = lambda: None) -> dict:
    """Runs the contenders in turn, round after round; a turn is a warm-up call and then `TURN`.

    Returns name -> {"ms": median, "ratio": median over the rounds of time / the first one's time
    in the same round}: what slows a whole round does not move the ratio.
    """
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 1)
    for turn in range(-1, rounds):
        for name, run in contenders.items():
            run()
            sync()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            sync()
            seconds[name].append((time.perf_counter() - start) / calls[name])
            if turn < 0:
                calls[name] = max(1, int(TURN / seconds[name].pop()))
    first = next(iter(seconds.values()))
    return {
        name: {
            "ms": round(1e3 * statistics.median(times), 4),
            "ratio": round(statistics.median(map(float.__truediv__, times, first)), 3),
        }
        for name, times in seconds.items()
    }


def keep_freed_memory() -> None:
    """Tells glibc not to give freed memory back: whether the next call has to take it page by page
    depends on who ran before, not on its own work."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # as much as glibc allows


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of `truth`; inf if not finite."""
    if value.shape != truth.shape:
        raise SystemExit(f"shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
    difference = (value.double() - truth.double()).abs().max() / truth.double().abs().max()
    return difference.item() if difference.isfinite() else float("inf")


def require(name: str, found: float, bound: float) -> None:
    """Ends the benchmark when a contender is wrong: its time would mean nothing."""
    if not found <= bound:
        raise SystemExit(f"{name} is wrong by {found:.2g} of the maximum: nothing is reported")


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record(device: str) -> dict:
    """Device, versions, commit, command and date of this run."""
    return {
        "command": f"python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "commit": commit() or os.environ.get("DIS_SSM_COMMIT", "unknown"),
        "device": device,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def commit() -> str:
    """The short hash, "-dirty" if anything but results differs from it; "" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}")
    return git("rev-parse", "--short", "HEAD").strip() + "-dirty" * bool(changed)


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)
    print(path)
