"""dis-ssm train | sample | evaluate | encode | info | convert | flops"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional

from dis_ssm.checkpoint import (
    check_writable,
    identity,
    locate,
    read_state,
    versions,
    write_json,
)
from dis_ssm.config import (
    MOST_IMAGES,
    Config,
    load_config,
    named_configs,
    sample_settings,
)
from dis_ssm.distributed import RankError, join_world
from dis_ssm.hf import DEFAULT_VAE
from dis_ssm.ops.native import BackendError
from dis_ssm.version import __version__

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, BackendError, RankError)
INTERRUPTED = 128 + signal.SIGINT
NUM = 100  # images, unless asked for more or fewer
LARGEST_GRID = 1000  # images
LONGEST_NAME = 200  # of a file; systems allow 255 bytes, drafts included


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. 2 and one line on stderr for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = arguments[arguments[:1] == ["--"] :]  # keeps torchrun from reading our options
    warnings.showwarning = _print_warning
    for stream in (sys.stdout, sys.stderr):  # names and formulas in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        commands = {
            "train": train_command(Config()),
            "sample": sample,
            "evaluate": evaluate,
            "encode": encode,
            "info": info,
            "convert": convert,
            "flops": flops,
        }
        if arguments == ["--version"]:
            print(f"dis-ssm {__version__}")
            return 0
        if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
            near = difflib.get_close_matches(arguments[0], commands, n=1) or commands
            return _fail(f"unknown command {arguments[0]!r}: did you mean {', '.join(near)}?")
        if arguments[:1] != ["train"]:
            return tyro.extras.subcommand_cli_from_dict(commands, prog="dis-ssm", args=arguments)
        rest, base = arguments[1:], Config()
        if rest and not rest[0].startswith("-"):
            base, rest = load_config(rest[0]), rest[1:]
        return tyro.cli(train_command(base), prog="dis-ssm train [CONFIG]", args=rest)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        return _fail(f"out of memory, take smaller batches: {reason}")
    except KeyboardInterrupt:
        return INTERRUPTED


def train_command(base: Config) -> Callable[..., int]:
    """The train command, whose flags start from `base`."""

    def train(config: Annotated[Config, tyro.conf.arg(name="")] = base, dry_run: bool = False):
        """Train a model, or continue the run in --out: the same command again resumes exactly.

        CONFIG comes first: a TOML file or the name of one (NAMES); flags override it.

        Args:
            dry_run: print the resolved config and its sizes, write nothing.
        """
        from dis_ssm.flops import describe
        from dis_ssm.train import train as run_training

        if dry_run:
            print(describe(config))
            return 0
        outcome = run_training(config)
        if os.environ.get("RANK", "0") != "0":
            return 0
        again = f"at step {outcome.step}; run the same command again to continue"
        if outcome.stopped_by is None:
            print(f"trained: {outcome.run}; draw with: dis-ssm sample {outcome.run}")
        else:
            print(f"stopped: {outcome.run} {again}")
        return INTERRUPTED if outcome.stopped_by == signal.SIGINT else 0

    train.__doc__ = train.__doc__.replace("NAMES", ", ".join(named_configs()))
    return train


def sample(
    run: Positional[Path],
    *,
    num: int | None = None,
    per_class: int | None = None,
    classes: tuple[int, ...] = (),
    cfg_scale: float | None = None,
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] | None = None,
    steps: int | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    eta: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    labels: Literal["balanced", "random"] = "balanced",
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    precision: Literal["float32", "bf16"] = "float32",
    compile: bool = False,
    device: str | None = None,
    png: bool = False,
    out: Path | None = None,
) -> int:
    """Draw images from a trained model; image i depends on (seed, i, class).

    A grid (.png) has one class a column. A set (.npz, as ADM's evaluator reads it) may be of any
    size and be drawn under torchrun by any number of processes; the same command again finishes one
    that was interrupted. Latents are decoded by a VAE; without one they stay float32 (n, C, H, W).

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images; 100 if neither this nor per-class is given.
        per_class: how many images of each class.
        classes: which classes; all if none is given.
        cfg_scale: guidance, 1 for none; unset, like the next seven, as the run's config says.
        cfg_channels: guide the first so many channels only.
        cfg_interval: guide between these timesteps only.
        labels: of a set: as many of each class (balanced), or drawn uniformly (random).
        weights: averaged (ema) or as trained.
        vae: folder or hub id of the VAE that decodes; none for the latents themselves; unset, that
            of the run's config, or the one its latent cache names if that is a folder.
        compile: compile the model first; pays off for thousands of images.
        png: write each image of a set to a folder of PNG files too.
        out: NAME.png or NAME.npz; by default in the run's samples folder, named after the step and
            these options, a grid up to 1000 images.
    """
    from dis_ssm.generate import draw_labels, generate, open_artist
    from dis_ssm.images import check_format, label_columns, samples_name, save_images

    if out:
        check_format(out)
    with join_world(device) as world:
        with world.together():
            found = locate(run)
        folder, checkpoint = world.gather(found)[0]  # one for all, should the run be in training
        artist = open_artist(
            checkpoint,
            weights=weights,
            vae=vae,
            device=world.device,
            precision=precision,
            compiled=compile,
        )
        config = artist.config
        if out and out.suffix == ".png" and not artist.visible:
            raise ValueError(
                f"{run} draws latents of {config.model.in_channels} channels, and showing them "
                f"needs a VAE: give --vae a folder or hub id, or --out a name that ends in .npz"
            )
        if not artist.visible and vae is None and world.main:
            _print_warning(
                f"{run} draws latents and no VAE is at hand, so they are written as they are: give "
                f"--vae a folder or hub id for images, or --vae none if this is meant"
            )
        settings = sample_settings(
            config,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
            cfg_interval=cfg_interval,
            steps=steps,
            sampler=sampler,
            eta=eta,
            seed=seed,
            batch_size=batch_size,
        )
        known = range(config.model.num_classes)
        if unknown := [label for label in classes if label not in known]:
            raise ValueError(f"class {unknown[0]} is not one of the model's {len(known)} classes")
        num = _count(num, per_class, len(classes or known))
        settings, step = dataclasses.replace(settings, num=num), read_state(checkpoint)["step"]
        if out is None:
            name = samples_name(step, settings, weights, classes)
            name += "-random" * (labels == "random") + "-bf16" * (precision == "bf16")
            is_grid = artist.visible and num <= LARGEST_GRID and world.size == 1 and not png
            out = folder / "samples" / (name + (".png" if is_grid else ".npz"))
            if len(out.name) > LONGEST_NAME:
                raise ValueError(f"{len(classes)} classes are too many for a file name: give --out")
        check_writable(out)
        if out.suffix == ".png":
            if world.size > 1 or labels == "random" or png:
                raise ValueError(
                    f"{out} is a grid, drawn by one process with a class a column: give --out a "
                    f"name that ends in .npz for a set"
                )
            chosen, columns = label_columns(num, list(classes or known))
            images = artist.draw(range(num), chosen, settings, progress=True)
            save_images(images, chosen, out, columns)
        else:
            if png and not artist.visible:
                raise ValueError(f"--png: {run} draws latents, and showing them needs --vae")
            chosen = draw_labels(num, classes or known, labels, settings.seed)
            size = min(settings.batch_size, num)
            plan = dataclasses.asdict(settings) | {"batch_size": size, "checkpoint_step": step}
            plan |= {"checkpoint": identity(checkpoint)}
            plan |= {"run": str(folder), "weights": weights, "labels": labels, "vae": vae}
            plan |= {"classes": list(classes), "precision": precision, "png": png}
            plan |= {"device": world.device.type, "versions": versions()}
            draw = functools.partial(artist.draw, settings=settings)
            generate(draw, chosen, num, size, out, plan, world, png)
        if world.main:
            print(out)
    return 0


def _count(num: int | None, per_class: int | None, classes: int) -> int:
    if num is not None and per_class is not None:
        raise ValueError(f"--num {num} and --per-class {per_class}: give one of them")
    if per_class is not None and not classes:
        raise ValueError(f"--per-class {per_class}: this model has no classes, give --num")
    wanted = NUM if num is None and per_class is None else (num or (per_class or 0) * classes)
    if not 1 <= wanted <= MOST_IMAGES:
        raise ValueError(f"{wanted} images: ask for 1 to {MOST_IMAGES:,}")
    return wanted


def evaluate(
    samples: Positional[Path],
    reference: Positional[str | None] = None,
    *,
    num: int = 600,
    cfg_scale: float | None = None,
    steps: int | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bound_images: int = 256,
    bound_terms: int = 32,
    keep: bool = False,
    extractor: Literal["inception", "lite0", "dinov2", "pixels"] = "inception",
    weights: Path | None = None,
    resize: int | None = None,
    image_size: int | None = None,
    split: Literal["train", "heldout"] = "train",
    save_reference: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Score images against a reference: FID, sFID, IS, precision, recall; or score a run.

    With a REFERENCE, SAMPLES are images (.npz, .zip, folder), and the reference is images, a data
    set, or statistics such as ADM's; several processes share the work under torchrun. Without one,
    SAMPLES is a run of small images: one process draws `num` and compares them with held-out ones.

    Args:
        samples: images, or a run folder or one of its checkpoints.
        reference: what to compare images with.
        num: of a run: how many images to draw.
        cfg_scale: of a run: guidance; unset, like steps and sampler, as its config says.
        bound_images: of a run: held-out images whose bits per dimension are bounded.
        bound_terms: of a run: timesteps each of them is evaluated at, even; 0 skips the bound.
        keep: of a run: write the samples to RUN/samples as .npz.
        extractor: the features; inception is FID's.
        weights: a file of the extractor's weights; inception downloads its own without one.
        resize: side in pixels at which lite0 and dinov2 look, instead of 224.
        image_size: crop and scale a reference that is a data set to this.
        split: of a reference that is a data set.
        save_reference: write the reference's statistics to this .npz for the next time.
        out: the report (.json); by default beside the samples, or in RUN/scores.
    """
    from dis_ssm.evaluate import evaluate_run, format_scores, scores_path

    _refuse_others(locals())
    if out and out.suffix != ".json":
        raise ValueError(f"the report is JSON: give --out a name that ends in .json, not {out}")
    if reference is not None:
        if reference.endswith(".npz") and (split != "train" or image_size is not None):
            raise ValueError(f"{reference} is taken as it is: leave out --split and --image-size")
        place = samples.absolute()
        name = place.name if place.is_dir() else place.stem
        return _evaluate_images(
            samples,
            reference,
            out or place.with_name(f"{name}-{extractor}.json"),
            device,
            extractor=extractor,
            weights=weights,
            resize=resize,
            batch_size=64 if batch_size is None else batch_size,
            image_size=image_size,
            split=split,
            save_reference=save_reference,
        )
    if samples.suffix in (".npz", ".zip"):
        raise ValueError(f"{samples} holds images: say what to compare them with, too")
    with join_world(device) as world:
        if world.size > 1:
            raise ValueError(f"{samples} is a run, which one process scores, not {world.size}")
    folder, _ = locate(samples)
    check_writable(out or folder / "scores" / "trial.json")
    scores = evaluate_run(
        samples,
        num=num,
        cfg_scale=cfg_scale,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        bound_images=bound_images,
        bound_terms=bound_terms,
        device=device,
        keep=keep,
    )
    path = out or scores_path(folder, scores)
    try:
        write_json(path, scores)
    finally:  # a full disk should not cost the scores, nor a closed pipe the report
        print(format_scores(scores))
    print(path)
    return 0


OF_A_RUN = ("num", "cfg_scale", "steps", "sampler", "seed", "bound_images", "bound_terms", "keep")
OF_IMAGES = ("extractor", "weights", "resize", "image_size", "split", "save_reference")


def _refuse_others(given: dict[str, Any]) -> None:
    """ValueError for options of `evaluate` that do not belong to what is scored."""
    known, a_run = inspect.signature(evaluate).parameters, given["reference"] is None
    for name in OF_IMAGES if a_run else OF_A_RUN:
        if given[name] != known[name].default:
            flag, what = f"--{name.replace('_', '-')}", "a run is" if a_run else "images are"
            raise ValueError(f"{flag} has no meaning where {what} scored: leave it out")


def _evaluate_images(
    samples: Path, reference: str, out: Path, device: str | None, **options
) -> int:
    from dis_ssm.metrics import evaluate_samples, format_report
    from dis_ssm.runs import is_run

    if is_run(samples):
        raise ValueError(
            f"{samples} is a run: draw a set (dis-ssm sample {samples} --num 50000 --out set.npz) "
            f"and score that, or leave out {reference}"
        )
    inputs = {samples.resolve(), Path(reference).expanduser().resolve()}
    for path in (out, options["save_reference"]):
        if path and path.resolve() in inputs:
            raise ValueError(f"{path} would overwrite what is scored: give another name")
    check_writable(out)
    with join_world(device) as world:
        report = evaluate_samples(samples, reference, world=world, progress=world.main, **options)
        if world.main:
            try:
                write_json(out, report)
            finally:
                print(format_report(report))
            print(out)
    return 0


def encode(
    source: Positional[str | None] = None,
    cache: Positional[Path | None] = None,
    *,
    vae: str = DEFAULT_VAE,
    image_size: int | None = None,
    split: Literal["train", "heldout"] = "train",
    batch_size: int = 64,
    shard_size: int = 10_000,
    precision: Literal["float32", "bf16"] = "float32",
    max_corrupt: int = 10,
    workers: int | None = None,
    device: str | None = None,
    check: Path | None = None,
) -> int:
    """Encode images with a VAE, once, into a cache that training reads; under torchrun, by all.

    The same command again goes on where it was stopped and mends shards that are damaged.

    Args:
        source: images: see docs/data.md.
        cache: the folder to write; then train with --data.source CACHE.
        vae: folder or hub id of a diffusers AutoencoderKL.
        image_size: side in pixels of the crop; folders of images need it.
        batch_size: images encoded at a time.
        shard_size: images in a file; a process that waits for others waits for one file.
        precision: bf16 is autocast; either is stored in float16.
        max_corrupt: unreadable images that may be left out.
        workers: threads that decode images.
        check: instead, read this cache and name the shards that are damaged.
    """
    from dis_ssm.distributed import join_world
    from dis_ssm.encoding import encode as run_encoding
    from dis_ssm.latents import AGAIN, check_cache

    if (source is None or cache is None) if check is None else (source or cache):
        raise ValueError("give SOURCE and CACHE to encode, or --check CACHE alone")
    if check is not None:
        wrong = check_cache(check)
        for problem in wrong.values():
            print(f"dis-ssm: error: {problem}", file=sys.stderr)
        if wrong:
            return _fail(f"{len(wrong)} of the files of {check} are not sound: {AGAIN}")
        print(f"{check}: all shards are intact")
        return 0
    with join_world(device) as world:
        manifest = run_encoding(
            source,
            cache,
            vae=vae,
            image_size=image_size,
            split=split,
            batch_size=batch_size,
            shard_size=shard_size,
            precision=precision,
            max_corrupt=max_corrupt,
            workers=workers,
            world=world,
        )
        if world.main:
            left_out = sum(len(record["corrupt"]) for record in manifest["shards"])
            note = f" ({left_out} corrupt ones left out)" if left_out else ""
            print(f"encoded: {cache}, {manifest['images']:,} images{note}")
    return 0


def info() -> int:
    """Say which kernels run here, and why; fails if DIS_SSM_BACKEND forces one that cannot."""
    from dis_ssm.ops.backend import backend_report, forced_problem

    print("\n".join(backend_report()))
    return 1 if forced_problem() else 0


def convert(
    source: Positional[Path],
    run: Positional[Path],
    *,
    input_size: tuple[int, int] | None = None,
) -> int:
    """Turn a released checkpoint into a run that `dis-ssm sample` draws from.

    Released models draw latents: sample them with --vae, or get .npz arrays.

    Args:
        source: the released file, a pickle or safetensors; pickles are opened safely.
        run: the folder to write.
        input_size: height and width; a square is assumed.
    """
    from dis_ssm.convert import convert_file

    convert_file(source, run, input_size, report=lambda note: print(f"{source}: {note}"))
    print(run)
    return 0


def flops(
    *,
    size: tuple[int, int] = (32, 32),
    channels: int = 4,
    classes: int = 1000,
    models: tuple[str, ...] = (),
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """What DiS costs: the paper's Table 1, and multiply-adds by part, beside DiT's and U-ViT's.

    Args:
        size: height and width of the images or latents.
        channels: of the images or latents.
        classes: 0 for none.
        models: such as DiS-H/2 DiT-XL/2 U-ViT-H/2; all if none is given.
        json: write the counts to this file.
        plot: draw cost against the number of tokens to this file (.png, .pdf, .svg).
    """
    from dis_ssm.complexity import draw, format_report, report

    for path in filter(None, (json, plot)):
        check_writable(path)
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'dis-ssm[plot]'")
    found = report(size, channels, classes, models)
    if json:
        write_json(json, found)
    if plot:
        draw(found, plot)
    print(format_report(found))
    for path in filter(None, (json, plot)):
        print(path)
    return 0


def _fail(message: str) -> int:
    print("dis-ssm: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "can't allocate memory" in str(error)  # what PyTorch says on a CPU


def _print_warning(message, *where, **options) -> None:
    print("dis-ssm: warning:", " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
