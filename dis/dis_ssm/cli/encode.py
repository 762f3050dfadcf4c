"""dis-ssm encode"""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dis_ssm.encoders.vae import DEFAULT_VAE
from dis_ssm.system.distributed import join_world


def encode(
    source: Positional[Annotated[str, arg(metavar="SOURCE")]],
    cache: Positional[Annotated[Path, arg(metavar="CACHE")]],
    *,
    vae: str = DEFAULT_VAE,
    image_size: int | None = None,
    split: Literal["train", "heldout"] = "train",
    batch_size: int = 64,
    shard_size: int = 10_000,
    precision: Literal["float32", "bf16"] = "float32",
    max_corrupt: int = 10,
    workers: int | None = None,
    background: Literal["white", "black", "drop"] = "white",
    relabel: bool = False,
    device: str | None = None,
) -> int:
    """Encode images with a VAE, once, into a cache that training reads; under torchrun, by all.

    The same command again goes on where it was stopped and mends the shards that `dis-ssm check`
    names.

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
        background: what images with alpha are composed on; drop ignores it, as ADM does.
        relabel: number the labels that occur 0, 1, ..., however large they are.
    """
    from dis_ssm.encoders.encoding import encode as run_encoding

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
            background=background,
            relabel=relabel,
            world=world,
        )
        if world.main:
            left_out = sum(len(record["corrupt"]) for record in manifest["shards"])
            note = f" ({left_out} corrupt ones left out)" if left_out else ""
            print(f"encoded: {cache}, {manifest['images']:,} images{note}")
    return 0
