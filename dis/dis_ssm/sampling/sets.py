"""Samples by the thousand: one set whatever the number of processes, resumed after any kill.

Image i has noise and label of its own and is always drawn in the same batch, so the set is the
same, bit for bit on one kind of device, however many processes share the batches. NAME.npz holds
them as ADM's evaluator reads them: arr_0 uint8 (n, H, W, C), arr_1 int64 labels; NAME.json says how
they were made. Until all are there, finished batches lie in the folder NAME.parts.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dis_ssm.config import SampleConfig
from dis_ssm.sampling.grids import label_columns, save_images
from dis_ssm.sampling.pipeline import Artist
from dis_ssm.system.distributed import World
from dis_ssm.system.files import check_writable, drafted, write_json
from dis_ssm.system.locks import locked
from dis_ssm.system.reading import FileError, read_json, sha256
from dis_ssm.system.seeds import derive_seed

PLAN = "plan.json"


def draw_labels(num: int, classes: Sequence[int], how: str, seed: int) -> Tensor | None:
    """int64 (num,): "balanced" in turn, or "random", uniform and fixed by `seed` (as ADM and DiT
    do); None without classes."""
    if not len(classes):
        return None
    if how == "balanced":
        return torch.tensor(list(classes))[torch.arange(num) % len(classes)]
    generator = torch.Generator().manual_seed(derive_seed("labels", seed))
    return torch.tensor(list(classes))[torch.randint(len(classes), (num,), generator=generator)]


def generate(
    draw: Callable[[Sequence[int], Tensor | None], Tensor],
    labels: Tensor | None,
    num: int,
    batch_size: int,
    out: Path,
    plan: dict[str, Any],
    world: World,
    png: bool = False,
) -> None:
    """Draw samples 0 to num - 1 in batches of `batch_size` and write `out` (.npz).

    Called by all ranks; each takes batches in turn. `plan`, plain data, is everything that the
    samples depend on: parts of another plan are refused with ValueError, and a whole set of the
    same plan is left as it is. With `png` each image is written to the folder NAME too. ValueError
    when another process draws the same set.
    """
    parts, record = out.with_suffix(".parts"), out.with_suffix(".json")
    pictures = out.with_suffix("") if png else None
    with world.together():
        check_writable(record)
        same = world.main and _is_whole(out, record, plan)
    if world.gather(same and _pictured(pictures, range(num)))[0]:
        return
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.main:
                parts.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(parts))
                _begin(parts, pictures, plan)
        _draw_set(draw, labels, num, batch_size, parts, pictures, world)
        with world.together():
            if world.main:
                _assemble(out, parts, -(-num // batch_size), num, labels)
                _record(out, record, plan)
                shutil.rmtree(parts)


def draw_grid(
    artist: Artist, classes: list[int], settings: SampleConfig, out: Path, plan: dict[str, Any]
) -> None:
    """Draw `settings.num` images, a class of `classes` a column, and write the grid `out` (.png).

    NAME.png.json records `plan`; a grid of the same plan is left as it is.
    """
    record = out.with_name(f"{out.name}.json")
    check_writable(record)
    if _is_whole(out, record, plan):
        return
    labels, columns = label_columns(settings.num, classes)
    images = artist.draw(range(settings.num), labels, settings, progress=True)
    save_images(images, labels, out, columns)
    _record(out, record, plan)


def _record(out: Path, record: Path, plan: dict[str, Any]) -> None:
    write_json(record, plan | {"bytes": out.stat().st_size, "sha256": sha256(out)})


def _is_whole(out: Path, record: Path, plan: dict[str, Any]) -> bool:
    """Whether `out` is what `plan` draws, to the bit; a warning when it was altered since."""
    found = _read_plan(record)
    digest = found.pop("sha256", None)  # 0.1.0 noted none
    size = out.stat().st_size if out.exists() else None
    if found != _plain(plan | {"bytes": size}):
        return False
    if digest in (None, sha256(out)):
        return True
    warnings.warn(f"{out} was altered since it was drawn: it is drawn again", stacklevel=3)
    return False


def _draw_set(draw, labels, num, batch_size, parts, pictures, world) -> None:
    batches = [range(i, min(i + batch_size, num)) for i in range(0, num, batch_size)]
    missing = []
    with world.together():
        for k, batch in enumerate(batches) if world.main else ():
            if not (_is_intact(_part(parts, k)) and _pictured(pictures, batch)):
                missing.append(k)
    missing = world.gather(missing)[0]
    done = num - sum(len(batches[k]) for k in missing)
    bar = tqdm(total=num, initial=done, unit="image", disable=not world.main, mininterval=1)
    with bar:
        for start in range(0, len(missing), world.size):
            turn = missing[start : start + world.size]
            with world.together():
                if world.rank < len(turn):
                    indices = batches[turn[world.rank]]
                    chosen = None if labels is None else labels[indices.start : indices.stop]
                    images = draw(indices, chosen)
                    if images.dtype == torch.uint8:
                        images = images.permute(0, 2, 3, 1)
                        _write_pictures(pictures, indices, images)
                    with drafted(_part(parts, turn[world.rank])) as draft, draft.open("wb") as file:
                        content = io.BytesIO()
                        np.save(content, images.contiguous().numpy())
                        file.write(content.getbuffer())
                        file.write(hashlib.sha256(content.getbuffer()).digest())
                        file.flush()
                        os.fsync(file.fileno())
            bar.update(sum(len(batches[k]) for k in turn))


def _begin(parts: Path, pictures: Path | None, plan: dict[str, Any]) -> None:
    """A new set, which clears the pictures of another one, or the one that was begun."""
    path = parts / PLAN
    if not any(parts.glob("part-*.npy")):
        for picture in pictures.glob("*.png") if pictures else ():
            if picture.stem.isdecimal():
                picture.unlink()
        write_json(path, plan)
        return
    found, wanted = _read_plan(path), _plain(plan)
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


def _read_plan(path: Path) -> dict[str, Any]:
    """What is known of a set; nothing if the file is missing or damaged."""
    try:
        found = read_json(path)
    except FileError:
        return {}
    return found if isinstance(found, dict) else {}


def _plain(plan: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(plan))


def _part(parts: Path, k: int) -> Path:
    return parts / f"part-{k:06d}.npy"


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


def _assemble(out: Path, parts: Path, count: int, num: int, labels: Tensor | None) -> None:
    """One .npz of all parts, a part in memory at a time."""
    with drafted(out) as draft, zipfile.ZipFile(draft, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for k in range(count):
                part = np.load(_part(parts, k), allow_pickle=False)
                if k == 0:
                    shape = (num, *part.shape[1:])
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
