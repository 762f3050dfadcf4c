"""Residual addition and RMS normalisation: the native kernel against float64, both ways."""

import types

import pytest
import torch

from dis_ssm.ops import cpu, reference
from dis_ssm.ops.norm import add_rms_norm, norm_op


def make(shape, residual=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    h, r = (torch.randn(*shape, generator=g) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=g)
    return h.to(dtype), (3 * r if residual else None), weight


def run(function, inputs, grads, dtype=None):
    leaves = [
        None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_()
        for t in inputs
    ]
    outputs = function(*leaves)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (33, 16), (5, 13, 33), (2, 65, 96), (3, 368)])
def test_values_and_gradients(native, shape, residual):
    inputs = make(shape, residual)
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    exact = run(reference.add_rms_norm, inputs, grads, torch.float64)
    found = run(add_rms_norm, inputs, grads)
    assert len(found) == (5 if residual else 4)
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - truth).abs().max() <= 2e-6 * truth.abs().max() + 1e-7


def test_the_kernel_is_what_runs(native):
    h, residual, weight = make((4, 32))
    normed, _ = add_rms_norm(h.requires_grad_(), residual, weight)
    assert "norm" in type(normed.grad_fn).__name__.lower() and "Rms" not in str(normed.grad_fn)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_outputs_may_go_unused(native, used):
    inputs = make((6, 24))
    found, exact = [], []
    for function, to in ((add_rms_norm, found), (reference.add_rms_norm, exact)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        function(*leaves)[used].square().sum().backward()
        to += [leaf.grad for leaf in leaves]
    for value, truth in zip(found, exact, strict=True):
        if truth is None:  # the weight, when only the stream was used
            assert value is None or not value.any()
        else:
            torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_half_precision_input_keeps_a_wide_stream(native):
    h, residual, weight = make((8, 40), dtype=torch.bfloat16)
    grads = [torch.randn(8, 40) for _ in range(2)]
    found = run(add_rms_norm, (h, residual, weight), grads)
    exact = run(reference.add_rms_norm, (h.double(), residual, weight), grads, torch.float64)
    assert [v.dtype for v in found[:2]] == [torch.float32] * 2 and found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=8e-3, atol=8e-3)


def test_bits_do_not_depend_on_threads_or_strides(native):
    inputs = make((3, 70, 48))
    grads = [torch.randn(3, 70, 48) for _ in range(2)]
    one = run(add_rms_norm, inputs, grads)
    torch.set_num_threads(3)
    for value, other in zip(one, run(add_rms_norm, inputs, grads), strict=True):
        assert torch.equal(value, other)
    apart = [t.mT.contiguous().mT if t.dim() == 3 else t for t in inputs]
    for value, other in zip(one, run(add_rms_norm, apart, grads), strict=True):
        assert torch.equal(value, other)


def test_double_precision_and_transforms_take_the_reference(native):
    inputs = [t.double() for t in make((2, 9))]
    assert all(torch.equal(a, b) for a, b in zip(
        add_rms_norm(*inputs), reference.add_rms_norm(*inputs), strict=True
    ))  # fmt: skip
    h, residual, weight = make((4, 5, 8))
    mapped = torch.func.vmap(lambda a, b: add_rms_norm(a, b, weight)[0])(h, residual)
    torch.testing.assert_close(mapped, add_rms_norm(h, residual, weight)[0])


def test_a_second_derivative_is_refused(native):
    h, residual, weight = (t.requires_grad_() for t in make((2, 8)))
    (grad,) = torch.autograd.grad(add_rms_norm(h, residual, weight)[0].sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


def test_an_empty_batch(native):
    h, residual, weight = make((0, 4, 8))
    normed, stream = add_rms_norm(h, residual, weight.requires_grad_())
    assert normed.shape == stream.shape == (0, 4, 8)
    normed.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))


def test_the_op_keeps_its_contract(native):
    inputs = [t.requires_grad_() for t in make((3, 20))]
    torch.library.opcheck(norm_op, (*inputs, 1e-5), test_utils=("test_schema", "test_faketensor"))


def test_memory_that_ran_out_is_an_error(native, monkeypatch):
    failing = types.SimpleNamespace(dis_ssm_norm_forward=lambda arguments, threads: 1)
    monkeypatch.setattr(cpu, "library", lambda: failing)
    with pytest.raises(MemoryError, match="norm_forward"):
        add_rms_norm(*make((2, 8)))


def test_a_residual_of_another_shape_is_refused(backend, monkeypatch):
    monkeypatch.setenv("DIS_SSM_BACKEND", backend)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 3, 4), torch.randn(1, 3, 4), torch.randn(4))
