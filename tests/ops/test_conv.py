"""The depthwise causal convolution against a loop over taps in float64.

y_t = act(bias + sum_k w[c, k] x_{t-(K-1)+k}), zero before the start; reverse looks ahead.
"""

import pytest
import torch

from dis_ssm.ops import bidirectional_causal_conv1d, causal_conv1d


def loop(x, weight, bias=None, activation="silu", reverse=False):
    length, width = x.shape[1], weight.shape[1]
    y = x * 0 if bias is None else x * 0 + bias
    for k in range(width):
        lag = width - 1 - k
        if lag >= length:
            continue
        past = x[:, lag:] if reverse else x[:, : length - lag]
        zeros = x.new_zeros(x.shape[0], lag, x.shape[2])
        moved = torch.cat([past, zeros] if reverse else [zeros, past], 1)
        y = y + moved * weight[:, k]
    return y * torch.sigmoid(y) if activation == "silu" else y


def loop_both(x, weight_f, weight_b, bias_f=None, bias_b=None, activation="silu"):
    forward = loop(x, weight_f, bias_f, activation)
    return forward, loop(x, weight_b, bias_b, activation, reverse=True)


def conv_inputs(batch, length, channels, width=4, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    inputs = {"x": randn(batch, length, channels), "weight": randn(channels, width)}
    return inputs | ({"bias": randn(channels)} if bias else {})


def both_inputs(*shape, **options):
    one, two = conv_inputs(*shape, **options), conv_inputs(*shape, **options, seed=1)
    both = {"x": one.pop("x")}
    two.pop("x")
    both |= {f"{n}_f": v for n, v in one.items()} | {f"{n}_b": v for n, v in two.items()}
    return both


def double(inputs):
    return {name: value.double() for name, value in inputs.items()}


def randn_like(x, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)


SHAPES = [
    (2, 0, 7), (2, 1, 9), (3, 2, 31), (2, 3, 5), (2, 17, 16), (1, 18, 770), (2, 31, 7), (2, 32, 32),
    (2, 33, 31), (1, 63, 64), (2, 64, 9), (3, 65, 1), (1, 66, 770), (2, 257, 31), (1, 258, 64),
    (0, 33, 32), (0, 0, 1), (1, 1, 1), (1, 1025, 9), (1, 1026, 32), (33, 3, 8),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_cpu_kernel_equals_the_float64_loop(native, index, run, assert_close):
    for bias, activation, reverse in (
        (index % 2 == 0, "silu", index % 3 == 0),
        (index % 2 == 1, None if index % 4 < 2 else "silu", index % 3 != 0),
    ):
        inputs = conv_inputs(*SHAPES[index], bias=bias, dtype=torch.float32, seed=index)
        g = randn_like(inputs["x"])
        named = dict(activation=activation, reverse=reverse)
        y, grads = run(causal_conv1d, inputs, g, backend=native, **named)
        y_true, grads_true = run(loop, double(inputs), g.double(), **named)
        assert_close(y, y_true, 2e-6)
        for name, grad in grads.items():
            assert_close(grad, grads_true[name], 2e-5, f"d{name}")


@pytest.mark.parametrize("index", range(0, len(SHAPES), 2))
def test_cpu_bidirectional_kernel_equals_the_float64_loop(native, index, run, assert_close):
    inputs = both_inputs(*SHAPES[index], bias=index % 4 == 0, dtype=torch.float32)
    g = (randn_like(inputs["x"]), randn_like(inputs["x"], 4))
    y, grads = run(bidirectional_causal_conv1d, inputs, g, backend=native)
    y_true, grads_true = run(loop_both, double(inputs), tuple(v.double() for v in g))
    for actual, truth in zip(y, y_true, strict=True):
        assert_close(actual, truth, 2e-6)
    for name, grad in grads.items():
        assert_close(grad, grads_true[name], 2e-5, f"d{name}")


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_width(backend, width, run, assert_close):
    for reverse in (False, True):
        inputs = conv_inputs(2, 6, 9, width, dtype=torch.float32)
        y, grads = run(causal_conv1d, inputs, backend=backend, reverse=reverse)
        y_true, grads_true = run(loop, double(inputs), reverse=reverse)
        assert_close(y, y_true, 2e-6)
        for name, grad in grads.items():
            assert_close(grad, grads_true[name], 2e-5, f"d{name}")


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_exact_in_float64(activation, reverse, bias, run, assert_close):
    inputs = conv_inputs(2, 19, 5, bias=bias)
    g, named = randn_like(inputs["x"]), dict(activation=activation, reverse=reverse)
    y, grads = run(causal_conv1d, inputs, g, backend="reference", **named)
    y_true, grads_true = run(loop, inputs, g, **named)
    assert_close(y, y_true, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, grads_true[name], 1e-12, f"d{name}")


def test_reference_gradients_by_finite_differences():
    inputs = both_inputs(2, 5, 3)

    def function(*values):
        named = dict(zip(inputs, values, strict=True))
        return bidirectional_causal_conv1d(**named, backend="reference")

    leaves = [v.requires_grad_(True) for v in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_impulse_response_is_the_kernel(backend):
    x = torch.zeros(1, 9, 1)
    x[0, 4, 0] = 1.0
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    y = causal_conv1d(x, weight, activation=None, backend=backend)[0, :, 0]
    assert y.tolist() == [0, 0, 0, 0, 4, 3, 2, 1, 0]
    y = causal_conv1d(x, weight, activation=None, reverse=True, backend=backend)[0, :, 0]
    assert y.tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0]


def test_reverse_is_the_flipped_convolution_bit_for_bit(backend, run, assert_same_bits):
    inputs = conv_inputs(3, 67, 37, dtype=torch.float32)
    g = randn_like(inputs["x"])
    flipped = inputs | {"x": inputs["x"].flip(1)}
    y, grads = run(causal_conv1d, inputs, g, backend=backend, reverse=True)
    y_flip, grads_flip = run(causal_conv1d, flipped, g.flip(1), backend=backend)
    assert_same_bits(backend, y, y_flip.flip(1))
    torch.testing.assert_close(grads["x"], grads_flip["x"].flip(1), rtol=1e-5, atol=1e-6)


def test_bidirectional_equals_its_two_directions(backend):
    inputs = both_inputs(2, 66, 33, dtype=torch.float32)
    forward, backward = bidirectional_causal_conv1d(**inputs, backend=backend)
    x = inputs["x"]
    one = causal_conv1d(x, inputs["weight_f"], inputs["bias_f"], backend=backend)
    two = causal_conv1d(x, inputs["weight_b"], inputs["bias_b"], reverse=True, backend=backend)
    torch.testing.assert_close(forward, one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(backward, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_gets_no_gradient(backend, used, assert_close):
    inputs = both_inputs(2, 18, 9, dtype=torch.float32)
    leaves = {n: v.requires_grad_(True) for n, v in inputs.items()}
    bidirectional_causal_conv1d(**leaves, backend=backend)[used].sum().backward()
    truth = {n: v.detach().double().requires_grad_(True) for n, v in inputs.items()}
    loop_both(**truth)[used].sum().backward()
    unused = "_b" if used == 0 else "_f"
    for name, leaf in leaves.items():
        if name.endswith(unused):
            assert leaf.grad is None or (leaf.grad == 0).all()
        else:
            assert_close(leaf.grad, truth[name].grad, 2e-5, f"d{name}")


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_each_gradient_alone(backend, wanted, run, assert_same_bits):
    inputs = conv_inputs(2, 33, 9, dtype=torch.float32)
    _, every = run(causal_conv1d, inputs, backend=backend)
    _, alone = run(causal_conv1d, inputs, wanted=[wanted], backend=backend)
    assert_same_bits(backend, alone[wanted], every[wanted], wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_numbers_stay_in_their_channel(backend, bad, run):
    inputs = conv_inputs(2, 66, 37, dtype=torch.float32)
    expected, expected_grads = run(causal_conv1d, inputs, backend=backend)
    inputs["x"][1, 30, 5] = bad
    y, grads = run(causal_conv1d, inputs, backend=backend)
    touched = torch.zeros(y.shape, dtype=torch.bool)
    touched[1, 30:34, 5] = True
    assert torch.equal(y[~touched], expected[~touched])
    assert bad == torch.inf or y[1, 30:34, 5].isnan().all()
    others = [c for c in range(37) if c != 5]
    for name in ("x", "weight", "bias"):
        columns = (..., others) if name == "x" else others
        assert torch.equal(grads[name][columns], expected_grads[name][columns]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_plain_pytorch(native, dtype, run):
    inputs = conv_inputs(2, 66, 40, dtype=dtype)
    g = randn_like(inputs["x"])

    def plain(**tensors):
        return loop(**{n: v.float() for n, v in tensors.items()}).to(dtype)

    y, grads = run(causal_conv1d, inputs, g, backend=native)
    y_true, grads_true = run(loop, double(inputs), g.double())
    y_plain, grads_plain = run(plain, inputs, g)
    assert y.dtype == dtype
    assert (y - y_true).abs().max() <= 2 * (y_plain - y_true).abs().max()
    for name, grad in grads.items():
        assert grad.dtype == dtype
        truth = grads_true[name]
        error_plain = (grads_plain[name] - truth).abs().max() + 2e-5 * truth.abs().max()
        assert (grad - truth).abs().max() <= 3 * error_plain, name


def test_half_precision_input_with_float32_weights(backend, run, assert_close):
    inputs = conv_inputs(2, 66, 40, dtype=torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    y, grads = run(causal_conv1d, inputs, backend=backend)
    y_true, grads_true = run(loop, double(inputs))
    assert y.dtype == torch.bfloat16 and grads["x"].dtype == torch.bfloat16
    assert grads["weight"].dtype == torch.float32
    assert_close(y, y_true, 0.005)
    for name, grad in grads.items():
        assert_close(grad, grads_true[name], 0.01, f"d{name}")


BAD_ARGUMENTS = {
    "x": lambda a: {"x": a["x"][0]},
    "weight": lambda a: {"weight": a["weight"][:-1]},
    "weight ": lambda a: {"weight": a["weight"][:, None]},
    "bias": lambda a: {"bias": a["bias"][:-1]},
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_shapes_are_named(backend, case):
    good = conv_inputs(2, 6, 9, dtype=torch.float32)
    bad = BAD_ARGUMENTS[case](good)
    ((name, value),) = bad.items()
    with pytest.raises(ValueError) as error:
        causal_conv1d(**(good | bad), backend=backend)
    assert name in str(error.value)
    assert all(str(n) in str(error.value) for n in value.shape)


def test_unknown_activation_is_named(backend):
    inputs = conv_inputs(2, 6, 9, dtype=torch.float32)
    with pytest.raises(ValueError, match="tanh"):
        causal_conv1d(**inputs, activation="tanh", backend=backend)
