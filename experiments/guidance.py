"""Fréchet distance, precision and recall against the guidance scale of one run.

    python experiments/guidance.py RUN [REFERENCE] [--scales 1 1.25 1.5 2 3 4] [--num 50000]
    torchrun --nproc-per-node 8 -- experiments/guidance.py RUN ...

For each scale the images are drawn as `dis-ssm sample` draws a set, into RUN/guidance, and scored
as `dis-ssm evaluate` scores it; rerun it to continue after a kill. Without a
REFERENCE the run's data is one. Writes RUN/guidance/guidance.json, .png and .md, or --results FILE;
errors are standard errors from repeated halves of the samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import study
import torch
import tyro
from tyro.conf import Positional

from dis_ssm.config import sample_settings, to_dict
from dis_ssm.metrics import evaluate_samples, format_report
from dis_ssm.sampling.draw import samples_name
from dis_ssm.sampling.pipeline import open_pipeline
from dis_ssm.sampling.sets import draw_set, plan_samples
from dis_ssm.storage.checkpoint import read_state
from dis_ssm.system.distributed import World, join_world
from dis_ssm.system.files import write_json

TRADED = ("precision", "recall")


@dataclass(frozen=True)
class Options:
    run: Positional[Path]  # or one of its checkpoints
    reference: Positional[str | None] = None  # images, statistics or a data set
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    num: int = 50_000  # images at each scale
    labels: Literal["balanced", "random"] = "random"
    steps: int | None = None  # of the sampler; unset, as the run's config says
    sampler: Literal["ddpm", "ddim"] | None = None
    cfg_interval: tuple[float, float] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    extractor: Literal["inception", "lite0", "dinov2", "pixels"] = "inception"
    weights: Path | None = None  # a file, of the extractor
    split: Literal["train", "heldout"] = "train"  # of a reference that is a data set
    real: bool = False  # score `num` training images of the run's data likewise
    results: Path | None = None  # NAME.json, and NAME.png, NAME.md beside it; unset: RUN/guidance
    threads: int = 1  # of the CPU


class Sweep:
    """Draws and scores sets in RUN/guidance. Every rank calls; what is there, and of this model, is
    not redone."""

    def __init__(self, options: Options, world: World):
        self.options, self.world = options, world
        precision = options.precision
        self.pipeline = open_pipeline(options.run, precision=precision, world=world)
        origin, self.config = self.pipeline.origin, self.pipeline.config
        self.run, self.step = origin.run, read_state(origin.checkpoint)["step"]
        self.reference = options.reference or self.config.data.source
        self.folder = self.run / "guidance"
        self.folder.mkdir(exist_ok=True)

    def drawn(self, scale: float) -> Path:
        """The set of one scale."""
        options = self.options
        settings = sample_settings(
            self.config,
            num=options.num,
            steps=options.steps,
            sampler=options.sampler,
            cfg_scale=scale,
            cfg_interval=options.cfg_interval,
            seed=options.seed,
        )
        plan = plan_samples(self.pipeline, settings, labels=options.labels)
        name = samples_name(self.step, settings)
        path = self.folder / f"{name}-{options.labels}-{options.precision}.npz"
        draw_set(self.pipeline, plan, path, self.world)
        if self.world.main:
            print(path)
        return path

    def real(self) -> Path:
        """As many training images, a fixed random choice."""
        path = self.folder / f"training-{self.options.num}.npz"
        with self.world.together():
            if self.world.main and not path.exists():
                study.save_training(self.config, self.options.num, path)
        return path

    def scored(self, images: Path) -> dict[str, Any] | None:
        """The report of a set, on the main rank."""
        options, size = self.options, self.config.data.image_size
        against = f"{Path(self.reference).stem}-{options.split}-{options.extractor}"
        path = images.with_name(f"{images.stem}-to-{against}.json")
        if not self.world.gather(_newer(path, images))[0]:
            named = {"extractor": options.extractor, "weights": options.weights}
            if not self.reference.endswith(".npz"):
                named |= {"image_size": size, "split": options.split}
            report = evaluate_samples(
                images, self.reference, world=self.world, progress=self.world.main, **named
            )
            if self.world.main:
                write_json(path, report)
                print(format_report(report), path, sep="\n")
        return json.loads(path.read_text(encoding="utf-8")) if self.world.main else None


def _newer(path: Path, than: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns > than.stat().st_mtime_ns


def draw(report: dict[str, Any], path: Path) -> None:
    """Distance, precision and recall against the scale, and precision against recall."""
    import matplotlib.figure

    distance, scales = report["metric"], [point["scale"] for point in report["points"]]
    title = study.metric(report["settings"]["extractor"]["name"])
    curves = {
        name: [point["scores"][name] for point in report["points"]]
        for name in (distance, *TRADED)
        if name in report["points"][0]["scores"]
    }
    figure = matplotlib.figure.Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for panel, names in ((left, [distance]), (middle, [n for n in TRADED if n in curves])):
        for name, colour in zip(names, ("tab:blue", "tab:orange"), strict=False):
            values = [found["value"] for found in curves[name]]
            errors = [found["stderr"] or 0 for found in curves[name]]
            label = title if name == distance else name
            panel.errorbar(scales, values, errors, color=colour, marker="o", capsize=3, label=label)
            if report["real"]:
                style = {"color": colour, "ls": "--", "lw": 1, "label": "training images"}
                panel.axhline(report["real"][name]["value"], **style)
        panel.set(xlabel="guidance scale")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
    left.set(title=title)
    middle.set(title="precision and recall")
    if set(TRADED) <= curves.keys():
        x, y = ([found["value"] for found in curves[name]] for name in reversed(TRADED))
        right.plot(x, y, color="tab:blue", marker="o")
        for scale, place in zip(scales, zip(x, y, strict=True), strict=True):
            right.annotate(f"{scale:g}", place, textcoords="offset points", xytext=(5, 3))
        right.set(title="precision against recall, by scale", xlabel="recall", ylabel="precision")
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['run']}, {report['num']:,} samples; {study.caption(report)}")
    figure.savefig(path, dpi=110)


def text(report: dict[str, Any]) -> str:
    """The scores as markdown."""
    names = [n for n in (report["metric"], *TRADED) if n in report["points"][0]["scores"]]
    rows = {point["scale"]: point["scores"] for point in report["points"]}
    rows |= {"training images": report["real"]} if report["real"] else {}
    cells = {
        row: [study.with_error(scores[n]["value"], scores[n]["stderr"]) for n in names]
        for row, scores in rows.items()
    }
    drawing, reference = report["config"]["sample"] | report["drawing"], report["reference"]
    return "\n".join(
        [
            "# Guidance scale",
            "",
            study.header(report),
            "",
            f"{report['num']:,} samples ({report['labels']} labels) of {report['run']}, step "
            f"{report['step']}, {drawing['sampler']} {drawing['steps']}, to {reference['source']} "
            f"({report['split']}): value ± standard error from repeated halves of the samples.",
            "",
            study.table([["scale", *names], *([row, *found] for row, found in cells.items())]),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    rest = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=rest, description=__doc__)
    torch.set_num_threads(options.threads)
    with join_world() as world:
        sweep = Sweep(options, world)
        reports = [sweep.scored(sweep.drawn(scale)) for scale in options.scales]
        real = sweep.scored(sweep.real()) if options.real else None
    if not world.main:
        return
    first, config = reports[0], sweep.config
    report = study.made_by(config) | {"run": str(sweep.run), "step": sweep.step}
    report |= {key: getattr(options, key) for key in ("num", "labels", "seed", "split")}
    report |= {key: first[key] for key in ("settings", "reference", "warnings", "unavailable")}
    report["config"], report["metric"] = to_dict(config), next(iter(first["scores"]))
    report["points"] = [
        {"scale": scale, "samples": found["samples"]["source"], "scores": found["scores"]}
        for scale, found in zip(options.scales, reports, strict=True)
    ]
    report["real"] = real and real["scores"]
    drawing = {"steps": options.steps, "sampler": options.sampler}
    report["drawing"] = {key: value for key, value in drawing.items() if value is not None}
    study.publish(report, options.results or sweep.folder / "guidance.json", text, draw)


if __name__ == "__main__":
    study.run(main)
