"""The fused mixer against the same parameters run op by op, and what it keeps for the backward."""

import copy

import pytest
import torch

from dis_ssm.costs.operations import flop_counter
from dis_ssm.models.mixer import BiMamba, FusedMixer
from dis_ssm.ops.scan import CHUNK


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    mixer = BiMamba(24, d_state=5, expand=2)
    for name, p in mixer.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if name.endswith("A_log") else 0.3)
    return mixer


def run(mixer, h, upstream, autocast=False):
    mixer = copy.deepcopy(mixer)
    h = h.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mixer(h)
    y.backward(upstream.to(y.dtype))
    grads = {name: p.grad for name, p in mixer.named_parameters()}
    return y.detach(), {"h": h.grad, **grads}


def reference(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setenv("DIS_SSM_BACKEND", "reference")
        return run(*args, **kwargs)


def test_values_and_every_gradient(native, mixer, monkeypatch, assert_close):
    h, upstream = torch.randn(3, 2 * CHUNK + 3, 24), torch.randn(3, 2 * CHUNK + 3, 24)
    y, grads = run(mixer, h, upstream)
    truth, truths = reference(monkeypatch, mixer.double(), h.double(), upstream.double())
    assert_close(y, truth, 2e-6)
    assert set(grads) == set(truths) and len(truths) == 17
    for name, grad in grads.items():
        assert_close(grad, truths[name], 2e-5, name)


def test_autocast_is_as_close_as_op_by_op(native, mixer, monkeypatch):
    h, upstream = torch.randn(3, 40, 24), torch.randn(3, 40, 24)
    truth, truths = run(mixer, h, upstream)
    plain, plains = reference(monkeypatch, mixer, h, upstream, autocast=True)
    y, grads = run(mixer, h, upstream, autocast=True)
    assert y.dtype is plain.dtype is torch.bfloat16

    def error(value, exact):
        return ((value.double() - exact.double()).norm() / exact.double().norm()).item()

    assert error(y, truth) <= 2 * error(plain, truth)
    for name, grad in grads.items():
        assert grad.dtype is plains[name].dtype, name
        assert error(grad, truths[name]) <= 3 * error(plains[name], truths[name]), name


def test_half_precision_parameters(native, mixer, monkeypatch, assert_close):
    h = torch.randn(2, 40, 24)
    truth, _ = run(mixer, h, h)
    y, grads = run(mixer.bfloat16(), h.bfloat16(), h)
    assert_close(y, truth, 5e-2)
    assert all(grad.dtype is torch.bfloat16 for grad in grads.values())


def test_keeps_projections_the_sum_and_chunk_states_only(native, mixer):
    """in_proj's input and output, two x_proj outputs, the sum before the gate, the states."""
    batch, length, inner, state = 2, 70, 48, 5
    kept = {}

    def pack(t):
        kept.setdefault(t.untyped_storage().data_ptr(), (t.untyped_storage().nbytes(), t))
        return t

    h = torch.randn(batch, length, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = mixer(h)
    parameters = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    sizes = sorted(size for pointer, (size, _) in kept.items() if pointer not in parameters)
    rank = mixer.forward_scan.dt_proj.in_features
    tokens = batch * length
    floats = [tokens * 24, *[tokens * (rank + 2 * state)] * 2, tokens * inner, tokens * 2 * inner]
    floats.append(2 * batch * -(-length // CHUNK) * state * inner)
    assert sizes == sorted(4 * n for n in floats)
    assert y.requires_grad


def test_nothing_is_kept_without_gradients(native, mixer):
    h = torch.randn(2, 40, 24)
    with torch.no_grad():
        y = mixer(h)
    assert not y.requires_grad
    frozen = mixer.requires_grad_(False)
    assert not frozen(h).requires_grad
    torch.testing.assert_close(frozen(h), y, rtol=0, atol=0)


def test_compiles_whole(native, mixer, assert_close):
    h, upstream = torch.randn(2, 40, 24), torch.randn(2, 40, 24)
    y, grads = run(mixer, h, upstream)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    h.requires_grad_()
    out = compiled(h)
    out.backward(upstream)
    assert_close(out, y, 1e-6)
    assert_close(h.grad, grads["h"], 1e-5)
    for name, p in mixer.named_parameters():
        assert_close(p.grad, grads[name], 1e-5, name)


def test_a_second_derivative_is_refused(native, mixer):
    h = torch.randn(2, 8, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(h).sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="DIS_SSM_BACKEND=reference"):
        grad.sum().backward()


def test_forward_mode_derivative(native, mixer, assert_close):
    """torch.func needs derivatives that the kernels lack, so the reference runs."""
    h, direction = torch.randn(2, 8, 24), torch.randn(2, 8, 24)
    _, tangent = torch.func.jvp(mixer, (h,), (direction,))
    double = copy.deepcopy(mixer).double()
    step = 1e-4
    plus, minus = (double(h.double() + s * direction.double()) for s in (step, -step))
    assert_close(tangent, (plus - minus) / (2 * step), 1e-4)


def test_flops_are_counted(native, mixer):
    batch, length, inner, state, width, rank = 2, 40, 48, 5, 4, 2
    h = torch.randn(batch, length, 24, requires_grad=True)
    tensors = mixer.tensors().flat()
    with flop_counter() as counter:  # its hooks would have each module called
        FusedMixer.apply(h, *tensors, True).sum().backward()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    points = 2 * batch * length * inner
    assert found["dis_ssm.scan"] == 7 * points * state
    assert found["dis_ssm.scan_backward"] == 19 * points * state
    assert found["dis_ssm.conv"] == 2 * 2 * points * width  # computed again in the backward pass
    assert found["dis_ssm.conv_backward"] == 6 * points * width
    tokens = batch * length
    projections = 24 * 2 * inner + 2 * inner * (rank + 2 * state) + 2 * rank * inner + inner * 24
    again = 2 * rank * inner  # dt_proj, in the backward pass
    products = sum(f for op, f in found.items() if "dis_ssm" not in op)
    assert products == 2 * tokens * (3 * projections + again)
