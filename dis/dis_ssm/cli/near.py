"""What a mistyped flag was meant to be."""

import inspect
from collections.abc import Callable

from dis_ssm.config import Config, flat, to_dict
from dis_ssm.system.nearest import nearest

SYNONYMS = {  # what other programs call it: what it is called here
    "learning-rate": "lr",
    "epochs": "steps",
    "iterations": "steps",
    "max-steps": "steps",
    "dataset": "source",
    "data-path": "source",
    "output": "out",
    "output-dir": "out",
    "guidance": "cfg-scale",
    "guidance-scale": "cfg-scale",
    "num-samples": "num",
    "num-sampling-steps": "steps",
    "resolution": "image-size",
    "amp": "precision",
    "resume": "out",
}


def near_flags(arguments: list[str], command: Callable[..., int]) -> dict[str, list[str]]:
    """{flag that `command` does not have: flags that it may have been meant to be}."""
    known, found = _flags(command), {}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known and (near := _near(flag[2:], known)):
            found[argument.partition("=")[0]] = near
    return found


def _near(name: str, known: list[str]) -> list[str]:
    section, _, leaf = name.rpartition(".")
    leaf = SYNONYMS.get(leaf, leaf)
    same = [flag for flag in known if flag[2:].rpartition(".")[2] == leaf]
    exact = f"--{section}.{leaf}" if section else f"--{leaf}"
    return [exact] if exact in same else same or nearest(f"--{name}", known)[:1]


def _flags(command: Callable[..., int]) -> list[str]:
    """All flags of a command, as they are typed."""
    flags = ["--help"]
    for name, parameter in inspect.signature(command).parameters.items():
        if isinstance(parameter.default, Config):  # its fields are flags
            named = flat(to_dict(parameter.default))
        else:
            named = {name: parameter.default}
        for key, default in named.items():
            section, _, leaf = f"--{key.replace('_', '-')}".rpartition(".")
            prefix = f"{section}." if section else "--"
            leaf = leaf.removeprefix("--")
            flags += [prefix + leaf] + [f"{prefix}no-{leaf}"] * isinstance(default, bool)
    return flags
