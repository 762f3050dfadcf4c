"""dis-ssm train | sample | evaluate | encode | info | convert"""

import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional

from dis_ssm.checkpoint import check_writable, load_model, locate, read_state, write_json
from dis_ssm.config import (
    Config,
    build_diffusion,
    load_config,
    named_configs,
    pick_device,
    sample_settings,
)
from dis_ssm.hf import DEFAULT_VAE
from dis_ssm.ops.native import BackendError

INTERRUPTED = 128 + signal.SIGINT
LONGEST_NAME = 200  # of a file; systems allow 255 bytes, drafts included


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. 2 and one line on stderr for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _print_warning
    try:
        commands = {
            "train": train_command(Config()),
            "sample": sample,
            "evaluate": evaluate,
            "encode": encode,
            "info": info,
            "convert": convert,
        }
        if arguments[:1] != ["train"]:
            return tyro.extras.subcommand_cli_from_dict(commands, prog="dis-ssm", args=arguments)
        rest, base = arguments[1:], Config()
        if rest and not rest[0].startswith("-"):
            base, rest = load_config(rest[0]), rest[1:]
        return tyro.cli(train_command(base), prog="dis-ssm train [CONFIG]", args=rest)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError, BackendError) as error:
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
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Draw images from a trained model, one class a column; image i depends on (seed, i, class).

    Latents are decoded by a VAE. Without one they are written as .npz: float32 (n, C, H, W).

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images; 100 if neither this nor per-class is given.
        per_class: how many images of each class.
        classes: which classes; all if none is given.
        cfg_scale: guidance, 1 for none; unset, like the next seven, as the run's config says.
        cfg_channels: guide the first so many channels only.
        cfg_interval: guide between these timesteps only.
        weights: averaged (ema) or as trained.
        vae: folder or hub id of the VAE that decodes; none for the latents themselves; unset, that
            of the run's config, or the one its latent cache names if that is a folder.
        out: a .png grid or .npz arrays; by default a grid in the run's samples folder, named
            after the step and these options.
    """
    from dis_ssm.images import (
        VISIBLE_CHANNELS,
        check_format,
        draw_samples,
        label_columns,
        samples_name,
        save_images,
        to_uint8,
    )
    from dis_ssm.latents import cached_vae, decode, is_cache, load_decoder

    if out:
        check_format(out)
    folder, checkpoint = locate(run)
    model, config = load_model(checkpoint, weights=weights, device=pick_device(device))
    source, channels = config.data.source, config.model.in_channels
    visible = channels in VISIBLE_CHANNELS and not is_cache(source)
    vae = vae or config.data.vae or cached_vae(source)
    decoder = None
    if vae and vae != "none":
        decoder = load_decoder(vae, source, channels, pick_device(device))
    elif out and out.suffix == ".png" and not visible:
        raise ValueError(
            f"{run} draws latents of {channels} channels, and showing them needs a VAE: give --vae "
            f"a folder or hub id, or --out a name that ends in .npz"
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
    labels, columns = label_columns(num, list(classes or known))
    if out is None:
        drawn = dataclasses.replace(settings, num=num)
        name = samples_name(read_state(checkpoint)["step"], drawn, weights, classes)
        out = folder / "samples" / (name + (".png" if visible or decoder else ".npz"))
        if len(out.name) > LONGEST_NAME:
            raise ValueError(f"{len(classes)} classes are too many for a file name: give --out")
    check_writable(out)
    shape = (config.model.in_channels, *config.model.input_size)
    samples = draw_samples(
        model, build_diffusion(config), shape, range(num), labels, settings, progress=True
    )
    if decoder:
        samples = decode(decoder, samples)
    elif visible:
        samples = to_uint8(samples)
    save_images(samples, labels, out, columns)
    print(out)
    return 0


def _count(num: int | None, per_class: int | None, classes: int, default: int = 100) -> int:
    if num is not None and per_class is not None:
        raise ValueError(f"--num {num} and --per-class {per_class}: give one of them")
    if per_class is not None and not classes:
        raise ValueError(f"--per-class {per_class}: this model has no classes, give --num")
    wanted = default if num is None and per_class is None else (num or (per_class or 0) * classes)
    if wanted < 1:
        raise ValueError(f"{wanted} images: ask for 1 or more")
    return wanted


def evaluate(
    run: Positional[Path],
    *,
    num: int = 600,
    cfg_scale: float | None = None,
    steps: int | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bound_images: int = 256,
    bound_terms: int = 32,
    device: str | None = None,
    keep: bool = False,
) -> int:
    """Score samples of a run against held-out real images; also written to RUN/scores.

    Args:
        run: a run folder, or one of its checkpoints.
        num: how many images to draw.
        cfg_scale: guidance, 1 for none; unset, like steps and sampler, as the run's config says.
        bound_images: held-out images whose bits per dimension are bounded.
        bound_terms: timesteps each of them is evaluated at, even; 0 skips the bound.
        keep: write the samples to RUN/samples as .npz.
    """
    from dis_ssm.evaluate import evaluate_run, format_scores, scores_path

    folder, _ = locate(run)
    check_writable(folder / "scores" / "trial.json")
    scores = evaluate_run(
        run,
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
    print(format_scores(scores))
    path = scores_path(folder, scores)
    write_json(path, scores)
    print(path)
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
    """Say which kernels run here, and why."""
    from dis_ssm.ops import backend_report

    print("\n".join(backend_report()))
    return 0


def convert(
    source: Positional[Path],
    run: Positional[Path],
    *,
    input_size: tuple[int, int] | None = None,
) -> int:
    """Turn a released checkpoint into a run that `dis-ssm sample` draws from.

    Released models draw latents, so their samples are .npz arrays for a VAE to decode.

    Args:
        source: the released file, a pickle or safetensors; pickles are opened safely.
        run: the folder to write.
        input_size: height and width; a square is assumed.
    """
    from dis_ssm.convert import convert_file

    convert_file(source, run, input_size=input_size)
    print(run)
    return 0


def _fail(message: str) -> int:
    print("dis-ssm: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "can't allocate memory" in str(error)  # what PyTorch says on a CPU


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print("dis-ssm: warning:", " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
