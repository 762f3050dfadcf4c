"""Counts against closed forms and published numbers, and the comparison with attention."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dis_ssm import DiS
from dis_ssm.cli import main
from dis_ssm.config import Config, ModelConfig
from dis_ssm.costs.complexity import (
    against_attention,
    attention_equation,
    crossover,
    growth,
    layers,
    ssm_equation,
    table1,
    total,
)
from dis_ssm.costs.operations import count, flop_counter, forward_flops, sketch
from dis_ssm.models.dit import dit
from dis_ssm.models.peers import build
from dis_ssm.models.uvit import UViT, UViTBlock

TABLE1 = {  # M parameters, the paper's Gflops, as they must come out
    "S": (28.457, 0.43),
    "B": (119.139, 1.86),
    "M": (229.390, 3.70),
    "L": (404.03, 6.58),
    "H": (900.56, 14.79),
}
LATENTS = (32, 32), 4, 1000


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(status, text, JSON, figure) of one `dis-ssm flops` at a size that is not square."""
    folder = tmp_path_factory.mktemp("flops")
    out, figure = folder / "new" / "flops.json", folder / "flops.png"
    arguments = f"flops --size 8 12 --models DiS-S/4 U-ViT-S/2 --json {out} --plot {figure}"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.extend(map(str, texts)))
        status = main(arguments.split())
    return status, "\n".join(lines), json.loads(out.read_text()), figure


# ---- counting --------------------------------------------------------------------------------


def test_table_1_is_computed():
    for name, row in table1().items():
        parameters, gflops = TABLE1[name]
        assert row["parameters"]["computed"] / 1e6 == pytest.approx(parameters, abs=5e-3)
        assert f"{row['gflops']['computed']:.2f}" == f"{gflops:.2f}"
        # skip linears on 65 tokens, decoder, patch convolution, time MLP
        D, L = row["width"]["computed"], row["depth"]
        called = L // 2 * 2 * D * D * 65 + 65 * D * 96 + 64 * D * 48 + 8 * D * D
        assert row["gflops"]["computed"] == pytest.approx(2e-9 * called, rel=1e-12)


def test_parts_of_dis_in_closed_form():
    D, L, N, K, width, p = 48, 5, 6, 7, 3, 2
    model = dict(input_size=(8, 12), patch_size=p, hidden_size=D, depth=L, num_classes=K)
    model = sketch(lambda: DiS(**model, in_channels=4, d_state=N, d_conv=width))
    found = count(model, (8, 12), 4, K)["parts"]
    J, inner, rank = 24, 2 * D, math.ceil(D / 16)
    mixer = D * 2 * inner + 2 * (inner * (rank + 2 * N) + rank * inner) + inner * D
    tokens = J + 2
    assert found == {
        "blocks": L * tokens * mixer,
        "skips": L // 2 * tokens * 2 * D * D,
        "scores": 0,
        "convolutions": L * 2 * tokens * inner * width,
        "scan": L * 2 * tokens * inner * N * 7 // 2,
        "rest": J * D * 4 * p * p + 8 * D * D + 2 * D * D + tokens * D * 8 * p * p,
    }


@pytest.mark.parametrize(
    "size, expected", [("S", 6.8), ("B", 29.0), ("M", 57.0), ("L", 100.8), ("H", 225.6)]
)
def test_linear_layers_at_imagenet_256(size, expected):
    parts = count(sketch(build, f"DiS-{size}/2", *LATENTS), *LATENTS)["parts"]
    assert (parts["blocks"] + parts["skips"] + parts["rest"]) / 1e9 == pytest.approx(
        expected, abs=0.05
    )


@pytest.mark.parametrize(
    "name, parameters, cost",
    [
        ("DiT-S/2", 33, 6.06),
        ("DiT-B/2", 130, 23.01),
        ("DiT-L/2", 458, 80.71),
        ("DiT-XL/2", 675, 118.64),  # arXiv 2212.09748, tables 1 and 4
        ("U-ViT-S/2", 44, None),
        ("U-ViT-M/2", 131, None),
        ("U-ViT-L/2", 287, None),
        ("U-ViT-H/2", 501, 133.25),  # arXiv 2209.12152, tables 1 and 3
    ],
)
def test_peers_as_published(name, parameters, cost):
    found = count(sketch(build, name, *LATENTS), *LATENTS)
    assert found["parameters"] / 1e6 == pytest.approx(parameters, abs=1)
    if cost:
        assert found["multiply_adds"] / 1e9 == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("family", ["DiS", "DiT", "U-ViT"])
def test_a_count_is_what_really_runs(native, family):
    """Every block run on data, not one of each kind on the meta device."""
    size, channels, classes, depth = (8, 8), 3, 5, 5
    make = {
        "DiS": lambda: DiS(8, 2, channels, 16, depth, classes),
        "DiT": lambda: dit(size, 2, channels, classes, depth, 2, 8),
        "U-ViT": lambda: UViT(size, 2, channels, classes, depth, 2, 8),
    }[family]
    model, y = make().eval(), torch.zeros(1, dtype=torch.int64)
    math = sdpa_kernel(SDPBackend.MATH)  # as matrix products, which are counted everywhere
    with flop_counter() as counter, torch.no_grad(), math:
        model(torch.randn(1, channels, *size), torch.zeros(1), y)
    again = 0
    if family == "DiT":  # diffusers embeds in every block and once at the end
        again = depth * (256 * 16 + 16 * 16)
    found = count(sketch(make), size, channels, classes)
    assert found["multiply_adds"] == counter.get_total_flops() / 2 - again
    unique = {id(p): p.numel() for p in model.parameters()}
    assert found["parameters"] == sum(unique.values())


def test_no_kernel_is_needed(monkeypatch):
    """The count does not depend on the backend, nor on what the kernels can do."""
    for width in (4, 7):
        sizes = dict(hidden_size=16, depth=3, patch_size=2, d_conv=width)
        model = ModelConfig(name=None, input_size=(8, 8), in_channels=3, num_classes=0, **sizes)
        config = Config(model=model)
        expected = forward_flops(config)
        assert expected["dis_ssm.scan"] > 0 and expected["dis_ssm.conv"] > 0
        monkeypatch.setenv("DIS_SSM_BACKEND", "reference")
        assert forward_flops(config) == expected
        monkeypatch.delenv("DIS_SSM_BACKEND")


@pytest.mark.parametrize("name", ["DiS-S/2", "DiT-S/2", "U-ViT-S/2"])
def test_only_the_number_of_tokens_counts(name):
    costs = {
        count(sketch(build, name, size, 4, 10), size, 4, 10)["multiply_adds"]
        for size in ((16, 16), (8, 32), (2, 128))
    }
    assert len(costs) == 1


# ---- U-ViT -----------------------------------------------------------------------------------


def test_a_block_is_torchs_transformer_layer(assert_close):
    """The same tensors in nn.TransformerEncoderLayer, whose qkv has a bias."""
    block = UViTBlock(12, 3, False).double()
    layer = torch.nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.out_proj.weight": "proj.weight",
        "self_attn.out_proj.bias": "proj.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.2.weight",
        "linear2.bias": "mlp.2.bias",
    }
    state = block.state_dict()
    norms = {f"norm{i}.{n}": state[f"norm{i}.{n}"] for i, n in product((1, 2), ("weight", "bias"))}
    bias = {"self_attn.in_proj_bias": torch.zeros(36)}
    layer.load_state_dict({k: state[v] for k, v in names.items()} | norms | bias)
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(block(h, None), layer(h), 1e-12)


def test_uvit_pairs_its_blocks_and_keeps_the_pixels_in_place(assert_close):
    """Blocks that only project: with W = [0 | a], the output is the mirror block's, scaled."""
    size, C, p, D = (4, 6), 3, 2, 12
    model = UViT(size, p, C, 4, 5, 2, 6).double().eval()
    seen = []
    for i, block in enumerate(model.blocks):
        block.forward = lambda h, skip, i=i: seen.append((i, skip)) or h + 10.0**i
    with torch.no_grad():
        model.norm = torch.nn.Identity()
        model.patch_embed.weight.copy_(torch.eye(D).reshape(D, C, p, p))
        model.linear.weight.copy_(torch.eye(D))
        for tensor in (model.patch_embed.bias, model.linear.bias, model.final.bias):
            tensor.zero_()
        model.final.weight.copy_(F.pad(torch.eye(C)[..., None, None], (1, 1, 1, 1)))
        x = torch.randn(2, C, *size, dtype=torch.float64)
        out = model(x, torch.tensor([1.0, 9.0]).double(), torch.tensor([0, 4]))
    assert_close(out - 11111, x, 1e-10)
    tokens = [
        None if skip is None else (skip[:, 2:] - seen[3][1][:, 2:])[0, 0, 0] for _, skip in seen
    ]
    assert [t if t is None else round(t.item()) for t in tokens] == [None] * 3 + [0, -10]


# ---- against attention -----------------------------------------------------------------------


def test_equations():
    assert ssm_equation(258, 1536, 16) == pytest.approx(0.2409e9, rel=1e-3)
    assert attention_equation(3, 5) == 4 * 3 * 25 + 2 * 9 * 5
    row = layers((32, 32), 2, 4, 1000)["H"]
    assert row["ssm"]["equation"] == ssm_equation(258, 1536, 16)
    assert row["ssm"]["blocks"] / 1e9 == pytest.approx(4.0, abs=0.05)
    assert row["ssm"]["scan"] == 7 * 258 * 3072 * 16 and row["ssm"]["skip"] == 2 * 258 * 1536**2
    attention = row["attention"]
    left_out = attention["blocks"] + attention["scores"] - attention["equation"]
    assert left_out == 8 * 256 * 1536**2 + 6 * 1536**2  # MLP, modulation
    assert attention["scores"] == 2 * 256**2 * 1536


@pytest.mark.parametrize("name", ["DiS-S/4", "DiT-S/4", "U-ViT-S/4"])
def test_growth_holds_at_other_lengths(name):
    parts = growth(lambda size: build(name, size, 4, 9), 4, 4, 9)
    found = count(sketch(build, name, (20, 28), 4, 9), (20, 28), 4, 9)["parts"]
    assert {part: a + 35 * b + 35**2 * c for part, (a, b, c) in parts.items()} == found
    assert all(c == 0 for part, (_, _, c) in parts.items() if part != "scores")


def test_crossover():
    def at(cost, j):
        return cost[0] + cost[1] * j + cost[2] * j * j

    numbers = (-40, -3, 0, 3, 40)
    for a, b, c in product(numbers, numbers, (0, 1, 2)):
        flat, cost = (1, 2, 3), (1 + a, 2 + b, 3 + c)
        dearer = [at(cost, j) > at(flat, j) for j in range(200)]
        expected = next((j for j in range(1, 200) if all(dearer[j:])), None)
        assert crossover(flat, cost) == expected, (a, b, c)


def test_dis_h_against_dit_xl():
    """Where the costs cross, counted anew on both sides of it."""
    rows = against_attention(2, 4, 1000)
    costs = {name: total(row["parts"]) for name, row in rows.items()}
    for name in list(rows)[1:]:
        since, half = rows[name]["dearer_from"], rows[name]["scores_half_from"]
        for j in (since - 1, since):
            a, b, c = (x - y for x, y in zip(costs[name], costs["DiS-H"], strict=True))
            assert (a + b * j + c * j * j > 0) == (j == since)
        a, b, c = rows[name]["parts"]["scores"]
        assert (a, b) == (0, 0) and half == pytest.approx(costs[name][1] / c, abs=2)
    size = 2, 2 * rows["DiT-XL"]["dearer_from"]
    dis, attention = (
        count(sketch(build, n, size, 4, 1000), size, 4, 1000)["multiply_adds"]
        for n in ("DiS-H/2", "DiT-XL/2")
    )
    assert 0 < attention - dis < 1e-3 * dis
    scan = rows["DiS-H"]["scan_share"]
    assert scan == pytest.approx(4.35 / 230.28, rel=0.01)


# ---- the command -----------------------------------------------------------------------------


def test_published_and_computed_stand_side_by_side(printed):
    status, text, _, _ = printed
    assert status == 0
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("model   L"))
    assert (
        header.split()[2:]
        == (
            "D published computed M parameters published computed Gflops published computed "
            "with the mixers"
        ).split()
    )
    found = {line.split()[0]: line.split()[1:] for line in lines if line[:2] in
             ("S ", "B ", "M ", "L ", "H ")}  # fmt: skip
    assert found["S"] == ["25", "384", "368", "28.4", "28.457", "0.43", "0.43", "3.73"]
    assert found["L"] == ["49", "1024", "1024", "404.0", "404.026", "6.57", "6.58", "52.40"]
    assert found["H"][:-1] == ["49", "1536", "1536", "900.6", "900.558", "14.79", "14.79"]


def test_json_and_figure(printed):
    _, text, report, figure = printed
    assert report["settings"] == {"size": [8, 12], "channels": 4, "classes": 1000}
    assert list(report["models"]) == ["DiS-S/4", "U-ViT-S/2"]
    row = report["models"]["DiS-S/4"]
    assert sum(row["parts"].values()) == row["multiply_adds"]
    assert row == count(sketch(build, "DiS-S/4", (8, 12), 4, 1000), (8, 12), 4, 1000)
    assert f"{row['multiply_adds'] / 1e9:.3f}" in text
    since = report["against_attention"]["rows"]["DiT-XL"]["dearer_from"]
    assert f"DiT-XL: costs more than DiS-H from J = {since:,} on" in text
    picture = pytest.importorskip("matplotlib.image").imread(figure)
    assert (picture[..., :3] < 0.9).any(-1).mean() > 0.01  # lines


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--models DiS-X/2", "unknown model 'DiS-X/2'; did you mean 'DiS-S/2'"),
        ("--models dit-xl/2", "did you mean 'DiT-XL/2'"),
        ("--size 33 32", "no patch of 2, 4, 8 divides 33x32"),
        ("--size 36 30 --models DiT-S/4", "patch_size 4 does not divide the input size 36x30"),
        ("--size 0 8", "sides and channels must be 1 to 65,536"),
        ("--channels 0", "channels 0"),
        ("--classes -1", "classes -1"),
        ("--json /proc/none/flops.json", "cannot write /proc/none/flops.json"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert main(["flops", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_says_what_is_counted():
    page = (Path(__file__).resolve().parents[2] / "docs" / "flops.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row}
    for name, row in table1().items():
        parameters, gflops = row["parameters"], row["gflops"]
        assert rows[name] == [
            f"{parameters['published'] / 1e6:.1f} M",
            f"{parameters['computed'] / 1e6:.3f} M",
            *(f"{gflops[key]:.2f}" for key in ("published", "computed", "all")),
        ]
    models = [name for name in rows if name.endswith("/2")]
    assert len(models) == 7
    for name in models:
        found = count(sketch(build, name, *LATENTS), *LATENTS)
        parts = [found["multiply_adds"], *list(found["parts"].values())[:5]]
        cells = [f"{n / 1e9:.2f}" if n else "" for n in parts]
        assert rows[name] == [f"{found['parameters'] / 1e6:.0f} M", *cells]
    for name, row in list(against_attention(2, 4, 1000).items())[1:]:
        assert f"from J = {row['dearer_from']:,}" in page, name
        assert f"{row['scores_half_from']:,}" in page, name
