"""Released DiS checkpoints -> this package's DiS, with the same outputs."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dis_ssm.model import DiS

_TOP = {
    "patch_embed.proj.": "patch_embed.",
    "label_emb.embedding_table.": "class_embed.",
    "norm_f.": "decoder.norm.",
    "final_layer.linear.": "decoder.linear.",
    "final_layer.adaLN_modulation.1.": "decoder.modulation.",
}
_DIRECTIONAL = re.compile(r"mixer\.(conv1d|x_proj|dt_proj|A|D)(_b)?(_log)?(?:\.(weight|bias))?$")


def from_released(
    source: dict[str, Tensor] | str | Path,
    input_size: int | tuple[int, int] | None = None,
) -> DiS:
    """Builds a DiS from a released state dict; every size is read off the tensors.

    Args:
        source: a state dict, or a file: the trainer's ``{"model", "ema", "opt", "args"}`` (the
            EMA is taken), a bare state dict, or safetensors. Pickles are opened with
            ``weights_only=True``; only ``argparse.Namespace`` is allowed besides tensors.
        input_size: side or (height, width); None assumes a square.

    Raises:
        ValueError: a file that holds anything else, or tensors that are missing, unknown or of
            the wrong shape, by name.
    """
    state = _read(Path(source)) if isinstance(source, str | Path) else source
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    config = _infer(state, input_size)
    with torch.device("meta"):
        model = DiS(**config)
    depth, expected = config["depth"], model.state_dict()
    translated, unknown, wrong = {}, [], []
    for name, tensor in state.items():
        ours = _translate(name, depth)
        if ours not in expected:
            unknown.append(name)
            continue
        if ours.endswith("conv_weight"):
            tensor = tensor.squeeze(1)
        if tensor.shape != expected[ours].shape:
            wrong.append(f"{name} {tuple(tensor.shape)}, expected {tuple(expected[ours].shape)}")
        translated[ours] = tensor
    missing = [name for name in expected if name not in translated]
    for what, names in (("unknown", unknown), ("misshapen", wrong), ("missing", missing)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"{what} tensors in the released checkpoint: {'; '.join(names[:5])}{more}"
            )
    model.load_state_dict(translated, assign=True)
    return model.requires_grad_(True)


def convert_file(source: str | Path, target: str | Path, **kwargs) -> DiS:
    """Writes :func:`from_released`'s model as safetensors, its configuration in the metadata."""
    model = from_released(source, **kwargs)
    target = Path(target)
    temporary = target.with_name(target.name + ".tmp")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, temporary, {"dis_ssm.model": json.dumps(model.config)})
    os.replace(temporary, target)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is not a checkpoint that can be loaded safely: {reason}"
        ) from None
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{path} holds no state dict (tensors by name, or one under 'ema' or 'model')"
        )
    return content


def _infer(state: dict[str, Tensor], input_size: int | tuple[int, int] | None) -> dict:
    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"missing tensors in the released checkpoint: {name}")
        return tuple(state[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("patch_embed.proj.weight")
    shallow = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    inner, d_state = shape("mid_block.mixer.A_log")
    table = "label_emb.embedding_table.weight"
    num_classes = shape(table)[0] - 1 if table in state else 0
    patches = shape("pos_embed")[1] - (2 if num_classes else 1)
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
        learn_sigma=shape("final_layer.linear.weight")[0] == patch_size**2 * in_channels * 2,
        d_state=d_state,
        expand=inner // hidden_size,
        d_conv=shape("mid_block.mixer.conv1d.weight")[-1],
        skip="concat" if any(".skip_linear." in name for name in state) else "none",
    )


def _translate(name: str, depth: int) -> str:
    for theirs, ours in _TOP.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = re.match(r"(?:(in|out)_blocks\.(\d+)|mid_block)\.", name)
    if not match:
        return name
    side, index = match.group(1), int(match.group(2) or 0)
    block = {"in": index, None: depth // 2, "out": depth // 2 + 1 + index}[side]
    rest = name[match.end() :]
    if inside := _DIRECTIONAL.match(rest):
        kind, backward, _, leaf = inside.groups()
        own = {"conv1d": f"conv_{leaf}", "A": "A_log", "D": "D"}.get(kind, f"{kind}.{leaf}")
        rest = f"mixer.{'backward' if backward else 'forward'}_scan.{own}"
    return f"blocks.{block}.{rest}"
