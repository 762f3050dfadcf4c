"""The mamba_ssm backend: layout, direction, dtypes; stand-ins for the packages."""

import sys
import types

import pytest
import torch

from dis_ssm.models.mixer import BiMamba
from dis_ssm.ops import (
    backend_report,
    bidirectional_selective_scan,
    causal_conv1d,
    mamba_ssm,
    reference,
    selective_scan,
)


def scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba-ssm's signature and layout: u, delta, z (b, d, l), B, C (b, n, l)."""
    assert all(t.is_contiguous() and t.dtype == u.dtype for t in (u, delta, B, C))
    assert A.dtype is torch.float32
    args = [u.mT, delta.mT, A, B.mT, C.mT, D, None if z is None else z.mT, delta_bias]
    return reference.selective_scan(*args, delta_softplus).mT


def conv_fn(x, weight, bias=None, activation=None):
    assert weight.dtype == x.dtype
    return reference.causal_conv1d(x.mT, weight, bias, activation).mT


@pytest.fixture
def packages(monkeypatch):
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = scan_fn
    convolution = types.ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = conv_fn
    ops = types.ModuleType("mamba_ssm.ops")
    ops.selective_scan_interface = interface
    for module in (types.ModuleType("mamba_ssm"), ops, interface, convolution):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    mamba_ssm.why_not.cache_clear()
    yield
    mamba_ssm.why_not.cache_clear()


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_convolution(packages, scan_inputs, assert_close, run, reverse):
    inputs = scan_inputs(2, 40, 9, 5, dtype=torch.float32)
    y, grads = run(selective_scan, inputs, backend="mamba_ssm", reverse=reverse)
    truth, truths = run(selective_scan, inputs, backend="reference", reverse=reverse)
    assert_close(y, truth, 1e-6)
    for name, grad in grads.items():
        assert_close(grad, truths[name], 1e-5, name)
    args = inputs["x"], torch.randn(9, 4), torch.randn(9), "silu", reverse
    assert_close(causal_conv1d(*args, "mamba_ssm"), causal_conv1d(*args, "reference"), 1e-6)


def test_both_directions_and_mixed_dtypes(packages, bidirectional_inputs, assert_close):
    inputs = bidirectional_inputs(2, 40, 9, 5, dtype=torch.float32)
    half = {k: v.bfloat16() if v.ndim == 3 else v for k, v in inputs.items()}
    for given, tolerance in ((inputs, 1e-6), (half, 1e-2)):
        y = bidirectional_selective_scan(**given, backend="mamba_ssm")
        assert y.dtype is given["x_f"].dtype
        exact = bidirectional_selective_scan(**given, backend="reference")
        assert_close(y, exact, tolerance)


def test_a_whole_mixer_when_forced(packages, monkeypatch, assert_close):
    torch.manual_seed(0)
    mixer = BiMamba(24, d_state=5)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h = torch.randn(2, 20, 24)
    expected = mixer(h)
    monkeypatch.setenv("DIS_SSM_BACKEND", "mamba_ssm")
    assert_close(mixer(h), expected, 1e-5)
    assert backend_report()[0] == "DIS_SSM_BACKEND=mamba_ssm is forced"


def test_absent_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    mamba_ssm.why_not.cache_clear()
    x = torch.randn(1, 3, 2)
    with pytest.raises(RuntimeError, match=r"'mamba_ssm' cannot run: .*causal_conv1d"):
        causal_conv1d(x, torch.randn(2, 4), backend="mamba_ssm")
    monkeypatch.setenv("DIS_SSM_BACKEND", "mamba_ssm")
    assert "is forced and cannot run" in backend_report()[0]
    mamba_ssm.why_not.cache_clear()
