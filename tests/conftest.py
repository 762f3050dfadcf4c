"""Shared fixtures: seeds, threads, inputs of the scan, and which tests need a compiler or minutes.

Tests marked `slow` or `distributed` run only when a marker expression is given (`pytest -m slow`).
"""

import os
import shutil
import signal
import warnings

import pytest
import torch

from helpers import Began, Late, Outcome


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    apart = [item for item in items if any(map(item.get_closest_marker, ("slow", "distributed")))]
    if apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]


@pytest.fixture(autouse=True)
def _fixed_seed_and_one_thread():
    """One thread: the tensors are small, and spinning threads on a busy machine cost minutes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native() -> str:
    """The name of the compiled backend; skips without a compiler, but never in CI."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        message = "the cpu kernel needs a C++ compiler (c++, g++, clang++ or CXX), none was found"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return "cpu"


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.getfixturevalue("native") if request.param == "cpu" else request.param


def _scan_inputs(batch, length, channels, state, *, options="Dzb", dtype=torch.float64, seed=0):
    """Arguments of `selective_scan`; `options` holds D, z, b for the optional ones."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "x": randn(batch, length, channels),
        "dt": randn(batch, length, channels),
        "A": -torch.exp(0.7 * randn(channels, state)),
        "B": randn(batch, length, state),
        "C": randn(batch, length, state),
        "D": randn(channels),
        "z": randn(batch, length, channels),
        "dt_bias": randn(channels) - 1,
    }
    absent = {"D": "D", "z": "z", "dt_bias": "b"}
    inputs = {n: v for n, v in inputs.items() if n not in absent or absent[n] in options}
    return {n: v.to(dtype) for n, v in inputs.items()}


@pytest.fixture(scope="session")
def scan_inputs():
    """Factory (batch, length, channels, state, *, options, dtype, seed) -> dict of arguments."""
    return _scan_inputs


def _two_directions(factory, *shape, options="Dzb", dtype=torch.float64, seed=0):
    forward = factory(*shape, options=options, dtype=dtype, seed=seed)
    backward = factory(*shape, options=options, dtype=dtype, seed=seed + 1)
    z = {"z": forward.pop("z")} if "z" in forward else {}
    backward.pop("z", None)
    both = {f"{n}_f": v for n, v in forward.items()} | {f"{n}_b": v for n, v in backward.items()}
    return both | z


@pytest.fixture(scope="session")
def bidirectional_inputs():
    """Like `scan_inputs`, for `bidirectional_selective_scan`."""
    return lambda *shape, **options: _two_directions(_scan_inputs, *shape, **options)


def _run(function, inputs, upstream=None, wanted=None, **options):
    """Outputs, and the gradients of sum(output * upstream) by every (or the wanted) input.

    `upstream` is a tensor, a tuple of them for several outputs, or None for all ones. An input
    that gets no gradient counts as 0.
    """
    leaves = {n: v.detach().clone(memory_format=torch.preserve_format) for n, v in inputs.items()}
    names = list(leaves) if wanted is None else wanted
    for name in names:
        leaves[name].requires_grad_(True)
    outputs = function(**leaves, **options)
    many = isinstance(outputs, tuple)
    pairs = zip(outputs if many else (outputs,), upstream if many else (upstream,), strict=True)
    loss = sum((y if u is None else y * u.to(y.dtype)).sum() for y, u in pairs)
    loss.backward()
    detached = tuple(y.detach() for y in outputs) if many else outputs.detach()
    grads = {n: leaves[n].grad for n in names}
    return detached, {n: leaves[n].detach() * 0 if g is None else g for n, g in grads.items()}


@pytest.fixture(scope="session")
def run():
    """(function, inputs, upstream=None, wanted=None, **options) -> outputs, {name: gradient}."""
    return _run


def _assert_close(actual, truth, tolerance, name="value"):
    """max |actual - truth| <= tolerance * max |truth|: the error relative to the largest entry."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape} instead of {truth.shape}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item()
    scale = truth.abs().max().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g}, {error / scale:.2g} of its max"


@pytest.fixture(scope="session")
def assert_close():
    return _assert_close


@pytest.fixture(scope="session")
def assert_same_bits(assert_close):
    """Bit for bit for a compiled kernel; PyTorch's own loops promise it to rounding only."""

    def check(backend, actual, expected, name="value"):
        if backend == "reference":
            assert_close(actual, expected, 3e-6, name)
        else:
            same = actual.dtype == expected.dtype and torch.equal(actual, expected)
            assert same, f"{name} differs in its bits"

    return check


@pytest.fixture
def began():
    """A stand-in for the work of a command."""

    def work(*arguments, **options):
        raise Began

    return work


@pytest.fixture
def outcome(capsys, monkeypatch):
    """(arguments, seconds=20) -> Outcome of `dis_ssm.cli.main`, which may not raise or hang."""
    from dis_ssm.cli import main

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def late(*_):
        raise Late

    def run_command(arguments: list[str], seconds: float = 20) -> Outcome:
        capsys.readouterr()
        previous = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        except Began:
            status = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        return Outcome(status, *capsys.readouterr())

    return run_command
