"""Hostile files, made by rule from a valid one of each format that the commands read: each is
refused by name, or read as what it was; nothing hangs, nothing in it is run, nothing is left."""

import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.cli import main
from dis_ssm.data.latents import manifest_sha256
from dis_ssm.system.locks import LOCK
from helpers import Late, contents, released_weights
from hostile_rules import (
    BYTES,
    IDX,
    JSON,
    MARKER,
    NPZ,
    PICKLE,
    SAFETENSORS,
    TOML,
    WEIGHTS,
    ZIP,
    Damage,
    Rule,
    cuts,
    flips,
    no_files,
    parquet_metadata,
    places,
    png_headers,
    remove,
    strangers,
    write_zip,
)
from latent_helpers import make_vae

pytestmark = pytest.mark.filterwarnings("default")

SIDE, SECONDS = 8, 10
FEW = 1  # of each rule and file, unless every one is asked for (-m slow)
NEVER = "$^"
VOLATILE = {"seconds", "run", "versions", "checkpoint", "reference", "samples", "source"}


class Subject(NamedTuple):
    """A file that `command` reads. `seal` makes its hashes right again after it was damaged;
    `result` is what the command writes, None where that is what it prints."""

    command: str
    file: str
    rules: tuple[Rule, ...]
    result: str | None = None
    seal: Callable[[Path], None] | None = None
    harmless: str = NEVER  # damage, as a regular expression, with which the result is the same
    left_out: str = NEVER  # damage that leaves something out, and is said in a warning
    valid: str = NEVER  # damage that makes another valid file: its format has no checksum
    names: str = ""  # what an error says, if not the name of the file
    else_says: str = NEVER  # what it says of damage that makes another valid file
    refused: bool = False  # even the valid file


# ---- hashes that are right again -------------------------------------------------------------


def seal_state(place: Path, run: str = "run") -> None:
    """COMPLETE; what whoever can write state.json can write, too."""
    state = next((place / run / "checkpoints").iterdir()) / "state.json"
    if state.is_file():
        state.with_name("COMPLETE").write_text(sha256(state) + "\n")


def seal_part(name: str) -> Callable[[Path], None]:
    def seal(place: Path) -> None:
        part = place / RUN / name
        if part.is_file():
            state = json.loads((place / RUN / "state.json").read_text())
            state["files"][name] = {"size": part.stat().st_size, "sha256": sha256(part)}
            (place / RUN / "state.json").write_text(json.dumps(state))
            seal_state(place)

    return seal


def seal_manifest(place: Path) -> None:
    path = place / "cache" / "manifest.json"
    if not path.is_file():
        return
    try:
        manifest = json.loads(path.read_bytes())
        manifest["sha256"] = manifest_sha256(manifest)
    except (ValueError, RecursionError, TypeError, AttributeError):
        return
    path.write_text(json.dumps(manifest))


def seal_shard(place: Path) -> None:
    path = place / "cache" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    record = manifest["shards"][0]
    shard = path.with_name(record["name"])
    if shard.is_file():
        record |= {"bytes": shard.stat().st_size, "sha256": sha256(shard)}
        path.write_text(json.dumps(manifest))
        seal_manifest(place)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is read, and by which command ------------------------------------------------------

RUN = "run/checkpoints/00000002"
SHARD = "shard-00000.safetensors"
CONVERTED = "converted/checkpoints/00000000/ema.safetensors"
SAMPLE = "sample run --num 2 --out set.npz"
RESUME = "train run --train.steps 3"
RESUMED = "run/checkpoints/00000003/ema.safetensors"
INIT = "train config.toml --train.init run --train.steps 1 --out new"
INITIATED = "new/checkpoints/00000001/ema.safetensors"
SCORE = "score run --num 4 --bound-terms 0 --out report.json"
LATENTS = "train config.toml --data.source cache --train.steps 1 --out new"
EVALUATE = "evaluate a.npz {} --extractor pixels --out report.json"
PICTURES = "evaluate {} a.npz --extractor pixels --out report.json"
DRY = "train config.toml --dry-run --data.source {}"
UNSEALED = (places, cuts, flips)
PICTURE = (no_files, cuts, flips, strangers)
# What is left out of a config is as it is by default; the rest of state.json is about training.
DEFAULTS = r"^removed config\.|^(other|huge|removed) (trainer|versions)|^extra"
DEFAULTS += r"|^huge config\.(data|train|sample|score)|^(removed|huge) files\.(model|optim)"
OTHER_CONFIG = (
    r"model lacks|say image_size|other settings|leave it unset|cannot download|not the data"
)
OTHER_PART = r"(ema|model|optimizer)\.safetensors (is missing|is damaged)|no training state"
ANY_FIELD = r"^(removed|other|huge|doubled|extra)"  # as long as the result is the same
DIRECTORY = r"^flip|^zip (packed )?size|^member"  # a zip file says most things twice

SUBJECTS = [
    Subject(SAMPLE, f"{RUN}/COMPLETE", BYTES),
    Subject(SAMPLE, f"{RUN}/state.json", UNSEALED),
    Subject(SAMPLE, f"{RUN}/ema.safetensors", UNSEALED),
    Subject(
        SAMPLE,
        f"{RUN}/state.json",
        JSON,
        "set.npz",
        seal_state,
        DEFAULTS,
        valid=r"config\.sample",
        else_says=OTHER_PART,
    ),
    Subject(SAMPLE, f"{RUN}/ema.safetensors", SAFETENSORS, "set.npz", seal_part("ema.safetensors")),
    Subject(
        f"{SAMPLE} --classes cat", "run/classes.json", JSON, "set.npz", else_says="keeps no names"
    ),
    Subject(
        SCORE,
        f"{RUN}/state.json",
        JSON,
        "report.json",
        seal_state,
        DEFAULTS,
        valid=r"config\.sample",
        else_says=f"{OTHER_PART}|{OTHER_CONFIG}",
    ),
    Subject(
        RESUME,
        "run/config.json",
        JSON,
        RESUMED,
        harmless="^removed|^huge|input_size",
        else_says=OTHER_CONFIG,
    ),
    Subject(RESUME, "run/log.jsonl", BYTES, RESUMED, harmless="^cut|^flip|^bytes|link"),
    Subject(
        RESUME,
        f"{RUN}/state.json",
        JSON,
        RESUMED,
        seal_state,
        r"^removed config|^huge (config|trainer)|^\w+ versions|machine|meter|extra",
        else_says=f"{OTHER_PART}|{OTHER_CONFIG}",
    ),
    Subject(RESUME, f"{RUN}/model.safetensors", UNSEALED),
    *(
        Subject(RESUME, f"{RUN}/{name}", SAFETENSORS, RESUMED, seal_part(name))
        for name in ("model.safetensors", "optimizer.safetensors")
    ),
    Subject(INIT, f"{RUN}/state.json", JSON, INITIATED, seal_state, DEFAULTS, else_says=OTHER_PART),
    Subject(INIT, f"{RUN}/ema.safetensors", SAFETENSORS, INITIATED, seal_part("ema.safetensors")),
    *(
        Subject(
            f"train {name} --dry-run",
            name,
            rules,
            harmless=r"^removed|^huge",
            valid=r"^removed|^huge",
            else_says=OTHER_CONFIG,
        )
        for name, rules in (("config.toml", TOML), ("plain.json", JSON))
    ),
    Subject(EVALUATE.format("b.npz"), "a.npz", NPZ, "report.json", harmless=DIRECTORY),
    Subject(EVALUATE.format("b.npz"), "b.npz", NPZ, "report.json", harmless=DIRECTORY),
    Subject(
        EVALUATE.format("statistics.npz"),
        "statistics.npz",
        NPZ,
        "report.json",
        harmless=DIRECTORY,
        valid=r"^removed (mu|protocol|arr_0)\.npy",
    ),
    Subject(
        PICTURES.format("flat"),
        "flat/0.png",
        (*PICTURE, png_headers),
        "report.json",
        harmless="^cut",
        left_out="pipe",
    ),
    *(
        Subject(
            PICTURES.format("flat"),
            f"flat/{name}",
            PICTURE,
            "report.json",
            harmless="^flip|^cut",
            left_out="pipe",
        )
        for name in ("1.jpg", "2.gif", "3.webp", "4.tif")
    ),
    Subject(
        PICTURES.format("pictures.zip"), "pictures.zip", ZIP, "report.json", harmless=DIRECTORY
    ),
    Subject(DRY.format("pictures.zip"), "pictures.zip", (places, cuts, strangers)),
    Subject(
        DRY.format("labelled"),
        "labelled/dataset.json",
        JSON,
        None,
        None,
        "^extra",
        valid="^other labels: None",
    ),
    Subject(
        DRY.format("mnist"),
        "mnist/train-images-idx3-ubyte",
        IDX,
        valid="^flip at 8",
        else_says="mnist is empty",
        names="train-images",
    ),
    Subject(
        DRY.format("mnist"),
        "mnist/train-labels-idx1-ubyte",
        IDX,
        valid="^flip at 8",
        names="train-labels",
    ),
    *(
        Subject(f"{DRY.format('cifar')} --data.image-size 32", f"cifar/{name}", PICKLE)
        for name in ("data_batch_1", "batches.meta")
    ),
    Subject(
        DRY.format("table.parquet"),
        "table.parquet",
        (*BYTES, parquet_metadata),
        harmless="^flip|extra|removed|^image is",
        valid="^metadata|removed label",
    ),
    Subject(
        EVALUATE.format("table.parquet --image-size 8"),
        "table.parquet",
        BYTES,
        "report.json",
        harmless="^flip",
    ),
    *(
        Subject(
            DRY.format("saved"),
            f"saved/{name}",
            JSON,
            None,
            None,
            rf"{ANY_FIELD}|^shape {{}}",
            names="saved",
            valid="features|info",
        )
        for name in ("state.json", "dataset_info.json")
    ),
    Subject(DRY.format("saved"), "saved/data-00000-of-00001.arrow", BYTES, names="saved"),
    Subject(DRY.format("cache"), "cache/manifest.json", BYTES, names="cache"),
    Subject(
        DRY.format("cache"),
        "cache/manifest.json",
        JSON,
        None,
        seal_manifest,
        ANY_FIELD,
        names="cache",
        valid="class_names|split|image_size|vae",
    ),
    Subject(
        "check cache",
        "cache/manifest.json",
        JSON,
        None,
        seal_manifest,
        ANY_FIELD,
        names="cache",
        valid="class_names|split|image_size|vae",
    ),
    Subject("check cache", f"cache/{SHARD}", SAFETENSORS, None, seal_shard),
    Subject(LATENTS, f"cache/{SHARD}", SAFETENSORS, INITIATED, seal_shard),
    Subject("check cache", f"cache/{SHARD}", UNSEALED),
    Subject(LATENTS, "cache/verified.json", JSON, INITIATED, harmless="."),
    Subject(
        "convert weights.pt converted", "weights.pt", WEIGHTS, CONVERTED, harmless="^flip|checksum"
    ),
    Subject("convert weights.safetensors converted", "weights.safetensors", SAFETENSORS, CONVERTED),
    Subject(
        "sample latent --vae vae --num 2 --out set.npz",
        "vae/config.json",
        JSON,
        "set.npz",
        None,
        ANY_FIELD,
        ".",
        valid="mid_block_add_attention|scaling_factor: -1|up_block_types|use_post_quant_conv",
        names="vae",
    ),
    Subject(
        "sample latent --vae vae --num 2 --out set.npz",
        "vae/diffusion_pytorch_model.safetensors",
        SAFETENSORS,
        "set.npz",
        names="vae",
    ),
    Subject(
        "sample run --num 2 --out kept.npz", "kept.json", JSON, "kept.npz", harmless="^(?!a )|link"
    ),
    Subject(
        "sample run --num 2 --out kept.npz", "kept.npz", BYTES, "kept.npz", harmless="^(?!a )|link"
    ),
    Subject(
        "evaluate a.npz b.npz --extractor dinov2 --weights weights.pth",
        "weights.pth",
        WEIGHTS,
        names="weights.pth",
        refused=True,
    ),
]
CASES = [
    pytest.param(
        subject,
        rule,
        id=f"{subject.command.split()[0]}-{i}-{Path(subject.file).name}-{rule.__name__}",
    )
    for i, subject in enumerate(SUBJECTS)
    for rule in subject.rules
]


# ---- where they are read ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A valid file of each format, and beside the folder a copy of it."""
    folder = tmp_path_factory.mktemp("hostile") / "place"
    folder.mkdir()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        make_images(folder)
        make_configs(folder)
        make_data_sets(folder)
        make_weights(folder)
        for command in (
            "train config.toml --out run",
            "sample run --num 2 --out kept.npz",
            "encode images cache --vae vae --image-size 8 --shard-size 4",
            "train config.toml --data.source cache --out latent",
            f"{EVALUATE.format('b.npz')} --save-reference statistics.npz",
        ):
            assert main(command.split()) == 0, command
        (folder / "report.json").unlink()
    shutil.copytree(folder, folder.with_name("pristine"))
    return folder


def make_images(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), np.uint8)
    for i, (split, name) in enumerate(itertools.product(("train", "heldout"), ("cat", "dog"))):
        inside = folder / "images" / split / name
        inside.mkdir(parents=True)
        for k in range(4):
            Image.fromarray(noise[4 * i + k]).save(inside / f"{k}.png")
    for inside in ("flat", "labelled"):
        (folder / inside).mkdir()
    for i, suffix in enumerate(("png", "jpg", "gif", "webp", "tif")):
        Image.fromarray(noise[16 + i]).save(folder / "flat" / f"{i}.{suffix}")
    names = [f"{i}.png" for i in range(4)]
    for name, image in zip(names, noise, strict=False):
        Image.fromarray(image).save(folder / "labelled" / name)
    table = {"labels": [[name, i % 2] for i, name in enumerate(names)]}
    (folder / "labelled" / "dataset.json").write_text(json.dumps(table))
    pictures = [(name, (folder / "labelled" / name).read_bytes()) for name in names]
    (folder / "pictures.zip").write_bytes(write_zip(pictures))
    np.savez(folder / "a.npz", noise[:12])
    np.savez(folder / "b.npz", noise[12:])


def make_configs(folder: Path) -> None:
    from dis_ssm.config import (
        Config,
        DataConfig,
        ModelConfig,
        SampleConfig,
        TrainConfig,
        to_dict,
        to_toml,
    )

    config = Config(
        model=ModelConfig(hidden_size=16, depth=3, patch_size=4),
        data=DataConfig(source="images", image_size=SIDE),
        train=TrainConfig(steps=2, batch_size=4, lr_schedule="constant", keep=1, log_every=1),
        sample=SampleConfig(every=0, steps=1),
    )
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "plain.json").write_text(json.dumps(to_dict(config)))


def make_data_sets(folder: Path) -> None:
    import datasets

    images = [(folder / "labelled" / f"{i}.png").read_bytes() for i in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 1, 0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "table.parquet")
    table.save_to_disk(folder / "saved")
    (folder / "mnist").mkdir()
    for kind, shape in (("images-idx3", (4, SIDE, SIDE)), ("labels-idx1", (4,))):
        header = struct.pack(f">HBB{len(shape)}i", 0, 8, len(shape), *shape)
        body = bytes(i % 2 for i in range(int(np.prod(shape))))
        (folder / "mnist" / f"train-{kind}-ubyte").write_bytes(header + body)
    (folder / "cifar").mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
        (folder / "cifar" / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"label_names": ["cat", "dog"]}
    (folder / "cifar" / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def make_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = released_weights()
    torch.save(weights, folder / "weights.pt")
    torch.save(weights, folder / "weights.pth")
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "weights.safetensors")
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    make_vae(folder / "vae", block_out_channels=[8], norm_num_groups=4, **blocks)


def restore(place: Path) -> None:
    """Make `place` what it was."""
    pristine = place.with_name("pristine")
    whole = {
        path.replace(str(pristine), str(place), 1): at for path, at in contents(pristine).items()
    }
    found = contents(place)
    for path in sorted((p for p in found if found[p] != whole.get(p)), reverse=True):
        remove(Path(path))
    found = contents(place)
    for path in sorted(whole.keys() - found.keys()):
        origin = str(pristine) + path[len(str(place)) :]
        if os.path.isdir(origin):
            os.mkdir(path)
        else:
            shutil.copy2(origin, path)


def result_of(place: Path, subject: Subject, printed: str):
    if subject.result is None:
        return re.sub(r"epochs: .*", "", printed)
    path = place / subject.result
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: array.tobytes() for name, array in arrays.items()}
    if path.suffix == ".json":
        report = json.loads(path.read_text())
        return {name: value for name, value in report.items() if name not in VOLATILE}
    return path.read_bytes()


@pytest.fixture(scope="module")
def sound():
    """The results of the valid files, by subject."""
    return {}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("subject, rule", CASES)
def test_a_hostile_file_is_refused_by_name_or_changes_nothing(
    subject, rule, every, place, sound, outcome, monkeypatch
):
    monkeypatch.chdir(place)
    key, path = (subject.command, subject.result), place / subject.file
    if key not in sound:
        found = outcome(subject.command.split())
        assert (found.status != 0) == subject.refused, found
        sound[key] = None if subject.refused else result_of(place, subject, found.out)
        restore(place)
    problems, damages = [], list(rule(path.read_bytes()))
    if not every:
        random.Random(f"{subject.command} {subject.file}").shuffle(damages)
        damages = damages[:FEW]
    for damage in damages:
        try:
            damage.put(path)
            if subject.seal:
                subject.seal(place)
            before = contents(place)
            try:
                found = outcome(subject.command.split(), SECONDS)
            except (Exception, Late) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                problem, found = f"{type(error).__name__}: {error} {where}"[:200], None
            else:
                problem = judge(subject, damage, found, place, before, sound[key])
            if problem:
                problems.append(f"{damage.rule}: {problem}\n    {found and found.err[-300:]}")
        finally:
            restore(place)
    assert not problems, f"{len(problems)} of {subject.file}:\n" + "\n".join(problems)


def judge(subject: Subject, damage: Damage, found, place: Path, before: dict, sound) -> str | None:
    """What is wrong with how the command ended."""
    if (place / MARKER).exists():
        return "it was executed"
    if found.problem:
        return found.problem
    said = " ".join(found.err.split())
    name = subject.names or re.escape(Path(subject.file).name)
    if found.status == 0:
        same = result_of(place, subject, found.out) == sound
        if same and re.search(subject.harmless, damage.rule):
            return None
        if re.search(subject.left_out, damage.rule) and re.search(name, said):
            return None
        if re.search(subject.valid, damage.rule):
            return None
        return "accepted" if same else "another result"
    otherwise = re.search(subject.else_says, said)
    if not re.search(name, said) and not otherwise:
        return "the file is not named"
    if damage.field and not otherwise and not subject.names and damage.field not in said:
        return f"the field {damage.field} is not named"
    after = contents(place)
    left = [p for p in after.keys() | before.keys() if after.get(p) != before.get(p)]
    left = [p for p in left if Path(p).name != LOCK]
    return f"left behind: {left}" if left else None


def test_there_are_many(place):
    files = {subject.file: (place / subject.file).read_bytes() for subject in SUBJECTS}
    counts = [len([*rule(files[s.file])]) for s in SUBJECTS for rule in s.rules]
    print(sum(counts), "in all")
    assert sum(min(FEW, count) for count in counts) >= 150
