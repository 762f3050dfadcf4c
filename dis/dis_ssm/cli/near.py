"""What a flag that a command does not have was meant to be."""

import contextlib
import io
import re
from collections.abc import Callable

import tyro

from dis_ssm.system.nearest import did_you_mean, nearest

Command = Callable[..., int]

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
COMMANDS = {"verify": "check", "run": "score"}  # flags that stand for a command of its own


def explain_flags(arguments: list[str], name: str, commands: dict[str, Command]) -> list[str]:
    """One line for each flag in `arguments` that the command `name` does not have.

    It names the flags that were meant, or the command whose flag it is or that has its name.
    """
    known, lines = flags_of(commands[name]), []
    for argument in arguments:
        given = argument.partition("=")[0]
        flag = given.replace("_", "-")
        if not flag.startswith("--") or flag == "--" or flag in known:
            continue
        command = COMMANDS.get(flag[2:], flag[2:])
        if command in commands and command != name:
            lines.append(f"{given}: that is a command of its own, dis-ssm {command}")
        elif near := _near(flag[2:], known):
            lines.append(f"{given}: {did_you_mean(given, known, near=near)}")
        elif owners := [n for n, c in commands.items() if n != name and flag in flags_of(c)]:
            lines.append(f"{given}: that is a flag of dis-ssm {', '.join(owners)}")
        elif near := _alike(flag[2:], known):
            lines.append(f"{given}: {did_you_mean(given, known, near=near)}")
    return lines


def flags_of(command: Command) -> list[str]:
    """All flags that the help of a command lists, as they are typed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"])
    columns = re.findall(r"^\W*?((?:-\w, )?--\w.*?)(?:  |$)", text.getvalue(), re.MULTILINE)
    return [flag for column in columns for flag in re.findall(r"--[\w.-]+", column)]


def _near(name: str, known: list[str]) -> list[str]:
    """Flags of `known` that go by the last part of `name` or by a synonym of it."""
    section, _, leaf = name.rpartition(".")
    leaf = SYNONYMS.get(leaf, leaf)
    same = [flag for flag in known if _leaf(flag) == leaf]
    exact = f"--{section}.{leaf}" if section else f"--{leaf}"
    return [exact] if exact in same else same


def _alike(name: str, known: list[str]) -> list[str]:
    """Flags of `known` whose last part, or a synonym of it, is spelt much as that of `name`."""
    section, _, leaf = name.rpartition(".")
    words = [*map(_leaf, known), *SYNONYMS]
    found = (
        _near(f"{section}.{word}" if section else word, known) for word in nearest(leaf, words)
    )
    return next(filter(None, found), [])


def _leaf(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2]
