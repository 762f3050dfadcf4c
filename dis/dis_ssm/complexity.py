"""What DiS costs beside attention: Table 1 and multiply-adds counted from the models themselves.

Letters: J tokens, D hidden size, L blocks, N state, p patch. One multiply-add is two of the
floating-point operations that `dis_ssm.flops` reports.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dis_ssm.attention import DIT, PATCHES, PEERS, build, dit
from dis_ssm.flops import count_kernels
from dis_ssm.model import DiS_models, create_model

Size = tuple[int, int]  # height, width
Quadratic = tuple[int, int, int]  # a, b, c of a + b J + c J²

PUBLISHED = {  # arXiv 2402.05608, table 1: D, millions of parameters, "Gflops"
    "S": (384, 28.4, 0.43),
    "B": (768, 119.1, 1.86),
    "M": (768, 229.4, 3.70),
    "L": (1024, 404.0, 6.57),
    "H": (1536, 900.6, 14.79),
}
TABLE1_PATCH, TABLE1_SIZE, TABLE1_CHANNELS = 4, (32, 32), 3  # no classes; these reproduce it
PARTS = ("blocks", "skips", "scores", "convolutions", "scan", "rest")


# ---- counting --------------------------------------------------------------------------------


def multiply_adds(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> dict[str, int]:
    """Multiply-adds of one forward pass on the meta device, by part.

    blocks: matrix products inside the blocks; skips: the long skips' linear layers; scores: QKᵀ
    and its product with V; convolutions: the depthwise ones of both directions; scan: both
    directions, 7/2 for each token, channel and state, the exponential counted as one operation;
    rest: patches, time, class, decoder. Elementwise operations and norms are left out.
    """
    special = {"dis_ssm.conv": "convolutions", "dis_ssm.scan": "scan", "aten.bmm": "scores"}
    spent, entered = Counter(), []

    def counts() -> Counter:
        found = Counter()
        for operator, flops in counter.get_flop_counts().get("Global", {}).items():
            attention = "scaled_dot_product" in str(operator)
            found[special.get(str(operator), "scores" if attention else "linear")] += flops
        return found

    def watch(module: nn.Module, part: str) -> None:
        def leave(*_):
            spent[part] += counts()["linear"] - entered.pop()

        module.register_forward_pre_hook(lambda *_: entered.append(counts()["linear"]))
        module.register_forward_hook(leave)

    peer = hasattr(model, "transformer_blocks")
    for block in model.transformer_blocks if peer else model.blocks:
        watch(block, "blocks")
        if getattr(block, "skip_linear", None) is not None:
            watch(block.skip_linear, "skips")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _run_dit(model, x, t, y) if peer else count_kernels(model)(x, t, y)
    found = counts()
    found["blocks"] = spent["blocks"] - spent["skips"]
    found["skips"] = spent["skips"]
    found["rest"] = found["linear"] - spent["blocks"]
    return {part: found[part] // 2 for part in PARTS}


def _run_dit(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    """The linear layers of diffusers' forward pass, at any size; time and class embedded once."""
    y = torch.zeros_like(t, dtype=torch.int64) if y is None else y
    embedders = model.transformer_blocks[0].norm1.emb
    condition = embedders(t, y)
    embedders.forward = lambda *arguments, **options: condition
    h = model.pos_embed.proj(x).flatten(2).mT
    for block in model.transformer_blocks:
        h = block(h, timestep=t, class_labels=y)
    model.proj_out_1(condition)
    model.proj_out_2(h)


def count(make: Callable[[], nn.Module], size: Size, channels: int, classes: int) -> dict:
    """Parameters, and multiply-adds by part, of what `make` builds for such images."""
    with torch.device("meta"):
        model = make().eval()
        x, t = torch.empty(1, channels, *size), torch.zeros(1)
        y = torch.zeros(1, dtype=torch.int64) if classes else None
        parameters = sum(p.numel() for p in model.parameters())
        parts = multiply_adds(model, x, t, y)
    return {"parameters": parameters, "multiply_adds": sum(parts.values()), "parts": parts}


def growth(
    make: Callable[[Size], nn.Module], patch: int, channels: int, classes: int
) -> dict[str, Quadratic]:
    """(a, b, c) of each part's multiply-adds a + b J + c J² at J patches, from three counts."""
    at = []
    for patches in (1, 2, 3):
        size = patch, patch * patches
        at.append(count(lambda size=size: make(size), size, channels, classes)["parts"])
    found = {}
    for part in PARTS:
        one, two, three = (parts[part] for parts in at)
        c = (three - 2 * two + one) // 2
        b = two - one - 3 * c
        found[part] = (one - b - c, b, c)
    return found


def total(parts: dict[str, Quadratic]) -> Quadratic:
    return tuple(map(sum, zip(*parts.values(), strict=True)))


def crossover(cheaper: Quadratic, dearer: Quadratic) -> int | None:
    """Fewest J from which on `dearer` costs more, both a + b J + c J²; None if it never does."""
    a, b, c = (d - e for d, e in zip(dearer, cheaper, strict=True))
    if (c, b, a) <= (0, 0, 0):
        return None

    def beyond(j: int) -> bool:  # past the minimum, and positive
        return a + b * j + c * j * j > 0 and b + 2 * c * j >= 0

    high = 1
    while not beyond(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high


# ---- the paper -------------------------------------------------------------------------------


def paper_gflops(parts: dict[str, int]) -> float:
    """The paper's "Gflops": 2e-9 x the multiply-adds of the modules that are called.

    A counter by module hooks (thop) sees the patch convolution, the time MLP, the skip linears and
    the decoder. The mixers pass their weights to fused functions, so it misses all of them.
    """
    return 2e-9 * (parts["skips"] + parts["rest"])


def attention_equation(tokens: int, width: int) -> int:
    """4 J D² + 2 J² D, of self-attention (§3.3): leaves out the MLP, 8 J D²."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def ssm_equation(tokens: int, width: int, state: int) -> int:
    """3 J (2D) N + J (2D) N² (§3.3): leaves out every projection, about 6.5 J D², and the
    convolutions, while N² stands for a dense state matrix where the model's is diagonal."""
    return 3 * tokens * 2 * width * state + tokens * 2 * width * state**2


# ---- the report ------------------------------------------------------------------------------


def table1() -> dict[str, dict]:
    """Each row of the paper's Table 1 as published, and counted from our model."""
    rows, (channels, size) = {}, (TABLE1_CHANNELS, TABLE1_SIZE)
    for name, (width, parameters, gflops) in PUBLISHED.items():

        def make(name=f"DiS-{name}/{TABLE1_PATCH}"):
            return build(name, size, channels, 0)

        with torch.device("meta"):
            model = make()
        found = count(make, size, channels, 0)
        rows[name] = {
            "depth": model.depth,
            "width": {"published": width, "computed": model.hidden_size},
            "parameters": {"published": parameters * 1e6, "computed": found["parameters"]},
            "gflops": {"published": gflops, "computed": paper_gflops(found["parts"])},
            "multiply_adds": found["multiply_adds"],
        }
    return rows


def layers(size: Size, patch: int, channels: int, classes: int) -> dict[str, dict]:
    """The paper's equations for one layer beside the multiply-adds of a counted one."""
    rows = {}
    for name in PUBLISHED:
        with torch.device("meta"):
            model = build(f"DiS-{name}/{patch}", size, channels, classes)
        width, depth = model.hidden_size, model.depth
        found = count(lambda model=model: model, size, channels, classes)["parts"]
        found = {part: found[part] // depth for part in ("blocks", "convolutions", "scan")} | {
            "skip": found["skips"] // (depth // 2)
        }
        shape = size, patch, channels, classes, 1, 1, width
        peer = count(lambda shape=shape: dit(*shape), size, channels, classes)["parts"]
        tokens, patches = model.pos_embed.shape[1], size[0] * size[1] // patch**2
        rows[f"{name}, D = {width}"] = {
            "attention": {
                "tokens": patches,
                "equation": attention_equation(patches, width),
                "blocks": peer["blocks"],
                "scores": peer["scores"],
            },
            "ssm": {
                "tokens": tokens,
                "equation": ssm_equation(tokens, width, model.config["d_state"]),
                **found,
            },
        }
    return rows


def against_attention(patch: int, channels: int, classes: int) -> dict[str, dict]:
    """Cost against tokens of DiS-H, of DiT-XL, and of a DiT of DiT-XL's depth and DiS-H's width."""
    name, (depth, heads, _) = f"DiS-H/{patch}", DIT["XL"]
    with torch.device("meta"):
        width = create_model(name, input_size=patch).hidden_size
    shapes = {
        "DiT-XL": DIT["XL"],
        f"DiT-XL of width {width}": (depth, heads, width // heads),
    }
    dis = growth(lambda size: build(name, size, channels, classes), patch, channels, classes)
    rows = {"DiS-H": {"parts": dis, "scan_share": dis["scan"][1] / total(dis)[1]}}
    for title, shape in shapes.items():
        parts = growth(
            lambda size, shape=shape: dit(size, patch, channels, classes, *shape),
            patch,
            channels,
            classes,
        )
        others = total({part: n for part, n in parts.items() if part != "scores"})
        rows[title] = {
            "parts": parts,
            "dearer_from": crossover(total(dis), total(parts)),
            "scores_half_from": crossover(others, parts["scores"]),
        }
    return rows


def report(
    size: Size = (32, 32), channels: int = 4, classes: int = 1000, models: Sequence[str] = ()
) -> dict:
    """Everything that `dis-ssm flops` prints, as a JSON object; multiply-adds, not Gflops.

    Args:
        size: height and width of image or latent. channels: C. classes: 0 for none.
        models: names; all of DiS, DiT and U-ViT whose patch divides the size when empty.

    Raises:
        ValueError: unknown model, or a size that no patch divides.
    """
    if min(*size, channels) < 1 or classes < 0:
        raise ValueError(
            f"size {size[0]}x{size[1]}, channels {channels}, classes {classes}: sides and channels "
            f"must be 1 or more, classes 0 or more"
        )
    patches = [p for p in PATCHES if not any(side % p for side in size)]
    if not patches:
        raise ValueError(
            f"no patch of {', '.join(map(str, PATCHES))} divides {size[0]}x{size[1]}: "
            f"both sides must be even"
        )
    every = (*DiS_models, *PEERS)
    names = models or [name for name in every if int(name.rpartition("/")[2]) in patches]
    made = {}
    for name in names:
        made[name] = count(
            lambda name=name: build(name, size, channels, classes), size, channels, classes
        )
    return {
        "settings": {"size": list(size), "channels": channels, "classes": classes},
        "table1": table1(),
        "models": made,
        "layers": {"patch": patches[0], "rows": layers(size, patches[0], channels, classes)},
        "against_attention": {
            "patch": patches[0],
            "rows": against_attention(patches[0], channels, classes),
        },
    }


def format_report(found: dict) -> str:
    """The report as tables."""
    settings, lines = found["settings"], []
    shape = f"{settings['channels']}x{settings['size'][0]}x{settings['size'][1]}"
    classes = f"{settings['classes']:,} classes" if settings["classes"] else "no classes"
    lines += [
        f"Table 1 of the paper: {TABLE1_CHANNELS}x{TABLE1_SIZE[0]}x{TABLE1_SIZE[1]} images, patch "
        f"{TABLE1_PATCH}, no classes, learned sigma. The paper's Gflops are twice the multiply-adds",
        "of what a module-wise counter sees; every mixer is missed. The last column counts all.",
        "",
    ]
    header = (
        "",
        "L",
        "D",
        "",
        "parameters, M",
        "",
        "Gflops, paper's convention",
        "",
        "G mult.-adds",
    )
    names = ("", "", *("published", "computed") * 3, "counted")
    rows = [
        (
            name,
            row["depth"],
            *row["width"].values(),
            f"{row['parameters']['published'] / 1e6:.1f}",
            f"{row['parameters']['computed'] / 1e6:.3f}",
            f"{row['gflops']['published']:.2f}",
            f"{row['gflops']['computed']:.2f}",
            _giga(row["multiply_adds"]),
        )
        for name, row in found["table1"].items()
    ]
    lines += _table(header, names, *rows)
    lines += ["", f"G multiply-adds of one forward pass, {shape}, {classes}", ""]
    header = ("", "parameters, M", "all", *PARTS)
    lines += _table(
        header,
        *(
            (
                name,
                f"{row['parameters'] / 1e6:.2f}",
                _giga(row["multiply_adds"]),
                *(_giga(row["parts"][part]) if row["parts"][part] else "-" for part in PARTS),
            )
            for name, row in found["models"].items()
        ),
    )
    lines += [
        "",
        "blocks, skips, rest: linear layers and the patch convolution; scores: QK' and its product",
        "with V; convolutions: depthwise, both directions; scan: both directions, 7/2 for each",
        "token, channel and state. Norms and elementwise operations are left out.",
        "",
        f"One layer, patch {found['layers']['patch']}: the paper's equations (5), (6) beside "
        f"counted layers, G multiply-adds",
        "",
    ]
    rows = [
        (
            name,
            row["attention"]["tokens"],
            *(_giga(row["attention"][key]) for key in ("equation", "blocks", "scores")),
            row["ssm"]["tokens"],
            *(_giga(row["ssm"][k]) for k in ("equation", "blocks", "convolutions", "scan", "skip")),
        )
        for name, row in found["layers"]["rows"].items()
    ]
    lines += _table(
        ("", "J", "4JD²+2J²D", "DiT: linear", "scores")
        + ("J", "6JDN+2JDN²", "DiS: linear", "conv.", "scan", "skip"),
        *rows,
    )
    lines += [
        "",
        "(5) leaves out the MLP, 8JD², and the modulation. (6) leaves out all linear layers of the",
        "mixer, about 6.5JD², the convolutions and the second direction, and its JN² would be that",
        "of a dense state matrix: the model's is diagonal. A DiS layer has no MLP, so DiS is deeper.",
        "",
        *_crossovers(found["against_attention"]),
    ]
    return "\n".join(lines)


def _crossovers(found: dict) -> list[str]:
    rows = dict(found["rows"])
    dis = rows.pop("DiS-H")
    lines = [f"Against the number of patches J (patch {found['patch']})"]
    lines.append(f"  DiS-H: linear in J; the scan is {dis['scan_share']:.1%} of it at every length")
    for name, row in rows.items():
        since, half = row["dearer_from"], row["scores_half_from"]
        side = found["patch"] * since**0.5
        lines.append(
            f"  {name}: costs more than DiS-H from J = {since:,} on ({side:.0f}x{side:.0f} latents "
            f"or pixels); its scores are over half of it from J = {half:,} on"
        )
    return lines


def _giga(n: int) -> str:
    return f"{n / 1e9:,.3f}"


def _table(*rows: tuple) -> list[str]:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]


def draw(found: dict, path: Path) -> None:
    """Cost against tokens as a figure; the format is the path's suffix."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axis, rows = figure.subplots(), found["against_attention"]["rows"]
    tokens = [2 ** (k / 8) for k in range(8 * 4, 8 * 16 + 1)]

    def curve(cost: Quadratic) -> list[float]:
        a, b, c = cost
        return [(a + b * j + c * j * j) / 1e9 for j in tokens]

    for color, (name, row) in zip(("tab:blue", "tab:orange", "tab:red"), rows.items(), strict=True):
        axis.loglog(tokens, curve(total(row["parts"])), color=color, label=name)
        part = "scan" if name == "DiS-H" else "scores"
        axis.loglog(tokens, curve(row["parts"][part]), ":", color=color, label=f"{name}: {part}")
        if since := row.get("dearer_from"):
            axis.axvline(since, color=color, linewidth=0.8, linestyle="--")
            axis.annotate(f"{since:,}", (since, 1.02), xycoords=("data", "axes fraction"),
                          ha="center", fontsize=8, color=color)  # fmt: skip
    axis.set(xlabel="patches J", ylabel="G multiply-adds of a forward pass", ylim=(1, None))
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
