"""Whatever goes wrong with the CUDA kernels is one line, and what passes is tried again."""

import importlib.metadata

import pytest
import torch

from dis_ssm.ops import cuda, nvrtc


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has a GPU and all that the kernels need; `fail(error)` has them fail."""
    failures = []

    def largest_error():
        if failures:
            raise failures.pop(0)
        return 1e-7

    for name, value in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_name": "a GPU",
        "is_current_stream_capturing": False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.2")
    monkeypatch.setattr(cuda, "_largest_error", largest_error)
    cuda.missing.cache_clear()
    cuda._lasting_reason.cache_clear()
    yield failures.append
    cuda.missing.cache_clear()
    cuda._lasting_reason.cache_clear()


class CUDAError(Exception):
    """As cuda-core's: no RuntimeError."""


@pytest.mark.parametrize(
    "error",
    [
        CUDAError("CUDA_ERROR_NO_BINARY_FOR_GPU:\n no kernel image"),
        ImportError("cannot import name 'Program' from 'cuda.core'"),
        AttributeError("module 'cuda.core' has no attribute 'ObjectCode'"),
        OSError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("CUDA: unspecified launch failure"),
    ],
)
def test_any_failure_is_a_reason_in_one_line_that_lasts(gpu, error):
    gpu(error)
    reason = cuda.why_not()
    words = " ".join(str(error).split())
    assert words in reason and "a GPU, cuda-core 1.2.2, NVRTC 13.0" in reason
    assert "\n" not in reason
    assert cuda.why_not() is reason  # it was not tried again


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "no GPU memory was free"),
        (CUDAError("CUDA_ERROR_OUT_OF_MEMORY"), "no GPU memory was free"),
        (RuntimeError("operation not permitted when stream is capturing"), "CUDA graph"),
    ],
)
def test_what_passes_is_tried_again(gpu, error, words):
    gpu(error)
    assert words in cuda.why_not()
    assert cuda.why_not() is None


def test_nothing_is_tried_while_a_graph_is_captured(gpu, monkeypatch):
    gpu(AssertionError("tried"))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "CUDA graph" in cuda.why_not()
    assert "tried" in cuda.why_not()


def test_wrong_numbers_are_a_reason(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "_largest_error", lambda: float("nan"))
    assert "the kernels are wrong by nan" in cuda.why_not()


@pytest.mark.parametrize("version", ["0.3.1", "0.7.0"])
def test_an_old_cuda_core_is_named_with_the_remedy(gpu, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = cuda.why_not()
    assert f"cuda-core {version} is too old; pip install --upgrade 'cuda-core>=1.0'" == reason


def test_another_major_nvrtc_than_torchs_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "torch is built for CUDA 12.8, but NVRTC is 13.0" in cuda.why_not()


def test_an_nvrtc_that_does_not_load_is_named(gpu, monkeypatch):
    def broken():
        raise CUDAError("libnvrtc-builtins.so not found")

    monkeypatch.setattr(nvrtc, "version", broken)
    assert "NVRTC does not load (CUDAError: libnvrtc-builtins.so not found)" in cuda.why_not()
