"""Encoding images into a cache of latents, once, by any number of processes.

`dis_ssm.data.latents` reads the cache. Work is dealt by the shard. A shard is written under another
name, flushed and renamed, and says in its own header which cache and which images it is of, so that
a killed process loses no more than the shard that it was at.
"""

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.images import to_model_space
from dis_ssm.data.latents import (
    FLIPS,
    FORMAT,
    MANIFEST,
    CacheError,
    manifest_sha256,
    open_cache,
    read_manifest,
    shard_spans,
    verify_shard,
)
from dis_ssm.data.open import open_dataset
from dis_ssm.encoders.vae import DEFAULT_VAE, load_vae, vae_hash
from dis_ssm.system.distributed import World
from dis_ssm.system.files import DRAFT, drafted, write_json
from dis_ssm.system.locks import is_empty, locked
from dis_ssm.system.machine import pick_device, versions
from dis_ssm.system.prefetch import prefetch
from dis_ssm.system.progress import bar_interval
from dis_ssm.system.reading import sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


NOTE = "dis_ssm"  # the key of a shard's header
PRECISIONS = ("float32", "bf16")
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
PROGRESS = ("versions", "complete", "images", "shards", "sha256")  # of a manifest: not what is made
LONGEST_VALUE = 100  # shown whole in a message


def encode(
    source: str | Path,
    out: str | Path,
    *,
    vae: str | Path = DEFAULT_VAE,
    image_size: int | None = None,
    split: str = "train",
    batch_size: int = 64,
    shard_size: int = 10_000,
    precision: str = "float32",
    max_corrupt: int = 10,
    workers: int | None = None,
    world: World | None = None,
    background: str = "white",
    relabel: bool = False,
) -> dict[str, Any]:
    """Encode the images of `source` (see `open_dataset`) into the cache `out`.

    Every rank of `world` calls it and encodes shards of its own. The same call again goes on where
    a killed one stopped: shards that are there and intact are kept, others encoded (again). The
    bits of a shard depend on the arguments and the machine, not on the world or on interruptions.

    Args:
        source: the images; split, image_size, max_corrupt, workers, background and relabel are
            those of `open_dataset`.
        out: the folder of the cache.
        vae: folder or hub id of the encoder.
        batch_size: images encoded together.
        shard_size: images of the source that one shard is for.
        precision: "float32", or "bf16" for autocast; the moments are taken in float32 and stored in
            float16.
        world: the processes that encode together; None: this one alone.

    Returns:
        The manifest.

    Raises:
        ValueError: settings cannot be, or differ from those the folder was begun with; more than
            `max_corrupt` images cannot be read; or moments are beyond float16.
        OSError: the disk is full. Finished shards stay, whatever is raised.
    """
    world, out = world or World(pick_device(None)), Path(out)
    for name, value in {"batch_size": batch_size, "shard_size": shard_size}.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    with world.together():
        dataset = open_dataset(source, split, image_size, max_corrupt, workers, background, relabel)
        model = load_vae(vae, world.device)
        settings = _settings(source, split, dataset, vae, model, precision, shard_size)
    with contextlib.ExitStack() as held:
        manifest = None
        with world.together():
            if world.main:
                held.enter_context(_folder_of_our_own(out))
                manifest = _begin(out, settings)
        cache = _Shards(out, world.gather(manifest)[0])
        todo = _look(cache, dataset, max_corrupt, world)
        if world.main:
            print(
                f"{out}: {len(dataset):,} images of {source}, {len(todo):,} of "
                f"{len(cache.spans):,} shards ({cache.bytes(todo) / 1e9:.2f} GB) to encode on "
                f"{world.device.type} x {world.size}",
                flush=True,
            )
        with _progress(cache, todo, world) as bar:
            for start in range(0, len(todo), world.size):
                dealt, done = todo[start : start + world.size], {}
                with world.together():
                    for name in dealt[world.rank : world.rank + 1]:
                        parts = _encode(dataset, cache.spans[name], model, precision, batch_size)
                        done[name] = cache.write(
                            name, parts, lambda n, d=dealt: bar.update(n * len(d))
                        )
                for records in world.gather(done):
                    cache.records |= records
                bar.update(cache.images(todo[: start + world.size]) - bar.n)
                with world.together():
                    cache.refuse_corrupt(max_corrupt)
                    if world.main:
                        cache.save()
        with world.together():
            open_cache(out)  # every rank must see every shard
    return cache.manifest


def _look(cache: "_Shards", dataset: ImageDataset, max_corrupt: int, world: World) -> list[str]:
    """Note the shards that are there and intact, each rank its part; the names of the others."""
    with world.together():
        mine = cache.look(list(cache.spans)[world.rank :: world.size], dataset)
    for records, damage in world.gather(mine):
        cache.records |= records
        if world.main:
            for line in damage:
                print(f"{line}; it is encoded again", flush=True)
    with world.together():
        cache.refuse_corrupt(max_corrupt)
        if world.main:
            cache.save()
    return [name for name in cache.spans if name not in cache.records]


class _Shards:
    """The shards of a cache that is being made; `records` are of those that are intact."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest, self.spans = folder, manifest, shard_spans(manifest)
        self.records: dict[str, dict[str, Any]] = {}

    def images(self, names: list[str]) -> int:
        return sum(len(self.spans[name]) for name in names)

    def bytes(self, names: list[str]) -> int:
        moments = 2 * FLIPS * math.prod(self.manifest["latent_shape"]) * torch.float16.itemsize
        return self.images(names) * (moments + torch.int64.itemsize)

    def look(
        self, names: list[str], dataset: ImageDataset
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Records of the shards `names` that are intact, and what is wrong with others."""
        known = {record["name"]: record for record in self.manifest["shards"]}
        records, damage = {}, []
        for name in names:
            if not (self.folder / name).is_file():
                continue
            try:
                # without a record, the process died between writing the shard and noting it
                record = known.get(name) or self._record(name)
                verify_shard(self.folder, self.manifest, record)
                left_out = [int(index) for index in record["corrupt"]]
                if left_out and len(dataset.read(left_out)[1]):
                    raise CacheError(f"{self.folder / name} lacks images that can be read by now")
                records[name] = record
            except CacheError as error:
                damage.append(str(error))
        return records, damage

    def write(self, name: str, parts: Iterator, tick: Callable[[int], Any]) -> dict[str, Any]:
        """Write a shard from the batches that `_encode` gives; its record."""
        span, filled, corrupt = self.spans[name], 0, {}
        shape = (len(span), FLIPS, *self.manifest["latent_shape"])
        mean, std = (torch.empty(shape, dtype=torch.float16) for _ in range(2))
        label = torch.empty(len(span), dtype=torch.int64)
        for moments, labels, left_out, read in parts:
            if len(labels):
                part = slice(filled, filled + len(labels))
                mean[part], std[part], label[part] = *moments, labels
                filled += len(labels)
            corrupt |= left_out
            tick(read)
        tensors = {"mean": mean[:filled], "std": std[:filled], "label": label[:filled]}
        note = {"cache": _digest(self.manifest), "shard": name, "corrupt": corrupt}
        path = self.folder / name
        with drafted(path) as draft:
            try:
                save_file(tensors, draft, {NOTE: json.dumps(note, sort_keys=True)})
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        return self._record(name)

    def _record(self, name: str) -> dict[str, Any]:
        path, note = self.folder / name, _note(self.folder / name)
        try:
            with safe_open(path, "pt") as file:
                images = file.get_slice("label").get_shape()[0]
        except SafetensorError as error:
            raise CacheError(f"{path} is damaged: {error}") from error
        if (note.get("cache"), note.get("shard")) != (_digest(self.manifest), name):
            raise CacheError(f"{path} belongs to another cache")
        record = {"name": name, "images": images, "bytes": path.stat().st_size}
        return record | {"sha256": sha256(path), "corrupt": note["corrupt"]}

    def save(self) -> None:
        """Write the manifest with the shards so far."""
        records = [self.records[name] for name in sorted(self.records)]
        self.manifest["shards"] = records
        self.manifest["images"] = sum(record["images"] for record in records)
        self.manifest["complete"] = len(records) == len(self.spans)
        self.manifest["sha256"] = manifest_sha256(self.manifest)
        write_json(self.folder / MANIFEST, self.manifest)

    def refuse_corrupt(self, limit: int) -> None:
        corrupt = [line for r in self.records.values() for line in r["corrupt"].values()]
        if len(corrupt) > limit:
            raise ValueError(
                f"{len(corrupt)} images cannot be read and max_corrupt is {limit}: "
                f"{'; '.join(corrupt[:5])}. Replace them, or allow more, and encode again"
            )


def _settings(source, split, dataset, vae, model, precision, shard_size) -> dict[str, Any]:
    """What the bits of a cache depend on, besides the machine."""
    config, size = model.config, (dataset.height, dataset.width)
    if dataset.channels != config.in_channels:
        raise ValueError(
            f"{source} has {dataset.channels} channels but VAE {vae} takes {config.in_channels}"
        )
    factor = 2 ** (len(config.block_out_channels) - 1)
    if any(side % factor for side in size):
        raise ValueError(
            f"{source} is {size[0]}x{size[1]} and VAE {vae} shrinks {factor} times: choose an "
            f"image_size that {factor} divides"
        )
    labels = dataset.labels.numpy().tobytes()
    return {
        "source": _absolute(source),
        "split": split,
        "source_images": len(dataset),
        "image_size": size[0] if size[0] == size[1] else list(size),
        "crop": dataset.crop,
        "background": dataset.background,
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "class_names": list(dataset.class_names),
        "vae": {"id": _absolute(vae), **vae_hash(model)} | {n: _plain(config[n]) for n in SCALE},
        "latent_shape": [config.latent_channels, *(side // factor for side in size)],
        "precision": precision,
        "shard_size": shard_size,
    }


@contextlib.contextmanager
def _folder_of_our_own(folder: Path) -> Iterator[None]:
    """Make `folder`, hold its lock, and remove what a killed process left half-written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the cache")
    if not (is_empty(folder) or (folder / MANIFEST).is_file()):
        raise ValueError(f"{folder} is not empty and is not a cache: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for draft in folder.glob(DRAFT + "*"):
            draft.unlink()
        yield


def _begin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest that is there, if it is of the same settings, or a new one."""
    new = {"format": FORMAT, **settings, "versions": versions()}
    new |= {"complete": False, "images": 0, "shards": []}
    if not (folder / MANIFEST).is_file():
        return new
    try:
        old = read_manifest(folder)
    except CacheError as error:
        _refuse_strangers(folder, new, error)
        print(f"{error}: it is made anew from the shards", flush=True)
        return new
    made = {"background": old.get("crop") and "drop"} | old  # as it was before there was a choice
    before, now = _identity(made), _identity(new)
    if changed := [f"{k}: {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]:
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(changed)}): give those again to "
            f"continue it, or another folder"
        )
    if old["versions"] != new["versions"]:
        was = f"{old['versions']} -> {new['versions']}"
        warnings.warn(f"{folder} is continued with other versions: {was}", stacklevel=2)
    return old


def _refuse_strangers(folder: Path, manifest: dict[str, Any], damage: CacheError) -> None:
    """ValueError unless every shard that says of which cache it is, is of this one."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            owner = _note(path).get("cache")
        except CacheError:
            continue  # it is encoded again
        if owner != _digest(manifest):
            raise ValueError(
                f"{damage}, and {path.name} was encoded with other settings than those given now: "
                f"give the settings of the first time, or another folder"
            ) from damage


def _note(path: Path) -> dict[str, Any]:
    """What a shard says in its header: its cache, its name and the corrupt images left out."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get(NOTE, "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}") from error
    if not isinstance(note, dict):
        raise CacheError(f"{path} is damaged: its header has no object under {NOTE!r}")
    return note


def _encode(
    dataset: ImageDataset, span: range, vae: "AutoencoderKL", precision: str, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, dict[str, str], int]]:
    """Batch after batch of `span`: moments (2, b, 2, C, H, W), labels (b,), the corrupt images left
    out, how many were read. The next batch is read while this one is encoded."""
    batches = [span[i : i + batch_size] for i in range(0, len(span), batch_size)]
    with contextlib.closing(prefetch(dataset.read, map(list, batches))) as found:
        for batch, (images, labels, kept) in zip(batches, found, strict=True):
            left_out = sorted(set(batch) - set(torch.as_tensor(kept).tolist()))
            corrupt = {str(i): dataset.corrupt[i] for i in left_out}
            if not len(labels):
                yield torch.empty(0), labels, corrupt, len(batch)
                continue
            moments = posterior_moments(vae, images, precision)
            wrong = ~moments.isfinite().flatten(2).all(2).all(0)
            if wrong.any():
                first = int(torch.as_tensor(kept)[wrong][0])
                raise ValueError(
                    f"the moments of image {first} of {dataset.name} are not finite in float16: "
                    f"take precision float32, or another VAE"
                )
            yield moments, labels, corrupt, len(batch)


@torch.no_grad()
def posterior_moments(vae: "AutoencoderKL", images: Tensor, precision: str = "float32") -> Tensor:
    """Mean and std of q(z | x) for uint8 images (n, C, H, W) and their mirror images.

    float16 (2 = mean, std; n; 2 = image, mirror image; C, H, W) on the CPU, by `vae.encode` of all
    the images and then of all the mirror images.
    """
    x, sides = to_model_space(images.to(vae.device)), []
    for view in (x, x.flip(-1)):
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=precision == "bf16"):
            posterior = vae.encode(view).latent_dist
        posterior = type(posterior)(posterior.parameters.float())
        sides.append(torch.stack([posterior.mean, posterior.std]))
    return torch.stack(sides, 2).half().cpu()


def _identity(manifest: dict[str, Any]) -> dict[str, str]:
    """What makes two caches the same, flat and short."""
    flat = {key: value for key, value in manifest.items() if key not in PROGRESS}
    flat |= {f"vae.{key}": value for key, value in flat.pop("vae").items() if key != "id"}
    texts = {key: json.dumps(value) for key, value in flat.items()}
    return {
        k: t if len(t) <= LONGEST_VALUE else f"{t[:LONGEST_VALUE]}... ({_sha(t)[:12]})"
        for k, t in texts.items()
    }


def _digest(manifest: dict[str, Any]) -> str:
    return _sha(json.dumps(_identity(manifest), sort_keys=True))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _absolute(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _progress(shards: _Shards, todo: list[str], world: World) -> tqdm:
    return tqdm(
        total=shards.images(todo),
        unit="image",
        disable=not world.main,
        mininterval=bar_interval(),
    )
