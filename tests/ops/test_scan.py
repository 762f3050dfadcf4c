"""The selective scan against a float64 loop over time: values, gradients and corner cases.

Letters: L length, N state size, g upstream gradient. The loop below is the definition:
h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t,  y_t = (C_t . h_t + D x_t) silu(z_t).
"""

import math

import pytest
import torch

from dis_ssm.ops import bidirectional_selective_scan, selective_scan


def loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=True, reverse=False):
    delta = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        small = torch.log1p(torch.exp(delta.clamp(max=20)))
        delta = torch.where(delta > 20, delta, small)
    deltas, xs, Bs, Cs = (v.unbind(1) for v in (delta, x, B, C))
    h = x.new_zeros(x.shape[0], *A.shape)
    y = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        step = deltas[t].unsqueeze(-1)
        h = torch.exp(step * A) * h + step * Bs[t].unsqueeze(1) * xs[t].unsqueeze(-1)
        y[t] = (h * Cs[t].unsqueeze(1)).sum(-1)
        if D is not None:
            y[t] = y[t] + D * xs[t]
    y = torch.stack(y, 1) if y else x * 0
    return y if z is None else y * z * torch.sigmoid(z)


def loop_both(z=None, dt_softplus=True, **inputs):
    forward = {n.removesuffix("_f"): v for n, v in inputs.items() if n.endswith("_f")}
    backward = {n.removesuffix("_b"): v for n, v in inputs.items() if n.endswith("_b")}
    y = loop(**forward, dt_softplus=dt_softplus)
    y = y + loop(**backward, dt_softplus=dt_softplus, reverse=True)
    return y if z is None else y * z * torch.sigmoid(z)


def double(inputs):
    return {name: value.double() for name, value in inputs.items()}


def upstream_like(inputs, seed=7):
    x = inputs.get("x", inputs.get("x_f"))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)


def check(run, assert_close, function, truth, inputs, value_tol, grad_tol, backend, **options):
    g = upstream_like(inputs)
    y, grads = run(function, inputs, g, backend=backend, **options)
    y_true, grads_true = run(truth, double(inputs), g.double(), **options)
    assert y.dtype == inputs.get("x", inputs.get("x_f")).dtype
    assert_close(y, y_true, value_tol)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, grads_true[name], grad_tol, f"d{name}")


# Every length, channel count and state size of the list meets several of the others.
OPTIONS = ["Dzb", "", "D", "z", "b", "Db", "zb", "Dz"]
SHAPES = [
    (2, 0, 7, 16), (2, 1, 9, 16), (3, 2, 31, 8), (2, 17, 16, 16), (1, 18, 770, 16), (2, 31, 7, 5),
    (2, 32, 32, 16), (2, 33, 31, 17), (1, 63, 64, 16), (2, 64, 9, 3), (3, 65, 1, 16),
    (1, 66, 770, 4), (2, 257, 31, 16), (1, 258, 64, 16), (0, 33, 32, 16), (0, 0, 1, 1),
    (1, 1, 1, 1), (1, 2, 770, 1), (5, 17, 7, 2), (2, 18, 9, 64), (2, 31, 32, 32),
    (1, 33, 64, 64), (1, 65, 33, 16), (2, 66, 16, 8), (1, 257, 7, 5), (1, 258, 9, 2),
    (1, 1025, 9, 16), (1, 1026, 32, 17), (33, 3, 8, 16), (9, 33, 48, 16),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_cpu_kernel_equals_the_float64_loop(native, index, run, assert_close, scan_inputs):
    for option, reverse, softplus in (
        (OPTIONS[index % 8], index % 2 == 0, index % 5 != 4),
        (OPTIONS[(index + 3) % 8], index % 2 == 1, index % 5 != 2),
    ):
        inputs = scan_inputs(*SHAPES[index], options=option, dtype=torch.float32, seed=index)
        if not softplus:
            inputs |= {n: inputs[n].abs() * 0.2 for n in ("dt", "dt_bias") if n in inputs}
        options = dict(reverse=reverse, dt_softplus=softplus)
        check(run, assert_close, selective_scan, loop, inputs, 2e-6, 2e-5, native, **options)


@pytest.mark.parametrize("index", [0, 1, 3, 4, 7, 9, 12, 13, 14, 19, 21, 27])
def test_cpu_bidirectional_kernel_equals_the_loops(
    native, index, run, assert_close, bidirectional_inputs
):
    options = OPTIONS[(index + 1) % 8]
    inputs = bidirectional_inputs(*SHAPES[index], options=options, dtype=torch.float32, seed=index)
    function, truth = bidirectional_selective_scan, loop_both
    check(run, assert_close, function, truth, inputs, 2e-6, 2e-5, native)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_exact_in_float64(options, reverse, run, assert_close, scan_inputs):
    inputs = scan_inputs(2, 19, 5, 3, options=options)
    for softplus in (True, False):
        named = dict(reverse=reverse, dt_softplus=softplus)
        check(run, assert_close, selective_scan, loop, inputs, 1e-12, 1e-12, "reference", **named)


@pytest.mark.parametrize("options", ["", "Db", "Dzb"])
def test_bidirectional_reference_is_exact_in_float64(
    options, run, assert_close, bidirectional_inputs
):
    inputs = bidirectional_inputs(2, 19, 5, 3, options=options)
    function, truth = bidirectional_selective_scan, loop_both
    check(run, assert_close, function, truth, inputs, 1e-12, 1e-12, "reference")


@pytest.mark.parametrize("options, reverse", [("Dzb", False), ("", True)])
def test_reference_gradients_by_finite_differences(options, reverse, scan_inputs):
    inputs = scan_inputs(2, 3, 2, 2, options=options)
    leaves = [v.requires_grad_(True) for v in inputs.values()]

    def function(*values):
        named = dict(zip(inputs, values, strict=True))
        return selective_scan(**named, reverse=reverse, backend="reference")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_bidirectional_reference_gradients_by_finite_differences(bidirectional_inputs):
    inputs = bidirectional_inputs(1, 3, 2, 2)

    def function(*values):
        named = dict(zip(inputs, values, strict=True))
        return bidirectional_selective_scan(**named, backend="reference")

    assert torch.autograd.gradcheck(function, [v.requires_grad_(True) for v in inputs.values()])


def test_closed_form_of_a_constant_input(backend):
    # x = 1, Delta = d, A = a, B = C = 1: y_t is a geometric sum; D adds 3 and z = 0 gives nothing.
    length, d, a = 40, 0.1, -0.7
    ones = torch.ones(1, length, 1)
    args = (ones, d * ones, torch.tensor([[a]]), ones, ones, torch.tensor([3.0]))
    y = selective_scan(*args, dt_softplus=False, backend=backend)
    q = math.exp(d * a)
    expected = torch.tensor([d * (1 - q ** (t + 1)) / (1 - q) + 3 for t in range(length)])
    torch.testing.assert_close(y[0, :, 0], expected, rtol=2e-6, atol=0)
    y = selective_scan(*args, dt_softplus=False, reverse=True, backend=backend)
    torch.testing.assert_close(y[0, :, 0], expected.flip(0), rtol=2e-6, atol=0)
    y = selective_scan(*args, z=0 * ones, dt_softplus=False, backend=backend)
    assert (y == 0).all()


# ---- numbers at the edges of float32 ------------------------------------------------------


def set_decay_underflow(inputs):
    inputs["A"] *= 40
    inputs["dt"][:, ::3] = 12.0


def set_large_softplus(inputs):
    values = torch.tensor([19.9, 20.0, 20.1, 25.0, 60.0, 100.0])
    inputs["dt"] = values[torch.arange(inputs["dt"].numel()) % 6].view_as(inputs["dt"]).clone()
    inputs["A"] *= 0.01


def set_negative_dt(value):
    def apply(inputs):
        inputs["dt"] = value + 0.1 * inputs["dt"]
        inputs["D"].zero_()  # so that the tiny scan itself is what is compared

    return apply


def set_decay_near_one(inputs):
    inputs["A"] *= 1e-6


def set_zero_A(inputs):
    inputs["A"].zero_()


def set_growing(inputs):
    inputs["A"] = inputs["A"].abs() * 0.05


EXTREMES = {
    "decay underflows to 0": set_decay_underflow,
    "softplus beyond 20": set_large_softplus,
    "dt = -30": set_negative_dt(-30.0),
    "dt = -40": set_negative_dt(-40.0),
    "decay near 1": set_decay_near_one,
    "A = 0": set_zero_A,
    "A > 0": set_growing,
}


@pytest.mark.parametrize("length", [70, 258])
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_decays(backend, case, length, run, assert_close, scan_inputs):
    inputs = scan_inputs(2, length, 9, 16, options="Dz", dtype=torch.float32)
    EXTREMES[case](inputs)
    # a growing state also accumulates the last bit of its exponentials, token by token
    tolerance = 1e-7 * length if case == "A > 0" else 3e-6
    check(run, assert_close, selective_scan, loop, inputs, tolerance, 10 * tolerance, backend)


def test_dt_so_negative_that_delta_vanishes(backend, run, scan_inputs):
    inputs = scan_inputs(2, 40, 9, 16, options="D", dtype=torch.float32)
    inputs["dt"].fill_(-1000.0)
    y, grads = run(selective_scan, inputs, backend=backend)
    assert torch.equal(y, inputs["D"] * inputs["x"])
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["A"] == 0).all() and (grads["dt"] == 0).all()


def test_overflow_is_infinite_exactly_where_it_should_be(backend):
    # h_t is about e^(10 t): float32 ends at e^88.7, so tokens 0..8 are finite and the rest inf.
    ones = torch.ones(1, 80, 9)
    A = torch.full((9, 2), -1.0)
    A[4] = 10.0
    BC = torch.ones(1, 80, 2)
    y = selective_scan(ones, ones, A, BC, BC, dt_softplus=False, backend=backend)
    assert y[0, :9, 4].isfinite().all()
    assert (y[0, 9:, 4] == torch.inf).all()
    assert y[..., [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_decay_that_overflows_in_one_step_stays_in_its_channel(backend, scan_inputs, assert_close):
    inputs = scan_inputs(1, 80, 40, 16, options="Dz", dtype=torch.float32)
    clean = selective_scan(**inputs, backend=backend)
    inputs["A"][5] = 500.0
    inputs["dt"][:, :, 5] = 3.0
    y = selective_scan(**inputs, backend=backend)
    others = [c for c in range(40) if c != 5]
    assert not y[:, 1:, 5].isfinite().any()
    assert_close(y[..., others], clean[..., others], 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "dt", "z", "A", "D", "dt_bias"])
def test_non_finite_numbers_stay_in_their_channel_and_row(
    backend, where, bad, run, scan_inputs, assert_close
):
    row, token, channel = 1, 37, 6
    clean = scan_inputs(3, 80, 40, 16, dtype=torch.float32)
    inputs = {n: v.clone() for n, v in clean.items()}
    if where in ("x", "dt", "z"):
        inputs[where][row, token, channel] = bad
    elif where == "A":
        inputs["A"][channel, 3] = bad
    else:
        inputs[where][channel] = bad
    y, grads = run(selective_scan, inputs, backend=backend)
    expected, expected_grads = run(selective_scan, clean, backend=backend)

    others = [c for c in range(40) if c != channel]
    assert_close(y[..., others], expected[..., others], 1e-6)
    for name in ("x", "dt", "z"):
        assert_close(grads[name][..., others], expected_grads[name][..., others], 1e-5, name)
    for name in ("A", "D", "dt_bias"):
        assert_close(grads[name][others], expected_grads[name][others], 1e-5, name)

    if where in ("x", "dt", "z"):
        rows = [0, 2]
        assert torch.equal(y[rows], expected[rows])
        for name in ("x", "dt", "z", "B", "C"):
            assert torch.equal(grads[name][rows], expected_grads[name][rows]), name
        assert_close(y[row, :token], expected[row, :token], 1e-6)

    if math.isnan(bad):
        if where in ("x", "dt"):
            assert y[row, token:, channel].isnan().all()
        elif where == "z":
            assert y[row, token, channel].isnan()
            assert torch.equal(y[row, token + 1 :], expected[row, token + 1 :])
        else:
            assert y[:, 1:, channel].isnan().all()
    elif where == "x" or (where, bad) == ("dt", torch.inf) or (where, bad) == ("z", torch.inf):
        assert not y[row, token, channel].isfinite()
    elif where == "D":
        assert not y[..., channel].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["B", "C"])
def test_non_finite_B_and_C_stay_in_their_row(backend, where, bad, scan_inputs):
    inputs = scan_inputs(3, 80, 40, 16, dtype=torch.float32)
    expected = selective_scan(**inputs, backend=backend)
    inputs[where][1, 37, 3] = bad
    y = selective_scan(**inputs, backend=backend)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert torch.equal(y[1, :37], expected[1, :37])
    assert not y[1, 37].isfinite().any()
    if where == "C":
        assert torch.equal(y[1, 38:], expected[1, 38:])


def test_negative_zero_is_zero(backend, run, scan_inputs):
    inputs = scan_inputs(2, 40, 9, 16, dtype=torch.float32)
    inputs["x"][:, ::2] = 0.0
    inputs["A"][3] = 0.0
    inputs["z"][:, ::3] = 0.0
    negative = {n: torch.where(v == 0, -0.0, v) for n, v in inputs.items()}
    y, grads = run(selective_scan, inputs, backend=backend)
    y_negative, grads_negative = run(selective_scan, negative, backend=backend)
    assert (y == y_negative).all()
    assert all((grads[n] == grads_negative[n]).all() for n in grads)


def test_denormals_are_not_flushed(backend, scan_inputs):
    inputs = scan_inputs(2, 40, 9, 16, options="D", dtype=torch.float32)
    inputs["x"] *= 1e-40
    truth = loop(**double(inputs))
    y = selective_scan(**inputs, backend=backend)
    assert (y.double() - truth).abs().max() < 1e-43
    inputs["C"] *= 1e30
    inputs["D"] *= 0
    y, truth = selective_scan(**inputs, backend=backend), loop(**double(inputs))
    assert (y.double() - truth).abs().max() < 1e-3 * truth.abs().max()


# ---- half precision -----------------------------------------------------------------------


def plain(function, **inputs):
    """PyTorch in float32 on the same half-precision inputs, rounded once at the end."""
    dtype = inputs.get("x", inputs.get("x_f")).dtype
    flags = {n: v for n, v in inputs.items() if not torch.is_tensor(v)}
    tensors = {n: v.float() for n, v in inputs.items() if torch.is_tensor(v)}
    return function(**tensors, **flags).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
@pytest.mark.parametrize("directions", [1, 2])
def test_half_precision_errs_no_more_than_plain_pytorch(
    native, dtype, parameters, directions, run, scan_inputs, bidirectional_inputs
):
    factory, function, truth = (
        (scan_inputs, selective_scan, loop),
        (bidirectional_inputs, bidirectional_selective_scan, loop_both),
    )[directions - 1]
    inputs = factory(2, 66, 40, 16, dtype=dtype)
    if parameters == "float32":
        kept = ("A", "D", "dt_bias")
        inputs = {n: v.float() if n.startswith(kept) else v for n, v in inputs.items()}
    g = upstream_like(inputs)
    y, grads = run(function, inputs, g, backend=native)
    y_true, grads_true = run(truth, double(inputs), g.double())
    y_plain, grads_plain = run(lambda **kw: plain(truth, **kw), inputs, g)
    assert y.dtype == dtype
    error, error_plain = ((v.double() - y_true).abs().max() for v in (y, y_plain))
    assert error <= 2 * error_plain
    for name, value in grads.items():
        assert value.dtype == inputs[name].dtype
        scale = grads_true[name].abs().max()
        error = (value.double() - grads_true[name]).abs().max()
        error_plain = (grads_plain[name].double() - grads_true[name]).abs().max()
        assert error <= 3 * error_plain + 2e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_accumulates_half_precision_in_float32(dtype, run, assert_close, scan_inputs):
    inputs = scan_inputs(2, 258, 9, 16, dtype=dtype)
    y, grads = run(selective_scan, inputs, upstream_like(inputs), backend="reference")
    y_true, grads_true = run(loop, double(inputs), upstream_like(inputs).double())
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert_close(y, y_true, eps)
    for name, value in grads.items():
        assert_close(value, grads_true[name], 4 * eps, f"d{name}")


def test_every_mix_of_dtypes_follows_x(backend, run, assert_close, scan_inputs):
    inputs = scan_inputs(2, 18, 9, 16, dtype=torch.float32)
    half = torch.bfloat16
    for names in (("x", "z"), ("dt", "B"), ("x", "dt", "z", "B", "C"), ("B", "C", "D")):
        mixed = {n: v.to(half) if n in names else v for n, v in inputs.items()}
        y, grads = run(selective_scan, mixed, backend=backend)
        y_true, grads_true = run(loop, double(mixed))
        assert y.dtype == mixed["x"].dtype
        assert_close(y, y_true, 2e-6 if y.dtype == torch.float32 else 0.005)
        for name, grad in grads.items():
            assert grad.dtype == mixed[name].dtype
            assert_close(grad, grads_true[name], 0.02, f"d{name}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_large_step_before_a_non_finite_one_is_still_exact(native, bad):
    # the bound that allows the fast exponential must not forget the large step
    x = torch.ones(1, 8, 3, requires_grad=True)
    dt, A, B = torch.full((1, 8, 3), 0.1), -torch.ones(3, 16), torch.ones(1, 8, 16)
    dt[:, 1], dt[:, 5] = 270.0, bad
    outputs, gradients = [], []
    for backend in (native, "reference"):
        y = selective_scan(x, dt, A, B, B, dt_softplus=False, backend=backend)[:, :5]
        outputs.append(y)
        gradients += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0, equal_nan=True)


def test_a_nan_in_A_is_a_nan_whatever_its_payload(native):
    A = torch.full((2, 16), -1.0)
    A[1, 3] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    ones, B = torch.ones(1, 4, 2), torch.ones(1, 4, 16)
    y = selective_scan(ones, ones, A, B, B, backend=native)
    assert y[..., 0].isfinite().all() and y[..., 1].isnan().all()


def test_many_channel_tiles_on_three_threads(native, scan_inputs):
    inputs = scan_inputs(2, 40, 200, 16, dtype=torch.float32)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y = selective_scan(**leaves, backend=native)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves.values())])
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))
