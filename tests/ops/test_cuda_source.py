"""The CUDA kernels without a GPU: NVRTC compiles them, and a host shim runs the same source.

The shim (`tests/ops/cuda_shim`) turns the threads of a block into fibres, so that indexing, shared
memory, barriers and shuffles are the kernels' own; only the launch itself is replaced.
"""

import ctypes
import importlib.util
import io
import os
import re
import shutil
import subprocess

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dis_ssm.ops import (
    BackendError,
    bidirectional_selective_scan,
    cuda,
    nvrtc,
    reference,
    selective_scan,
)
from dis_ssm.ops.scan import scan_op
from nvrtc_compile import conv_macros, resources, scan_macros

SHIM = os.path.join(os.path.dirname(__file__), "cuda_shim")
ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]


def missing(message):
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


# ---- NVRTC -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cuda_core():
    try:
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        missing(f"cuda-core is not installed: {nvrtc.INSTALL}")


@pytest.mark.parametrize(
    "arch, dtype",
    [(arch, torch.bfloat16) for arch in ARCHITECTURES]
    + [("sm_90", torch.float16), ("sm_90", torch.float32)],
)
def test_sixteen_states_compile_without_a_spill(cuda_core, arch, dtype):
    report = io.StringIO()
    macros = scan_macros(cuda.IO_TYPES[dtype])
    cubin = nvrtc.compile_cubin("scan", arch, macros, report)
    assert cubin[:4] == b"\x7fELF"
    found = resources(report.getvalue())
    forward = {"scan_forward", "scan_forward_both", "scan_forward_apart", "scan_combine"}
    assert set(found) == {*forward, "scan_backward", "sum_partials"}
    print(arch, dtype, found, "shared", cuda.backward_shared(16, 4, dtype.itemsize))
    assert {name: spill for name, (_, spill) in found.items() if spill} == {}
    # 6 blocks of 64 threads and 8 warps are what the launch counts on.
    assert found["scan_forward"][0] <= 65536 // (6 * 64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_convolutions_compile_without_a_spill(cuda_core, arch):
    for width in (1, 4):
        report = io.StringIO()
        nvrtc.compile_cubin("conv", arch, conv_macros(2, width), report)
        found = resources(report.getvalue())
        assert set(found) == {"conv_forward", "conv_backward", "sum_partials"}
        assert all(spill == 0 for _, spill in found.values()), found


def test_the_cubin_cache_survives_damage(cuda_core, tmp_path, monkeypatch):
    monkeypatch.setenv("DIS_SSM_CACHE", str(tmp_path))
    compiled = []
    compile_cubin = nvrtc.compile_cubin
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *a: compiled.append(a) or compile_cubin(*a))
    macros = conv_macros(2)
    cubin = nvrtc.cached_cubin("conv", "sm_90", macros)
    assert nvrtc.cached_cubin("conv", "sm_90", macros) == cubin and len(compiled) == 1
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"?" + data[101:])
    assert nvrtc.cached_cubin("conv", "sm_90", macros) == cubin and len(compiled) == 2
    assert path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    nvrtc.cached_cubin("conv", "sm_80", macros)
    nvrtc.cached_cubin("conv", "sm_90", conv_macros(1))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_broken_source_says_why(cuda_core):
    with pytest.raises(BackendError, match=r"conv\.cu for sm_90.*error"):
        nvrtc.compile_cubin("conv", "sm_90", conv_macros(2, "nothing"))


@pytest.mark.parametrize(
    "block, sm, states, warps",
    [(227, 228, 16, 4), (163, 164, 16, 1), (99, 100, 16, 1), (99, 100, 32, 2), (99, 100, 64, 1)],
)
def test_blocks_fit_the_shared_memory(block, sm, states, warps):
    limits = block * 1024, sm * 1024
    assert cuda.backward_warps(states, 2, *limits) == warps
    assert cuda.backward_shared(states, warps, 2) <= limits[0]


# ---- the kernels on the CPU ------------------------------------------------------------------


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """(source, macros) -> the compiled shim."""
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        missing("the host shim needs a C++ compiler")
    folder, built = tmp_path_factory.mktemp("cuda_shim"), {}

    def build(source, macros):
        key = source, tuple(sorted(macros.items()))
        if key not in built:
            files = [*nvrtc.SOURCES.glob(f"{source}*.cu*"), nvrtc.SOURCES / "common.cuh"]
            text = "".join(file.read_text() for file in sorted(files))
            kernels = re.findall(r'extern "C" __global__ .*?(\w+)\(const __grid', text)
            path = folder / f"{source}{len(built)}.so"
            command = [
                *f"{compiler} -std=c++17 -O1 -w -fPIC -shared -o {path} {SHIM}/driver.cpp".split(),
                *(f"-I{nvrtc.SOURCES}", f'-DSOURCE="{source}.cu"'),
                f"-DKERNELS={' '.join(f'X({k})' for k in kernels)}",
                *(f"-D{name}={value}" for name, value in macros.items()),
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            built[key] = ctypes.CDLL(str(path))
            built[key].shim_run.restype = ctypes.c_char_p
        return built[key]

    return build


@pytest.fixture
def shim(libraries, monkeypatch):
    """Launches go to the shim, on an imagined GPU; memory that nothing wrote is NaN."""
    state = type("Shim", (), {"order": 0, "launched": [], "aligned": None})()
    aligned = cuda._aligned

    def as_asked(*arguments):
        found = aligned(*arguments)
        assert found or not state.aligned
        return found if state.aligned is None else state.aligned

    monkeypatch.setattr(cuda, "_aligned", as_asked)

    def launch(source, name, macros, grid, block, shared, arguments, device):
        library = libraries(source, macros)
        grid = (ctypes.c_uint * 3)(*grid)
        state.launched.append(name)
        problem = library.shim_run(
            name.encode(), grid, block, shared, ctypes.byref(arguments), state.order
        )
        assert problem is None, f"{name}: {problem.decode()}"

    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: state.shared_memory)
    monkeypatch.setattr(cuda, "_processors", lambda device: state.processors)
    state.shared_memory = 227 * 1024, 228 * 1024  # four warps a block in the backward pass
    state.processors = 0  # the wide kernel; many make it the one with several lanes
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield state
    torch.use_deterministic_algorithms(False)


SCAN_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def scan_arguments(inputs, reverse=False, softplus=True):
    if "x" in inputs:
        groups = [inputs.get(n) for n in SCAN_NAMES] + [None] * 7
    else:
        groups = [inputs.get(f"{n}_{d}") for d in "fb" for n in SCAN_NAMES]
    return *groups, inputs.get("z"), softplus, reverse


def scan_names(inputs):
    if "x" in inputs:
        return [*SCAN_NAMES, *(None,) * 7, "z"]
    return [*(f"{n}_{d}" for d in "fb" for n in SCAN_NAMES), "z"]


def run_scan(inputs, g=None, **options):
    """The output, and with ``g`` the gradients by name."""
    arguments = scan_arguments(inputs, **options)
    out, pregate, states = cuda.scan_forward(*arguments, g is not None)
    if g is None:
        return out, {}
    grads = cuda.scan_backward(g, pregate, states, *arguments)
    named = zip(scan_names(inputs), grads, strict=True)
    return out, {name: grad for name, grad in named if name in inputs}


def truth_of(run, inputs, g, reverse=False, softplus=True):
    wide = {name: value.double() for name, value in inputs.items()}
    options = dict(dt_softplus=softplus, backend="reference")
    if "x" not in inputs:
        return run(bidirectional_selective_scan, wide, g.double(), **options)
    return run(selective_scan, wide, g.double(), reverse=reverse, **options)


def upstream(inputs, seed=5):
    x = inputs.get("x", inputs.get("x_f"))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g).to(x.dtype)


def check_scan(run, assert_close, inputs, value_tol=2e-6, grad_tol=2e-5, **options):
    g = upstream(inputs)
    y, grads = run_scan(inputs, g, **options)
    y_true, grads_true = truth_of(run, inputs, g, **options)
    assert_close(y, y_true, value_tol)
    assert set(grads) == set(inputs)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, grads_true[name], grad_tol, f"d{name}")


def test_fake_tensors_have_the_shapes_of_the_kernel(shim, scan_inputs):
    inputs = scan_inputs(1, 40, 9, 16, dtype=torch.float32)
    real = cuda.scan_forward(*scan_arguments(inputs), True)
    with FakeTensorMode():
        on_gpu = {n: torch.empty(v.shape, device="cuda") for n, v in inputs.items()}
        fake = scan_op(*scan_arguments(on_gpu), True)
    assert [t.shape for t in fake] == [t.shape for t in real]


OPTIONS = ["Dzb", "", "D", "z", "b", "Db", "zb", "Dz"]
SHAPES = [
    (2, 0, 7, 16), (2, 1, 9, 16), (3, 2, 31, 8), (1, 17, 16, 16), (1, 18, 130, 16), (1, 31, 7, 5),
    (1, 32, 32, 16), (2, 33, 31, 16), (1, 63, 33, 16), (1, 64, 9, 3), (2, 65, 1, 16),
    (1, 66, 7, 16), (0, 33, 32, 16), (0, 0, 1, 1), (1, 1, 1, 1), (1, 2, 70, 16), (1, 130, 5, 16),
]  # fmt: skip


@pytest.mark.parametrize("processors", [0, 10**6], ids=["wide", "apart"])
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_scan_equals_the_reference(shim, index, processors, run, assert_close, scan_inputs):
    shim.processors = processors
    inputs = scan_inputs(*SHAPES[index], options=OPTIONS[index % 8], dtype=torch.float32)
    softplus = index % 5 != 4
    if not softplus:
        inputs |= {n: inputs[n].abs() * 0.2 for n in ("dt", "dt_bias") if n in inputs}
    reverse = (index + bool(processors)) % 2 == 1
    check_scan(run, assert_close, inputs, reverse=reverse, softplus=softplus)


@pytest.mark.parametrize("shape", [(2, 35, 40, 16), (1, 64, 136, 16), (1, 17, 8, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_borders_of_sixteen_bytes(shim, shape, dtype, run, bidirectional_inputs):
    inputs = bidirectional_inputs(*shape, dtype=torch.float32)
    inputs = {n: v.to(dtype) if v.ndim == 3 else v for n, v in inputs.items()}
    g = upstream(inputs)
    shim.aligned = True
    _, copied = run_scan(inputs, g)
    shim.aligned = False
    _, loaded = run_scan(inputs, g)
    assert all(torch.equal(copied[name], loaded[name]) for name in inputs)
    _, truth = truth_of(run, inputs, g)
    for name, grad in copied.items():
        scale = truth[name].abs().max().item()
        assert error(grad, truth[name]) <= (2e-5 if dtype is torch.float32 else 2e-2) * scale, name


@pytest.mark.parametrize("processors", [0, 10**6], ids=["wide", "apart"])
@pytest.mark.parametrize("index", [0, 1, 4, 7, 9, 10, 11, 12])
def test_both_directions_equal_the_reference(
    shim, index, processors, run, assert_close, bidirectional_inputs
):
    shim.processors = processors
    options = OPTIONS[(index + bool(processors)) % 8]
    inputs = bidirectional_inputs(*SHAPES[index], options=options, dtype=torch.float32)
    check_scan(run, assert_close, inputs)


@pytest.mark.parametrize("shape", [(1, 33, 33, 17), (1, 18, 9, 32), (2, 19, 9, 64), (1, 34, 5, 50)])
def test_more_than_sixteen_states(shim, shape, run, assert_close, scan_inputs):
    for shim.processors in (0, 10**6):
        check_scan(run, assert_close, scan_inputs(*shape, dtype=torch.float32))


def error(actual, truth):
    return (actual.double() - truth).abs().max().item()


@pytest.mark.parametrize("processors", [0, 10**6], ids=["wide", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_like_plain_pytorch(shim, dtype, processors, run, bidirectional_inputs):
    shim.processors = processors
    inputs = bidirectional_inputs(2, 37, 40, 16, dtype=torch.float32)
    inputs = {n: v if n[:2] in ("A_", "D_") else v.to(dtype) for n, v in inputs.items()}
    g = upstream(inputs)
    y, grads = run_scan(inputs, g)
    y_true, grads_true = truth_of(run, inputs, g)
    plain, plain_grads = run(bidirectional_selective_scan, inputs, g, backend="reference")
    assert y.dtype == dtype
    assert error(y, y_true) <= 2 * error(plain, y_true)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        # What plain PyTorch keeps in float32 may be exact to its last digits there.
        floor = 2e-5 * grads_true[name].abs().max().item()
        allowed = 3 * error(plain_grads[name], grads_true[name])
        assert error(grad, grads_true[name]) <= max(allowed, floor), name


def test_blocks_of_fewer_warps(shim, run, assert_close, bidirectional_inputs):
    inputs = bidirectional_inputs(1, 35, 70, 16, dtype=torch.float32)
    for limits in ((163, 164), (99, 100)):
        shim.shared_memory = tuple(limit * 1024 for limit in limits)
        check_scan(run, assert_close, inputs)


def test_mixed_types_strides_and_views(shim, run, assert_close, scan_inputs):
    inputs = scan_inputs(2, 35, 9, 16, dtype=torch.float32)
    wide = torch.randn(2, 35, 3 + 9 + 32)
    inputs |= {"x": wide[..., 3:12], "B": wide[..., 12:28], "C": wide[..., 28:]}
    inputs["z"] = torch.randn(2, 9, 35).transpose(1, 2)
    inputs["dt"] = torch.randn(35, 9).expand(2, 35, 9)
    before = {n: v.clone() for n, v in inputs.items()}
    check_scan(run, assert_close, inputs)
    assert all(torch.equal(before[n], v) for n, v in inputs.items())
    g = torch.ones(()).expand(2, 35, 9)
    _, grads = run_scan(inputs, g)
    _, expected = run_scan(inputs, g.contiguous())
    assert all(torch.equal(grads[n], expected[n]) for n in grads)
    mixed = inputs | {"dt": inputs["dt"].bfloat16(), "A": inputs["A"].double()}
    check_scan(run, assert_close, mixed, grad_tol=8e-3)


def test_extreme_decays(shim, run, assert_close, scan_inputs):
    def case(**changes):
        inputs = scan_inputs(1, 70, 9, 16, dtype=torch.float32)
        return inputs | {name: change(inputs[name]) for name, change in changes.items()}

    steps = torch.tensor([-40.0, -30.0, 12.0, 19.9, 20.1, 60.0, 100.0]).repeat(90).view(1, 70, 9)
    for inputs in (
        case(A=lambda A: A * 40, dt=lambda dt: dt + 12.0 * (torch.arange(70) % 3 == 0)[:, None]),
        case(A=lambda A: A * 0.01, dt=lambda dt: steps),
        case(dt=lambda dt: -30 + 0.1 * dt, D=lambda D: D * 0),
        case(A=lambda A: A * 1e-6),
        case(A=lambda A: A * 0),
        case(A=lambda A: -A * 0.05),
        case(x=lambda x: x * 0, D=lambda D: D * 0) | {"B": torch.full((1, 70, 16), -0.0)},
        case(x=lambda x: x * 1e-36, C=lambda C: C * 1e-2),
    ):
        check_scan(run, assert_close, inputs, 4e-6, 4e-5)


def test_growth_to_infinity_stays_in_its_channel(shim, scan_inputs):
    inputs = scan_inputs(1, 90, 9, 16, dtype=torch.float32)
    clean, clean_grads = run_scan(inputs, upstream(inputs))
    inputs["A"] = inputs["A"].clone()
    inputs["A"][4] = 9.0
    wide = {n: v.double() for n, v in inputs.items()}
    for shim.processors in (0, 10**6):
        y, grads = run_scan(inputs, upstream(inputs))
        assert not y[..., 4].isfinite().all()
        truth = selective_scan(**wide, backend="reference")[..., 4]
        early = truth.abs() < 1e30
        assert early.sum() > 5 and torch.allclose(y[..., 4][early].double(), truth[early], 1e-3)
        others = [c for c in range(9) if c != 4]
        assert torch.equal(y[..., others], clean[..., others])
        for name in ("x", "dt", "z"):
            assert torch.equal(grads[name][..., others], clean_grads[name][..., others])
        for name in ("A", "D", "dt_bias"):
            assert torch.equal(grads[name][others], clean_grads[name][others])


LONG = [(1, 257, 3, 16), (1, 258, 770, 4), (1, 1026, 2, 16), (1, 2049, 1, 2)]


@pytest.mark.parametrize("shape", LONG, ids=lambda s: "x".join(map(str, s)))
def test_long_sequences_and_many_channels(shim, shape, run, assert_close, scan_inputs):
    check_scan(run, assert_close, scan_inputs(*shape, dtype=torch.float32), reverse=True)


def test_an_infinitely_fast_decay_is_no_decay_of_absent_tokens(shim, scan_inputs):
    inputs = scan_inputs(1, 35, 9, 16, dtype=torch.float32)
    results = []
    for value in (-1e30, -float("inf")):
        inputs["A"][4, 3] = value
        y, grads = run_scan(inputs, upstream(inputs))
        results.append([y, *grads.values()])
    for finite, infinite in zip(*results, strict=True):
        assert finite.isfinite().all() and torch.equal(finite, infinite)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_place(shim, name, value, scan_inputs):
    inputs = scan_inputs(2, 40, 9, 16, dtype=torch.float32)
    clean, clean_grads = run_scan(inputs, upstream(inputs))
    inputs[name] = inputs[name].clone()
    if name == "A":
        inputs["A"][4, 3] = value
        hit = (slice(None), slice(None), 4)
    else:
        inputs[name][1, 20, 4] = value
        hit = (1, slice(20, None), slice(None) if name == "B" else 4)
    y, grads = run_scan(inputs, upstream(inputs))
    assert not y[hit].isfinite().all()
    y[hit] = clean[hit]
    assert torch.equal(y, clean)
    for n in ("x", "dt", "z"):  # earlier tokens of the same channel may be reached, others not
        other = (0,) if name == "B" else (slice(None), slice(None), [c for c in range(9) if c != 4])
        other = (0,) if name == "B" else other
        assert torch.equal(grads[n][other], clean_grads[n][other])


def test_no_order_of_the_threads_changes_a_bit(shim, bidirectional_inputs):
    inputs = bidirectional_inputs(2, 67, 70, 16, dtype=torch.float32)
    results = []
    for shim.order, shim.processors in ((0, 0), (1, 0), (7, 0), (0, 10**6), (7, 10**6)):
        y, grads = run_scan(inputs, upstream(inputs))
        results.append([y, *grads.values()])
        # The kernels for many and for few channels agree as well.
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    assert {"scan_forward_both", "scan_forward_apart", "scan_combine"} <= set(shim.launched)
    # A row's result does not depend on its batch.
    one = {n: v[1:] if v.ndim == 3 else v for n, v in inputs.items()}
    shim.processors = 0
    y, grads = run_scan(one, upstream(inputs)[1:])
    assert torch.equal(y, results[0][0][1:])
    assert torch.equal(grads["B_f"], results[0][1 + list(grads).index("B_f")][1:])


def test_reverse_is_a_flip(shim, scan_inputs):
    inputs = scan_inputs(1, 45, 9, 16, dtype=torch.float32)
    flipped = {n: v.flip(1) if v.ndim == 3 else v for n, v in inputs.items()}
    g = upstream(inputs)
    y, grads = run_scan(inputs, g, reverse=True)
    y_flipped, grads_flipped = run_scan(flipped, g.flip(1))
    assert torch.equal(y, y_flipped.flip(1))
    for n, grad in grads.items():
        other = grads_flipped[n]
        assert torch.equal(grad, other.flip(1) if grad.ndim == 3 else other), n


@pytest.mark.parametrize("processors", [0, 10**6], ids=["wide", "apart"])
def test_both_directions_are_the_sum_of_two(shim, processors, bidirectional_inputs):
    shim.processors = processors
    inputs = bidirectional_inputs(2, 45, 9, 16, options="Db", dtype=torch.float32)
    g = upstream(inputs)
    y, grads = run_scan(inputs, g)
    total = 0
    for d, reverse in (("f", False), ("b", True)):
        one = {n: inputs[f"{n}_{d}"] for n in SCAN_NAMES}
        y_one, grads_one = run_scan(one, g, reverse=reverse)
        total = total + y_one
        assert all(torch.equal(grads[f"{n}_{d}"], grad) for n, grad in grads_one.items())
    assert torch.equal(y, total)


@pytest.mark.parametrize("state", [17, 40, 64])
def test_wide_and_apart_agree_with_more_states(shim, state, scan_inputs):
    inputs = scan_inputs(1, 19, 9, state, dtype=torch.float32)
    outputs = []
    for shim.processors in (0, 10**6):
        outputs.append(run_scan(inputs)[0])
    assert torch.equal(*outputs)


# ---- convolution -----------------------------------------------------------------------------

CONV_NAMES = ("x", "weight_f", "bias_f", "weight_b", "bias_b")


def conv_truth(x, weight_f, bias_f=None, weight_b=None, bias_b=None, silu=True, reverse=False):
    activation = "silu" if silu else None
    y = (reference.causal_conv1d(x, weight_f, bias_f, activation, reverse),)
    if weight_b is not None:
        y += (reference.causal_conv1d(x, weight_b, bias_b, activation, not reverse),)
    return y


CONV_SHAPES = [
    (2, 0, 7), (2, 1, 9), (3, 2, 31), (2, 3, 5), (1, 18, 130), (2, 63, 7), (2, 64, 9), (2, 65, 1),
    (0, 33, 32), (2, 66, 5), (1, 131, 3),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CONV_SHAPES)))
def test_convolution_equals_the_reference(shim, index, run, assert_close):
    batch, length, channels = CONV_SHAPES[index]
    width = 4 if index % 3 else 1 + index // 3 % 4
    for two, reverse in ((True, False), (True, True), (False, False), (False, True)):
        silu = (index + two) % 3 != 0
        inputs = {"x": torch.randn(batch, length, channels + 2)[..., 1:-1]}
        for d in "fb" if two else "f":
            inputs[f"weight_{d}"] = torch.randn(channels, width)
            if (index + reverse) % 2:
                inputs[f"bias_{d}"] = torch.randn(channels)
        arguments = *(inputs.get(n) for n in CONV_NAMES), silu, reverse
        y = cuda.conv_forward(*arguments)
        g = [torch.randn(batch, length, channels) for _ in y]
        grads = cuda.conv_backward(g[0], g[1] if two else None, *arguments)
        wide = {n: v.double() for n, v in inputs.items()}
        upstream = tuple(v.double() for v in g)
        y_true, grads_true = run(conv_truth, wide, upstream, silu=silu, reverse=reverse)
        for actual, expected in zip(y, y_true, strict=True):
            assert_close(actual, expected, 2e-6)
        for name, grad in zip(CONV_NAMES, grads, strict=True):
            if name in inputs:
                assert_close(grad, grads_true[name], 2e-5, f"d{name}")


def test_convolution_in_half_precision(shim, run):
    for dtype in (torch.bfloat16, torch.float16):
        inputs = {"x": torch.randn(2, 70, 9).to(dtype), "weight_f": torch.randn(9, 4)}
        inputs["bias_f"] = torch.randn(9)
        arguments = *inputs.values(), None, None, True, False
        g = torch.randn(2, 70, 9).to(dtype)
        (y,), grads = cuda.conv_forward(*arguments), cuda.conv_backward(g, None, *arguments)
        wide = {n: v.double() for n, v in inputs.items()}
        (y_true,), grads_true = run(conv_truth, wide, (g.double(),))
        (plain,), plain_grads = run(conv_truth, inputs, (g,))
        assert y.dtype == dtype and error(y, y_true) <= 2 * error(plain, y_true)
        for (name, value), grad in zip(inputs.items(), grads[:3], strict=True):
            assert grad.dtype == value.dtype
            floor = 2e-5 * grads_true[name].abs().max().item()
            allowed = 3 * error(plain_grads[name], grads_true[name])
            assert error(grad, grads_true[name]) <= max(allowed, floor), name


def test_convolution_flips_adds_up_and_confines_nan(shim):
    x, weight, bias = torch.randn(2, 70, 9), torch.randn(9, 4), torch.randn(9)
    g = torch.randn(2, 70, 9)
    past, future = (
        (x, weight, bias, None, None, True, False),
        (x, weight, bias, None, None, True, True),
    )
    flipped = (x.flip(1), *past[1:])
    (y_past,), (y_future,) = cuda.conv_forward(*past), cuda.conv_forward(*future)
    assert torch.equal(y_future, cuda.conv_forward(*flipped)[0].flip(1))
    d_past, d_future = cuda.conv_backward(g, None, *past), cuda.conv_backward(g, None, *future)
    assert torch.equal(d_future[0], cuda.conv_backward(g.flip(1), None, *flipped)[0].flip(1))
    both = (x, weight, bias, weight, bias, True, False)
    assert all(map(torch.equal, cuda.conv_forward(*both), (y_past, y_future)))
    d_both = cuda.conv_backward(g, g, *both)
    assert all(map(torch.equal, d_both[1:], (*d_past[1:3], *d_future[1:3])))
    assert torch.allclose(d_both[0], d_past[0] + d_future[0], atol=1e-5)
    shim.order = 7
    assert all(map(torch.equal, cuda.conv_backward(g, g, *both), d_both))
    poisoned = x.clone()
    poisoned[1, 20, 4] = float("nan")
    (y,) = cuda.conv_forward(poisoned, *past[1:])
    assert y[1, 20:24, 4].isnan().all()
    y[1, 20:24, 4] = y_past[1, 20:24, 4]
    assert torch.equal(y, y_past)


# ---- the self-check --------------------------------------------------------------------------


def test_the_self_check_passes(shim):
    assert cuda._largest_error("cpu") < 1e-5


@pytest.mark.parametrize("name", ["scan_backward", "conv_backward", "conv_forward", "sum_partials"])
def test_the_self_check_sees_a_kernel_that_writes_nothing(shim, monkeypatch, name):
    launch = nvrtc.launch

    def all_but_one(source, kernel, *rest):
        if kernel != name:
            launch(source, kernel, *rest)

    monkeypatch.setattr(nvrtc, "launch", all_but_one)
    assert not cuda._largest_error("cpu") < 1e-4
