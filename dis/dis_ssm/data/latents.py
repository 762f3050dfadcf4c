"""A cache of VAE latents, read at random. (`dis_ssm.encoders.encoding` makes it.)

CACHE/shard-%05d.safetensors holds, for `shard_size` consecutive images of the source less the
corrupt ones, `mean` and `std` (n, 2, C, H, W) float16 of the posterior of the image [:, 0] and of
its mirror image [:, 1], and `label` (n,) int64. CACHE/manifest.json says what they are of:
source, VAE and its hashes, scale, precision, counts, size and SHA-256 of every shard.

Letters: n images, C latent channels, H, W latent height and width.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.sources.base import NO_LABEL
from dis_ssm.system.files import write_json
from dis_ssm.system.progress import bar_interval
from dis_ssm.system.reading import FileError, read_json, sha256

FORMAT = 1
MANIFEST, VERIFIED = "manifest.json", "verified.json"
KEYS = ("source_images", "class_names", "vae", "latent_shape", "shard_size", "shards", "images")
KEYS += ("complete",)
UNHASHED = {"format", "source", "split", "image_size", "crop", "labels_sha256", "precision"}
UNHASHED |= {"versions", *KEYS}  # all that a manifest of 0.1.0 holds
RECORD = ("name", "images", "bytes", "sha256", "corrupt")  # of a shard
MOST_SHARDS = 10**6
FLIPS = 2  # the image, its mirror image
CHUNK = 256  # images looked at together
AGAIN = "rerun the same `dis-ssm encode` to repair it"


class CacheError(ValueError):
    """A cache or a shard of it is missing, incomplete, cut short or altered."""


class LatentDataset(ImageDataset):
    """Moments of a cache, memory-mapped: `channels`, `height`, `width` are those of the latents.

    Opens with `open_cache`. Copies of it in other processes map the files again.

    Raises:
        CacheError: a shard is missing, cut short or of another shape.
    """

    latents = True

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        shards = [_map_shard(folder, manifest, record) for record in manifest["shards"]]
        self._maps = [(shard["mean"].numpy(), shard["std"].numpy()) for shard in shards]
        self._verified = Verified(folder)
        self._ends = torch.tensor([len(shard["label"]) for shard in shards]).cumsum(0)
        self.shift, self.scale = latent_scale(manifest["vae"])
        labels = torch.cat([shard["label"] for shard in shards])
        names = manifest["class_names"]
        super().__init__(str(folder), manifest["latent_shape"], labels, names)

    def __reduce__(self):
        return open_cache, (self.folder,)

    def stored(self, indices, flips: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of images `indices`, and their labels.

        Args:
            indices: n integers.
            flips: bool (n,), for which of them to take the moments of the mirror image.

        Returns:
            float16 (n, 2, C, H, W), mean and standard deviation, and int64 (n,).

        Raises:
            IndexError: there is no such image.
            CacheError: a shard that is used for the first time was altered.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.name} has latents 0 to {len(self) - 1}")
        shards = torch.searchsorted(self._ends, indices, right=True)
        for k in shards.unique().tolist():
            self._verified.require(self.manifest["shards"][k])
        starts = torch.cat([self._ends.new_zeros(1), self._ends])[shards]
        places = zip(
            shards.tolist(), (indices - starts).tolist(), flips.int().tolist(), strict=True
        )
        found = np.empty((len(indices), 2, self.channels, self.height, self.width), np.float16)
        for row, (k, i, side) in zip(found, places, strict=True):
            mean, std = self._maps[k]
            row[0], row[1] = mean[i, side], std[i, side]
        return torch.from_numpy(found), self.labels[indices]

    def to_model_space(self, data: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Latents drawn from the moments: `(mean + std * noise - shift) * scale`.

        For Stable Diffusion's VAEs shift is 0 and scale the scaling_factor (Rombach et al. 2022,
        appendix G).

        Args:
            data: moments (n, 2, C, H, W), as `stored` gives them.
            draw: gives the noise (n, C, H, W), standard normal.

        Returns:
            float32 (n, C, H, W), on the device of the noise.
        """
        noise = draw()
        mean, std = data.to(noise.device, torch.float32).unbind(1)
        shift, scale = self.shift.to(noise.device), self.scale.to(noise.device)
        return (mean + std * noise - shift) * scale

    def _images(self, indices: Tensor) -> Tensor:
        raise ValueError(f"{self.name} holds latents and no images: read it by `stored`")


class Verified:
    """Which shards of a cache are known to be what the manifest says.

    A shard's SHA-256 is taken at its first use. CACHE/verified.json keeps size and time of change
    of those that were right, so that the next run reads only what has changed since; where it
    cannot be written, the next run reads them all.
    """

    def __init__(self, folder: Path):
        self.folder, self._seen = folder, set()
        try:
            found = read_json(folder / VERIFIED)
        except FileError:
            found = None
        self._stamps = found if isinstance(found, dict) else {}

    def require(self, record: dict[str, Any]) -> None:
        """Check the shard of `record`, unless that has been done.

        Raises:
            CacheError: the shard was altered.
        """
        name, path = record["name"], self.folder / record["name"]
        if name in self._seen:
            return
        state = path.stat()
        stamp = [record["sha256"], state.st_size, state.st_mtime_ns]
        if self._stamps.get(name) != stamp:
            if sha256(path) != record["sha256"]:
                raise CacheError(f"{path} was altered: its SHA-256 is wrong; {AGAIN}")
            self._stamps[name] = stamp
            with contextlib.suppress(OSError):
                write_json(self.folder / VERIFIED, self._stamps)
        self._seen.add(name)


def is_cache(source: str | Path) -> bool:
    """Whether `source` is a folder with the manifest of a cache."""
    return (Path(source).expanduser() / MANIFEST).is_file()


def open_cache(folder: str | Path) -> LatentDataset:
    """A complete cache, for reading. Sizes and headers are checked; contents by `check_cache`.

    Raises:
        CacheError: the cache is incomplete, or a file, which it names, is missing, cut short or of
            another shape.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        shards = f"{len(manifest['shards'])} of {len(shard_spans(manifest))} shards"
        raise CacheError(
            f"{folder} is incomplete, {shards}: rerun the same `dis-ssm encode` to finish it"
        )
    try:
        return LatentDataset(folder, manifest)
    except CacheError as error:
        raise CacheError(f"{error}; {AGAIN}") from error


def check_cache(folder: str | Path) -> dict[str, str]:
    """Read a whole cache; {shard: what is wrong with it}, empty when all is well.

    Verifies sizes, SHA-256, shapes, labels, that all moments are finite and no std negative, and
    the counts. Encoding into the folder again repairs what is wrong.

    Raises:
        CacheError: there is no manifest, or it is damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    records, wrong = {record["name"]: record for record in manifest["shards"]}, {}
    spans = shard_spans(manifest)
    for name, span in tqdm(spans.items(), unit="shard", mininterval=bar_interval()):
        try:
            if name not in records:
                raise CacheError(f"{folder / name} is not encoded yet")
            verify_shard(folder, manifest, records[name])
            met = records[name]["images"] + len(records[name]["corrupt"])
            if met != len(span):
                raise CacheError(f"{folder / name} accounts for {met} images of {len(span)}")
        except CacheError as error:
            wrong[name] = str(error)
    counted = sum(record["images"] for record in manifest["shards"])
    if counted != manifest["images"]:
        wrong[MANIFEST] = f"{folder / MANIFEST} says {manifest['images']} images, not {counted}"
    return wrong


def shard_spans(manifest: dict[str, Any]) -> dict[str, range]:
    """The names of all shards, in order, and which images of the source each one is for."""
    n, size = manifest["source_images"], manifest["shard_size"]
    return {
        f"shard-{k:05d}.safetensors": range(k * size, min((k + 1) * size, n))
        for k in range(math.ceil(n / size))
    }


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says, but for this."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, verified by its own SHA-256 (which 0.1.0 did not write).

    Raises:
        CacheError: there is none, or it is damaged, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(f"{folder} is not a cache of latents: {MANIFEST} is missing")
    try:
        manifest = read_json(path)
        old = "sha256" not in manifest and not manifest.keys() - UNHASHED
        if not old and manifest["sha256"] != manifest_sha256(manifest):
            raise ValueError("its SHA-256 is wrong")
        found, _ = manifest["format"], [manifest[key] for key in KEYS]
        shards = [[record[key] for key in RECORD] for record in manifest["shards"]]
        counts = {name: manifest[name] for name in ("source_images", "images", "shard_size")}
        if wrong := [name for name, count in counts.items() if type(count) is not int]:
            raise ValueError(f"{wrong[0]} is no number: {counts[wrong[0]]!r}")
        if manifest["shard_size"] < 1 or manifest["source_images"] < len(shards):
            raise ValueError("its numbers cannot be")
        count = -(-counts["source_images"] // counts["shard_size"])
        if count > MOST_SHARDS or (manifest["complete"] and not shards):
            raise ValueError(f"it lists {len(shards)} shards and is for {count}")
        latent_scale(manifest["vae"])
        names = [record["name"] for record in manifest["shards"]]
        if wrong := [name for name in names if not _is_file_name(name)]:
            raise ValueError(f"shard {wrong[0]!r} is no file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged: {error!r}; {AGAIN}") from error
    if found != FORMAT:
        raise CacheError(f"{folder} has format {found}, this version reads {FORMAT}")
    return manifest


def latent_scale(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(shift, scale), float32 (1 or C, 1, 1): model space is (z - shift) * scale.

    shift_factor (0 if None) and scaling_factor of a VAE's config; where it has latents_mean and
    latents_std, one of each a channel, these and scaling_factor / latents_std.

    Raises:
        ValueError: they are no finite numbers.
    """
    try:
        shift, scale = _latent_scale(config)
    except (KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"the VAE's scaling_factor, shift_factor: {error!r}") from error
    if not (shift.isfinite().all() and scale.isfinite().all() and (scale != 0).all()):
        raise ValueError(f"the VAE's scaling_factor, shift_factor are {scale}, {shift}")
    return shift, scale


def _latent_scale(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    shift, scale = config["shift_factor"] or 0.0, config["scaling_factor"]
    if config["latents_mean"] is not None and config["latents_std"] is not None:
        shift, scale = config["latents_mean"], [scale / std for std in config["latents_std"]]
    return tuple(torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (shift, scale))


def _map_shard(folder: Path, manifest: dict[str, Any], record: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a shard, mapped from the file, after its size and header were checked."""
    path, images = folder / record["name"], record["images"]
    if not path.is_file():
        raise CacheError(f"{path} is missing")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise CacheError(f"{path} is damaged: {size} bytes instead of {record['bytes']}")
    moments = (torch.float16, (images, FLIPS, *manifest["latent_shape"]))
    wanted = {"mean": moments, "std": moments, "label": (torch.int64, (images,))}
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged: {error}") from error
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != wanted:
        raise CacheError(f"{path} holds {found} instead of {wanted}")
    return tensors


def verify_shard(folder: Path, manifest: dict[str, Any], record: dict[str, Any]) -> None:
    """Check that a shard is what `record` says, to the bit, and that its numbers are sound.

    Raises:
        CacheError: it is not.
    """
    path, tensors = folder / record["name"], _map_shard(folder, manifest, record)
    if sha256(path) != record["sha256"]:
        raise CacheError(f"{path} was altered: its SHA-256 is wrong")
    for name, least in {"mean": -math.inf, "std": 0}.items():
        if not all((p.isfinite() & (p >= least)).all() for p in tensors[name].split(CHUNK)):
            raise CacheError(f"{path} has a {name} that is not finite, or negative")
    classes = len(manifest["class_names"])
    allowed = range(classes) if classes else (NO_LABEL,)
    if wrong := set(tensors["label"].tolist()) - set(allowed):
        raise CacheError(f"{path} has label {min(wrong)} but there are {classes} classes")
