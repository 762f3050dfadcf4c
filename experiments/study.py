"""What the experiments share: many runs, each trained once, their scores, means over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
from harness import RESULTS, processor, record, write

from dis_ssm.checkpoint import write_json
from dis_ssm.config import Config, build_model, differences, load_config, to_dict
from dis_ssm.data import epoch_order, open_dataset
from dis_ssm.distributed import join_world
from dis_ssm.flops import forward_flops
from dis_ssm.images import save_images
from dis_ssm.runs import score_path
from dis_ssm.train import train

__all__ = ["RESULTS", "write", "write_json"]

DECIDED = 2  # a difference counts when it exceeds so many of its standard errors


@dataclass(frozen=True)
class Options:
    """Flags of a study; every flag of `dis-ssm train` changes the configuration of all its runs."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    runs: Path  # the folder of the runs
    results: Path  # NAME.json; NAME.png and NAME.md are written beside it
    seeds: int = 3  # runs of each variant, from train.seed on; sample.seed is the same number
    threads: int = 1  # of the CPU
    list: bool = False  # print the command of each run, one a line, and do nothing
    launcher: str = "dis-ssm"  # of these commands; "torchrun --nproc-per-node 8 -m dis_ssm"
    collect: bool = False  # train nothing, take the runs that are there


Chosen = TypeVar("Chosen", bound=Options)


def parse(default: Chosen, doc: str, arguments: Sequence[str] | None = None) -> Chosen:
    """Options from a command line: [CONFIG] [flags], flags over `default`."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if rest and not rest[0].startswith("-"):
        default = dataclasses.replace(default, config=load_config(rest.pop(0)))
    options = tyro.cli(type(default), default=default, args=rest, description=doc)
    if options.seeds < 1:
        raise ValueError(f"seeds is {options.seeds}: give 1 or more")
    if not options.config.score.every:
        raise ValueError("score.every is 0: say how often the runs are scored")
    torch.set_num_threads(options.threads)
    return options


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with other values: change(config, model={"depth": 3})."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **changed)


def seeded(config: Config, name: str, options: Options) -> list[Config]:
    """The runs RUNS/NAME-SEED of one variant."""
    first = options.config.train.seed
    return [
        dataclasses.replace(
            change(config, train={"seed": seed}, sample={"seed": seed}),
            out=options.runs / f"{name}-{seed}",
        )
        for seed in range(first, first + options.seeds)
    ]


def command(config: Config, base: str, launcher: str) -> str:
    """The `dis-ssm train` command that makes `config` out of the configuration named `base`."""
    before, after = _flat(load_config(base)), _flat(config)
    words = [*shlex.split(launcher), "train", base]
    for key, value in after.items():
        if value == before[key]:
            continue
        section, _, name = key.replace("_", "-").rpartition(".")
        flag = f"--{section}.{name}" if section else f"--{name}"
        if isinstance(value, bool):
            words.append(flag if value else f"--{section}.no-{name}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def train_all(runs: Iterable[Config]) -> None:
    """Train each run that is not finished, continue the one that was killed."""
    runs = list(runs)
    for number, config in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}]", end=" ", flush=True)
        outcome = train(config)
        if outcome.stopped_by:
            raise SystemExit(128 + outcome.stopped_by)


def identical(config: Config, folders: Iterable[Path]) -> Path | None:
    """A finished run in `folders` that is trained, drawn and scored as `config`, a resolved one."""
    for folder in folders:
        for path in sorted(folder.glob("*/config.json")):
            saved = load_config(path)
            scored = (saved.sample, saved.score) == (config.sample, config.score)
            if scored and not differences(saved, config) and _finished(path.parent, saved):
                return path.parent
    return None


def _finished(run: Path, config: Config) -> bool:
    return score_path(run, config.train.steps).exists()


def summarise(runs: Iterable[Config]) -> dict[str, Any] | None:
    """Size, cost and distances of the finished ones of `runs`, which differ in their seeds.

    "runs" holds the distances of each seed at "steps", "mean" and "stderr" the mean over seeds and
    its standard error (None for one seed). None when no run is finished.
    """
    finished = [config for config in runs if _finished(config.out, config)]
    if not finished:
        return None
    curves = {config.train.seed: distances(config) for config in finished}
    steps = sorted(set.intersection(*map(set, curves.values())))
    across = [mean_error([curve[step] for curve in curves.values()]) for step in steps]
    resolved = load_config(finished[0].out / "config.json")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(resolved).parameters())
    return {
        "parameters": parameters,
        "gflops": sum(forward_flops(resolved).values()) / 1e9,
        "folders": {str(config.train.seed): str(config.out) for config in finished},
        "training seconds": {str(c.train.seed): _last_line(c.out)["seconds"] for c in finished},
        "steps": steps,
        "runs": {str(seed): [curve[step] for step in steps] for seed, curve in curves.items()},
        "mean": [mean for mean, _ in across],
        "stderr": [error for _, error in across],
    }


def distances(config: Config) -> dict[int, float]:
    """step -> Fréchet distance of a run. ValueError for scores of other settings."""
    wanted = {"extractor": config.score.extractor, "num": config.score.num}
    wanted |= {name: getattr(config.sample, name) for name in ("sampler", "steps", "seed")}
    found = {}
    for path in sorted((config.out / "scores").glob("training-*.json")):
        score = json.loads(path.read_text(encoding="utf-8"))
        if other := [f"{k} {score[k]}, not {v}" for k, v in wanted.items() if score[k] != v]:
            raise ValueError(f"{path} was made with {', '.join(other)}: move it away, or its run")
        found[score["step"]] = score["frechet_distance"]
    return found


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / √n, s² = Σ(x - mean)² / (n - 1); None for one value."""
    n = len(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def compare(better: dict[str, Any], worse: dict[str, Any]) -> dict[str, Any]:
    """Whether `better` has the smaller final distance: gain, its standard error, and verdict.

    "repeats" or "does not" when |gain| exceeds `DECIDED` standard errors, √(e₁² + e₂²): the bars
    mean ± e are then apart. Otherwise "undecided".
    """
    gain = worse["mean"][-1] - better["mean"][-1]
    errors = [better["stderr"][-1], worse["stderr"][-1]]
    if None in errors:
        return {"gain": gain, "stderr": None, "verdict": "undecided"}
    error = math.hypot(*errors)
    verdict = "undecided"
    if abs(gain) > DECIDED * error:
        verdict = "repeats" if gain > 0 else "does not"
    return {"gain": gain, "stderr": error, "verdict": verdict}


def metric(config: Config) -> str:
    """The name of the distance: only Inception's may be called FID."""
    extractor = config.score.extractor
    return "FID" if extractor == "inception" else f"FD-{extractor}"


def protocol(config: Config) -> dict[str, Any]:
    """What the distances depend on, besides the model."""
    drawing = {name: getattr(config.sample, name) for name in ("sampler", "steps", "cfg_scale")}
    scoring = to_dict(config)["score"]
    return {"metric": metric(config), **scoring, **drawing, "weights": "ema"}


def about(config: Config) -> dict[str, Any]:
    """Command, commit, hardware, versions, date, and the settings that all runs share."""
    with join_world(config.train.device) as world:
        gpu = world.device.type == "cuda"
        device = torch.cuda.get_device_name(world.device) if gpu else processor()
    threads = {"threads": torch.get_num_threads()}
    return record(device) | threads | {"score": protocol(config), "config": to_dict(config)}


def save_heldout(source: str, path: Path) -> None:
    """Write the held-out images of `source` to `path` (.npz), unless they are there."""
    if not path.exists():
        dataset = open_dataset(source, "heldout")
        save_images(*dataset.batch(range(len(dataset))), path)


def save_training(source: str, num: int, path: Path) -> None:
    """Write `num` training images of `source`, a fixed random choice, to `path` (.npz)."""
    if not path.exists():
        dataset = open_dataset(source, "train")
        if num > len(dataset):
            raise ValueError(f"{source} has {len(dataset)} training images, not {num}")
        save_images(*dataset.batch(epoch_order(len(dataset), seed=0, epoch=0)[:num]), path)


def caption(report: dict[str, Any]) -> str:
    return f"{report['device']}, commit {report['commit']}, {report['date']}"


def with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, the first row being its head, the first column left-aligned."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" + "---:|" * (len(rows[0]) - 1), *body])


def _last_line(run: Path) -> dict[str, Any]:
    return json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def _flat(config: Config) -> dict[str, Any]:
    flat = {}
    for key, value in to_dict(config).items():
        section = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        flat |= section or {key: value}
    return flat
