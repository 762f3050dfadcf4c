"""The model against its specification: counts, conditioning, order of patches, ablation
switches, guidance and PyTorch's machinery. Its arithmetic is in test_convert.py."""

import copy
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dis_ssm import DiS, DiS_models, create_model

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3)


def tiny(**options):
    return DiS(**(TINY | options))


def awaken(model, scale=0.2):
    """Random numbers where the initialisation puts zeros, so that outputs say something."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            if (p == 0).all():
                p.copy_(scale * torch.randn(p.shape, generator=g))
    return model


def batch_for(model_options=TINY, batch=3, num_classes=0):
    size = model_options["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model_options["in_channels"], height, width, generator=g)
    t = torch.tensor([0, 17, 999, 500, 250])[:batch]
    y = torch.arange(batch) % num_classes if num_classes else None
    return x, t, y


def count(module):
    return sum(p.numel() for p in module.parameters())


def by_suffix(model, *suffixes):
    found = {n: p for n, p in model.named_parameters() if n.endswith(suffixes)}
    assert found, f"no parameter ends in {suffixes}"
    return found


# ---- sizes --------------------------------------------------------------------------------


def parameters_of(width, depth, patch, channels, tokens, classes=0, n=16, expand=2, conv=4):
    """PAPER §1 and §6, added up: unconditional for classes = 0, learned sigma, null row."""
    inner, rank, extra = expand * width, math.ceil(width / 16), (2 if classes else 1)
    direction = inner * (conv + 1)  # convolution
    direction += (rank + 2 * n) * inner + inner * rank + inner  # x_proj, dt_proj
    direction += inner * n + inner  # A_log, D
    block = width + 2 * inner * width + inner * width + 2 * direction
    total = channels * patch**2 * width + width  # patches
    total += 4 * width * width + 4 * width + 4 * width * width + width  # time
    total += (tokens + extra) * width  # positions
    total += depth * block + depth // 2 * (2 * width * width + width)  # blocks, skips
    total += width + (width + 1) * patch**2 * 2 * channels  # last norm, decoder
    if classes:
        total += (classes + 1) * width + (width + 1) * 2 * width  # table, adaLN of the decoder
    return total


SIZES = {"S": (368, 25), "B": (768, 25), "M": (768, 49), "L": (1024, 49), "H": (1536, 49)}
PUBLISHED = {"S": 28.457, "B": 119.139, "M": 229.390, "L": 404.03, "H": 900.56}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_paper(size):
    width, depth = SIZES[size]
    expected = parameters_of(width, depth, patch=4, channels=3, tokens=64)
    assert expected / 1e6 == pytest.approx(PUBLISHED[size], abs=0.0051 if size in "LH" else 5.1e-4)
    with torch.device("meta"):
        model = create_model(f"DiS-{size}/4", input_size=32, in_channels=3, num_classes=0)
    assert count(model) == expected


@pytest.mark.parametrize("patch", [2, 8])
def test_parameter_counts_with_classes(patch):
    with torch.device("meta"):
        model = create_model(f"DiS-S/{patch}", input_size=32, in_channels=4, num_classes=1000)
    assert count(model) == parameters_of(368, 25, patch, 4, (32 // patch) ** 2, 1000)


def test_registry_has_every_size_and_patch():
    assert set(DiS_models) == {f"DiS-{s}/{p}" for s in SIZES for p in (2, 4, 8)}
    with pytest.raises(ValueError, match=r"DiS-S/3.*DiS-S/"):
        create_model("DiS-S/3", input_size=32, in_channels=4)
    with pytest.raises(ValueError, match="DiS-B/2"):
        create_model("dis-b/2", input_size=32, in_channels=4)


def test_options_change_the_parameters_they_should():
    base = tiny()
    width, pairs, tokens = 32, 1, 16
    skip = pairs * (2 * width * width + width)
    for mode in ("add", "none"):
        assert count(tiny(skip=mode)) == count(base) - skip
    positions = [p for p in tiny(time_conditioning="adaln").parameters() if p.dim() == 3]
    assert [p.shape[1] for p in positions if p.shape[2] == width] == [tokens]
    # without class dropout there is no null row
    dropped = count(tiny(num_classes=10)) - count(tiny(num_classes=10, class_dropout_prob=0.0))
    assert dropped == width
    assert tiny(num_classes=10).null_class == 10
    vector = count(tiny(cond_dim=5)) - count(tiny(num_classes=10))
    assert vector == (5 + 1) * width - (10 + 1) * width
    assert count(base) == parameters_of(width, 3, 2, 3, tokens)
    assert count(base) - count(tiny(learn_sigma=False)) == (width + 1) * 4 * 3


# ---- initialisation -----------------------------------------------------------------------


def test_initialisation_table():
    torch.manual_seed(3)
    width, depth, n = 96, 5, 16
    model = DiS(input_size=8, patch_size=2, in_channels=3, hidden_size=width, depth=depth)
    for p in by_suffix(model, "A_log").values():
        assert p.shape == (2 * width, n)
        expected = torch.log(torch.arange(1, n + 1.0)).expand(2 * width, n)
        torch.testing.assert_close(p.detach(), expected)
    ones = [p for n, p in model.named_parameters() if n.endswith(".D")]
    assert len(ones) == 2 * depth and all((p == 1).all() for p in ones)

    biases = {n: p for n, p in model.named_parameters() if "dt" in n and n.endswith("bias")}
    assert len(biases) == 2 * depth
    logs = {n: F.softplus(p.detach()).log() for n, p in biases.items()}
    low, high = math.log(1e-3), math.log(1e-1)
    middle, spread = (low + high) / 2, (high - low) / math.sqrt(12)
    for backward in (False, True):
        values = torch.cat([v for n, v in logs.items() if ("backward" in n) == backward])
        assert values.min() > low - 1e-3 and values.max() < high + 1e-3
        assert values.mean().item() == pytest.approx(middle, abs=5 * spread / len(values) ** 0.5)
        assert values.std().item() == pytest.approx(spread, rel=0.1)
    dt_weights = {n: p for n, p in model.named_parameters() if "dt" in n and n.endswith("weight")}
    assert len(dt_weights) == 2 * depth
    for p in dt_weights.values():
        bound = p.shape[1] ** -0.5
        assert 0.95 * bound < p.abs().max() <= bound

    # Kaiming uniform with a = sqrt 5 has standard deviation 1 / sqrt(3 fan_in)
    for p in by_suffix(model, "out_proj.weight").values():
        expected = 1 / math.sqrt(3 * p.shape[1]) / math.sqrt(depth)
        assert p.std().item() == pytest.approx(expected, rel=0.05)
    torch.manual_seed(3)
    table = [p for p in tiny(num_classes=900).parameters() if p.shape == (901, 32)]
    assert table[0].std().item() == pytest.approx(0.02, rel=0.05)


def test_output_is_zero_at_the_start():
    for options in ({}, {"num_classes": 10}, {"time_conditioning": "adaln"}):
        x, t, y = batch_for(num_classes=options.get("num_classes", 0))
        assert (tiny(**options)(x, t, y) == 0).all()


OPTIONS = {
    "unconditional": {},
    "classes": {"num_classes": 5},
    "vector": {"cond_dim": 4},
    "add": {"skip": "add"},
    "no skip": {"skip": "none"},
    "adaln": {"time_conditioning": "adaln", "num_classes": 5},
    "adaln without classes": {"time_conditioning": "adaln"},
    "no sigma": {"learn_sigma": False},
    "not square": {"input_size": (8, 12), "in_channels": 5},
    "other state": {"d_state": 5, "expand": 1, "d_conv": 3, "hidden_size": 24},
    "deep": {"depth": 7, "patch_size": 4},
}


def options_batch(options):
    merged = TINY | options
    x, t, y = batch_for(merged, num_classes=options.get("num_classes", 0))
    if "cond_dim" in options:
        y = torch.randn(len(x), options["cond_dim"], generator=torch.Generator().manual_seed(2))
    return x, t, y


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_learns_and_shapes_follow(name):
    options = OPTIONS[name]
    model = awaken(tiny(**options)).eval()
    x, t, y = options_batch(options)
    out = model(x, t, y)
    channels = x.shape[1] * (1 if options.get("learn_sigma") is False else 2)
    assert out.shape == (3, channels, *x.shape[2:]) and out.isfinite().all()
    out.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", OPTIONS)
def test_output_depends_on_its_condition_and_not_on_its_neighbours(name):
    options = OPTIONS[name]
    model = awaken(tiny(**options)).double().eval()
    x, t, y = options_batch(options)
    x, y = x.double(), y.double() if y is not None and y.is_floating_point() else y
    out = model(x, t, y)
    assert (model(x, t + 1, y) - out).abs().amax((1, 2, 3)).min() > 1e-6
    if y is not None:
        assert (model(x, t, y.roll(1, 0)) - out).abs().amax((1, 2, 3)).min() > 1e-6
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], None if y is None else y[i : i + 1])
        torch.testing.assert_close(alone[0], out[i], rtol=1e-9, atol=1e-12)


# ---- tokens and their order ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["unconditional", "not square", "adaln without classes"])
def test_every_patch_sees_every_patch(name):
    model = awaken(tiny(**OPTIONS[name])).double().eval()
    x, t, _ = options_batch(OPTIONS[name])
    x = x[:1].double().requires_grad_(True)
    out = model(x, t[:1])
    p, (height, width) = 2, x.shape[2:]
    corners = [(0, 0), (0, width // p - 1), (height // p - 1, 0), (height // p - 1, width // p - 1)]
    for row, column in corners:
        target = out[..., row * p : (row + 1) * p, column * p : (column + 1) * p].sum()
        (grad,) = torch.autograd.grad(target, x, retain_graph=True)
        seen = F.max_pool2d(grad.abs().amax(1), p)
        assert (seen > 0).all()


def named_like(model, *ends):
    return [p for n, p in model.named_parameters() if n.endswith(ends)]


@pytest.mark.parametrize("blind", ["forward", "backward"])
def test_one_direction_sees_only_one_side(blind):
    # With one direction's D and C silenced, what is left of one block is strictly one-sided.
    model = awaken(tiny(depth=1)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"{blind}_scan.x_proj" in name or f"{blind}_scan.D" in name:
                p.zero_()
    x, t, _ = batch_for(batch=1)
    x = x.double().requires_grad_(True)
    out = model(x, t)
    (grad,) = torch.autograd.grad(out[..., 4:6, 2:4].sum(), x)
    seen = F.max_pool2d(grad.abs().amax(1), 2).flatten() > 0  # of row 2, column 1: patch 9
    index = torch.arange(16)
    assert torch.equal(seen, index <= 9 if blind == "backward" else index >= 9)


def test_patches_are_row_major_and_come_back_where_they_were():
    # One token of the position embedding reaches, through the decoder alone, one patch.
    model = tiny(input_size=(8, 12), depth=1).double().eval()
    with torch.no_grad():
        for p in named_like(model, "out_proj.weight"):
            p.zero_()
        final = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        final.bias.copy_(torch.arange(len(final.bias)))
        (position,) = [p for p in model.parameters() if p.dim() == 3 and p.shape[1] == 24 + 1]
    x, t, _ = batch_for(TINY | {"input_size": (8, 12)}, batch=1)
    out = model(x.double(), t)
    # bias k = (i * p + j) * 6 + c lands at pixel (i, j) of every patch, channel c
    i, j = torch.meshgrid(torch.arange(8) % 2, torch.arange(12) % 2, indexing="ij")
    for c in range(6):
        assert torch.equal(out[0, c], ((i * 2 + j) * 6 + c).double())

    with torch.no_grad():
        final.weight.normal_(generator=torch.Generator().manual_seed(0))
        before = model(x.double(), t)
        position[0, 1 + 8] += torch.linspace(-1, 1, 32).double()  # after the time token, patch 8
        moved = F.max_pool2d((model(x.double(), t) - before).abs().amax(1), 2)[0] > 0
    assert moved.nonzero().tolist() == [[1, 2]]  # 6 patches a row: 8 = 1 * 6 + 2


def test_integer_and_float_timesteps_agree():
    model = awaken(tiny()).eval()
    x, t, _ = batch_for()
    assert torch.equal(model(x, t), model(x, t.float()))
    between = model(x, t.float() + 0.5)
    assert (between - model(x, t)).abs().amax((1, 2, 3)).min() > 0


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2, 24])
def test_even_depth_says_why(depth):
    with pytest.raises(ValueError, match=rf"{depth}(.|\n)*odd|odd(.|\n)*{depth}"):
        tiny(depth=depth)


def test_wrong_options_name_the_value():
    with pytest.raises(ValueError, match="patch_size 4 does not divide the input size 30x30"):
        tiny(input_size=30, patch_size=4)
    with pytest.raises(ValueError, match="the input size 8x7"):
        tiny(input_size=(8, 7))
    with pytest.raises(ValueError, match=r"hidden_size must be .* an integer, got 2\.5"):
        tiny(hidden_size=2.5)
    for option in ("skip", "time_conditioning"):
        with pytest.raises(ValueError, match="sideways"):
            tiny(**{option: "sideways"})
    with pytest.raises(ValueError, match="num_classes or cond_dim, not both"):
        tiny(cond_dim=4, num_classes=3)


def test_wrong_inputs_name_the_value():
    x, t, y = batch_for(num_classes=5)
    model = tiny(num_classes=5)
    with pytest.raises(ValueError, match=r"label 6 is out of range: the model knows 0 \.\.\. 5$"):
        model(x, t, torch.tensor([0, 6, 1]))
    with pytest.raises(ValueError, match="label -1 is out of range"):
        model(x, t, torch.tensor([0, -1, 1]))
    model(x, t, torch.tensor([0, 5, 1]))  # 5 is the null class
    with pytest.raises(ValueError, match=r"label 5 .* 0 \.\.\. 4; it has no null class"):
        tiny(num_classes=5, class_dropout_prob=0.0)(x, t, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="y is missing: this model needs labels"):
        model(x, t)
    with pytest.raises(ValueError, match="y was given to an unconditional model"):
        tiny()(x, t, y)
    for shape in ((3, 3, 16, 16), (3, 4, 8, 8)):
        with pytest.raises(ValueError, match=re.escape(f"(batch, 3, 8, 8), got {shape}")):
            model(torch.randn(shape), t, y)
    with pytest.raises(ValueError, match=re.escape("y must have shape (3, 4), got (3, 5)")):
        tiny(cond_dim=4)(x, t, torch.randn(3, 5))
    with pytest.raises(ValueError, match="y is missing: this model needs vectors"):
        tiny(cond_dim=4)(x, t)
    for dtype in (torch.float64, torch.float16, torch.uint8):
        with pytest.raises(ValueError, match=rf"x is {dtype}.*x\.to\(torch\.float32\)"):
            model(x.to(dtype), t, y)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"labels must be integers, got {dtype}"):
            model(x, t, y.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_integer_dtype_mean_the_same(dtype):
    model = awaken(tiny(num_classes=5)).eval()
    x, t, y = batch_for(num_classes=5)
    assert torch.equal(model(x, t, y.to(dtype)), model(x, t, y))


# ---- guidance, dropout --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 2, 0])
def test_guidance_is_the_formula(channels):
    model = awaken(tiny(num_classes=5)).double().eval()
    x, t, y = batch_for(num_classes=5)
    z = x.double()
    both = (torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 5)]))
    conditional, unconditional = model(z, t, y), model(z, t, both[2][3:])
    guided = 3 if channels is None else channels
    expected = conditional.clone()
    null = unconditional[:, :guided]
    expected[:, :guided] = null + 2.5 * (conditional[:, :guided] - null)
    out = model.forward_with_cfg(*both, 2.5, cfg_channels=channels)
    assert out.shape == (6, 6, 8, 8)
    torch.testing.assert_close(out[:3], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out[3:, :guided], expected[:, :guided], rtol=1e-10, atol=1e-12)


def test_guidance_ignores_the_second_half_of_x_and_obeys_the_interval():
    model = awaken(tiny(num_classes=5)).double().eval()
    x, t, y = batch_for(num_classes=5)
    z = x.double()
    labels = torch.cat([y, torch.full_like(y, 5)])
    whole = torch.cat([z, z]), torch.cat([t, t]), labels
    out = model.forward_with_cfg(*whole, 3.0)
    garbage = model.forward_with_cfg(torch.cat([z, z * 0]), torch.cat([t, t]), labels, 3.0)
    assert torch.equal(out, garbage)
    part = model.forward_with_cfg(*whole, 3.0, interval=(10, 600))  # t is 0, 17, 999
    plain = model.forward_with_cfg(*whole, 1.0)
    torch.testing.assert_close(part[1], out[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(part[[0, 2]], plain[[0, 2]], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(plain[:3], model(z, t, y), rtol=1e-10, atol=1e-12)


def test_class_dropout_draws_the_null_class_in_training_only():
    model = awaken(tiny(num_classes=5, class_dropout_prob=1 - 1e-9)).double()
    x, t, y = batch_for(num_classes=5)
    null = torch.full_like(y, model.null_class)
    dropped = model.train()(x.double(), t, y)
    kept, unconditional = model.eval()(x.double(), t, y), model.eval()(x.double(), t, null)
    torch.testing.assert_close(dropped, unconditional)
    assert (kept - unconditional).abs().max() > 1e-6


def test_class_dropout_has_its_rate():
    model = awaken(tiny(num_classes=5, class_dropout_prob=0.3, depth=1, input_size=2)).train()
    rows = 2000
    x, t = torch.zeros(rows, 3, 2, 2), torch.zeros(rows)
    out = model(x, t, torch.zeros(rows, dtype=torch.long)).flatten(1)
    dropped = (out - model.eval()(x[:1], t[:1], torch.tensor([5])).flatten(1)).abs().amax(1) < 1e-5
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_drop_path_is_random_per_image_in_training_only():
    plain, dropping = awaken(tiny()), awaken(tiny(drop_path=0.6))
    dropping.load_state_dict(plain.state_dict())
    x, t = torch.ones(64, 3, 8, 8), torch.full((64,), 7)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(x, t), plain.eval()(x, t))
        assert torch.equal(plain.train()(x, t), plain.eval()(x, t))
        rows = dropping.train()(x, t).flatten(1)
    kinds = len({tuple((row * 1e4).round().tolist()) for row in rows})
    assert 2 <= kinds <= 8  # each of three blocks is kept or not, for each image by itself


def test_given_blocks_are_kept_and_scaled():
    """A kept block input is divided by its chance: with chance 1/2 it doubles."""
    model = awaken(tiny(drop_path=0.5)).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    block = model.blocks[-1]
    inputs = []
    block.norm.register_forward_hook(lambda module, args, out: inputs.append(out[1]))
    residuals = []
    block.register_forward_pre_hook(lambda module, args: residuals.append(args[:3]))
    mask = torch.ones(model.depth, 2, dtype=torch.bool)
    mask[-1, 1] = False
    model(x, t, None, mask)
    h, residual, skip = residuals[0]
    h = block.skip_linear(torch.cat([h, skip], dim=-1)) if block.skip_linear else h
    torch.testing.assert_close(inputs[0][0], residual[0] + 2 * h[0])
    torch.testing.assert_close(inputs[0][1], residual[1])


# ---- PyTorch's machinery ------------------------------------------------------------------


def test_checkpointing_activations_changes_nothing():
    model = awaken(tiny(num_classes=5, drop_path=0.3))
    batch = batch_for(num_classes=5)

    def gradients(flag):
        model.set_grad_checkpointing(flag)
        model.train().zero_grad()
        torch.manual_seed(4)
        out = model(*batch)
        out.square().sum().backward()
        return [out.detach()] + [p.grad.clone() for p in model.parameters()]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_copies_and_state_dicts_give_the_same_outputs():
    model = awaken(tiny(num_classes=5)).eval()
    batch = batch_for(num_classes=5)
    out = model(*batch)
    twin = copy.deepcopy(model)
    fresh = tiny(num_classes=5).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(twin(*batch), out) and torch.equal(fresh(*batch), out)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(model(*batch), out)


def test_compiles_whole():
    torch._dynamo.reset()
    model = awaken(tiny(num_classes=5)).eval()
    batch = batch_for(num_classes=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), model(*batch), rtol=1e-5, atol=1e-6)


def norm_inputs(model):
    """A list that collects, at every forward pass, the dtype that each norm normalises."""
    seen = []
    for name, module in model.named_modules():
        if "norm" in name.split(".")[-1] and not list(module.children()):
            module.register_forward_hook(
                lambda m, args, out: seen.append((out if torch.is_tensor(out) else out[1]).dtype)
            )
    return seen


def test_residual_stream_stays_float32_under_autocast():
    model = awaken(tiny(depth=5))
    seen = norm_inputs(model)
    x, t, _ = batch_for()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t)
        out.float().square().mean().backward()
    assert len(seen) >= 5 + 1 and set(seen) == {torch.float32}
    truth = model(x, t)
    assert (out.float() - truth).abs().max() < 0.05 * truth.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_residual_stream_stays_float32_in_a_bfloat16_model():
    model = awaken(tiny(depth=5)).bfloat16()
    seen = norm_inputs(model)
    x, t, _ = batch_for()
    model(x.bfloat16(), t)
    assert len(seen) >= 5 + 1 and set(seen) == {torch.float32}


def test_residual_stream_keeps_what_bfloat16_would_lose():
    # Big tokens plus small mixer outputs: a bfloat16 stream would drop the small ones entirely.
    model = awaken(tiny(depth=5)).eval()
    (position,) = [p for p in model.parameters() if p.dim() == 3 and p.shape[1] == 17]
    with torch.no_grad():
        position.mul_(0).add_(300.0)
    x, t, _ = batch_for()
    truth = model(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t).float()
    assert (out - truth).abs().max() < 0.1 * (truth - truth.mean(0)).abs().max()


def test_bfloat16_and_float64_models_run():
    x, t, _ = batch_for()
    model = awaken(tiny()).eval()
    truth = model.double()(x.double(), t)
    assert truth.dtype == torch.float64
    single = model.float()(x, t)
    half = model.bfloat16()(x.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    for out, tolerance in ((single, 1e-5), (half, 0.05)):
        assert (out.double() - truth).abs().max() < tolerance * truth.abs().max()


def test_seeds_reproduce_the_initialisation():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append([p.detach().clone() for p in tiny(num_classes=5).parameters()])
    same, other = (
        all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        for one, two in pairwise(states)
    )
    assert same and not other


@pytest.mark.parametrize(
    "wrong",
    [{"patch_size": 2.0}, {"depth": 1.0}, {"num_classes": None}, {"input_size": 8.0}],
)
def test_counts_are_integers(wrong):
    with pytest.raises(ValueError, match="and an integer, got"):
        DiS(**{"input_size": 8, "hidden_size": 16, "depth": 1} | wrong)
    assert DiS(np.int64(8), hidden_size=16, depth=1).input_size == (8, 8)
    with pytest.raises(ValueError, match="unknown model 'None'"):
        create_model(None)
