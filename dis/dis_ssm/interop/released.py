"""Released DiS checkpoints -> this package's DiS, with the same outputs."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dis_ssm.config import CONVERTED, Config, DataConfig, DiffusionConfig, ModelConfig
from dis_ssm.models.dis import DiS
from dis_ssm.storage.checkpoint import complete_checkpoints, save_checkpoint
from dis_ssm.storage.run import exclusive

_TOP = {  # ours -> released, outside the blocks; other names are the same
    "patch_embed.": "patch_embed.proj.",
    "class_embed.": "label_emb.embedding_table.",
    "decoder.norm.": "norm_f.",
    "decoder.linear.": "final_layer.linear.",
    "decoder.modulation.": "final_layer.adaLN_modulation.1.",
}
_KEYS = ("ema", "model_ema", "ema_state_dict", "model", "state_dict", "model_state_dict", "net")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")  # DDP, compile, FSDP, averages
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_MOST_CLASSES = 100  # that a pickle may name besides tensors
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
_SCAN = re.compile(r"mixer\.(forward|backward)_scan\.(\w+)(\.\w+)?")


def from_released(
    source: dict[str, Tensor] | str | Path,
    input_size: int | tuple[int, int] | None = None,
) -> DiS:
    """Builds a DiS from a released state dict; every size is read off the tensors.

    Args:
        source: a state dict, or a file: the trainer's `{"model", "ema", "opt", "args"}` (the
            EMA is taken), a state dict under another usual key or none, or safetensors. What
            DDP, FSDP, torch.compile and AveragedModel add to names is taken off. Pickles are
            opened with `weights_only=True`: objects of other classes than tensors become
            placeholders, and nothing that a file names is imported or run.
        input_size: side or (height, width); None assumes a square.

    Raises:
        ValueError: a file that holds anything else, or tensors that are missing, unknown or of
            the wrong shape or dtype, by name.

    Warns of a tensor that is not finite.
    """
    return _build(source, input_size)[0]


def _build(source, input_size) -> tuple[DiS, list[str]]:
    """The model, and lines that say where its tensors were found and what was left out."""
    notes: list[str] = []
    if not isinstance(source, str | Path):
        return _fit(source, "source", notes, input_size)
    content = _read(Path(source), notes)
    try:
        return _fit(content, str(source), notes, input_size)
    except ValueError as error:
        named = str(error).startswith(str(source))
        raise ValueError(error if named else f"{source}: {error}") from error


def _fit(content, name: str, notes: list[str], input_size) -> tuple[DiS, list[str]]:
    state, path = _find_state(content)
    if path:
        notes.append(f"taken from {' / '.join(map(repr, path))}")
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(
            f"{name} holds no state dict (tensors by name, or one under 'ema' or 'model')"
        )
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in state.items()}
    if plain.keys() != state.keys():
        added = sorted({part for name in state for part in name.split(".") if part in _WRAPPERS})
        notes.append(f"{', '.join(added)} taken off the names")
    if len(plain) < len(state):
        raise ValueError("the released checkpoint holds a tensor twice, wrapped and as it is")
    state = plain
    if state.pop(_COUNTER, None) is not None:
        notes.append(f"{_COUNTER} left out")
    config = _infer(state, input_size)
    with torch.device("meta"):
        model = DiS(**config)
    own = model.state_dict()
    names = {name: _released_name(name, config["depth"]) for name in own}
    problems = [f"lacks {theirs}" for theirs in names.values() if theirs not in state]
    problems += [f"has {name}, which DiS does not" for name in state.keys() - set(names.values())]
    tensors = {}
    for name, theirs in names.items():
        if theirs not in state:
            continue
        tensor = state[theirs].detach().clone()
        if tensor.is_meta:
            problems.append(f"has {theirs} without its numbers, a meta tensor")
            continue
        if tensor.layout is not torch.strided:
            problems.append(f"has {theirs} of layout {tensor.layout}, expected a dense tensor")
            continue
        tensors[name] = tensor.squeeze(1) if name.endswith("conv_weight") else tensor
        if tensors[name].shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            problems.append(f"has {theirs} of shape {shapes}")
        elif not tensor.is_floating_point():
            problems.append(f"has {theirs} of dtype {tensor.dtype}, expected floating point")
        elif not tensor.isfinite().all():
            warnings.warn(f"{theirs} of the released checkpoint is not finite", stacklevel=2)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"the released checkpoint {problems[0]}{more}")
    model.load_state_dict(tensors, assign=True)
    count = sum(tensor.numel() for tensor in tensors.values())
    notes.append(f"{len(tensors)} tensors of {count:,} parameters mapped")
    return model.requires_grad_(True), notes


def convert_file(
    source: str | Path,
    run: str | Path,
    input_size: int | tuple[int, int] | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Writes `from_released`'s model as the EMA of a run folder; returns the checkpoint.

    The diffusion is the released one (linear, epsilon); the data it was trained on are not known.
    `report` is called with lines that say what was mapped and what was left out.

    Raises:
        ValueError: what `from_released` raises, or `run` already holds checkpoints or
            something else.
    """
    (model, notes), run = _build(source, input_size), Path(run)
    for note in notes if report else ():
        report(note)
    sizes = {f.name: model.config[f.name] for f in fields(ModelConfig) if f.name in model.config}
    sizes["input_size"] = model.input_size
    config = Config(
        out=run,
        model=ModelConfig(**sizes),
        data=DataConfig(source=CONVERTED),
        diffusion=DiffusionConfig(learn_sigma=model.learn_sigma),
    )
    with exclusive(run):
        if complete_checkpoints(run):
            raise ValueError(f"{run} already holds checkpoints: give another folder")
        return save_checkpoint(run, 0, {"ema": model.float().state_dict()}, config, {}, keep=1)


class Placeholder:
    """Stands for an object whose class a pickle names: that class is neither imported nor run."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def _find_state(content) -> tuple[Any, list[str]]:
    """What lies under the usual keys, and those keys."""
    path = []
    while isinstance(content, dict):
        key = next((k for k in _KEYS if isinstance(content.get(k), dict)), None)
        if key is None or any(isinstance(value, Tensor) for value in content.values()):
            break
        path, content = [*path, key], content[key]
    return content, path


def _read(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return _unpickle(path, notes)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle fails in any way it likes
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} would run {unsafe[1]}: refused, it is not safe") from None
        raise ValueError(
            f"{path} cannot be loaded safely: it is damaged, another kind of file, or holds more "
            f"than tensors"
        ) from None


def _unpickle(path: Path, notes: list[str]) -> Any:
    """torch.load with weights_only=True, a `Placeholder` for every class that it does not allow."""
    names: list[str] = []
    while True:
        allowed = [argparse.Namespace, *((Placeholder, name) for name in names)]
        try:
            with torch.serialization.safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+)", str(error))
            blocked = "is blocked" in str(error)  # os, posix, sys: no honest file names these
            if not unknown or blocked or unknown[1] in names or len(names) == _MOST_CLASSES:
                raise
            names.append(unknown[1])
    if names:
        notes.append(f"objects of other classes left out: {', '.join(names)}")
    return content


def _infer(state: dict[str, Tensor], input_size: int | tuple[int, int] | None) -> dict:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"the released checkpoint lacks {name}")
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(
                f"the released checkpoint has {name} of shape {found}, expected {dimensions} "
                f"dimensions, none of them 0"
            )
        return found

    hidden_size, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    shallow = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    inner, d_state = shape("mid_block.mixer.A_log", 2)
    if inner % hidden_size:
        raise ValueError(
            f"the released checkpoint has mid_block.mixer.A_log of {inner} rows, expected a "
            f"multiple of {hidden_size}"
        )
    table = "label_emb.embedding_table.weight"
    num_classes = shape(table, 2)[0] - 1 if table in state else 0
    positions, tokens = shape("pos_embed", 3), 2 if num_classes else 1
    patches = positions[1] - tokens
    if patches < 1:
        raise ValueError(
            f"the released checkpoint has pos_embed of shape {positions}, expected more than "
            f"{tokens} positions"
        )
    if input_size is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"{patches} patches are not a square: give input_size=(height, width)")
        input_size = side * patch_size
    return dict(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=2 * shallow + 1,
        num_classes=num_classes,
        learn_sigma=shape("final_layer.linear.weight", 2)[0] == patch_size**2 * in_channels * 2,
        d_state=d_state,
        expand=inner // hidden_size,
        d_conv=shape("mid_block.mixer.conv1d.weight", 3)[-1],
        skip="concat" if any(".skip_linear." in name for name in state) else "none",
    )


def _released_name(name: str, depth: int) -> str:
    for ours, theirs in _TOP.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if not (block := _BLOCK.fullmatch(name)):
        return name
    index, rest, half = int(block[1]), block[2], depth // 2
    if index == half:
        place = "mid_block"
    else:
        place = f"in_blocks.{index}" if index < half else f"out_blocks.{index - half - 1}"
    if scan := _SCAN.fullmatch(rest):
        b, leaf = "_b" if scan[1] == "backward" else "", scan[3] or ""
        rest = {
            "conv_weight": f"mixer.conv1d{b}.weight",
            "conv_bias": f"mixer.conv1d{b}.bias",
            "A_log": f"mixer.A{b}_log",
        }.get(scan[2], f"mixer.{scan[2]}{b}{leaf}")
    return f"{place}.{rest}"
