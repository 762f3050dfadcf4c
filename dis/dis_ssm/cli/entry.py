"""The command line as a whole: which command, its errors, its exit status."""

import io
import os
import sys
import warnings
from collections.abc import Callable

import torch
import tyro

from dis_ssm.cli.check import check
from dis_ssm.cli.convert import convert
from dis_ssm.cli.encode import encode
from dis_ssm.cli.evaluate import evaluate
from dis_ssm.cli.flops import flops
from dis_ssm.cli.info import info
from dis_ssm.cli.messages import fail, print_warning
from dis_ssm.cli.near import explain_flags
from dis_ssm.cli.sample import sample
from dis_ssm.cli.score import score
from dis_ssm.cli.train import INTERRUPTED, base_of, train_command
from dis_ssm.config import Config
from dis_ssm.ops import BackendError
from dis_ssm.system.distributed import RankError
from dis_ssm.system.nearest import did_you_mean
from dis_ssm.version import __version__

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, BackendError, RankError)
USAGE = 2  # the status of what the user can mend


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. 2 and one line on stderr for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = arguments[arguments[:1] == ["--"] :]  # keeps torchrun from reading our options
    warnings.showwarning = print_warning
    for stream in (sys.stdout, sys.stderr):  # names and formulas in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(arguments)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        return fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        return fail(f"out of memory, take smaller batches: {reason}")
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    commands: dict[str, Callable[..., int]] = {
        "train": train_command(Config()),
        "sample": sample,
        "score": score,
        "evaluate": evaluate,
        "encode": encode,
        "check": check,
        "info": info,
        "convert": convert,
        "flops": flops,
    }
    if arguments == ["--version"]:
        print(f"dis-ssm {__version__}")
        return 0
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name and not name.startswith("-") and name not in commands:
        return fail(f"unknown command {name!r}: {did_you_mean(name, commands)}")
    try:
        if name != "train":
            return tyro.extras.subcommand_cli_from_dict(commands, prog="dis-ssm", args=arguments)
        base = Config()
        if rest and not rest[0].startswith("-"):
            base, rest = base_of(rest[0]), rest[1:]
        return tyro.cli(train_command(base), prog="dis-ssm train [CONFIG]", args=rest)
    except SystemExit as stop:
        if stop.code == USAGE and name in commands:
            for line in explain_flags(rest, name, commands):
                print(f"dis-ssm: {line}", file=sys.stderr)
        raise


def _out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "can't allocate memory" in str(error)  # what PyTorch says on a CPU
