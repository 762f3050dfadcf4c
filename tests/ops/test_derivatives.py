"""Derivatives other than plain reverse mode: forward-mode AD, torch.func's transforms, batched and
second derivatives. They are the reference's, or refused."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dis_ssm import DiS
from dis_ssm.ops import (
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    dispatch,
    reference,
    selective_scan,
)
from dis_ssm.ops.norm import add_rms_norm


@pytest.fixture
def ops(scan_inputs, bidirectional_inputs):
    """name -> (op, its float32 arguments)."""
    one = scan_inputs(2, 6, 5, 3, dtype=torch.float32)
    both = bidirectional_inputs(2, 6, 5, 3, dtype=torch.float32)
    conv = {"x": one["x"], "weight": one["A"], "bias": one["D"]}
    two = {"x": one["x"], "weight_f": one["A"], "weight_b": both["A_b"], "bias_f": one["D"]}
    return {
        "scan": (selective_scan, one),
        "both scans": (bidirectional_selective_scan, both),
        "convolution": (causal_conv1d, conv),
        "both convolutions": (bidirectional_causal_conv1d, two),
    }


NAMES = ["scan", "both scans", "convolution", "both convolutions"]


def summed(outputs):
    return sum(outputs) if isinstance(outputs, tuple) else outputs


def as_function(op, arguments, **options):
    """The op of its first tensor alone, and that tensor."""
    (name, first), *rest = arguments.items()
    return lambda x: summed(op(**{name: x}, **dict(rest), **options)), first


@pytest.mark.parametrize("name", NAMES)
def test_dual_tensors(native, ops, name):
    """Every argument's tangent, alone and together."""
    op, arguments = ops[name]
    tangents = {n: torch.randn_like(v) for n, v in arguments.items()}
    for wanted in [*([n] for n in arguments), list(arguments)]:

        def tangent(wanted=wanted, **options):
            with forward_ad.dual_level():
                duals = {
                    n: forward_ad.make_dual(v, tangents[n]) if n in wanted else v
                    for n, v in arguments.items()
                }
                return forward_ad.unpack_dual(summed(op(**duals, **options)))

        found, expected = tangent(), tangent(backend="reference")
        assert found.tangent is not None
        torch.testing.assert_close(found.tangent, expected.tangent)
        torch.testing.assert_close(found.primal, expected.primal)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_still_runs_beside_a_dual_level(native, ops, name):
    op, arguments = ops[name]
    expected = summed(op(**arguments, backend=native))
    with forward_ad.dual_level():
        assert torch.equal(summed(op(**arguments)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_forced_kernel_refuses(native, ops, name):
    op, arguments = ops[name]
    function, x = as_function(op, arguments, backend=native)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        function(forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match=r"torch\.func"):
        jvp(function, (x,), (x,))


def test_a_kernel_is_not_tried_out_inside_a_transform(ops, monkeypatch):
    """Its self-test draws numbers, which vmap forbids, and its failure would be remembered."""
    monkeypatch.setattr(dispatch, "_ready", lambda kernel: pytest.fail("tried out"))
    function, x = as_function(*ops["scan"])
    vmap(function)(x[None])


TRANSFORMS = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos())[0],
    "grad": lambda f, x: grad(lambda v: f(v).square().sum())(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.sin()])),
    "vmap of grad": lambda f, x: vmap(grad(lambda v: f(v).square().sum()))(torch.stack([x, -x])),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda v: f(v).square().sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NAMES)
def test_transforms(native, ops, name, transform):
    op, arguments = ops[name]
    found = TRANSFORMS[transform](*as_function(op, arguments))
    expected = TRANSFORMS[transform](*as_function(op, arguments, backend="reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_in_a_compiled_graph(native, ops, name, transform):
    function, x = as_function(*ops[name])
    expected = TRANSFORMS[transform](function, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: TRANSFORMS[transform](function, v), backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad", "jacfwd"])
def test_the_norm(native, transform):
    h, residual, weight = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5)
    found, expected = (
        TRANSFORMS[transform](lambda v, norm=norm: summed(norm(v, residual, weight)), h)
        for norm in (add_rms_norm, reference.add_rms_norm)
    )
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        normed, _ = add_rms_norm(forward_ad.make_dual(h, h), residual, weight)
        assert forward_ad.unpack_dual(normed).tangent is not None


# ---- the whole model ----------------------------------------------------------------------


@pytest.fixture
def model():
    sizes = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, d_state=4)
    model = DiS(**sizes, num_classes=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def batch():
    return torch.randn(3, 2, 4, 4), torch.tensor([1.0, 50.0, 900.0]), torch.tensor([0, 3, 4])


def one(model, parameters, x, t, y):
    """The model of a single image."""
    return functional_call(model, parameters, (x[None], t[None], y[None]))[0]


def test_vmap_over_images_times_and_labels(native, model, batch):
    parameters = dict(model.named_parameters())
    found = vmap(one, (None, None, 0, 0, 0))(model, parameters, *batch)
    torch.testing.assert_close(found, model(*batch), rtol=1e-4, atol=1e-5)


def test_gradients_of_each_sample(native, model, batch):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, t, y):
        return one(model, parameters, x, t, y).square().sum()

    found = vmap(grad(loss), (None, 0, 0, 0))(parameters, *batch)
    for i in range(len(batch[0])):
        model.zero_grad()
        model(*(v[i : i + 1] for v in batch)).square().sum().backward()
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            scale = 1e-4 * expected.abs().max().item() + 1e-6
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=scale)


def test_labels_are_still_checked_where_they_can_be(native, model, batch):
    x, t, _ = batch
    with pytest.raises(ValueError, match="label 9"):
        vmap(lambda v: model(v[None], t[:1], torch.tensor([9])))(x)
    with pytest.raises(IndexError):
        vmap(lambda v, y: model(v[None], t[:1], y[None]))(x, torch.tensor([0, 1, 9]))


def test_forward_mode_of_the_model(native, model, batch):
    x, t, y = batch
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v), t, y))
    _, from_func = jvp(lambda x: model(x, t, y), (x,), (v,))
    double, step = model.double(), 1e-5
    plus, minus = (double(x.double() + s * v.double(), t, y) for s in (step, -step))
    expected = ((plus - minus) / (2 * step)).float()
    torch.testing.assert_close(out.tangent, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(from_func, expected, rtol=1e-3, atol=1e-4)


def test_forward_mode_by_the_parameters(native, model, batch):
    """Dual parameters in a plain module, the input without a tangent."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, expected = jvp(lambda p: functional_call(model, p, batch), (parameters,), (directions,))
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, directions[n]) for n, p in parameters.items()}
        found = forward_ad.unpack_dual(functional_call(model, duals, batch)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- batched gradients --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batched_gradients_are_the_reference_s_or_refused(native, ops, name):
    function, x = as_function(*ops[name])
    reference, _ = as_function(*ops[name], backend="reference")
    x = x.clone().requires_grad_()
    several = torch.randn(3, *x.shape)
    expected = torch.autograd.grad(reference(x), x, several, is_grads_batched=True)[0]
    alone = torch.stack([torch.autograd.grad(reference(x), x, v)[0] for v in several])
    torch.testing.assert_close(expected, alone)
    with pytest.raises(NotImplementedError, match="DIS_SSM_BACKEND=reference"):
        torch.autograd.grad(function(x), x, several, is_grads_batched=True)


def test_batched_gradients_of_the_model(native, model, batch, monkeypatch):
    x, t, y = batch
    x = x.requires_grad_()
    several = torch.randn(2, 3, 4, 4, 4)
    with pytest.raises(NotImplementedError, match="DIS_SSM_BACKEND=reference"):
        torch.autograd.grad(model(x, t, y), x, several, is_grads_batched=True)
    monkeypatch.setenv("DIS_SSM_BACKEND", "reference")
    found = torch.autograd.grad(model(x, t, y), x, several, is_grads_batched=True)[0]
    alone = torch.stack([torch.autograd.grad(model(x, t, y), x, v)[0] for v in several])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
