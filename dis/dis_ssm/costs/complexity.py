"""What DiS costs beside attention: Table 1 and multiply-adds counted from the models themselves.

Letters: J tokens, D hidden size, L blocks, N state, p patch. One multiply-add is two of the
floating-point operations that `dis_ssm.costs.operations` reports.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from dis_ssm.costs.operations import PARTS, Size, count, sketch
from dis_ssm.models.dit import dit
from dis_ssm.models.peers import DIT, PATCHES, PEERS, build
from dis_ssm.models.presets import DiS_models
from dis_ssm.system.limits import LARGEST_SIDE, MOST_CLASSES
from dis_ssm.system.tables import format_table

Quadratic = tuple[int, int, int]  # a, b, c of a + b J + c J²

PUBLISHED = {  # arXiv 2402.05608, table 1: D, millions of parameters, "Gflops"
    "S": (384, 28.4, 0.43),
    "B": (768, 119.1, 1.86),
    "M": (768, 229.4, 3.70),
    "L": (1024, 404.0, 6.57),
    "H": (1536, 900.6, 14.79),
}
TABLE1_PATCH, TABLE1_SIZE, TABLE1_CHANNELS = 4, (32, 32), 3  # no classes; these reproduce it


# ---- growth with the number of tokens -------------------------------------------------------


def growth(
    make: Callable[[Size], nn.Module], patch: int, channels: int, classes: int
) -> dict[str, Quadratic]:
    """(a, b, c) of each part's multiply-adds a + b J + c J² at J patches, from three counts."""
    sizes = [(patch, patch * patches) for patches in (1, 2, 3)]
    at = [count(sketch(make, size), size, channels, classes)["parts"] for size in sizes]
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
    square = b * b - 4 * a * c
    if (c, b, a) <= (0, 0, 0):
        return None
    if (c == 0 and b == 0) or square < 0:
        return 1
    last = (math.isqrt(square) - b) // (2 * c) if c else -a // b
    return 1 if last < 1 or a + b * last + c * last * last > 0 else last + 1


# ---- the paper -------------------------------------------------------------------------------


def paper_gflops(parts: dict[str, int]) -> float:
    """The paper's "Gflops": 2e-9 x the multiply-adds of the modules that are called.

    A counter by module hooks (thop) sees the patch convolution, the time MLP, the skip linears and
    the decoder. The authors' mixers pass their weights to fused functions: it misses all of them.
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
        model = sketch(build, f"DiS-{name}/{TABLE1_PATCH}", size, channels, 0)
        found = count(model, size, channels, 0)
        rows[name] = {
            "depth": model.depth,
            "width": {"published": width, "computed": model.hidden_size},
            "parameters": {"published": parameters * 1e6, "computed": found["parameters"]},
            "gflops": {
                "published": gflops,
                "computed": paper_gflops(found["parts"]),
                "all": 2e-9 * found["multiply_adds"],
            },
        }
    return rows


def layers(size: Size, patch: int, channels: int, classes: int) -> dict[str, dict]:
    """The paper's equations for one layer beside the multiply-adds of a counted one."""
    rows = {}
    for name in PUBLISHED:
        model = sketch(build, f"DiS-{name}/{patch}", size, channels, classes)
        width, depth, tokens = model.hidden_size, model.depth, model.pos_embed.shape[1]
        found = count(model, size, channels, classes)["parts"]
        each = {part: found[part] // depth for part in ("blocks", "convolutions", "scan")}
        each["skip"] = found["skips"] // (depth // 2)
        peer = sketch(dit, size, patch, channels, classes, 1, 1, width)
        attention = count(peer, size, channels, classes)["parts"]
        patches = size[0] * size[1] // patch**2
        rows[name] = {
            "width": width,
            "attention": {
                "tokens": patches,
                "equation": attention_equation(patches, width),
                "blocks": attention["blocks"],
                "scores": attention["scores"],
            },
            "ssm": {
                "tokens": tokens,
                "equation": ssm_equation(tokens, width, model.config["d_state"]),
                **each,
            },
        }
    return rows


def against_attention(patch: int, channels: int, classes: int) -> dict[str, dict]:
    """Cost against tokens of DiS-H, of DiT-XL, and of a DiT of DiT-XL's depth and DiS-H's width."""
    name, (depth, heads, _) = f"DiS-H/{patch}", DIT["XL"]
    width = sketch(build, name, (patch, patch), channels, classes).hidden_size
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
    sides = (*size, channels)
    if min(sides) < 1 or max(sides) > LARGEST_SIDE or not 0 <= classes <= MOST_CLASSES:
        raise ValueError(
            f"size {size[0]}x{size[1]}, channels {channels}, classes {classes}: sides and channels "
            f"must be 1 to {LARGEST_SIDE:,}, classes 0 to {MOST_CLASSES:,}"
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
        model = sketch(build, name, size, channels, classes)
        made[name] = count(model, size, channels, classes)
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
    settings, layers = found["settings"], found["layers"]
    shape = f"{settings['channels']}x{settings['size'][0]}x{settings['size'][1]}"
    classes = f"{settings['classes']:,} classes" if settings["classes"] else "no classes"
    setting1 = f"{TABLE1_CHANNELS}x{TABLE1_SIZE[0]}x{TABLE1_SIZE[1]}, patch {TABLE1_PATCH}"
    return "\n".join(
        [
            f"The paper's Table 1, {setting1}, no classes, learned sigma",
            "",
            _table1(found["table1"]),
            "",
            "The paper's Gflops are twice the multiply-adds of the modules that are called, and",
            "miss every mixer; the last column has them, in the same unit.",
            "",
            f"G multiply-adds of one forward pass, {shape}, {classes}",
            "",
            _models(found["models"]),
            "",
            "blocks, skips, rest: linear layers and the patch convolution; scores: QKᵀ and its",
            "product with V; convolutions: depthwise, both directions; scan: both directions, 7/2",
            "for each token, channel and state. Norms and elementwise operations are left out.",
            "",
            f"One layer, patch {layers['patch']}, G multiply-adds: the paper's equations (5), (6) "
            f"and what is counted",
            "",
            _layers(layers["rows"]),
            "",
            "(5) leaves out the MLP, 8JD², and the modulation. (6) leaves out all linear layers of",
            "the mixer, about 6.5JD², the convolutions and the second direction; its JN² is for a",
            "dense state matrix, while the model's is diagonal.",
            "",
            *_crossovers(found["against_attention"]),
        ]
    )


def _table1(rows: dict) -> str:
    header = ("model", "L", "D published", "computed", "M parameters published", "computed")
    header += ("Gflops published", "computed", "with the mixers")
    cells = []
    for name, row in rows.items():
        parameters, gflops = row["parameters"], row["gflops"]
        cells.append(
            (
                name,
                row["depth"],
                *(row["width"][key] for key in ("published", "computed")),
                f"{parameters['published'] / 1e6:.1f}",
                f"{parameters['computed'] / 1e6:.3f}",
                *(f"{gflops[key]:.2f}" for key in ("published", "computed", "all")),
            )
        )
    return format_table([header, *cells], right=True)


def _models(rows: dict) -> str:
    cells = []
    for name, row in rows.items():
        parts = (_giga(row["parts"][part]) if row["parts"][part] else "-" for part in PARTS)
        parameters = f"{row['parameters'] / 1e6:.2f}"
        cells.append((name, parameters, _giga(row["multiply_adds"]), *parts))
    return format_table([("model", "M parameters", "all", *PARTS), *cells], right=True)


def _layers(rows: dict) -> str:
    header = ("DiT layer", "J", "4JD²+2J²D", "linear", "scores")
    header += ("DiS layer", "J", "6JDN+2JDN²", "linear", "convolutions", "scan", "skip linear")
    cells = []
    for name, row in rows.items():
        attention, ssm = row["attention"], row["ssm"]
        keys = ("equation", "blocks", "convolutions", "scan", "skip")
        cells.append(
            (
                f"D = {row['width']}",
                attention["tokens"],
                *(_giga(attention[key]) for key in ("equation", "blocks", "scores")),
                name,
                ssm["tokens"],
                *(_giga(ssm[key]) for key in keys),
            )
        )
    return format_table([header, *cells], right=True)


def _crossovers(found: dict) -> list[str]:
    rows = dict(found["rows"])
    dis = rows.pop("DiS-H")
    lines = [f"Against the number of patches J (patch {found['patch']})"]
    lines.append(f"  DiS-H: linear in J; the scan is {dis['scan_share']:.1%} of it at every length")
    for name, row in rows.items():
        since, half = row["dearer_from"], row["scores_half_from"]
        side = found["patch"] * since**0.5
        lines.append(
            f"  {name}: costs more than DiS-H from J = {since:,} on, {side:.0f}x{side:.0f} latents;"
        )
        lines.append(f"    its scores are over half of its cost from J = {half:,} on")
    return lines


def _giga(n: int) -> str:
    return f"{n / 1e9:,.3f}"


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
