"""The whole model against an independent float64 implementation, through released names.

`plain_forward` below is written from the paper's description alone, on the tensors of a
released checkpoint: it shares no code with the package. Letters: D width, I inner width,
R rank of Delta, N states, J patches.
"""

import argparse
import math
import os
import re

import pytest
import torch

from dis_ssm import DiS
from dis_ssm.build import load_model
from dis_ssm.cli import main
from dis_ssm.interop.released import from_released

N = 16


# ---- the independent implementation -------------------------------------------------------


def silu(v):
    return v / (1 + torch.exp(-v))


def affine(state, name, v):
    out = v @ state[name + ".weight"].T
    return out + state[name + ".bias"] if name + ".bias" in state else out


def rms_norm(v, weight):
    return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def direction(state, block, suffix, x):
    """One direction on an already ordered sequence x (B, L, I), before the gate."""
    mixer = f"{block}.mixer."
    weight, bias = state[f"{mixer}conv1d{suffix}.weight"], state[f"{mixer}conv1d{suffix}.bias"]
    u = torch.zeros_like(x) + bias
    for t in range(x.shape[1]):
        for k in range(4):
            if t - 3 + k >= 0:
                u[:, t] += weight[:, 0, k] * x[:, t - 3 + k]
    u = silu(u)
    projected = affine(state, f"{mixer}x_proj{suffix}", u)
    rank = projected.shape[-1] - 2 * N
    delta = affine(state, f"{mixer}dt_proj{suffix}", projected[..., :rank])
    delta = torch.log1p(torch.exp(delta))
    B, C = projected[..., rank : rank + N], projected[..., rank + N :]
    A = -torch.exp(state[mixer + ("A_b_log" if suffix else "A_log")])
    h = torch.zeros(x.shape[0], x.shape[2], N, dtype=x.dtype)
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1) + state[mixer + "D" + suffix] * u[:, t]
    return y


def mixer(state, block, h):
    x, z = affine(state, f"{block}.mixer.in_proj", h).chunk(2, -1)
    forward = direction(state, block, "", x)
    backward = direction(state, block, "_b", x.flip(1)).flip(1)
    return affine(state, f"{block}.mixer.out_proj", (forward + backward) * silu(z))


def plain_forward(state, x, t, y=None):
    batch, _, height, width = x.shape
    kernel = state["patch_embed.proj.weight"]
    size, channels, p, _ = kernel.shape
    rows, columns = height // p, width // p
    patches = x.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
    tokens = patches.reshape(batch, rows * columns, -1) @ kernel.reshape(size, -1).T
    tokens = tokens + state["patch_embed.proj.bias"]

    frequencies = [10000 ** (-i / (size // 2)) for i in range(size // 2)]
    angles = t.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    features = torch.cat([angles.cos(), angles.sin()], 1)
    time = affine(state, "time_embed.2", silu(affine(state, "time_embed.0", features)))
    condition, extra = time, [time]
    if y is not None:
        label = state["label_emb.embedding_table.weight"][y]
        condition, extra = time + label, [label, time]
    h = torch.cat([v[:, None] for v in extra] + [tokens], 1) + state["pos_embed"]

    half = sum(name.startswith("in_blocks.") and name.endswith(".norm.weight") for name in state)
    residual, skips = torch.zeros_like(h), []
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"]
    for block in names + [f"out_blocks.{i}" for i in range(half)]:
        if block.startswith("out_blocks"):
            h = affine(state, f"{block}.skip_linear", torch.cat([h, skips.pop()], -1))
        residual = residual + h
        h = mixer(state, block, rms_norm(residual, state[f"{block}.norm.weight"]))
        if block.startswith("in_blocks"):
            skips.append(h)

    h = rms_norm(residual + h, state["norm_f.weight"])
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    if y is not None:
        modulation = affine(state, "final_layer.adaLN_modulation.1", silu(condition))
        shift, scale = modulation[:, None].chunk(2, -1)
        h = h * (1 + scale) + shift
    out = affine(state, "final_layer.linear", h[:, len(extra) :])
    out = out.reshape(batch, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, height, width)


def released_state(
    size=32, depth=5, patch=2, channels=4, grid=(4, 4), classes=0, sigma=True, seed=0
):
    """A random state dict with the names and shapes of a released checkpoint."""
    inner, rank, patches = 2 * size, math.ceil(size / 16), grid[0] * grid[1]
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=None):
        scale = scale or 1 / math.sqrt(math.prod(shape[1:]) or 1)
        return scale * torch.randn(*shape, generator=g)

    def linear(name, rows, columns):
        return {f"{name}.weight": randn(rows, columns), f"{name}.bias": randn(rows, scale=0.3)}

    state = {
        "patch_embed.proj.weight": randn(size, channels, patch, patch),
        "patch_embed.proj.bias": randn(size, scale=0.3),
        **linear("time_embed.0", 4 * size, size),
        **linear("time_embed.2", size, 4 * size),
        "pos_embed": randn(1, patches + (2 if classes else 1), size, scale=0.5),
    }
    if classes:
        state["label_emb.embedding_table.weight"] = randn(classes + 1, size, scale=0.7)
    half = depth // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"]
    for block in names + [f"out_blocks.{i}" for i in range(half)]:
        state[f"{block}.norm.weight"] = 1 + randn(size, scale=0.2)
        state[f"{block}.mixer.in_proj.weight"] = randn(2 * inner, size)
        state[f"{block}.mixer.out_proj.weight"] = randn(size, inner)
        for suffix, a_log in (("", "A_log"), ("_b", "A_b_log")):
            mixer = f"{block}.mixer."
            state[f"{mixer}conv1d{suffix}.weight"] = randn(inner, 1, 4)
            state[f"{mixer}conv1d{suffix}.bias"] = randn(inner, scale=0.3)
            state[f"{mixer}x_proj{suffix}.weight"] = randn(rank + 2 * N, inner)
            state |= linear(f"{mixer}dt_proj{suffix}", inner, rank)
            state[mixer + a_log] = randn(inner, N, scale=0.7)
            state[f"{mixer}D{suffix}"] = randn(inner, scale=0.7)
        if block.startswith("out_blocks"):
            state |= linear(f"{block}.skip_linear", size, 2 * size)
    state["norm_f.weight"] = 1 + randn(size, scale=0.2)
    state |= linear("final_layer.linear", patch**2 * channels * (2 if sigma else 1), size)
    if classes:
        state |= linear("final_layer.adaLN_modulation.1", 2 * size, size)
    return state


def images(channels=4, height=8, width=8, batch=3):
    g = torch.Generator().manual_seed(9)
    x = torch.randn(batch, channels, height, width, generator=g, dtype=torch.float64)
    return x, torch.tensor([0, 130, 999])[:batch]


CASES = {
    "unconditional": dict(),
    "classes": dict(classes=7),
    "rank not divided": dict(size=40, depth=3, classes=3),
    "no sigma, rgb, patch 4": dict(channels=3, patch=4, depth=3, sigma=False, grid=(2, 2)),
    "one block": dict(depth=1, classes=2),
    "not square": dict(grid=(4, 6), depth=3, classes=4),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_an_independent_implementation(case, monkeypatch):
    monkeypatch.setenv("DIS_SSM_BACKEND", "reference")
    options = CASES[case]
    state = released_state(**options)
    patch, grid = options.get("patch", 2), options.get("grid", (4, 4))
    height, width = grid[0] * patch, grid[1] * patch
    square = height == width
    model = from_released(dict(state), input_size=None if square else (height, width))
    assert isinstance(model, DiS)
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for v in state.values())

    x, t = images(options.get("channels", 4), height, width)
    classes = options.get("classes", 0)
    y = torch.tensor([0, 1, classes]) if classes else None  # the last is the null class
    model = model.double().eval()
    expected = plain_forward({n: v.double() for n, v in state.items()}, x, t, y)
    with torch.no_grad():
        out = model(x, t, y)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_compiled_kernels_reach_the_same_outputs(native):
    state = released_state(classes=7)
    x, t = images()
    y = torch.tensor([0, 3, 7])
    expected = plain_forward({n: v.double() for n, v in state.items()}, x, t, y)
    with torch.no_grad():
        out = from_released(state).eval()(x.float(), t, y)
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


def test_gradients_equal_those_of_the_independent_implementation(monkeypatch):
    monkeypatch.setenv("DIS_SSM_BACKEND", "reference")
    state = released_state(depth=3, classes=2)
    x, t = images(batch=2)
    y = torch.tensor([1, 0])
    leaves = {n: v.double().requires_grad_(True) for n, v in state.items()}
    x_plain, x_ours = (x.clone().requires_grad_(True) for _ in range(2))
    plain_forward(leaves, x_plain, t, y).square().sum().backward()
    model = from_released(state).double().eval()
    model(x_ours, t, y).square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_plain.grad, rtol=1e-8, atol=1e-8)
    ours = sorted(p.grad.double().norm().item() for p in model.parameters())
    plain = sorted(v.grad.norm().item() for v in leaves.values())
    assert ours == pytest.approx(plain, rel=1e-8)


# ---- files --------------------------------------------------------------------------------


class Payload:
    """Unpickling this runs a command: what a malicious checkpoint does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def output_of(model):
    x, t = images()
    with torch.no_grad():
        return model.float().eval()(x.float(), t)


def test_whole_file_with_a_namespace_loads_and_prefers_ema(tmp_path):
    model, ema = released_state(depth=1), released_state(depth=1, seed=1)
    args = argparse.Namespace(model="DiS-S/2", image_size=64, lr=1e-4, cfg=None, flags=[1, "a"])
    whole = {"model": model, "ema": ema, "opt": {"state": {}, "param_groups": []}, "args": args}
    torch.save(whole, tmp_path / "whole.pt")
    expected = output_of(from_released(ema))
    assert torch.equal(output_of(from_released(tmp_path / "whole.pt")), expected)
    assert torch.equal(output_of(from_released(str(tmp_path / "whole.pt"))), expected)
    torch.save({"model": ema}, tmp_path / "model.pt")
    assert torch.equal(output_of(from_released(tmp_path / "model.pt")), expected)
    torch.save(ema, tmp_path / "bare.pt")
    assert torch.equal(output_of(from_released(tmp_path / "bare.pt")), expected)
    assert not torch.equal(output_of(from_released(model)), expected)


@pytest.mark.parametrize("place", ["top", "args", "namespace"])
def test_malicious_file_is_refused_and_not_run(tmp_path, place):
    trace = tmp_path / "trace"
    whole = {"ema": released_state(depth=1), "args": argparse.Namespace(model="DiS-S/2")}
    if place == "top":
        whole["extra"] = Payload(trace)
    elif place == "args":
        whole["args"] = Payload(trace)
    else:
        whole["args"].model = Payload(trace)
    torch.save(whole, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt would run .*\.system: refused") as error:
        from_released(tmp_path / "bad.pt")
    assert "weights_only" not in str(error.value)
    assert not trace.exists()


def test_loading_leaves_the_global_allow_list_alone(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"ema": released_state(depth=1), "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    from_released(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_given_state_dict_is_neither_changed_nor_shared():
    state = released_state(depth=1)
    names, before = set(state), {n: v.clone() for n, v in state.items()}
    model = from_released(state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert set(state) == names
    assert all(torch.equal(state[n], before[n]) for n in names)


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.proj.weight",
        "time_embed.2.bias",
        "pos_embed",
        "in_blocks.1.mixer.A_b_log",
        "mid_block.norm.weight",
        "out_blocks.0.skip_linear.bias",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.bias",
    ],
)
def test_missing_and_misshapen_tensors_are_named(name):
    state = released_state(classes=3)
    value = state.pop(name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        from_released(state)
    if name in ("pos_embed", "patch_embed.proj.weight"):
        return  # these define the sizes that the others are held against
    state[name] = torch.zeros(*value.shape[:-1], value.shape[-1] + 1)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        from_released(state)


def test_unexpected_tensors_are_named():
    state = released_state(depth=1)
    state["mid_block.mixer.surprise"] = torch.zeros(3)
    with pytest.raises(ValueError, match="surprise"):
        from_released(state)


def test_input_size_must_fit_the_positions():
    state = released_state(depth=1, grid=(4, 6))
    with pytest.raises(ValueError, match="24 patches are not a square: give input_size"):
        from_released(state)
    with pytest.raises(ValueError, match=r"pos_embed .*25, 32\), expected \(1, 17, 32\)"):
        from_released(state, input_size=(8, 8))
    assert from_released(state, input_size=(12, 8)).input_size == (12, 8)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("pos_embed", torch.zeros(3), r"\(3,\), expected 3 dimensions"),
        ("pos_embed", torch.zeros(1, 1, 32), r"\(1, 1, 32\), expected more than 1 positions"),
        ("patch_embed.proj.weight", torch.zeros(3, 2), r"\(3, 2\), expected 4 dimensions"),
        ("patch_embed.proj.weight", torch.zeros(0, 4, 2, 2), r"\(0, 4, 2, 2\), expected"),
        ("final_layer.linear.weight", torch.tensor(1.0), r"\(\), expected 2 dimensions"),
        ("mid_block.mixer.A_log", torch.zeros(33, 16), "33 rows, expected a multiple of 32"),
        (
            "norm_f.weight",
            torch.ones(32).to_sparse(),
            r"layout torch\.sparse_coo, expected a dense",
        ),
        (
            "mid_block.mixer.conv1d.weight",
            torch.ones(32, 1, 4).to_sparse(),
            r"layout torch\.sparse_coo",
        ),
        ("norm_f.weight", torch.ones(32).long(), r"dtype torch\.int64, expected floating point"),
    ],
)
def test_malformed_tensors_are_named_with_their_shapes(name, value, words):
    state = released_state(depth=1) | {name: value}
    with pytest.raises(ValueError, match=f"{re.escape(name)} of .*{words}"):
        from_released(state)


def test_tensors_that_are_not_finite_are_named():
    state = released_state(depth=1)
    state["norm_f.weight"][3] = math.nan
    with pytest.warns(UserWarning, match=r"norm_f\.weight .* is not finite"):
        from_released(state)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint file at .*nowhere\.pt"):
        from_released(tmp_path / "nowhere.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"this is not a checkpoint")
        with pytest.raises(ValueError, match=rf"{name} cannot be loaded safely: it is damaged"):
            from_released(tmp_path / name)
    for content in ({1: torch.zeros(2)}, {"ema": [1]}, torch.zeros(3)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt holds no state dict"):
            from_released(tmp_path / "other.pt")


def test_convert_command_writes_a_run_that_samples(tmp_path, capsys):
    state = released_state(channels=3, classes=5)
    torch.save({"ema": state, "args": argparse.Namespace(cfg=1.5)}, tmp_path / "released.pt")
    run = tmp_path / "run"
    assert main(["convert", str(tmp_path / "released.pt"), str(run)]) == 0
    loaded, _ = load_model(run)
    own = from_released(state).eval()
    x, t, y = torch.randn(2, 3, *loaded.input_size), torch.tensor([3, 900]), torch.tensor([0, 5])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), own(x, t, y))
    out = tmp_path / "samples.npz"
    arguments = ["sample", str(run), "--num", "5", "--steps", "2", "--out", str(out)]
    assert main(arguments) == 0 and out.is_file()
    assert main(["convert", str(tmp_path / "released.pt"), str(run)]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err


def test_convert_command_leaves_other_folders_alone(tmp_path, capsys):
    torch.save(released_state(depth=1), tmp_path / "released.pt")
    assert main(["convert", str(tmp_path / "released.pt"), str(tmp_path)]) == 2
    assert f"{tmp_path} is not empty and is not a run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["released.pt"]
