"""What every op promises whatever it computes: layouts, gradients asked for, determinism,
torch.compile, fake tensors, autocast, threads, fork, and errors that name the argument."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dis_ssm.ops import (
    backend_report,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
)

FLIPPED = ("x", "dt", "B", "C", "z")


@pytest.fixture
def inputs(scan_inputs):
    return scan_inputs(3, 67, 37, 16, dtype=torch.float32)


@pytest.fixture
def g(inputs):
    return torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(5))


def conv_both(x, dt, A, z):
    """Both convolutions on tensors at hand, as one differentiable function."""
    return bidirectional_causal_conv1d(x, A[:, :4], A[:, 4:8], z[0, 0], dt[0, 0])


# ---- layouts ------------------------------------------------------------------------------


def channels_of_a_double_width(value):
    return torch.cat([value * 0 + 3, value], -1).chunk(2, -1)[1]


def transposed(value):
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_inside(value):
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def one_element_off(value):
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)


def every_second(value):
    return value.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = [channels_of_a_double_width, transposed, batch_inside, one_element_off, every_second]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_does_not_change_a_bit(backend, layout, inputs, g, run, assert_same_bits):
    def through_views(**tensors):
        views = {n: layout(v) if v.dim() > 1 else v for n, v in tensors.items()}
        if layout in (one_element_off, every_second):
            views |= {n: layout(v) for n, v in tensors.items() if v.dim() == 1}
        return selective_scan(**views, backend=backend)

    y, grads = run(selective_scan, inputs, g, backend=backend)
    y_views, grads_views = run(through_views, inputs, layout(g))
    assert_same_bits(backend, y_views, y)
    for name in grads:
        assert_same_bits(backend, grads_views[name], grads[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_does_not_change_a_bit_of_the_convolution(
    backend, layout, inputs, g, run, assert_same_bits
):
    inputs = {"x": inputs["x"], "weight": inputs["A"][:, :4].contiguous(), "bias": inputs["D"]}

    def through_views(x, weight, bias):
        return causal_conv1d(layout(x), layout(weight), bias, backend=backend)

    y, grads = run(causal_conv1d, inputs, g, backend=backend)
    y_views, grads_views = run(through_views, inputs, layout(g))
    assert_same_bits(backend, y_views, y)
    for name in grads:
        assert_same_bits(backend, grads_views[name], grads[name], name)


def test_expanded_inputs_and_gradients(backend, inputs, run, assert_same_bits):
    expanded = {n: v[:1].expand(v.shape) if n in FLIPPED else v for n, v in inputs.items()}
    dense = {n: v.contiguous() for n, v in expanded.items()}
    stride_0 = torch.tensor(0.5).expand(dense["x"].shape)
    y, grads = run(selective_scan, expanded, stride_0, backend=backend)
    y_dense, grads_dense = run(selective_scan, dense, stride_0.contiguous(), backend=backend)
    assert_same_bits(backend, y, y_dense)
    for name in grads:
        assert_same_bits(backend, grads[name], grads_dense[name], name)

    x = dense["x"].requires_grad_(True)
    arguments = dense | {"x": x}
    (from_sum,) = torch.autograd.grad(selective_scan(**arguments, backend=backend).sum(), x)
    ones = torch.ones(x.shape)
    (from_ones,) = torch.autograd.grad(selective_scan(**arguments, backend=backend), x, ones)
    assert_same_bits(backend, from_sum, from_ones)


@pytest.mark.parametrize("function", [selective_scan, causal_conv1d], ids=["scan", "convolution"])
def test_offsets_beyond_two_to_the_31(native, function, scan_inputs, run):
    inputs = scan_inputs(2, 5, 7, 4, dtype=torch.bfloat16)
    if function is causal_conv1d:
        inputs = {"x": inputs["x"], "weight": inputs["A"]}
    try:
        memory = torch.empty(2**31 + 99, dtype=torch.bfloat16)  # only the pages used are real
    except RuntimeError as error:
        pytest.skip(f"no address space for 4 GB: {error}")
    far = memory.as_strided((2, 5, 7), (2**31, 7, 1)).copy_(inputs["x"])
    expected = function(**inputs, backend=native)
    assert torch.equal(function(**(inputs | {"x": far}), backend=native), expected)


def need_memory(gigabytes):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, there are {free:.0f}")


@pytest.fixture
def huge_row():
    return torch.randn(2**16 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.slow
def test_convolution_of_more_than_two_to_the_31_elements(native, huge_row):
    need_memory(24)
    x = huge_row.expand(2, 2**14 + 1, -1)
    weight = torch.tensor([[1.0, 2.0]]).bfloat16().expand(len(huge_row), 2)
    y = causal_conv1d(x, weight, activation=None, backend=native)
    assert y.numel() > 2**31
    for t in (1, 2**13, 2**14):
        assert torch.equal(y[0, t], y[1, t])
        assert torch.equal(y[1, t], (3 * huge_row.float()).bfloat16())


@pytest.mark.slow
def test_scan_of_more_than_two_to_the_31_elements(native, huge_row):
    need_memory(48)
    x = huge_row.expand(2, 2**14 + 1, -1)
    dt = torch.tensor(2.0**-14).bfloat16().expand(x.shape)
    ones = torch.ones(()).expand(2, 2**14 + 1, 1)
    A = torch.zeros(len(huge_row), 1)  # no decay: y_t = (t + 1) Delta x
    y = selective_scan(x, dt, A, ones, ones, dt_softplus=False, backend=native)
    assert y.numel() > 2**31
    for t in (0, 2**13 - 1, 2**14 - 1):
        expected = (huge_row.float() * (t + 1) * 2.0**-14).bfloat16()
        assert torch.equal(y[0, t], y[1, t]) and torch.equal(y[1, t], expected)


# ---- what the numbers may depend on -------------------------------------------------------


def test_inputs_are_left_untouched(backend, inputs, g, bidirectional_inputs):
    for function, given in (
        (selective_scan, inputs),
        (bidirectional_selective_scan, bidirectional_inputs(3, 67, 37, 16, dtype=torch.float32)),
    ):
        before = {n: v.clone() for n, v in given.items()}
        leaves = {n: v.requires_grad_(True) for n, v in given.items()}
        upstream = g.clone()
        function(**leaves, backend=backend).backward(upstream)
        assert all(torch.equal(leaves[n], before[n]) for n in before)
        assert torch.equal(upstream, g)


def test_reverse_is_the_flipped_scan_bit_for_bit(backend, inputs, g, run, assert_same_bits):
    flipped = {n: v.flip(1) if n in FLIPPED else v for n, v in inputs.items()}
    y, grads = run(selective_scan, inputs, g, backend=backend, reverse=True)
    y_flip, grads_flip = run(selective_scan, flipped, g.flip(1), backend=backend)
    assert_same_bits(backend, y, y_flip.flip(1))
    for name, grad in grads.items():
        expected = grads_flip[name].flip(1) if name in FLIPPED else grads_flip[name]
        assert_same_bits(backend, grad, expected, name)


def test_bidirectional_is_the_sum_of_both_scans(backend, bidirectional_inputs):
    both = bidirectional_inputs(2, 67, 37, 16, dtype=torch.float32)
    y = bidirectional_selective_scan(**both, backend=backend)
    z = both.pop("z")
    one, two = ({n[:-2]: v for n, v in both.items() if n.endswith(end)} for end in ("_f", "_b"))
    expected = selective_scan(**one, backend=backend)
    expected = expected + selective_scan(**two, reverse=True, backend=backend)
    expected = expected * torch.nn.functional.silu(z)
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_row_does_not_depend_on_its_batch(backend, inputs, g, run, assert_same_bits):
    y, grads = run(selective_scan, inputs, g, backend=backend)
    for row in range(3):
        alone = {n: v[row : row + 1] if n in FLIPPED else v for n, v in inputs.items()}
        y_alone, grads_alone = run(selective_scan, alone, g[row : row + 1], backend=backend)
        assert_same_bits(backend, y_alone, y[row : row + 1])
        for name in FLIPPED:
            assert_same_bits(backend, grads_alone[name], grads[name][row : row + 1], name)


@pytest.mark.parametrize("shape", [(3, 67, 37, 16), (1, 258, 200, 16), (9, 18, 7, 5)])
def test_same_bits_at_every_repeat_and_thread_count(native, shape, run, bidirectional_inputs):
    both = bidirectional_inputs(*shape, dtype=torch.float32)
    conv = {"x": both["x_f"], "weight": both["A_f"][:, :4], "bias": both["D_f"]}
    for function, given in ((bidirectional_selective_scan, both), (causal_conv1d, conv)):
        results = []
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            results.append(run(function, given, backend=native))
        y, grads = results[0]
        for y_other, grads_other in results[1:]:
            assert torch.equal(y, y_other)
            assert all(torch.equal(grads[n], grads_other[n]) for n in grads)


# ---- gradients asked for ------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_each_gradient_alone(backend, wanted, inputs, g, run, assert_same_bits):
    _, every = run(selective_scan, inputs, g, backend=backend)
    _, alone = run(selective_scan, inputs, g, wanted=[wanted], backend=backend)
    assert_same_bits(backend, alone[wanted], every[wanted], wanted)


def test_no_gradient_wanted(backend, inputs):
    assert not selective_scan(**inputs, backend=backend).requires_grad
    leaves = {n: v.requires_grad_(True) for n, v in inputs.items()}
    with torch.no_grad():
        assert not selective_scan(**leaves, backend=backend).requires_grad


def test_second_derivative_is_right_or_refused(native, scan_inputs):
    inputs = scan_inputs(1, 5, 3, 2, dtype=torch.float32)

    def second(backend):
        x = inputs["x"].clone().requires_grad_(True)
        y = selective_scan(**(inputs | {"x": x, "z": x}), backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    try:
        result = second(native)
    except RuntimeError as error:
        message = str(error).lower()
        assert any(word in message for word in ("second", "twice", "once", "formula")), message
    else:
        torch.testing.assert_close(result, second("reference"), rtol=1e-4, atol=1e-4)


# ---- PyTorch's machinery ------------------------------------------------------------------


class Record(TorchDispatchMode):
    """Collects the calls of our ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dis_ssm":
            self.calls.setdefault(str(function), (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def test_opcheck(native, scan_inputs, bidirectional_inputs):
    one = scan_inputs(2, 5, 3, 2, dtype=torch.float32)
    bare = scan_inputs(2, 5, 3, 2, dtype=torch.float32, options="")
    both = bidirectional_inputs(2, 5, 3, 2, dtype=torch.float32)
    checked = set()
    for function, given in (
        (selective_scan, one),
        (selective_scan, bare),
        (bidirectional_selective_scan, both),
        (causal_conv1d, {"x": one["x"], "weight": one["A"], "bias": one["D"]}),
        (causal_conv1d, {"x": one["x"], "weight": one["A"]}),
        (bidirectional_causal_conv1d, {"x": one["x"], "weight_f": one["A"], "weight_b": one["A"]}),
    ):
        with Record() as record:
            leaves = {n: v.clone().requires_grad_(True) for n, v in given.items()}
            outputs = function(**leaves, backend=native)
            sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        assert record.calls, f"{function.__name__} does not go through a dis_ssm op"
        for op, args, kwargs in record.calls.values():
            checked.add(op)
            forward = not any(word in str(op) for word in ("backward", "bwd", "grad"))
            args, kwargs = tree_map_only(
                torch.Tensor,
                lambda v, forward=forward: v.detach().clone().requires_grad_(forward),
                (args, kwargs),
            )
            torch.library.opcheck(op, args, kwargs)
    assert len(checked) >= 4


@pytest.mark.parametrize("name", ["scan", "bidirectional", "convolution"])
def test_compiled_without_a_graph_break(native, name, inputs, run, bidirectional_inputs):
    both = bidirectional_inputs(2, 18, 9, 16, dtype=torch.float32)
    single = {n: inputs[n] for n in ("x", "dt", "A", "z")}
    function, given, options = {
        "scan": (selective_scan, inputs, {"backend": native}),
        "bidirectional": (bidirectional_selective_scan, both, {}),
        "convolution": (lambda **kw: sum(conv_both(**kw)), single, {}),
    }[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, grads = run(function, given, **options)
    y_compiled, grads_compiled = run(compiled, given, **options)
    assert torch.equal(y, y_compiled)
    assert all(torch.equal(grads[n], grads_compiled[n]) for n in grads)


def test_compiled_with_dynamic_shapes(native, scan_inputs):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(kwargs):
        return selective_scan(**kwargs, backend=native) * 2

    for batch, length in ((2, 18), (3, 66), (4, 7)):
        given = scan_inputs(batch, length, 9, 16, dtype=torch.float32)
        assert torch.equal(compiled(given), selective_scan(**given, backend=native) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_agree_with_real_ones(native, dtype, scan_inputs, run):
    real = scan_inputs(2, 18, 9, 16, dtype=dtype)
    y, grads = run(selective_scan, real, backend=native)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) for n, v in real.items()}
        y_fake, grads_fake = run(selective_scan, fake, backend=native)
        x_f, x_b = conv_both(fake["x"], fake["dt"], fake["A"], fake["z"])
    pairs = [(y, y_fake), (real["x"], x_f), (real["x"], x_b)]
    for one, two in pairs + [(grads[n], grads_fake[n]) for n in grads]:
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


def test_autocast_keeps_the_decay_in_float32(backend, inputs, run):
    # A decay of exp(-1e-4) is 1 in bfloat16: rounding Delta * A or the state would show.
    inputs["A"] = torch.full_like(inputs["A"], -1e-3)
    inputs["z"].fill_(2.0)
    half = {n: v.bfloat16() if n in FLIPPED else v for n, v in inputs.items()}
    truth = selective_scan(**{n: v.float() for n, v in half.items()}, backend="reference")

    def autocast(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return selective_scan(**kwargs, backend=backend)

    y, grads = run(autocast, half)
    assert (y.float() - truth).abs().max() <= 0.005 * truth.abs().max()
    for name, grad in grads.items():
        assert grad.dtype == half[name].dtype and grad.isfinite().all()


def test_checkpointed_backward_has_the_same_bits(native, inputs, g, run):
    def checkpointed(**kwargs):
        return torch.utils.checkpoint.checkpoint(
            lambda: selective_scan(**kwargs, backend=native), use_reentrant=False
        )

    y, grads = run(selective_scan, inputs, g, backend=native)
    y_again, grads_again = run(checkpointed, inputs, g)
    assert torch.equal(y, y_again)
    assert all(torch.equal(grads[n], grads_again[n]) for n in grads)


def test_two_python_threads_at_once(native, inputs, g, run):
    y, grads = run(selective_scan, inputs, g, backend=native)
    wrong = []

    def work():
        for _ in range(10):
            other, other_grads = run(selective_scan, inputs, g, backend=native)
            same = torch.equal(other, y)
            if not same or not all(torch.equal(other_grads[n], grads[n]) for n in grads):
                wrong.append(True)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORK = """
import os, signal, time, torch
from dis_ssm.ops import causal_conv1d, selective_scan
torch.manual_seed(0)
torch.set_num_threads(2)
# small enough that PyTorch's own operations, which would hang too, stay on one thread
x, dt = torch.randn(2, 4, 120, 64)
A, bc = -torch.rand(64, 16), torch.randn(4, 120, 16)

def work():
    v = x.clone().requires_grad_(True)
    y = selective_scan(v, dt, A, bc, bc, backend="cpu")
    y = causal_conv1d(y, A[:, :4], backend="cpu")
    return y.detach(), torch.autograd.grad(y.sum(), v)[0]

before = work()
child = os.fork()
if child == 0:
    signal.alarm(20)
    same = all(torch.equal(a, b) for a, b in zip(before, work()))
    os._exit(0 if same else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
after = all(torch.equal(a, b) for a, b in zip(before, work()))
print("child", status, "parent", after)
"""


def test_fork_after_the_kernel_ran_on_two_threads(native):
    command = [sys.executable, "-c", FORK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "child 0 parent True", result.stdout + result.stderr


# ---- choice of backend and errors ---------------------------------------------------------


def test_cpu_backend_refuses_float64_and_says_why(native, scan_inputs):
    inputs = scan_inputs(1, 3, 2, 2)
    with pytest.raises(ValueError, match="float64"):
        selective_scan(**inputs, backend=native)
    with pytest.raises(ValueError, match="float64"):
        causal_conv1d(inputs["x"], inputs["A"], backend=native)
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="reference"))


def test_default_backend_is_the_compiled_one(native, inputs):
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend=native))


def test_backends_that_cannot_run_here_say_so(inputs):
    for name in ("cuda", "mamba_ssm"):
        with pytest.raises((RuntimeError, ValueError), match=name):
            selective_scan(**inputs, backend=name)
        with pytest.raises((RuntimeError, ValueError), match=name):
            causal_conv1d(inputs["x"], inputs["A"][:, :4], backend=name)
    with pytest.raises(ValueError, match="numpy"):
        selective_scan(**inputs, backend="numpy")


def test_report_names_the_backend(native):
    lines = backend_report()
    assert lines and all(isinstance(line, str) and "\n" not in line for line in lines)
    assert any(native in line for line in lines)


BAD_ARGUMENTS = {
    "x": lambda v: v[0],
    "dt": lambda v: v[:, :-1],
    "A": lambda v: v[:-1],
    "B": lambda v: v[:, :, :-1],
    "C": lambda v: v[:-1],
    "D": lambda v: v[:, None],
    "z": lambda v: v[..., :-1],
    "dt_bias": lambda v: v[:-1],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_shapes_are_named(backend, name, inputs, bidirectional_inputs):
    wrong = BAD_ARGUMENTS[name](inputs[name])
    with pytest.raises(ValueError) as error:
        selective_scan(**(inputs | {name: wrong}), backend=backend)
    assert name in str(error.value) and str(wrong.shape[-1]) in str(error.value)
    if name == "x":
        return
    both = bidirectional_inputs(3, 67, 37, 16, dtype=torch.float32)
    name_b = name if name == "z" else f"{name}_b"
    with pytest.raises(ValueError) as error:
        bidirectional_selective_scan(**(both | {name_b: wrong}), backend=backend)
    assert name_b in str(error.value)


def test_wrong_dtype_and_device_are_named(backend, inputs):
    with pytest.raises((TypeError, ValueError), match="int64"):
        selective_scan(**(inputs | {"dt": inputs["dt"].long()}), backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        selective_scan(**(inputs | {"A": inputs["A"].to("meta")}), backend=backend)
