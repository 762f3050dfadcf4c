"""The CUDA kernels on a GPU: against the reference, in streams, graphs and compiled functions."""

import pytest
import torch

from dis_ssm.ops import (
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    cuda,
    selective_scan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cuda.missing() is not None,
        reason="needs an NVIDIA GPU and cuda-core",
    ),
]


def test_passes_its_own_check():
    assert cuda.why_not() is None


OPTIONS = ["Dzb", "", "D", "z", "b", "Db", "zb", "Dz"]
SHAPES = [
    (2, 0, 7, 16), (2, 1, 9, 16), (3, 2, 31, 8), (1, 17, 770, 16), (2, 18, 1, 16), (1, 31, 7, 5),
    (2, 32, 31, 16), (2, 33, 130, 16), (1, 63, 9, 64), (3, 64, 770, 17), (2, 65, 7, 40),
    (0, 33, 32, 16), (2, 258, 770, 16), (1, 1026, 129, 16), (1, 2049, 31, 16), (16, 66, 3072, 16),
]  # fmt: skip


def on_gpu(inputs):
    return {n: v.cuda() for n, v in inputs.items()}


def upstream(inputs, seed=5):
    x = inputs.get("x", inputs.get("x_f"))
    g = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=g, device=x.device).to(x.dtype)


def both_runs(run, function, inputs, g, **options):
    """(output, gradients) of the kernel, and of the reference in float64."""
    wide = {n: v.double() for n, v in inputs.items()}
    wide_g = tuple(v.double() for v in g) if isinstance(g, tuple) else g.double()
    actual = run(function, inputs, g, backend="cuda", **options)
    return actual, run(function, wide, wide_g, backend="reference", **options)


def check(run, assert_close, function, inputs, value_tol=4e-6, grad_tol=4e-5, **options):
    actual, truth = both_runs(run, function, inputs, upstream(inputs), **options)
    assert_close(actual[0], truth[0], value_tol)
    for name, grad in actual[1].items():
        assert grad.dtype == inputs[name].dtype and grad.device == inputs[name].device
        assert_close(grad, truth[1][name], grad_tol, f"d{name}")


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_scan_equals_the_reference(index, run, assert_close, scan_inputs, bidirectional_inputs):
    options = OPTIONS[index % 8]
    make = dict(options=options, dtype=torch.float32)
    inputs = on_gpu(scan_inputs(*SHAPES[index], **make))
    softplus = index % 5 != 4
    if not softplus:
        inputs |= {n: inputs[n].abs() * 0.2 for n in ("dt", "dt_bias") if n in inputs}
    reverse = index % 2 == 1
    check(run, assert_close, selective_scan, inputs, reverse=reverse, dt_softplus=softplus)
    inputs = on_gpu(bidirectional_inputs(*SHAPES[index], **make))
    check(run, assert_close, bidirectional_selective_scan, inputs)


@pytest.mark.parametrize("channels", [40, 3072], ids=["apart", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_like_plain_pytorch(dtype, channels, run, bidirectional_inputs):
    batch = 16 if channels > 1000 else 2
    inputs = on_gpu(bidirectional_inputs(batch, 66, channels, 16, dtype=torch.float32))
    inputs = {n: v if n[:2] in ("A_", "D_") else v.to(dtype) for n, v in inputs.items()}
    g = upstream(inputs)
    (y, grads), (y_true, grads_true) = both_runs(run, bidirectional_selective_scan, inputs, g)
    plain, plain_grads = run(bidirectional_selective_scan, inputs, g, backend="reference")

    def error(actual, truth):
        return (actual.double() - truth).abs().max().item()

    assert error(y, y_true) <= 2 * error(plain, y_true)
    for name, grad in grads.items():
        floor = 2e-5 * grads_true[name].abs().max().item()
        allowed = 3 * error(plain_grads[name], grads_true[name])
        assert error(grad, grads_true[name]) <= max(allowed, floor), name


def test_views_and_strides(run, assert_close, scan_inputs):
    inputs = on_gpu(scan_inputs(2, 35, 9, 16, dtype=torch.float32))
    wide = torch.randn(2, 35, 3 + 9 + 32, device="cuda")
    inputs |= {"x": wide[..., 3:12], "B": wide[..., 12:28], "C": wide[..., 28:]}
    inputs["z"] = torch.randn(2, 9, 35, device="cuda").transpose(1, 2)
    inputs["dt"] = torch.randn(35, 9, device="cuda").expand(2, 35, 9)
    before = {n: v.clone() for n, v in inputs.items()}
    check(run, assert_close, selective_scan, inputs)
    assert all(torch.equal(before[n], v) for n, v in inputs.items())
    x, z = torch.randn(2, 35, 18, device="cuda", requires_grad=True).chunk(2, dim=-1)
    y = selective_scan(**inputs | {"x": x, "z": z}, backend="cuda")
    y.sum().backward()  # the gradient has stride 0


def test_extremes(run, assert_close, scan_inputs):
    def case(**changes):
        inputs = on_gpu(scan_inputs(1, 70, 9, 16, dtype=torch.float32))
        return inputs | {name: change(inputs[name]) for name, change in changes.items()}

    steps = torch.tensor([-40.0, -30.0, 12.0, 19.9, 20.1, 60.0, 100.0], device="cuda")
    for inputs in (
        case(A=lambda A: A * 40, dt=lambda dt: dt + 6),
        case(A=lambda A: A * 0.01, dt=lambda dt: steps.repeat(90).view(1, 70, 9)),
        case(dt=lambda dt: -30 + 0.1 * dt, D=lambda D: D * 0),
        case(A=lambda A: A * 0),
        case(A=lambda A: -A * 0.05),
        case(x=lambda x: x * 1e-36, C=lambda C: C * 1e-2),
    ):
        check(run, assert_close, selective_scan, inputs, 8e-6, 8e-5)


@pytest.mark.parametrize("name", ["x", "dt", "B", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_place(name, value, scan_inputs):
    inputs = on_gpu(scan_inputs(2, 40, 9, 16, dtype=torch.float32))
    clean = selective_scan(**inputs, backend="cuda")
    inputs[name][1, 20, 4] = value
    hit = (1, slice(20, None), slice(None) if name == "B" else 4)
    y = selective_scan(**inputs, backend="cuda")
    assert not y[hit].isfinite().all()
    y[hit] = clean[hit]
    assert torch.equal(y, clean)


def test_bits(run, bidirectional_inputs, scan_inputs):
    """Repeats, batch rows, a flip and the two directions agree bit for bit."""
    inputs = on_gpu(bidirectional_inputs(40, 67, 1000, 16, dtype=torch.float32))
    g = upstream(inputs)
    y, grads = run(bidirectional_selective_scan, inputs, g, backend="cuda")
    for _ in range(3):
        again, grads_again = run(bidirectional_selective_scan, inputs, g, backend="cuda")
        assert torch.equal(y, again)
        assert all(torch.equal(grads[n], grads_again[n]) for n in grads)
    one = {n: v[3:4] if v.ndim == 3 else v for n, v in inputs.items()}  # another kernel
    y_one, grads_one = run(bidirectional_selective_scan, one, g[3:4], backend="cuda")
    assert torch.equal(y_one, y[3:4])
    per_row = [n for n, v in inputs.items() if v.ndim == 3]
    assert all(torch.equal(grads_one[n], grads[n][3:4]) for n in per_row)

    inputs = on_gpu(scan_inputs(2, 45, 70, 16, dtype=torch.bfloat16))
    flipped = {n: v.flip(1) if v.ndim == 3 else v for n, v in inputs.items()}
    g = upstream(inputs)
    y, grads = run(selective_scan, inputs, g, reverse=True, backend="cuda")
    y_flipped, grads_flipped = run(selective_scan, flipped, g.flip(1), backend="cuda")
    assert torch.equal(y, y_flipped.flip(1))
    for n, grad in grads.items():
        assert torch.equal(grad, grads_flipped[n].flip(1) if grad.ndim == 3 else grads_flipped[n])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(2, 0, 7), (2, 1, 9), (3, 65, 31), (2, 258, 770)])
def test_convolutions_equal_the_reference(shape, width, run, assert_close):
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    channels = shape[2]
    inputs = {"x": randn(*shape[:2], channels + 2)[..., 1:-1]}
    inputs |= {f"weight_{d}": randn(channels, width) for d in "fb"}
    inputs |= {f"bias_{d}": randn(channels) for d in "fb"}
    up = randn(*shape), randn(*shape)
    actual, truth = both_runs(run, bidirectional_causal_conv1d, inputs, up)
    for y, y_true in zip(actual[0], truth[0], strict=True):
        assert_close(y, y_true, 4e-6)
    for n, grad in actual[1].items():
        assert_close(grad, truth[1][n], 4e-5, n)
    one = {"x": inputs["x"], "weight": inputs["weight_f"]}
    for options in (dict(reverse=True), dict(activation=None)):
        actual, truth = both_runs(run, causal_conv1d, one, up[0], **options)
        assert_close(actual[0], truth[0], 4e-6)
        for n, grad in actual[1].items():
            assert_close(grad, truth[1][n], 4e-5, n)
    half = {n: v.bfloat16() if n == "x" else v for n, v in inputs.items()}
    actual, truth = both_runs(
        run, bidirectional_causal_conv1d, half, tuple(u.bfloat16() for u in up)
    )
    assert_close(actual[0][0], truth[0][0], 8e-3)
    assert_close(actual[1]["x"], truth[1]["x"], 8e-3)


def block(x, weight_f, weight_b, dt_f, dt_b, A, B, C, D, z):
    """Both ops in a row, the way the mixer uses them."""
    x_f, x_b = bidirectional_causal_conv1d(x, weight_f, weight_b, backend="cuda")
    return bidirectional_selective_scan(
        x_f, x_b, dt_f, dt_b, A, A, B, B, C, C, D, D, z, backend="cuda"
    )


@pytest.fixture
def block_inputs(scan_inputs):
    inputs = on_gpu(scan_inputs(2, 66, 96, 16, options="Dz", dtype=torch.float32))
    inputs |= {f"weight_{d}": torch.randn(96, 4, device="cuda") for d in "fb"}
    dt = inputs.pop("dt")
    inputs |= {"dt_f": dt, "dt_b": dt.flip(1)}
    return {n: v.requires_grad_(True) for n, v in inputs.items()}


def gradients(function, inputs):
    return torch.autograd.grad(function(**inputs).square().sum(), list(inputs.values()))


def test_a_side_stream(block_inputs):
    expected = gradients(block, block_inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work that the kernels must wait for, although they run on no default stream.
        late = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            late = (late @ late).tanh()
        late = late.sum() * 0
        shifted = {n: v + late for n, v in block_inputs.items()}
        actual = gradients(block, shifted)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_graph_replays(block_inputs):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and loads the kernels
        gradients(block, block_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(block, block_inputs)
    with torch.no_grad():
        for v in block_inputs.values():
            v.mul_(0.9)
    graph.replay()
    expected = gradients(block, block_inputs)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiles_as_one_graph(block_inputs, assert_close):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual, expected = gradients(compiled, block_inputs), gradients(block, block_inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-6)


def test_operators_are_well_formed(scan_inputs):
    from dis_ssm.ops.conv import conv_op
    from dis_ssm.ops.scan import scan_op

    i = on_gpu(scan_inputs(1, 33, 9, 16, dtype=torch.float32))
    i = {n: v.requires_grad_(True) for n, v in i.items()}
    scan = tuple(i[n] for n in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    torch.library.opcheck(scan_op, (*scan, *(None,) * 7, i["z"], True, False, True))
    weight = torch.randn(9, 4, device="cuda", requires_grad=True)
    torch.library.opcheck(conv_op, (i["x"], weight, None, None, None, True, False))


def test_autocast_and_a_second_device(block_inputs):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert all(g.isfinite().all() for g in gradients(block, block_inputs))
    if torch.cuda.device_count() > 1:
        moved = {n: v.detach().to("cuda:1").requires_grad_(True) for n, v in block_inputs.items()}
        expected = gradients(block, block_inputs)
        for a, b in zip(gradients(block, moved), expected, strict=True):
            assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.slow
def test_more_than_two_billion_elements():
    batch, length, channels = 700, 1026, 3072
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    x = torch.randn(1, length, channels, device="cuda", dtype=torch.bfloat16)
    dt, z = torch.randn_like(x), torch.randn_like(x)
    A = -torch.rand(channels, 16, device="cuda") - 0.5
    B, C = torch.randn(2, 1, length, 16, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        one = selective_scan(x, dt, A, B, C, z=z, backend="cuda")
        row = [t.expand(batch, *t.shape[1:]) for t in (x, dt, B, C, z)]
        y = selective_scan(row[0], row[1], A, row[2], row[3], z=row[4], backend="cuda")
    assert y.numel() > 2**31 and torch.equal(y[-1:], one) and torch.equal(y[:1], one)
