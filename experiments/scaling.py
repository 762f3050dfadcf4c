"""Fréchet distance against GFLOPs: models times patch sizes, trained alike.

    python experiments/scaling.py [CONFIG] [--models S B M L H] [--patches 2 4 8] [--list]

A model is a size of Table 1 or WIDTHxDEPTH. Flags of dis-ssm train change all runs; a run lives in
RUNS/MODEL-PATCH-SEED and is not repeated, nor is one that `--reuse` folders hold already. On a
cluster, submit the lines that `--list` prints, then run the same command with `--collect`. Writes
RUNS/scaling.json, .png and .md, or --results FILE. GFLOPs are those of one image's forward pass,
scan and convolutions included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import study

from dis_ssm.build import open_run
from dis_ssm.config import Config, load_config

MARKERS = "osD^v*"


@dataclass(frozen=True)
class Options(study.Options):
    models: tuple[str, ...] = ("S", "B", "M", "L", "H")
    patches: tuple[int, ...] = (2, 4, 8)
    reuse: tuple[Path, ...] = ()  # folders of other studies' runs


def sized(config: Config, model: str, patch: int) -> Config:
    """`config` with the model "S" (DiS-S/patch) or "48x5" (width 48, depth 5)."""
    none = dict.fromkeys(("name", "hidden_size", "depth", "patch_size"))
    if custom := re.fullmatch(r"(\d+)x(\d+)", model):
        width, depth = map(int, custom.groups())
        sizes = {"hidden_size": width, "depth": depth, "patch_size": patch}
    else:
        sizes = {"name": f"DiS-{model}/{patch}"}
    return study.change(config, model=none | sizes)


def found(config: Config, reuse: Sequence[Path]) -> Config:
    """The same run in one of the folders `reuse`, or `config` itself."""
    resolved = open_run(config)[0] if reuse else config
    for path in (path for folder in reuse for path in sorted(folder.iterdir())):
        if study.is_that(path, resolved):
            return replace(config, out=path)
    return config


def correlation(points: Sequence[dict[str, Any]]) -> float | None:
    """Pearson's, between the logarithms of GFLOPs and of the final distance."""
    if len(points) < 3:
        return None
    pairs = np.log([(point["gflops"], point["mean"][-1]) for point in points])
    return float(np.corrcoef(pairs.T)[0, 1])


def draw(report: dict[str, Any], path: Path) -> None:
    """Final distance against GFLOPs, a colour a model, a marker a patch size; both logarithmic."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    points = report["points"]
    models, patches = ([*dict.fromkeys(p[key] for p in points)] for key in ("model", "patch"))
    for model in models:
        line = [point for point in points if point["model"] == model]
        x, y = [p["gflops"] for p in line], [p["mean"][-1] for p in line]
        colour = f"C{models.index(model)}"
        panel.plot(x, y, color=colour, lw=1, label=model)
        for point in line:
            panel.errorbar(
                point["gflops"],
                point["mean"][-1],
                point["stderr"][-1] or 0,
                color=colour,
                marker=MARKERS[patches.index(point["patch"]) % len(MARKERS)],
                capsize=3,
            )
    for patch in patches:
        marker = MARKERS[patches.index(patch) % len(MARKERS)]
        panel.plot([], [], "k", ls="", marker=marker, label=f"patch {patch}")
    score, step = report["score"], points[0]["steps"][-1]
    r = report["correlation"]
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="GFLOPs of one image's forward pass",
        ylabel=f"{score['metric']} of {score['num']} samples, step {step}",
        title=f"{report['config']['data']['source']}"
        + ("" if r is None else f": correlation of the logarithms {r:.2f}"),
    )
    study.plain_numbers(panel.yaxis)
    panel.legend(frameon=False, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(study.caption(report), fontsize=8)
    figure.savefig(path, dpi=110)


def text(report: dict[str, Any]) -> str:
    score, settings, r = report["score"], report["config"]["train"], report["correlation"]
    rows = [["model", "patch", "parameters", "GFLOPs", "seeds", score["metric"]]]
    for p in report["points"]:
        distance = study.with_error(p["mean"][-1], p["stderr"][-1])
        cost = [f"{p['parameters']:,}", f"{p['gflops']:.4g}"]
        rows.append([p["model"], p["patch"], *cost, len(p["runs"]), distance])
    split = f"{score['split']} images of {score['reference'] or report['config']['data']['source']}"
    return "\n".join(
        [
            "# Distance against GFLOPs",
            "",
            study.header(report, report["points"]),
            "",
            f"{settings['steps']:,} steps of {settings['batch_size']} images for all; "
            f"{score['metric']} of {score['num']:,} EMA samples, {score['sampler']} "
            f"{score['steps']}, to the {split}: mean ± standard error over seeds.",
            "",
            study.table(rows),
            "",
            *([f"Missing: {', '.join(report['missing'])}.", ""] if report["missing"] else []),
            *([] if r is None else [f"Correlation of log GFLOPs and log distance: {r:.3f}.", ""]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    runs = Path("runs/scaling")
    default = Options(load_config("imagenet256"), runs, seeds=1, base="imagenet256")
    options = study.parse(default, __doc__, arguments)
    points = {
        (model, patch): study.seeded(
            sized(options.config, model, patch), f"{model}-{patch}", options
        )
        for model in options.models
        for patch in options.patches
    }
    points = {key: [found(c, options.reuse) for c in same] for key, same in points.items()}
    everything = [config for same in points.values() for config in same]
    if options.list:
        lines = [study.command(c, options.base, options.launcher) for c in everything]
        print(*lines, sep="\n")
        return
    if not options.collect:
        study.train_all(everything)
    report = study.about(options.config) | {"points": [], "missing": []}
    for (model, patch), same in points.items():
        if row := study.summarise(same):
            report["points"].append({"model": model, "patch": patch} | row)
        else:
            report["missing"].append(f"{model}/{patch}")
    if not report["points"]:
        raise ValueError(f"no run in {options.runs} is finished: run it without --collect")
    report["correlation"] = correlation(report["points"])
    study.publish(report, options.results or options.runs / "scaling.json", text, draw)


if __name__ == "__main__":
    study.run(main)
