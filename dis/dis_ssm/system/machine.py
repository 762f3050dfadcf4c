"""The machine: its devices, and the versions that results depend on."""

import platform

import torch

from dis_ssm.version import __version__


def versions() -> dict[str, str]:
    """What bit-exactness depends on, besides the machine."""
    return {"dis_ssm": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The model of a GPU; of another device its type, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_device(name: str | None = None) -> torch.device:
    """The named device; for None, cuda if there is a GPU, else cpu.

    Raises:
        ValueError: the device cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).item()  # "meta" has tensors, but no numbers in them
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
