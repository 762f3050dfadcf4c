"""Bad command lines, made from the signatures of the commands: each is refused by name, before any
work, and leaves nothing behind."""

import dataclasses
import inspect
import os
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.cli import entry
from dis_ssm.cli.evaluate import Drawing
from dis_ssm.config import Config
from helpers import contents, released_weights, tidy

pytestmark = pytest.mark.filterwarnings("default")

COMMANDS = {
    name: getattr(entry, name)
    for name in ("sample", "score", "evaluate", "encode", "check", "info", "convert", "flops")
}
BASES = {  # a command line that is accepted, but for what a case adds or takes away
    "train": ["train", "config.toml", "--out", "new"],
    "sample": ["sample", "run", "--num", "2", "--out", "set.npz"],
    "score": ["score", "run"],
    "evaluate": ["evaluate", "a.npz", "b.npz", "--extractor", "pixels"],
    "evaluate run": ["evaluate", "run", "--extractor", "pixels"],
    "encode": ["encode", "images", "cache", "--vae", "vae", "--image-size", "8"],
    "check": ["check", "cache"],
    "info": ["info"],
    "convert": ["convert", "weights.pt", "converted"],
    "flops": ["flops", "--models", "DiS-S/2", "--size", "32", "32"],
}
LONG = "n" * 300
PLACES = ["nowhere/deep/x", "empty", "pipe", "/dev/null", LONG, "\udcff.png"]


class Flag(NamedTuple):
    name: str
    hint: object


class Case(NamedTuple):
    arguments: tuple[str, ...]
    names: tuple[str, ...]  # one of which the error must say
    certain: bool  # whether it must be refused, whatever the command makes of it


# ---- what the commands take ----------------------------------------------------------------


def flags_of(command: str) -> list[Flag]:
    if command == "train":
        return [*dataclass_flags(Config, ""), Flag("extend", int | None), Flag("dry-run", bool)]
    if command == "evaluate run":
        return [*dataclass_flags(Drawing, "")]
    function = COMMANDS[command]
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [
        Flag(p.name.replace("_", "-"), hints[p.name])
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and not dataclasses.is_dataclass(hints[p.name])
    ]


def dataclass_flags(section: type, prefix: str):
    for name, hint in typing.get_type_hints(section).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(hint):
            yield from dataclass_flags(hint, f"{flag}.")
        else:
            yield Flag(flag, hint)


def positionals_of(command: str) -> int:
    if command in ("train", "score", "evaluate run"):
        return 1
    parameters = inspect.signature(COMMANDS[command.split()[0]]).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


# ---- what is wrong with a value of a type ----------------------------------------------------


def bad_values(hint: object):
    """(words, whether they must be refused) for a flag of this type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (h for h in typing.get_args(hint) if h is not types.NoneType)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        yield from (([word], True) for word in (arguments[0][:-1], arguments[0].upper()))
    elif typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        yield from ((["0", *words], sure) for words, sure in bad_values(arguments[0]) if words)
    elif typing.get_origin(hint) is tuple:
        good = {int: "8", float: "0.5"}[arguments[0]]
        yield from (([good] * n, True) for n in (1, len(arguments) + 1))
        for words, sure in bad_values(arguments[0]):
            yield [*words, *[good] * (len(arguments) - 1)], sure
    elif hint is bool:
        yield ["True"], True
    elif hint is int:
        yield from (([word], True) for word in ("x", ""))
        yield from (([word], False) for word in ("-1", "0", str(10**20)))
    elif hint is float:
        yield from (([word], True) for word in ("x", "nan", "1e400"))
        yield ["-1"], False
    else:
        assert hint in (str, Path), hint
        yield from (([word], False) for word in PLACES[:: 1 if hint is Path else 2])


def misspelt(name: str) -> str:
    return name[:2] + name[1:] if len(name) > 2 else name * 3


def cases_of(command: str):
    base, tried = BASES[command], set()
    for flag in flags_of(command):
        option, last = f"--{flag.name}", flag.name.rpartition(".")[2]
        for words, certain in bad_values(flag.hint):
            if words == ["x"] and (command, flag.hint) in tried:
                continue  # the parser's own refusal, once a type
            tried.add((command, flag.hint))
            names = (last, *(word for word in words if word))
            yield Case((*base, option, *words), names, certain)
        if "." in flag.name and flag.hint in (int, str):
            continue  # many flags of train are alike
        yield Case((*base, f"--{misspelt(flag.name)}", "1"), (misspelt(flag.name),), True)
        if flag.hint is not bool and "..." not in str(flag.hint) and "." not in flag.name:
            yield Case((*base, option), (last,), True)
    yield Case((*base, "superfluous", "words"), ("superfluous", "words"), True)
    yield Case((misspelt(base[0]), *base[1:]), (misspelt(base[0]), base[0]), True)
    for position in range(1, 1 + positionals_of(command)):
        for place in ("", *PLACES):
            words = [*base]
            words[position] = place
            yield Case(tuple(words), (place, base[position]), False)
        # what is optional may be left out; the next word then takes its place
        yield Case((*base[:position], *base[position + 1 :]), ("",), False)
    yield Case((base[0], "--"), ("",), False)


CASES = [
    pytest.param(case, id=f"{command}-{i}")
    for command in BASES
    for i, case in enumerate(cases_of(command))
]


# ---- where they are run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of small sound inputs, one of each kind that a command reads."""
    from dis_ssm.build import build_model
    from dis_ssm.config import (
        DataConfig,
        ModelConfig,
        SampleConfig,
        ScoreConfig,
        TrainConfig,
        to_toml,
    )
    from dis_ssm.storage.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("place")
    sizes = {"hidden_size": 16, "depth": 3, "patch_size": 4}
    config = Config(
        model=ModelConfig(**sizes),
        data=DataConfig(source="images", image_size=8),
        train=TrainConfig(steps=2, batch_size=4),
        sample=SampleConfig(every=0, steps=1, batch_size=4),
        score=ScoreConfig(extractor="pixels"),
    )
    (folder / "config.toml").write_text(to_toml(config))
    model = ModelConfig(**sizes, num_classes=10, in_channels=1, input_size=(8, 8))
    config = dataclasses.replace(config, model=model, data=DataConfig())
    parts = {"ema": build_model(config).state_dict()}
    save_checkpoint(folder / "run", 2, parts, config, {}, 1)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    for name in "ab":
        np.savez(folder / f"{name}.npz", noise)
    (folder / "images").mkdir()
    for i, image in enumerate(noise[:2]):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    torch.save(released_weights(), folder / "weights.pt")
    return folder


@pytest.fixture
def stopped_before_work(began, monkeypatch):
    from dis_ssm.costs import complexity
    from dis_ssm.encoders import encoding
    from dis_ssm.encoders import vae as hf
    from dis_ssm.metrics import evaluator
    from dis_ssm.metrics import run_scores as evaluate
    from dis_ssm.sampling import pipeline
    from dis_ssm.training import trainer

    def nowhere(*arguments, **options):
        raise OSError("no network in tests")

    monkeypatch.setattr(hf, "_from_hub", nowhere)
    monkeypatch.setattr(trainer.Trainer, "update", began)
    monkeypatch.setattr(pipeline.Pipeline, "draw", began)
    monkeypatch.setattr(evaluate, "draw_images", began)
    monkeypatch.setattr(complexity, "sketch", began)
    monkeypatch.setattr(
        encoding,
        "load_vae",
        lambda name, device: hf.load_vae(name, device) if name != "vae" else None,
    )
    sizes = {"source_images": 2, "shard_size": 2, "vae": {}}
    monkeypatch.setattr(encoding, "_settings", lambda *_: sizes)
    monkeypatch.setattr(encoding, "_look", began)
    monkeypatch.setattr(evaluator, "extract_features", began)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_command_line_is_refused_by_name(
    case, place, outcome, stopped_before_work, monkeypatch
):
    monkeypatch.chdir(place)
    before = contents(place)
    try:
        found = outcome(list(case.arguments))
    finally:
        after = contents(place)
        tidy(before, after)
    told = f"{' '.join(map(ascii, case.arguments))}: {found}"
    assert found.problem is None, told
    if found.status in (0, None):
        assert not case.certain, told
        return
    shown = "".join(found.err.replace("│", "").split()).replace("_", "-")
    names = [name.encode(errors="backslashreplace").decode() for name in case.names]
    assert any(n[:40].replace("_", "-").replace(" ", "") in shown for n in names), told
    left = [p for p in after.keys() | before.keys() if after.get(p) != before.get(p)]
    assert not left, told


def test_there_are_many():
    assert sum(case.values[0].certain for case in CASES) >= 300


@pytest.mark.parametrize("command", ["train", "sample", "encode"])
def test_processes_end_alike(command, place):
    """What the process as a whole does, of one case a command."""
    case = next(case for case in cases_of(command) if case.certain)
    done = subprocess.run(
        [sys.executable, "-m", "dis_ssm", *case.arguments],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
