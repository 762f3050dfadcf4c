"""The benchmarks, on the CPU with tiny shapes: what they time must be right."""

import importlib.util
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dis_ssm import DiS
from dis_ssm.models import peers as attention
from dis_ssm.models.dit import dit
from dis_ssm.models.mixer import BiMamba
from dis_ssm.ops import bidirectional_selective_scan, cuda, selective_scan

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load():
    """Imports a benchmark by name; its folder is on the path only meanwhile."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def clock(monkeypatch, load):
    """A clock that only fakes advance."""
    now = [0.0]
    monkeypatch.setattr(load("harness").time, "perf_counter", lambda: now[0])
    return now


def test_a_race_takes_medians_round_by_round(load, clock):
    """Round k is k times as slow for everyone: the medians follow, the ratio does not."""
    calls, turns = [], {"a": 0, "b": 0}

    def contender(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds * slowness[0]

        return run

    slowness = [1.0]

    def sync():  # twice a turn
        turns["a"] += 1
        slowness[0] = 1.0 + (turns["a"] // 4)

    found = load("harness").race({"a": contender("a", 1.0), "b": contender("b", 3.0)}, 5, sync)
    assert found["b"]["ratio"] == pytest.approx(3.0) and found["a"]["ratio"] == 1.0
    assert found["a"]["ms"] == pytest.approx(4000) and found["b"]["ms"] == pytest.approx(12000)
    assert calls[:4] == ["a", "a", "b", "b"] and calls.count("a") == calls.count("b")


def test_short_calls_are_repeated(load, clock):
    calls = [0]

    def run():
        calls[0] += 1
        clock[0] += 0.001

    found = load("harness").race({"a": run}, 3)
    assert found["a"]["ms"] == pytest.approx(1.0)
    assert calls[0] == 2 + 3 * (1 + 100)  # a turn lasts 0.1 s after its warm-up call


def test_contenders_take_turns(load):
    """The stopwatch returns what it is told; medians, quartiles and ratios come from it alone."""
    order, told = [], iter([1.0, 4.0, 2.0, 6.0, 9.0, 90.0])

    def stopwatch(run):
        run()
        return next(told) * 1e-6

    rows = load("gpu_kernels").take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, stopwatch
    )
    assert "".join(order) == "aaabbb" + "ababab"
    assert rows["a"] == {"us": 2.0, "spread": 2.0, "ratio": 1.0}
    assert rows["b"]["us"] == 6.0 and rows["b"]["ratio"] == 4.0  # of 4, 3 and 10


def test_error_and_require(load):
    harness = load("harness")
    truth = torch.tensor([1.0, -4.0])
    assert harness.error(torch.tensor([1.0, -3.0]), truth) == 0.25
    assert harness.error(truth.double(), truth) == 0.0
    for wrong in ([float("nan"), -4.0], [1.0, float("inf")]):
        assert harness.error(torch.tensor(wrong), truth) == float("inf")
    assert harness.error(truth, torch.zeros(2)) == float("inf")
    assert harness.error(torch.zeros(2), torch.zeros(2)) == float("inf")
    with pytest.raises(SystemExit, match=r"shape \(2,\) instead of \(3,\)"):
        harness.error(truth, torch.zeros(3))
    harness.require("right", 1e-6, 1e-5)
    for found in (1e-4, float("inf"), float("nan")):
        with pytest.raises(SystemExit, match=r"the loop is wrong by .* nothing is reported"):
            harness.require("the loop", found, 1e-5)


def test_record_and_write(load, monkeypatch, tmp_path, capsys):
    harness = load("harness")
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "scan.py"), "--rounds", "1"])
    report = harness.record("a machine")
    assert report["command"].endswith("experiments/benchmarks/scan.py --rounds 1")
    assert report["device"] == "a machine" and report["versions"]["torch"] == torch.__version__
    assert report["commit"] and len(report["date"]) == 10
    path = tmp_path / "new" / "report.json"
    harness.write(report, path)
    assert json.loads(path.read_text()) == report and capsys.readouterr().out == f"{path}\n"

    def crash(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(harness.os, "replace", crash)
    with pytest.raises(OSError):
        harness.write({}, path)
    assert json.loads(path.read_text()) == report  # what was there is whole


H100 = (132, 1.7e9, 3.35e12)
TABLE = {  # of both directions at batch 32, 3072 channels, 16 states, bfloat16, in microseconds
    ("forward", "memory"): (91, 361),
    ("forward", "exp"): (268, 1067),
    ("backward", "memory"): (182, 723),
    ("backward", "exp"): (297, 1180),
    ("backward", "exp, recomputed"): (523, 2079),
    ("backward", "issue"): (583, 2318),
}


@pytest.mark.parametrize("name, unit", TABLE)
def test_floors_of_an_h100(load, name, unit):
    kernels = load("gpu_kernels")
    for length, expected in zip((258, 1026), TABLE[name, unit], strict=True):
        found = kernels.floors(kernels.Gpu(*H100), "scan", name, (32, length, 3072, 16), 2)
        assert found[unit] == pytest.approx(expected, rel=0.02)


def test_floors_scale(load):
    kernels, shape = load("gpu_kernels"), (32, 258, 3072, 16)
    of = partial(kernels.floors, kernels.Gpu(*H100), "scan", "backward")
    fast = kernels.floors(kernels.Gpu(264, 1.7e9, 6.7e12), "scan", "backward", shape, 2)
    assert all(of(shape, 2)[unit] == pytest.approx(2 * fast[unit], rel=1e-3) for unit in fast)
    assert of(shape, 4)["memory"] == pytest.approx(2 * of(shape, 2)["memory"], rel=1e-3)
    assert of(shape, 4)["exp"] == of(shape, 2)["exp"]
    convolution = kernels.floors(kernels.Gpu(*H100), "convolution", "forward", shape, 2)
    assert convolution["memory"] == pytest.approx(45.4, rel=0.02)  # 152 MB


def test_a_commit_is_dirty_when_more_than_results_differ(load, monkeypatch, tmp_path):
    results = tmp_path / "experiments" / "results"
    results.mkdir(parents=True)
    (results / "a.json").touch()
    (tmp_path / "source.py").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init"], ["add", "."], [*who, "commit", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    harness = load("harness")
    monkeypatch.setattr(harness, "RESULTS", results)
    (results / "a.json").write_text("{}")
    clean = harness.commit()
    (tmp_path / "source.py").write_text("pass")
    assert len(clean) >= 7 and harness.commit() == clean + "-dirty"


def test_a_gpu_is_described(load, monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    h100 = {  # as its driver states them: kHz, bits
        "MULTIPROCESSOR_COUNT": 132,
        "CLOCK_RATE": 1_980_000,
        "MEMORY_CLOCK_RATE": 2_619_000,
        "GLOBAL_MEMORY_BUS_WIDTH": 5120,
    }

    def attribute(kind, device):
        return 0, h100[kind.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    monkeypatch.setattr(driver, "cuDeviceGetAttribute", attribute)
    gpu = load("gpu_kernels").describe(0)
    assert (gpu.processors, gpu.clock) == (132, 1.98e9)
    assert gpu.bandwidth == pytest.approx(3.35e12, rel=1e-3)
    monkeypatch.setattr(driver, "cuDeviceGetAttribute", lambda *_: (1, 0))
    with pytest.raises(RuntimeError, match="CUDA: 1 for"):
        load("gpu_kernels").describe(0)


@pytest.fixture
def problem(scan_inputs):
    inputs = scan_inputs(2, 21, 12, 5, dtype=torch.float32)
    return inputs, torch.randn(2, 21, 12)


@pytest.mark.parametrize("peer", ["lean", "lean_training", "mambapy", "mamba_reference"])
def test_peers_compute_the_same(load, peer, problem, run, assert_close):
    peers = load("peers")
    contender = getattr(peers, peer)
    if peer in ("mambapy", "mamba_reference"):
        package = "mambapy" if peer == "mambapy" else "mamba_ssm"
        if importlib.util.find_spec(package) is None:
            assert contender() is None
            pytest.skip(f"{package} is not installed")
        contender = contender()
    inputs, upstream = problem
    wide = {n: t.double() for n, t in inputs.items()}
    truth, truths = run(selective_scan, wide, upstream.double(), backend="reference")
    if peer == "lean":
        assert_close(contender(**inputs), truth, 2e-6)
        return
    y, grads = run(contender, inputs, upstream)
    assert_close(y, truth, 2e-6)
    for name, grad in grads.items():
        assert_close(grad, truths[name], 2e-5, name)


def mamba_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba-ssm's signature and layout."""
    assert all(t.is_contiguous() for t in (u, delta, z, B, C))
    args = u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias, delta_softplus
    return selective_scan(*args, backend="reference").mT


@pytest.fixture
def mamba(load, monkeypatch):
    """A stand-in for mamba-ssm's module: whatever is set on it is what the peer finds."""
    interface = type("interface", (), {"selective_scan_fn": staticmethod(mamba_fn)})
    interface.selective_scan_cuda = object()
    monkeypatch.setattr(load("peers"), "_mamba_interface", lambda: interface)
    return interface


def test_mamba_in_both_directions(load, mamba, assert_close, monkeypatch):
    kernels, peers = load("gpu_kernels"), load("peers")
    inputs = kernels.scan_inputs((2, 9, 6, 4), torch.float32, CPU)
    y = peers.mamba_bidirectional()(**{n: peers.to_mamba(n, t) for n, t in inputs.items()})
    assert_close(y.mT, bidirectional_selective_scan(**inputs, backend="reference"), 1e-6)
    check = partial(kernels.check_peer, shape=(0, 9, 0, 4), device=CPU)
    for dtype in kernels.DTYPES:
        check(peers.mamba_bidirectional(), dtype=dtype)
    with pytest.raises(ArithmeticError, match="wrong by"):
        check(lambda **leaves: peers.mamba_bidirectional()(**leaves) * 1.01, dtype=torch.float32)
    mamba.selective_scan_cuda = type("stub", (), {"reason": "undefined symbol"})
    with pytest.raises(ImportError, match="undefined symbol"):
        peers.mamba_bidirectional()
    monkeypatch.setattr(peers, "_mamba_interface", lambda: None)
    with pytest.raises(ImportError, match="not installed"):
        peers.mamba_bidirectional()


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_wrong_kernel_is_noticed(load, native, dtype, off):
    kernels = load("gpu_kernels")
    inputs = kernels.scan_inputs((2, 17, 9, 5), dtype, CPU)

    def spoiled(spoil, backend, **inputs):
        y = bidirectional_selective_scan(backend=backend, **inputs)
        return spoil(y) if backend == native else y

    def verify(spoil):
        return kernels.verify(partial(spoiled, spoil), inputs, native)

    right = verify(lambda y: y)
    assert right["passed"] and right["share of the bound"] <= 1
    values = verify(lambda y: y + off * y.detach().abs().max())
    gradients = verify(lambda y: y + off * (y - y.detach()))
    assert not values["passed"] and values["gradients"] == right["gradients"]
    assert not gradients["passed"] and gradients["values"] == right["values"]
    nothing = verify(lambda y: y * float("nan"))
    assert not nothing["passed"] and nothing["values"] == "not finite"


def tiny(name, size, channels, classes):
    """A DiS where a DiS is asked for, a DiT where that is."""
    if name.startswith("DiS"):
        return DiS(size, in_channels=channels, hidden_size=16, depth=3, num_classes=classes)
    return dit(size, 2, channels, classes, depth=1, heads=1, head_width=8)


@pytest.fixture
def suite(load):
    """(report, budget) -> whether all is right: the suite on the CPU with next to nothing in it."""
    suite, kernels, models = load("gpu_suite"), load("gpu_kernels"), load("gpu_models")
    time_model = partial(models.time_model, batch=2, rounds=1, build=tiny, compiler="eager")
    settings = dict(shapes=[(2, 5, 9, 4)], timed=[(6, torch.float32)], sizes=(1, 8, 4))
    settings["models"] = [
        ("DiS-S/2", 4, ("eager", "op by op", "compiled", "graph"), 1),
        ("DiT-S/2", 4, ("eager",), 1),
        ("DiS-H/2", 4, ("eager",), 1e6),
    ]
    settings["time_model"] = time_model
    stopwatch = kernels.Stopwatch(CPU)
    return lambda report, budget, **changes: suite.run(
        report, stopwatch, kernels.Gpu(*H100), budget, **settings | changes
    )


def test_the_suite(load, suite, native, mamba, tmp_path, capsys):
    report, fused = load("harness").record("a machine"), BiMamba.forward
    assert suite(report, load("gpu_suite").Budget(300))
    assert len(report["correctness"]) == 4 * 3
    assert all(row["passed"] for row in report["correctness"].values())
    for name in ("forward", "forward, training", "backward"):
        scan, conv = report[f"scan, {name}"], report[f"convolution, {name}"]
        ours, theirs = (scan[f"6 tokens, float32, {n}"] for n in ("dis_ssm", "mamba-ssm"))
        assert ours["times the floor"] == pytest.approx(ours["us"] / ours["floor"], rel=1e-3)
        assert ours["floor"] == max(ours["floors"].values()) and ours["ratio"] == 1
        assert theirs["ratio"] > 0 and list(conv) == ["6 tokens, float32, dis_ssm"]
    for mode in ("training", "sampling"):
        rows = report[f"{mode}, 4x4 latents"]
        for variant in ("DiS-S/2, eager", "DiS-S/2, op by op", "DiS-S/2, compiled"):
            rate = rows[variant]["images/s"]
            assert rate == pytest.approx(2 * 1e3 / rows[variant]["ms"], rel=1e-2)
        assert "images/s" in rows["DiT-S/2, eager"]
        assert rows["DiS-S/2, graph"]["left out"] == "ValueError: CUDA graphs need a GPU"
    assert BiMamba.forward is fused
    ((title, reason),) = report["left out"].items()
    assert title.startswith("DiS-H/2") and reason.startswith("may take 1000000.0 s")
    json.dumps(report, allow_nan=False)
    text = "\n".join(load("plots").lines(report))
    assert "x the floor" in text and "x the first" in text and f"left out: {title}" in text


def test_nothing_wrong_is_timed(load, suite, native, monkeypatch, mamba, capsys):
    kernels = load("gpu_kernels")

    def wrong(backend, **inputs):
        y = bidirectional_selective_scan(**inputs, backend=backend)
        return y * 1.001 if backend == native else y

    broken = {"both directions": (wrong, kernels.scan_inputs)}
    monkeypatch.setitem(kernels.KERNELS, "scan", broken)
    report = {}
    assert not suite(report, load("gpu_suite").Budget(300))
    assert not any(name.startswith(("scan", "training", "sampling")) for name in report)
    assert "convolution, forward" in report
    assert "wrong: scan, both directions, (2, 5, 9, 4), float32" in capsys.readouterr().out
    assert (
        report["left out"]["scan, (1, 6, 8, 4), float32"] == "the scan is wrong or was not checked"
    )


def test_a_wrong_peer_is_not_timed(load, suite, native, mamba):
    mamba.selective_scan_fn = staticmethod(lambda *args, **options: mamba_fn(*args, **options) * 2)
    report = {}
    assert suite(report, load("gpu_suite").Budget(300), models=[])
    assert "wrong by" in report["left out"]["mamba-ssm, 6 tokens, float32"]
    assert list(report["scan, forward"]) == ["6 tokens, float32, dis_ssm"]


def test_the_budget(load, capsys):
    budget, done = load("gpu_suite").Budget(0.3), []
    budget.run("quick", 0.1, done.append, 1)
    budget.run("fails", 0.1, lambda: 1 / 0)

    def stubborn():
        while True:
            try:
                time.sleep(5)
            except Exception:
                pass

    start = time.monotonic()
    budget.run("slow", 0.1, stubborn)
    budget.run("late", 0.1, done.append, 2)
    assert done == [1] and time.monotonic() - start < 2
    assert budget.left_out == {
        "fails": "ZeroDivisionError: division by zero",
        "slow": "cut off after 0 s",
        "late": "may take 0.1 s, 0 s were left",
    }


def command(*arguments):
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(cuda.missing() is None, reason="there is a GPU")
def test_the_suite_refuses_without_a_gpu(tmp_path):
    found = command(FOLDER / "gpu_suite.py", "--out", tmp_path / "gpu.json")
    assert found.returncode == 1 and not found.stdout and not list(tmp_path.iterdir())
    (line,) = found.stderr.splitlines()
    assert line == f"gpu_suite.py needs a GPU and the CUDA kernels: {cuda.missing()}"


def test_names_and_versions(load):
    suite = load("gpu_suite")
    assert suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert {"cuda", "driver", "diffusers"} <= suite.versions().keys()


def test_scan_from_end_to_end(load, native, tmp_path):
    out = tmp_path / "scan.json"
    options = "--lengths 5 --batch 1 --channels 32 --rounds 1 --out".split()
    found = command(FOLDER / "scan.py", *options, out)
    assert found.returncode == 0, found.stderr
    report = json.loads(out.read_text())
    assert {"command", "date", "commit", "device", "versions"} <= report.keys()
    table = report["(batch, length, channels, state) = (1, 5, 32, 16)"]
    for part in ("forward", "forward and backward"):
        rows = table[part]
        assert {"kernel", "kernel, both directions", "lean PyTorch loop"} <= rows.keys()
        assert ("as many exponentials" in rows) == (part == "forward")
        assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows.values())
    steps = 5 * 32 * 16 / table["forward"]["kernel"]["ms"] / 1e6
    assert table["forward"]["kernel"]["G state-steps/s"] == pytest.approx(steps, abs=0.01)


def test_kept_bytes(load):
    """A chain x -> x * a -> exp keeps a's factor x, and exp's result; a is a parameter."""

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(10))

        def forward(self, x, t, y):
            return ((x + 1) * self.a).exp()

    x = torch.zeros(7, 10)
    assert load("step").kept_bytes(Chain(), x, None, None) == 2 * 7 * 10 * 4


def test_the_fused_mixer_keeps_less(load, native, monkeypatch):
    model = tiny("DiS", (8, 8), 4, 1000)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 0])
    fused = load("step").kept_bytes(model, *inputs)
    monkeypatch.setattr(BiMamba, "forward", BiMamba.op_by_op)
    assert 0 < fused < 0.7 * load("step").kept_bytes(model, *inputs)


def test_memory_rises_and_falls(load):
    """x is there before; a and b live together, then b and c, a last result alone."""
    x = torch.randn(1 << 20)

    def run():
        a = x * 2
        b = torch.cat([a, a])
        del a
        b.sum()
        c = b[: 1 << 19] * 2
        del b, c
        x.neg()

    assert load("throughput").rise(run, CPU) == pytest.approx(3 * 4 << 20, rel=1e-3)


@pytest.fixture
def small(monkeypatch):
    """The three families under their own names, in next to no time."""
    dis = partial(DiS, patch_size=2, hidden_size=16, depth=3)
    monkeypatch.setitem(attention.DiS_models, "DiS-S/2", dis)
    monkeypatch.setitem(attention.PEERS, "DiT-S/2", ("DiT", 2, (2, 1, 8)))
    monkeypatch.setitem(attention.PEERS, "U-ViT-S/2", ("U-ViT", 2, (3, 2, 8)))


def test_throughput_from_end_to_end(load, native, small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, throughput = tmp_path / "t.json", load("throughput")
    options = f"--sizes 4 8 --tokens 8 --rounds 1 --threads 1 --device cpu --out {out}"
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options.split()])
    throughput.main()
    report = json.loads(out.read_text())
    assert {"command", "date", "commit", "device", "versions"} <= report.keys()
    assert out.with_suffix(".png").stat().st_size
    for size, batch in ((4, 2), (8, 1)):
        costs = report["G multiply-adds"][f"{size}x{size}"]
        training, sampling = (report[f"{m}, {size}x{size} latents"] for m in throughput.MODES)
        assert list(training) == list(sampling) == list(costs) == list(throughput.MODELS)
        for name in throughput.MODELS:
            model = attention.build(name, (size, size), 4, 1000)
            weights = sum(p.numel() for p in model.parameters()) * 4e-9
            assert training[name]["peak GB"] > 3.9 * weights > sampling[name]["peak GB"] > 0
            for row in (training[name], sampling[name]):
                rate = batch * 1e3 / row["ms"]
                assert row["batch"] == batch and row["images/s"] == pytest.approx(rate, rel=1e-2)
    titles = [title for title, _, _ in load("plots").panels(report)]
    assert len(titles) == 4


def test_one_contender_may_fail(load, native, small, monkeypatch):
    throughput, report = load("throughput"), {}

    def fail(self, *inputs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(attention.UViT, "forward", fail)
    throughput.compare(report, list(throughput.MODELS), 4, 1, 1, CPU)
    for rows in report.values():
        assert rows["U-ViT-S/2"] == {"left out": "RuntimeError: out of memory"}
        assert rows["DiS-S/2"]["ratio"] == 1 and rows["DiT-S/2"]["images/s"] > 0


def test_what_a_contender_holds(load, native, small):
    model = attention.build("U-ViT-S/2", (4, 4), 4, 1000)
    contender = load("throughput").Contender(model, 4, 2, CPU, torch.float32)
    weights = sum(p.numel() for p in model.parameters()) * 4
    before = next(model.parameters()).clone()
    contender.runs("training")()
    assert not torch.equal(before, next(model.parameters()))
    steps = 4 * len(list(model.parameters()))  # AdamW counts each parameter's
    assert contender.held_bytes() == 4 * weights + steps
    before = next(model.parameters()).clone()
    contender.runs("sampling")()
    assert contender.held_bytes() == weights and torch.equal(before, next(model.parameters()))


def test_plots(load, tmp_path):
    pytest.importorskip("matplotlib")
    plots = load("plots")
    gpu = {"a": {"us": 2.0, "floor": 1.0}, "b": {"us": 6.0, "ratio": 3.0}, "floors": [1]}
    models = {"m": {"images/s": 5.0, "ms": 200.0, "peak GB": 1.5}, "n": {"left out": "no memory"}}
    report = {"device": "d", "commit": "c", "date": "2026-01-01", "versions": {"torch": "2"}}
    report |= {"scan": {"forward": gpu}, "models": models, "left out": {"x": "no time"}}
    found = [(title, unit, list(rows)) for title, unit, rows in plots.panels(report)]
    assert found == [("scan: forward", "us", ["a", "b"]), ("models", "images/s", ["m"])]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert command(FOLDER / "plots.py", path).returncode == 0
    from matplotlib.image import imread

    picture = imread(tmp_path / "report.png")[..., :3]
    assert picture.shape[0] > 100 and picture.shape[1] > 100
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.2)
    assert blue.mean() > 0.02  # bars
    with pytest.raises(ValueError, match="holds no times"):
        plots.draw({}, path)


RESULTS = [
    path
    for path in sorted(FOLDER.parent.glob("results/*.json"))
    if "benchmarks" in json.loads(path.read_text())["command"]
]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_can_be_drawn(load, path, tmp_path):
    pytest.importorskip("matplotlib")
    assert load("plots").draw(json.loads(path.read_text()), tmp_path / "r.png").stat().st_size
