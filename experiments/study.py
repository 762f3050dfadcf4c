"""What the experiments share: many runs, each trained once, their scores, means over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
from harness import processor, record, write

from dis_ssm.build import build_model, open_run
from dis_ssm.config import Config, differences, load_config, to_dict
from dis_ssm.costs.operations import forward_flops
from dis_ssm.data.open import open_dataset
from dis_ssm.data.order import epoch_order
from dis_ssm.metrics import evaluate_samples
from dis_ssm.sampling.grids import save_images
from dis_ssm.storage.run import score_path
from dis_ssm.system.files import write_json
from dis_ssm.system.machine import pick_device
from dis_ssm.system.tables import format_table
from dis_ssm.training import train

__all__ = ["write_json"]

RECORD = "record.json"
DECIDED = 2  # a difference counts when it exceeds so many of its standard errors


@dataclass(frozen=True)
class Options:
    """Flags of a study; every flag of `dis-ssm train` changes the configuration of all its runs."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    runs: Path  # the folder of the runs
    results: Path | None = None  # NAME.json, and NAME.png, NAME.md beside it; unset: in `runs`
    seeds: int = 3  # runs of each variant, from train.seed on; sample.seed is the same number
    threads: int = 1  # of the CPU
    list: bool = False  # print the command of each run, one a line, and do nothing
    launcher: str = "dis-ssm"  # of these commands: "torchrun --nproc-per-node 8 -m dis_ssm --"
    collect: bool = False  # train nothing, take the runs that are there
    base: Annotated[str | None, tyro.conf.Suppress] = None  # the configuration's name, if optional


Chosen = TypeVar("Chosen", bound=Options)


def parse(default: Chosen, doc: str, arguments: Sequence[str] | None = None) -> Chosen:
    """Options from a command line: flags over `default`, after a CONFIG if it has a `base`."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if default.base and rest and not rest[0].startswith("-"):
        default = dataclasses.replace(default, config=load_config(rest[0]), base=rest[0])
        del rest[0]
    options = tyro.cli(type(default), default=default, args=rest, description=doc)
    if options.seeds < 1:
        raise ValueError(f"seeds is {options.seeds}: give 1 or more")
    if not options.config.score.every:
        raise ValueError("score.every is 0: say how often the runs are scored")
    torch.set_num_threads(options.threads)
    return options


def run(main: Callable[[], None]) -> None:
    """Call `main`; one line on stderr for what the user can mend."""
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error


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
    """Train each run that is not finished, continue the one that was killed.

    RUN/record.json says by what it was finished: command, commit, hardware, versions, date.
    """
    runs = list(runs)
    now = made_by(runs[0])
    for number, config in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}]", end=" ", flush=True)
        if is_that(config.out, open_run(config)[0]):
            print(f"{config.out} is done")
            continue
        outcome = train(config)
        if outcome.stopped_by:
            raise SystemExit(128 + outcome.stopped_by)
        if not (path := config.out / RECORD).exists():
            write_json(path, now)


def is_that(run: Path, config: Config) -> bool:
    """Whether `run` is finished and was trained, drawn and scored as `config`, a resolved one."""
    path = run / "config.json"
    if not path.exists():
        return False
    saved = load_config(path)
    scored = (saved.sample, saved.score) == (config.sample, config.score)
    return scored and not differences(saved, config) and _finished(run, saved)


def _finished(run: Path, config: Config) -> bool:
    return score_path(run, config.train.steps).exists()


def summarise(runs: Iterable[Config]) -> dict[str, Any] | None:
    """Size, cost and distances of the finished ones of `runs`, which differ in their seeds.

    "runs" holds the distances of each seed at "steps", "mean" and "stderr" the mean over seeds and
    its standard error (None for one seed); "mse" is the training loss of the last tenth of the
    steps. None when no run is finished.
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
        "made": {str(config.train.seed): _record(config.out) for config in finished},
        "training seconds": {str(c.train.seed): _log(c.out)[-1]["seconds"] for c in finished},
        "mse": {str(config.train.seed): _final_mse(config) for config in finished},
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


def metric(extractor: str) -> str:
    """The name of the distance: only Inception's may be called FID."""
    return "FID" if extractor == "inception" else f"FD-{extractor}"


def protocol(config: Config) -> dict[str, Any]:
    """What the distances depend on, besides the model."""
    drawing = {name: getattr(config.sample, name) for name in ("sampler", "steps", "cfg_scale")}
    scoring = to_dict(config)["score"]
    return {"metric": metric(config.score.extractor), **scoring, **drawing, "weights": "ema"}


def made_by(config: Config) -> dict[str, Any]:
    """Command, commit, hardware, versions and date of this process."""
    device = pick_device(config.train.device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else processor()
    return record(name) | {"threads": torch.get_num_threads()}


def about(config: Config) -> dict[str, Any]:
    """`made_by` and the settings that all runs share."""
    return made_by(config) | {"score": protocol(config), "config": to_dict(config)}


def save_training(config: Config, num: int, path: Path) -> None:
    """Write `num` images that a run trains on, a fixed random choice, to `path` (.npz)."""
    dataset = open_dataset(config.data.source, "train", config.data.image_size)
    if num > len(dataset):
        raise ValueError(f"{config.data.source} has {len(dataset)} training images, not {num}")
    save_images(*dataset.batch(epoch_order(len(dataset), seed=0, epoch=0)[:num]), path)


def floor(config: Config, path: Path) -> float:
    """The distance of as many training images, written to `path`, to the reference of [score]."""
    score = config.score
    save_training(config, score.num, path)
    report = evaluate_samples(
        path,
        score.reference or config.data.source,
        extractor=score.extractor,
        weights=score.weights,
        split=score.split,
        image_size=config.data.image_size,
        confidence=False,
    )
    return next(iter(report["scores"].values()))["value"]


def plain_numbers(axis: Any) -> None:
    """Labels of a logarithmic axis as 2, 3, not 2 x 10^0."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def caption(report: dict[str, Any]) -> str:
    return f"{report['device']}, commit {report['commit']}, {report['date']}"


def header(report: dict[str, Any], rows: Iterable[dict[str, Any]] = ()) -> str:
    """By what the numbers were made, as markdown; `rows` are summaries of runs."""
    commits = {str(made["commit"]) for row in rows for made in row["made"].values()}
    trained = f"; runs trained at {', '.join(sorted(commits))}" if commits else ""
    return (
        f"`{report['command']}`, commit {report['commit']}{trained}; {report['device']}, "
        f"{report['threads']} thread(s), {report['date']}."
    )


def publish(
    report: dict[str, Any],
    path: Path,
    text: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Write `path` (.json), and beside it what `text` and `draw` make of the report; print it."""
    write(report, path)
    path.with_suffix(".md").write_text(text(report), encoding="utf-8")
    draw(report, path.with_suffix(".png"))
    print(text(report))


def with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, the first row being its header, numbers to the right."""
    return format_table(rows, right=True, markdown=True)


def _record(run: Path) -> dict[str, Any]:
    path = run / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"run": str(run)} | {key: known.get(key) for key in ("commit", "date", "device")}


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]


def _final_mse(config: Config) -> float:
    """The mean of the training loss, without its variational part, over the last tenth of steps."""
    lines = [line for line in _log(config.out) if line["step"] > 0.9 * config.train.steps]
    return statistics.fmean(line["mse"] for line in lines if line["mse"] is not None)


def _flat(config: Config) -> dict[str, Any]:
    flat = {}
    for key, value in to_dict(config).items():
        section = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        flat |= section or {key: value}
    return flat
