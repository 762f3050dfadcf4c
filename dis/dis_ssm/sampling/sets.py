"""Samples by the thousand: one set whatever the number of processes, resumed after any kill.

    with join_world() as world:
        pipeline = open_pipeline("runs/dis", world=world)
        settings = sample_settings(pipeline.config, num=50_000, cfg_scale=1.5)
        draw_set(pipeline, plan_samples(pipeline, settings), Path("set.npz"), world)

Image i has noise and label of its own and is always drawn in the same batch, so the set is the
same, bit for bit on one kind of device, however many processes share the batches. NAME.npz holds
them as ADM's evaluator reads them: arr_0 uint8 (n, H, W, C), arr_1 int64 labels; NAME.json says how
they were made. Until all are there, finished batches lie in the folder NAME.parts.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dis_ssm.condition import take
from dis_ssm.config import SampleConfig
from dis_ssm.sampling.draw import samples_name
from dis_ssm.sampling.grids import label_columns, save_images
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.storage.checkpoint import identity, read_state
from dis_ssm.system.distributed import ALONE, World
from dis_ssm.system.files import check_writable, drafted, write_json
from dis_ssm.system.locks import locked
from dis_ssm.system.machine import versions
from dis_ssm.system.reading import FileError, read_json, sha256
from dis_ssm.system.seeds import derive_seed

PLAN = "plan.json"


@dataclass(frozen=True)
class SamplePlan:
    """Everything that a set or grid of samples depends on; two of one plan are the same.

    Args:
        settings: of the sampler, `num` images from `seed` in batches of `batch_size`.
        checkpoint_step: training steps of the checkpoint.
        checkpoint: its `identity`.
        run: its run, as it was named.
        weights: "ema" or "model".
        labels: how a set's labels are drawn, see `draw_labels`.
        vae: what was asked to decode, see `find_decoder`.
        classes: which are drawn; none are all that the model knows.
        precision: "float32" or "bf16".
        png: whether each image of a set is written to a picture of its own, too.
        device: its type.
        versions: of what computes.
    """

    settings: SampleConfig
    checkpoint_step: int
    checkpoint: str
    run: str
    weights: str = "ema"
    labels: Literal["balanced", "random"] = "balanced"
    vae: str | None = None
    classes: tuple[int, ...] = ()
    precision: str = "float32"
    png: bool = False
    device: str = "cpu"
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    @property
    def name(self) -> str:
        """What tells these samples from others of the run, as the name of their file."""
        name = samples_name(self.checkpoint_step, self.settings, self.weights, self.classes)
        return name + "-random" * (self.labels == "random") + "-bf16" * (self.precision == "bf16")

    def record(self) -> dict[str, Any]:
        """As NAME.json keeps it, flat, as JSON gives it back. Sets of 0.1.0 have the same keys."""
        values = dataclasses.asdict(self)
        return json.loads(json.dumps(values.pop("settings") | values))


def plan_samples(
    pipeline: Pipeline,
    settings: SampleConfig,
    *,
    labels: Literal["balanced", "random"] = "balanced",
    classes: Sequence[int] = (),
    png: bool = False,
) -> SamplePlan:
    """The plan of samples that `pipeline` is to draw.

    Args:
        settings: see `config.sample_settings`, which checks them against the run.
        labels: see `draw_labels`.
        classes: which of the model's; none are all.
        png: write each image of a set to a picture of its own, too.

    Raises:
        ValueError: the pipeline was not opened from a checkpoint, the model has not these classes,
            or pictures are asked of latents that no VAE decodes.
    """
    origin = pipeline.origin
    if origin is None:
        raise ValueError("a set is of a checkpoint: use a pipeline of open_pipeline")
    if png and not pipeline.visible:
        raise ValueError(f"{origin.run} draws latents, and pictures of them need a VAE: give vae")
    for label in classes:
        if not 0 <= label < pipeline.num_classes:
            raise ValueError(
                f"class {label} is not one of the {pipeline.num_classes} classes of {origin.run}"
            )
    return SamplePlan(
        settings,
        read_state(origin.checkpoint)["step"],
        identity(origin.checkpoint),
        str(origin.run),
        origin.weights,
        labels,
        origin.vae,
        tuple(classes),
        pipeline.precision,
        png,
        pipeline.device.type,
    )


class Draws(Protocol):
    """What draws the samples of a set; a `Pipeline` does."""

    @property
    def num_classes(self) -> int:
        """Classes that it knows; 0 without labels."""

    def draw(self, indices: range, y: Tensor | None, settings: SampleConfig) -> Tensor:
        """Samples `indices`, (n, C, H, W), uint8 or float32, on the CPU."""


def draw_labels(num: int, classes: Sequence[int], how: str, seed: int) -> Tensor | None:
    """int64 (num,): "balanced" in turn, or "random", uniform and fixed by `seed` (as ADM and DiT
    do); None without classes."""
    if not len(classes):
        return None
    if how == "balanced":
        return torch.tensor(list(classes))[torch.arange(num) % len(classes)]
    generator = torch.Generator().manual_seed(derive_seed("labels", seed))
    return torch.tensor(list(classes))[torch.randint(len(classes), (num,), generator=generator)]


def draw_set(pipeline: Draws, plan: SamplePlan, out: Path, world: World = ALONE) -> None:
    """Draw samples 0 to num - 1 of `plan`, in batches of its batch size, and write `out` (.npz).

    Called by all ranks; each takes batches in turn. A whole set of the same plan is left as it is,
    and one that was begun is finished. With `plan.png` each image is written to the folder NAME,
    too.

    Raises:
        ValueError: parts of another plan are there, or another process draws the same set.
        OSError: nothing can be written there.
    """
    settings = plan.settings
    num, size = settings.num, min(settings.batch_size, settings.num)
    plan = dataclasses.replace(plan, settings=dataclasses.replace(settings, batch_size=size))
    record, wanted = out.with_suffix(".json"), plan.record()
    pictures = out.with_suffix("") if plan.png else None
    with world.together():
        check_writable(record)
        same = world.main and _is_whole(out, record, wanted)
    if world.gather(same and _pictured(pictures, range(num)))[0]:
        return
    classes = plan.classes or range(pipeline.num_classes)
    labels = draw_labels(num, classes, plan.labels, settings.seed)
    batches = _Batches(
        out.with_suffix(".parts"),
        pictures,
        [range(i, min(i + size, num)) for i in range(0, num, size)],
    )
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.main:
                batches.parts.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(batches.parts))
                _begin(batches.parts, pictures, wanted)
        _draw_batches(pipeline, plan.settings, labels, batches, world)
        with world.together():
            if world.main:
                _assemble(out, batches, labels)
                _write_record(out, record, wanted)
                shutil.rmtree(batches.parts)


def draw_grid(pipeline: Pipeline, plan: SamplePlan, out: Path) -> None:
    """Draw the images of `plan`, a class a column, and write the grid `out` (.png).

    NAME.png.json records the plan; a grid of the same plan is left as it is.

    Raises:
        ValueError: the plan is of a set (random labels, pictures of each image), or the results
            cannot be seen.
        OSError: nothing can be written there.
    """
    if plan.labels == "random" or plan.png:
        raise ValueError(f"{out} is a grid, with a class a column and no pictures beside it")
    if not pipeline.visible:
        raise ValueError(f"{out} cannot show latents: open the pipeline with a VAE")
    record, wanted = out.with_name(f"{out.name}.json"), plan.record()
    check_writable(record)
    if _is_whole(out, record, wanted):
        return
    settings, classes = plan.settings, plan.classes or range(pipeline.num_classes)
    labels, columns = label_columns(settings.num, list(classes))
    images = pipeline.draw(range(settings.num), labels, settings, progress=True)
    save_images(images, labels, out, columns)
    _write_record(out, record, wanted)


# -- records -------------------------------------------------------------------------------------


def _write_record(out: Path, record: Path, wanted: dict[str, Any]) -> None:
    write_json(record, wanted | {"bytes": out.stat().st_size, "sha256": sha256(out)})


def _is_whole(out: Path, record: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` is what the plan draws, to the bit; a warning when it was altered since."""
    found = _read_record(record)
    digest = found.pop("sha256", None)  # 0.1.0 noted none
    size = out.stat().st_size if out.exists() else None
    if found != wanted | {"bytes": size}:
        return False
    if digest in (None, sha256(out)):
        return True
    warnings.warn(f"{out} was altered since it was drawn: it is drawn again", stacklevel=3)
    return False


def _begin(parts: Path, pictures: Path | None, wanted: dict[str, Any]) -> None:
    """A new set, which clears the pictures of another one, or the one that was begun."""
    path = parts / PLAN
    if not any(parts.glob("part-*.npy")):
        for picture in pictures.glob("*.png") if pictures else ():
            if picture.stem.isdecimal():
                picture.unlink()
        write_json(path, wanted)
        return
    found = _read_record(path)
    changed = [
        f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise ValueError(
            f"{parts} holds samples drawn with other settings ({'; '.join(changed)}): give those "
            f"again to finish them, remove the folder, or give another --out"
        )


def _read_record(path: Path) -> dict[str, Any]:
    """What is known of a set; nothing if the file is missing or damaged."""
    try:
        found = read_json(path)
    except FileError:
        return {}
    return found if isinstance(found, dict) else {}


# -- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batches:
    """Which images are drawn together, and where they lie until the set is whole."""

    parts: Path
    pictures: Path | None
    indices: list[range]

    @property
    def num(self) -> int:
        return self.indices[-1].stop

    def missing(self) -> list[int]:
        """Those that are not yet drawn, or were damaged since."""
        return [
            k
            for k, indices in enumerate(self.indices)
            if not (_is_intact(_part(self.parts, k)) and _pictured(self.pictures, indices))
        ]


def _draw_batches(
    pipeline: Draws, settings: SampleConfig, labels: Tensor | None, batches: _Batches, world: World
) -> None:
    """Draw and keep the batches that are missing, a turn of one for each rank at a time."""
    missing: list[int] = []
    with world.together():
        if world.main:
            missing = batches.missing()
    missing = world.gather(missing)[0]
    done = batches.num - sum(len(batches.indices[k]) for k in missing)
    bar = tqdm(total=batches.num, initial=done, unit="image", disable=not world.main, mininterval=1)
    with bar:
        for start in range(0, len(missing), world.size):
            turn = missing[start : start + world.size]
            with world.together():
                if world.rank < len(turn):
                    indices = batches.indices[turn[world.rank]]
                    y = take(labels, slice(indices.start, indices.stop))
                    images = pipeline.draw(indices, y, settings)
                    if images.dtype == torch.uint8:
                        images = images.permute(0, 2, 3, 1)
                        _write_pictures(batches.pictures, indices, images)
                    _write_part(_part(batches.parts, turn[world.rank]), images)
            bar.update(sum(len(batches.indices[k]) for k in turn))


def _part(parts: Path, k: int) -> Path:
    return parts / f"part-{k:06d}.npy"


def _write_part(part: Path, images: Tensor) -> None:
    """The array as .npy, and the SHA-256 of that behind it."""
    with drafted(part) as draft, draft.open("wb") as file:
        content = io.BytesIO()
        np.save(content, images.contiguous().numpy())
        file.write(content.getbuffer())
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())


def _is_intact(part: Path) -> bool:
    """Whether it ends with the SHA-256 of the array before it; a warning when it was altered."""
    if not part.exists():
        return False
    content = memoryview(part.read_bytes())
    size = hashlib.sha256().digest_size
    if hashlib.sha256(content[:-size]).digest() == content[-size:]:
        return True
    warnings.warn(f"{part} is damaged: its samples are drawn again", stacklevel=3)
    return False


def _picture(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def _pictured(folder: Path | None, indices: range) -> bool:
    return folder is None or all(_picture(folder, i).exists() for i in indices)


def _write_pictures(folder: Path | None, indices: range, images: Tensor) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in zip(indices, images.numpy(), strict=True):
        with drafted(_picture(folder, i)) as draft:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(draft)


def _assemble(out: Path, batches: _Batches, labels: Tensor | None) -> None:
    """One .npz of all parts, a part in memory at a time."""
    with drafted(out) as draft, zipfile.ZipFile(draft, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for k in range(len(batches.indices)):
                part = np.load(_part(batches.parts, k), allow_pickle=False)
                if k == 0:
                    shape = (batches.num, *part.shape[1:])
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
