"""Files that version 0.1.0 wrote still open, and mean what they meant to it.

tests/data/make.py made them, with 0.1.0 itself; expected.json is what 0.1.0 computed from them.
"""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dis_ssm.build import load_model
from dis_ssm.cli import main
from dis_ssm.data.latents import check_cache
from dis_ssm.data.open import open_dataset

DATA = Path(__file__).parent / "data"
MAKE = runpy.run_path(str(DATA / "make.py"))
EXPECTED = json.loads((DATA / "expected.json").read_text())
ROUNDING = 1e-5  # of the largest value: other machines round otherwise

# another torch than that of the files
pytestmark = pytest.mark.filterwarnings("default:.*though not bit for bit")


@pytest.fixture
def old(tmp_path):
    """(name) -> a copy of tests/data/NAME."""
    return lambda name: Path(shutil.copytree(DATA / name, tmp_path / name))


def command(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def log(run):
    return (run / "log.jsonl").read_text().splitlines()


def drawn(run, *flags):
    command("sample", run, *MAKE["DRAW"].split(), *flags, "--out", run.parent / "drawn.npz")
    with np.load(run.parent / "drawn.npz") as archive:
        return torch.from_numpy(archive["arr_0"]), archive["arr_1"].tolist()


@pytest.mark.parametrize("name", ["run", "converted"])
def test_a_model_is_the_same_and_computes_the_same(name, old, assert_close):
    model, config = load_model(old(name))
    expected = EXPECTED[name]
    assert MAKE["digest"](model.state_dict()) == expected["ema"]
    with torch.no_grad():
        output = model(*MAKE["inputs"](config)).flatten()[::8]
    assert_close(output, torch.tensor(expected["output"]), ROUNDING)


def test_a_run_draws_the_same_images(old):
    images, labels = drawn(old("run"))
    assert images.dtype == torch.uint8 and images.shape == (4, 8, 8, 1)
    assert labels == EXPECTED["run"]["labels"]
    expected = torch.tensor(EXPECTED["run"]["drawn"])
    assert (images.flatten().long() - expected).abs().max() <= 1


def test_a_converted_run_draws_the_same_latents_and_shows_them(old, assert_close):
    run = old("converted")
    latents, labels = drawn(run)
    assert latents.dtype == torch.float32 and latents.shape == (4, 4, 4, 4)
    assert labels == EXPECTED["converted"]["labels"]
    assert_close(latents.flatten(), torch.tensor(EXPECTED["converted"]["drawn"]), 1e-4)
    images, _ = drawn(run, "--vae", old("vae"))
    assert images.dtype == torch.uint8 and images.shape == (4, 8, 8, 3)


def test_a_run_is_continued_as_by_its_own_version(old):
    run, steps, further = old("run"), MAKE["STEPS"], MAKE["FURTHER"]
    before = log(run)
    command("train", run, "--train.steps", further)
    after = log(run)
    assert after[:steps] == before
    lines = [json.loads(line) for line in after[steps:]]
    assert [line["step"] for line in lines] == list(range(steps + 1, further + 1))
    losses = [line["loss"] for line in lines]
    assert losses == pytest.approx(EXPECTED["run"]["further_losses"], rel=ROUNDING)
    model, _ = load_model(run)
    assert MAKE["digest"](model.state_dict()) != EXPECTED["run"]["ema"]


def test_a_finished_run_is_left_alone(old, capsys):
    run = old("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command("train", run)
    assert f"{MAKE['STEPS']} of {MAKE['STEPS']} steps" in capsys.readouterr().out
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_a_cache_holds_the_same(old, assert_close):
    folder, expected = old("latents"), EXPECTED["latents"]
    assert check_cache(folder) == {}
    latents = open_dataset(folder)
    assert (len(latents), list(latents.class_names)) == (expected["images"], expected["classes"])
    indices = torch.arange(len(latents))
    sides = [latents.stored(indices, torch.full_like(indices, side)) for side in (0, 1)]
    (moments, labels), (mirrored, _) = sides
    assert labels.tolist() == expected["labels"]
    assert MAKE["digest"]({"images": moments, "mirrored": mirrored}) == expected["moments"]
    noise = torch.linspace(-1, 1, moments[:, 0].numel()).reshape(moments[:, 0].shape)
    learned = latents.to_model_space(moments, lambda: noise).flatten()[::8]
    assert_close(learned, torch.tensor(expected["model_space"]), ROUNDING)


def test_a_cache_trains(old, tmp_path):
    cache, run = old("latents"), tmp_path / "latent run"
    sizes = ["--model.hidden-size", 16, "--model.depth", 1, "--model.patch-size", 4]
    steps = ["--train.steps", 1, "--train.batch-size", 4, "--data.flip", "--sample.every", 0]
    command("train", "--data.source", cache, "--out", run, *sizes, *steps)
    (line,) = map(json.loads, log(run))
    assert line["step"] == 1 and 0 < line["loss"] < 100
    config = load_model(run)[1]
    assert (config.model.in_channels, config.model.input_size) == (4, (8, 8))
    assert config.model.num_classes == len(EXPECTED["latents"]["classes"])
