"""The kernels whatever PyTorch's defaults are (dtype, device), with assertions on and off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dis_ssm.ops import cpu
from dis_ssm.ops.conv import conv_backward_op, conv_op
from dis_ssm.ops.norm import norm_backward_op, norm_op
from dis_ssm.ops.scan import scan_backward_op, scan_op

HERE = Path(__file__).parent
MIXER = "../models/test_mixer.py"

# Says what differs by raising, for `assert` is not run under -O.
CHECK = """
import sys
import torch
from dis_ssm import DiS
from dis_ssm.models.mixer import BiMamba
from dis_ssm.ops import bidirectional_causal_conv1d, bidirectional_selective_scan
from dis_ssm.ops import causal_conv1d, reference, selective_scan
from dis_ssm.ops.norm import add_rms_norm

dtype, device = getattr(torch, sys.argv[1]), sys.argv[2]
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)

def randn(*shape):
    return torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu")

def scan_arguments():
    shapes = [(3, 70, 40), (3, 70, 40), (40, 16), (3, 70, 16), (3, 70, 16), (40,)]
    x, dt, A, B, C, D = (randn(*shape) for shape in shapes)
    return x, dt, -A.exp(), B, C, D

def results(function, arguments):
    leaves = [t.clone().requires_grad_() for t in arguments]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.square().sum() for y in outputs).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]

def both_scans(backend):
    def run(x, dt, A, B, C, D, z, x2, dt2, A2, B2, C2, D2, bias):
        pairs = zip((x, dt, A, B, C, D), (x2, dt2, A2, B2, C2, D2), strict=True)
        pairs = (t for pair in pairs for t in pair)
        return bidirectional_selective_scan(*pairs, z, bias, bias, backend=backend)
    return run

def mixer(module):
    names = [name for name, _ in module.named_parameters()]
    def run(h, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), h)
    return run

arguments = {
    "scan": scan_arguments(),
    "both scans": (*scan_arguments(), randn(3, 70, 40), *scan_arguments(), randn(40)),
    "convolution": (randn(3, 70, 40), randn(40, 4), randn(40)),
    "both convolutions": (randn(3, 70, 40), randn(40, 4), randn(40, 4), randn(40), randn(40)),
    "norm": (randn(3, 70, 40), randn(3, 70, 40), randn(40)),
}
module = BiMamba(24, 5)
arguments["mixer"] = randn(2, 70, 24), *(0.2 * randn(*p.shape) for p in module.parameters())

def functions(backend):
    return {
        "scan": lambda *a: selective_scan(*a, backend=backend),
        "both scans": both_scans(backend),
        "convolution": lambda *a: causal_conv1d(*a, backend=backend),
        "both convolutions": lambda x, *a: bidirectional_causal_conv1d(x, *a, backend=backend),
        "norm": add_rms_norm if backend == "cpu" else reference.add_rms_norm,
        "mixer": mixer(module),
    }

def everything(backend):
    return {n: results(f, arguments[n]) for n, f in functions(backend).items()}

plain = everything("cpu")
torch.set_default_dtype(dtype)
if device != "cpu":
    torch.set_default_device(device)
for name, values in everything("cpu").items():
    for i, (found, expected) in enumerate(zip(values, plain[name], strict=True)):
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise SystemExit(f"{name}: tensor {i} differs under {dtype} on {device}")
for name, values in everything("reference").items():
    for i, (found, expected) in enumerate(zip(values, plain[name], strict=True)):
        scale = expected.abs().max()
        if found.dtype != expected.dtype or not (found - expected).abs().max() <= 1e-4 * scale:
            raise SystemExit(f"{name}: tensor {i} of the reference differs under {dtype}")

sizes = dict(input_size=8, in_channels=2, hidden_size=24, depth=3, d_state=5, num_classes=3)
trained = DiS(**sizes, drop_path=0.3)
if device == "cpu":
    x = torch.randn(2, 2, 8, 8)
    loss = trained.train()(x, torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).square().mean()
    loss.backward()
    if not all(p.grad is None or p.grad.dtype == dtype for p in trained.parameters()):
        raise SystemExit(f"a gradient is not {dtype}")
exit_code = 0 if __debug__ == (sys.argv[3] == "asserts") else "asserts are on"
raise SystemExit(exit_code)
"""


def python(*arguments, **environment):
    env = os.environ | {"DIS_SSM_BACKEND": ""} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["asserts", "no asserts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_default_dtype(native, dtype, flags):
    result = python(*flags, "-c", CHECK, dtype, "cpu", "none" if flags else "asserts")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["asserts", "no asserts"])
def test_another_default_device(native, flags):
    result = python(*flags, "-c", CHECK, "float32", "meta", "none" if flags else "asserts")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("name", ["test_scan.py", "test_conv.py", "test_norm.py", MIXER])
def test_the_kernels_tests_without_assertions(native, name):
    """pytest compiles the tests' own asserts into raises, so that they count under -O too."""
    flags = ["-qx", "-p", "no:cacheprovider"]
    result = python("-O", "-m", "pytest", *flags, HERE / name)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


# ---- what a pointer is made of ------------------------------------------------------------


def scan_tensors():
    x, A, B = torch.randn(2, 40, 6), -torch.rand(6, 4), torch.randn(2, 40, 4)
    return [x, x.clone(), A, B, B.clone(), torch.randn(6), torch.randn(6)]


NOTHING = (None,) * 7


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_scan_refuses_shapes_that_would_be_read_beyond_their_end(native, place, direction):
    """As FusedMixer or a deserialised graph could hand over, past the public op's own checks."""
    tensors, other = scan_tensors(), scan_tensors()
    z = torch.randn(2, 40, 6)
    _, pregate, states = scan_op(*tensors, *other, z, True, False, True)
    wrong = other if direction == "backward" else tensors
    if place:  # x gives the shape of all that follows, of the other direction too
        wrong[place] = wrong[place][..., :-1] if place == 2 else wrong[place][:1]
    else:
        wrong[0] = wrong[0][:, :-1]
    with pytest.raises(ValueError, match="shape"):
        scan_op(*tensors, *other, z, True, False, False)
    with pytest.raises(ValueError, match="shape"):
        scan_backward_op(z, pregate, states, *tensors, *other, z, True, False)


@pytest.mark.parametrize("wrong", ["dout", "pregate", "states", "states dtype", "one state set"])
def test_the_scan_s_backward_refuses_what_the_forward_pass_did_not_keep(native, wrong):
    tensors, z = scan_tensors(), torch.randn(2, 40, 6)
    _, pregate, states = scan_op(*tensors, *scan_tensors(), z, True, False, True)
    kept = {"dout": z, "pregate": pregate, "states": states}
    if wrong == "states dtype":
        kept["states"] = states.bfloat16()
    elif wrong == "one state set":
        kept["states"] = states[:1]
    else:
        kept[wrong] = torch.empty(0)
    with pytest.raises((ValueError, RuntimeError)):
        scan_backward_op(*kept.values(), *tensors, *scan_tensors(), z, True, False)


def test_a_backward_pass_without_kept_states_is_refused(native):
    tensors = [t.requires_grad_() for t in scan_tensors()]
    out, *_ = scan_op(*tensors, *NOTHING, None, True, False, False)
    with pytest.raises(RuntimeError, match="not kept"):
        out.sum().backward()


def test_the_convolution_and_the_norm_refuse_shapes_likewise(native):
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    for bad in ((weight[:5], bias, None, None), (weight, bias[:5], None, None)):
        with pytest.raises(ValueError, match="shape"):
            conv_op(x, *bad, True, False)
        with pytest.raises(ValueError, match="shape"):
            conv_backward_op(x, None, x, *bad, True, False)
    with pytest.raises(ValueError, match="shape"):
        conv_op(x, weight, None, weight[:, :3], None, True, False)
    with pytest.raises(ValueError, match="shape"):
        conv_backward_op(x[:1], None, x, weight, None, None, None, True, False)
    with pytest.raises(ValueError, match="shape"):
        norm_op(x, x[:1], bias, 1e-5)
    with pytest.raises(ValueError, match="shape"):
        norm_op(x, None, bias[:1], 1e-5)
    _, stream, rstd = norm_op(x, None, bias, 1e-5)
    with pytest.raises(ValueError, match="shape"):
        norm_backward_op(x[:1], None, stream, rstd, bias)
    with pytest.raises(ValueError, match="shape"):
        norm_backward_op(x, None, stream, rstd[:1], bias)


def test_pointers_are_made_of_dense_float32_memory_only():
    x = torch.randn(2, 3, 4)
    for bad in (x.double(), x.bfloat16(), x.to("meta"), x.mT):
        with pytest.raises(RuntimeError, match="float32"):
            cpu.pointer(bad, bad.shape)
        with pytest.raises(RuntimeError, match="float32"):
            cpu.rows(bad, bad.shape)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        cpu.pointer(x, x.shape)
