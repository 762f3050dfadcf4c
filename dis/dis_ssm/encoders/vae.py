"""The VAE of diffusers: loaded, checked, identified.

Only here and in `models.dit` are classes of diffusers built.
diffusers is imported inside the functions, because that takes seconds.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dis_ssm.system.extras import declare_torchvision_operators
from dis_ssm.system.reading import read_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
LONGEST_REASON = 200
HUB_TIMEOUT = 10  # seconds
ENCODER = ("encoder.", "quant_conv.")  # the weights that latents depend on


def load_vae(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "AutoencoderKL":
    """The AutoencoderKL of a folder (its own, or a pipeline's with a sub-folder `vae`) or hub id.

    What is on this machine is used; only a hub id that is not is downloaded. The weights must be
    safetensors and complete. Frozen, in eval mode. Raises ValueError naming `path_or_id`.
    """
    declare_torchvision_operators()
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("loading a VAE needs diffusers: pip install diffusers") from error

    source, folder = str(path_or_id), Path(path_or_id).expanduser()
    options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options |= {"low_cpu_mem_usage": False}  # the other way needs accelerate
    try:
        with _errors_not_logged():
            if folder.is_dir():
                inner = folder / "vae"
                folder = inner if (inner / "config.json").is_file() else folder
                _check_config(folder / "config.json")
                found = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, **options)
            elif folder.exists() or not HUB_ID.fullmatch(source):
                raise OSError("there is no such folder")
            else:
                found = _from_hub(AutoencoderKL, source, options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged config or file of weights fails in any way it likes
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(
            f"cannot load VAE {source!r}: {reason}. Give the folder of an AutoencoderKL, with its "
            f"config.json and safetensors, or a hub id, such as {DEFAULT_VAE}"
        ) from error
    vae, report = found
    if absent := sorted(report["missing_keys"]):
        raise ValueError(f"VAE {source!r} is not an AutoencoderKL, or incomplete: no {absent[0]}")
    return vae.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def _errors_not_logged() -> Iterator[None]:
    """diffusers logs an error and then raises it, too."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger.addFilter(below_error)
    try:
        yield
    finally:
        logger.removeFilter(below_error)


def _check_config(path: Path) -> None:
    """ValueError for what diffusers would take: no object, or no groups to normalise."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no object")
    groups = config.get("norm_num_groups", 1)
    if type(groups) is not int or groups < 1:
        raise ValueError(f"norm_num_groups is {groups!r} in {path.name}")


def _from_hub(cls: type, name: str, options: dict):
    try:
        return cls.from_pretrained(name, local_files_only=True, **options)
    except OSError:
        _ask_hub(name)
        return cls.from_pretrained(name, **options)


def _ask_hub(name: str) -> None:
    """OSError unless the hub knows `name`: one request, where a download would be tried again and
    again."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the client's, or of the library below it
        raise OSError(f"it is not on this machine, and the hub says: {error}") from error


def vae_scale(vae: "AutoencoderKL") -> int:
    """How many times as high and wide as the latents the images are."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_hash(vae: "AutoencoderKL") -> dict[str, str]:
    """{"config": ..., "weights": ...}, SHA-256 in hex.

    config: the architecture and scale as sorted JSON, without what names versions and places.
    weights: name, dtype, shape and bytes of every tensor of the **encoder** and quant_conv, in
    order of name; decoders tuned afterwards share the latents and therefore the hash.
    """
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=list)
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(ENCODER):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            weights.update(flat.view(torch.uint8).numpy())
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "weights": weights.hexdigest()}
