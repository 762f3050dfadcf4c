"""Checkpoints that are either complete and unaltered, or refused by name.

RUN/checkpoints/STEP/ holds `model`, `ema` (float32) and `optimizer` as .safetensors, then
`state.json` (step, config, versions, the trainer's own state, size and SHA-256 of every file), then
`COMPLETE` with the SHA-256 of state.json. A part whose tensors are sharded over processes is a
folder of safetensors instead, one file a process (torch.distributed.checkpoint's), which any number
of processes reads. The folder is written under a temporary name, flushed to disk and renamed: a
killed process or a full disk leaves the older ones as they were.

A file that is cut short, altered or missing is a `CheckpointError`. `newest_intact` (resuming) then
goes on to the checkpoint before it, with one line of warning, whatever the damage; `load_model`
(sampling, scoring) never does, because other weights would give other results.
"""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor

from dis_ssm.config import MOST_STEPS, Config, from_saved, to_dict
from dis_ssm.system.distributed import ALONE, World, fill
from dis_ssm.system.files import DRAFT, sync, usual_mode, write_json, write_text
from dis_ssm.system.machine import versions
from dis_ssm.system.reading import FileError, read_json, sha256

FORMAT = 1
STATE, COMPLETE = "state.json", "COMPLETE"
WEIGHTS = ("ema", "model")
SHA256 = re.compile(rb"[0-9a-f]{64}")
STATE_FIELDS = {"format": int, "step": int, "config": dict, "versions": dict, "trainer": dict}
STATE_FIELDS |= {"files": dict}


class CheckpointError(ValueError):
    """A checkpoint is incomplete, cut short, altered, or does not fit the model."""


def save_checkpoint(
    run: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    config: Config,
    state: dict[str, Any],
    keep: int,
    world: World = ALONE,
) -> Path:
    """Write RUN/checkpoints/STEP with one file per part, then remove all but the newest `keep`.

    Called by all ranks, with the same arguments but for their shards; the main one writes what is
    whole. Later steps, which resuming refused as damaged, are removed too.

    Args:
        run: the folder of the run.
        step: of the checkpoint, which names its folder.
        parts: the tensors of each file by its name without the suffix.
        config: of the run, resolved.
        state: what else the trainer needs to continue, as JSON can hold.
        keep: how many checkpoints stay.
        world: the processes that write together.

    Returns:
        The folder.

    Raises:
        OSError, CheckpointError: it cannot be written; nothing older is touched then.
    """
    folder = run / "checkpoints" / f"{step:08d}"
    draft = folder.with_name(DRAFT + folder.name)
    try:
        with world.together():
            if world.main:
                _remove(draft)
                draft.mkdir(parents=True)
        for name, tensors in parts.items():
            if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
                _write_shards(draft / name, tensors)
            else:
                with world.together():
                    if world.main:
                        _write_tensors(draft / f"{name}.safetensors", tensors)
        names, entries = world.gather(_files(draft) if world.main else None)[0], {}
        with world.together():
            for name in names[world.rank :: world.size]:
                path = draft / name
                entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        files = {k: v for part in world.gather(entries) for k, v in part.items()}
        with world.together():
            if world.main:
                write_json(
                    draft / STATE,
                    {"format": FORMAT, "step": step, "config": to_dict(config)}
                    | {"versions": versions(), "trainer": state, "files": files},
                )
                write_text(draft / COMPLETE, sha256(draft / STATE) + "\n")
                for part in {(draft / name).parent for name in names} | {draft}:
                    sync(part)
                _rename(draft, folder)
    finally:
        if world.main:
            shutil.rmtree(draft, ignore_errors=True)
    if world.main:
        steps = _step_folders(run)
        for abandoned in steps[steps.index(folder) + 1 :]:
            _discard(abandoned)
        for old in complete_checkpoints(run)[:-keep]:
            _discard(old)
    return folder


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders with their completion marker, oldest first; their files not verified."""
    return [folder for folder in _step_folders(run) if (folder / COMPLETE).is_file()]


def clean_drafts(run: Path) -> None:
    """Remove what a killed process left half-written."""
    for draft in (run / "checkpoints").glob(DRAFT + "*"):
        _remove(draft)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, verified against its completion marker.

    Raises:
        CheckpointError: a file is missing, cut short, altered or of another format.
    """
    if not (folder / COMPLETE).is_file():
        raise CheckpointError(f"{folder} is incomplete: {COMPLETE} is missing")
    if not (folder / STATE).is_file():
        raise CheckpointError(f"{folder / STATE} is missing, or no file")
    wanted = (folder / COMPLETE).read_bytes().strip()
    if not SHA256.fullmatch(wanted):
        raise CheckpointError(f"{folder / COMPLETE} was cut short or altered: it holds no SHA-256")
    if sha256(folder / STATE).encode() != wanted:
        raise CheckpointError(
            f"{folder / STATE} was cut short or altered: its SHA-256 is wrong, or {COMPLETE} was"
        )
    try:
        state = read_json(folder / STATE)
        _check_state(state)
    except FileError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} cannot be used: {error}") from error
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {state['format']}, this version reads {FORMAT}")
    return state


def _check_state(state: Any) -> None:
    """ValueError naming the field of state.json that is missing or of another kind."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not an object")
    for name, kind in STATE_FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{name!r} is missing, or no {kind.__name__}")
    if not 0 <= state["step"] <= MOST_STEPS or isinstance(state["step"], bool):
        raise ValueError(f"'step' is {state['step']!r}: it must be from 0 to {MOST_STEPS:,}")
    for name, entry in state["files"].items():
        known = entry if isinstance(entry, dict) else {}
        if type(known.get("size")) is not int or not isinstance(known.get("sha256"), str):
            raise ValueError(f"'files' says no size and sha256 of {name!r}")


def saved_config(folder: Path, state: dict[str, Any]) -> Config:
    """The config in state.json, resolved as it was saved.

    Raises:
        CheckpointError: it cannot be used; it names file and key.
    """
    with of_state(folder):
        config = from_saved(state["config"])
        for name in ("in_channels", "input_size", "num_classes"):
            if getattr(config.model, name) is None:
                raise ValueError(f"model.{name} is missing")
        return config


@contextlib.contextmanager
def of_state(folder: Path) -> Iterator[None]:
    """Errors inside are of the config in the checkpoint's state.

    Raises:
        CheckpointError: for a ValueError inside; it names the file.
    """
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} cannot be used: its config: {error}") from error


def read_part(folder: Path, state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Whole tensors of one part of a checkpoint, on the CPU, after its files were verified.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    for file in part_files(folder, state, name):
        verify_file(folder, state, file)
    if not (folder / name).is_dir():
        return _read_tensors(folder / f"{name}.safetensors")
    tensors = {n: torch.empty(size, dtype=dtype) for n, (size, dtype) in _sharded(folder / name)}
    _read_shards(folder / name, tensors)
    return tensors


def load_part(folder: Path, state: dict[str, Any], name: str, own: dict[str, Tensor]) -> None:
    """Fill the tensors `own`, whole or sharded, from a part whose files were verified.

    Raises:
        CheckpointError: names and shapes are not exactly theirs.
    """
    if (folder / name).is_dir():
        found = {n: torch.empty(size, device="meta") for n, (size, _) in _sharded(folder / name)}
        check_tensors(own, found, folder / name)
        _read_shards(folder / name, own)
        return
    path = folder / f"{name}.safetensors"
    tensors = _read_tensors(path)
    check_tensors(own, tensors, path)
    for key, tensor in own.items():
        fill(tensor, tensors[key])


def part_files(folder: Path, state: dict[str, Any], name: str) -> list[str]:
    """The files of a part, relative to the checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    files = [f for f in state["files"] if f == f"{name}.safetensors" or f.startswith(f"{name}/")]
    if not files:
        raise CheckpointError(f"{folder / name}.safetensors is missing")
    return files


def verify_file(folder: Path, state: dict[str, Any], file: str) -> None:
    """Check that a file has the size and SHA-256 in state.json.

    Raises:
        CheckpointError: it has not, or is missing.
    """
    path, wanted = folder / file, state["files"][file]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if (size := path.stat().st_size) != wanted["size"]:
        raise CheckpointError(f"{path} is damaged: {size} bytes instead of {wanted['size']}")
    if sha256(path) != wanted["sha256"]:
        raise CheckpointError(f"{path} was altered: its SHA-256 is wrong")


def newest_intact(
    run: Path, names: Iterable[str], world: World = ALONE
) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest checkpoint whose parts `names` verify; None without any.

    Damaged ones are passed over with a warning each. The ranks share the reading.

    Raises:
        CheckpointError: all are damaged.
        ValueError: one was never meant to be continued.
    """
    problem = None
    for folder in world.gather(list(reversed(_step_folders(run))))[0]:
        found = None
        try:
            state = read_state(folder)
            stems = {file.partition("/")[0].removesuffix(".safetensors") for file in state["files"]}
            if lacking := [name for name in names if name not in stems]:
                raise ValueError(
                    f"{folder} has no training state ({', '.join(lacking)}), as a converted "
                    f"checkpoint: draw from it, or give another --out to train"
                )
            files = [file for name in names for file in part_files(folder, state, name)]
            for file in files[world.rank :: world.size]:
                verify_file(folder, state, file)
        except CheckpointError as error:
            found = str(error)
        if not any(problems := world.gather(found)):
            return folder, state
        problem = next(filter(None, problems))
        if world.main:
            warnings.warn(f"{problem}; trying the checkpoint before it", stacklevel=2)
    if problem:
        raise CheckpointError(
            f"no checkpoint of {run} is intact, the last tried: {problem}. Restore one, or remove "
            f"{run / 'checkpoints'} to start from step 0"
        )
    return None


def locate(path: str | Path) -> tuple[Path, Path]:
    """(RUN, checkpoint folder) of a run, whose newest complete one it is, or of a checkpoint.

    Raises:
        ValueError: there is neither.
        CheckpointError: the newest is incomplete.
    """
    path = Path(path)
    if (path / STATE).is_file() or (path / COMPLETE).is_file():
        folder = path.resolve()
        return (folder.parents[1] if folder.parent.name == "checkpoints" else folder), path
    if complete := complete_checkpoints(path):
        if (newest := _step_folders(path)[-1]) != complete[-1]:
            raise CheckpointError(
                f"{newest} is incomplete: {COMPLETE} is missing. Restore it, or name another "
                f"checkpoint, such as {complete[-1]}"
            )
        return path, complete[-1]
    if begun := _step_folders(path):
        raise CheckpointError(f"{begun[-1]} is incomplete: {COMPLETE} is missing. Restore it")
    raise ValueError(f"{path} is neither a run with a complete checkpoint nor a checkpoint")


def load_weights(model: nn.Module, tensors: dict[str, Tensor], origin: str | Path) -> None:
    """Copy `tensors` into `model`.

    Raises:
        CheckpointError: names and shapes are not exactly its own.
    """
    check_tensors(model.state_dict(), tensors, origin)
    model.load_state_dict(tensors)


def check_tensors(own: dict[str, Tensor], tensors: dict[str, Tensor], origin: str | Path) -> None:
    """Check that `tensors` have the names and shapes of `own`.

    Raises:
        CheckpointError: one, which it names, is missing, unexpected or of another shape.
    """
    problems = [f"lacks {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            problems.append(f"has {name} {tuple(tensor.shape)}, which the model does not")
        elif tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model {tuple(own[name].shape)}"
            problems.append(f"has {name} of shape {shapes}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{origin} {problems[0]}{more}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "parameter name/slot" -> tensor, not copied."""
    return {
        f"{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def identity(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's state.json, which has those of all its files."""
    return (checkpoint / COMPLETE).read_text(encoding="utf-8").strip()


def _step_folders(run: Path) -> list[Path]:
    folders = (run / "checkpoints").glob("*")
    return sorted((f for f in folders if f.name.isdecimal()), key=lambda f: int(f.name))


def _discard(folder: Path) -> None:
    """Remove a checkpoint at one stroke; `clean_drafts` ends what a kill interrupts."""
    gone = folder.with_name(f"{DRAFT}old-{folder.name}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with usual_mode(path):
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    sync(path)


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def _sharded(folder: Path) -> Iterator[tuple[str, tuple[torch.Size, torch.dtype]]]:
    try:
        found = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged header fails in any way it likes
        raise CheckpointError(f"{folder} cannot be read: {error!r}") from error
    return ((name, (item.size, item.properties.dtype)) for name, item in found.items())


@torch.no_grad()
def _read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each process reads what it needs, so that nobody waits for another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)


def _files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _remove(path: Path) -> None:
    """A file, a link, a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rename(draft: Path, folder: Path) -> None:
    """A damaged folder of the same step may be in the way: it goes once its successor is ready."""
    if folder.exists():
        old = folder.with_name(f"{DRAFT}old-{folder.name}")
        os.rename(folder, old)
        os.rename(draft, folder)
        shutil.rmtree(old)
    else:
        os.rename(draft, folder)
    sync(folder.parent)
