"""The command line: what a user types, reads and gets back."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm import cli
from dis_ssm.build import build_model, load_model
from dis_ssm.cli import main, messages
from dis_ssm.cli import score as score_module
from dis_ssm.config import (
    Config,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    load_config,
    to_toml,
)
from dis_ssm.data.images import to_model_space, to_uint8
from dis_ssm.sampling import grids as images
from dis_ssm.sampling.grids import GAP, label_columns, make_grid
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.storage.checkpoint import save_checkpoint
from dis_ssm.system import distributed
from dis_ssm.training.trainer import Trainer, Update

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of digits, trained for two steps, so that samples of other classes differ."""
    folder = tmp_path_factory.mktemp("cli")
    config = Config(
        out=folder / "run",
        model=ModelConfig(hidden_size=16, depth=1, patch_size=4, d_state=4),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        train=TrainConfig(steps=2, batch_size=16, lr=0.05, ema_warmup=1, ema_decay=0.1),
        sample=SampleConfig(every=0, steps=2, batch_size=16),
    )
    (folder / "config.toml").write_text(to_toml(config))
    assert main(["train", str(folder / "config.toml")]) == 0
    return folder / "run"


def config_of(run):
    return str(run.parent / "config.toml")


def exits(arguments):
    """Exit status, whether returned or raised by the parser."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


# ---- train ---------------------------------------------------------------------------------


def test_dry_run_prints_what_would_happen_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--train.steps", "10", "--train.lr", "2e-4", "--dry-run"]
    assert main(["train", str(ROOT / "experiments/configs/digits.toml"), *flags]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(text)
    config = load_config(tmp_path / "again.toml")
    assert config.train.steps == 10 and config.train.lr == 2e-4
    assert config.model.input_size == (8, 8) and config.model.num_classes == 10
    parameters = sum(p.numel() for p in Trainer(config).model.parameters())
    assert f"# parameters: {parameters:,}" in text
    tokens = 64 // config.model.patch_size**2 + 2
    assert f"# tokens: {tokens}\n" in text and "# steps: 10 of" in text
    assert f"# epochs: {10 * config.train.batch_size / 1195:.2f} of 1,195" in text
    assert os.listdir(tmp_path) == ["again.toml"]


def test_named_configs_and_flags(capsys):
    assert main(["train", "digits", "--data.flip", "--out", "x", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert 'out = "x"' in text and "flip = true" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--train.lrr", "1"], ["--train.lrr", "--train.lr"]),
        (["train", "digits", "--data.flip", "False"], ["False"]),
        (["train", "digits", "--train.lr", "fast"], ["fast"]),
        (["train", "digits", "--train.lr", "-1"], ["lr is -1.0", "positive"]),
        (["train", "digits", "--diffusion.schedule", "cosin"], ["cosin", "cosine"]),
        (["train", "digist"], ["'digist'", "'digits'"]),
        (["train", "digits", "--data.source", "digist", "--dry-run"], ["'digist'", "'digits'"]),
        (["train", "digits", "--model.patch-size", "3", "--dry-run"], ["patch_size 3", "8x8"]),
        (["train", "--dry-run"], ["hidden_size"]),
        (["sample"], ["RUN"]),
        (["sample", "/nowhere"], ["/nowhere", "neither a run"]),
        (["trian"], ["trian", "train"]),
    ],
)
def test_mistakes_end_with_two_and_name_themselves(arguments, words, capsys):
    assert exits(arguments) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err.upper() + captured.err for word in words), captured.err
    assert "Traceback" not in captured.err


def test_an_empty_data_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    flags = ["--data.source", "images", "--data.image-size", "8", "--out", "run"]
    assert main(["train", "digits", *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("dis-ssm: error: images is empty")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["images"]


def test_running_again_reports_or_refuses(run, capsys):
    assert main(["train", config_of(run)]) == 0
    assert f"{run} is done: 2 of 2 steps" in capsys.readouterr().out
    assert main(["train", config_of(run), "--train.seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "train.seed: 0 -> 1" in error and error.count("\n") == 1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_status_of_a_stopped_run(run, tmp_path, monkeypatch, capsys, number, status):
    update = Trainer.update

    def stopped(self, batch, stop=None):
        return update(self, batch, number)

    monkeypatch.setattr(Trainer, "update", stopped)
    assert main(["train", config_of(run), "--out", str(tmp_path / "run")]) == status
    assert "at step 1; run the same command again" in capsys.readouterr().out
    load_model(tmp_path / "run")


def test_what_is_refused_leaves_no_folder(run, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", config_of(run), "--out", str(out), "--model.depth", "2"]) == 2
    assert "depth must be odd" in capsys.readouterr().err and not out.exists()


def test_a_batch_that_no_memory_holds_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "update", lambda *_: torch.empty(10**14, dtype=torch.uint8))
    assert main(["train", config_of(run), "--out", str(tmp_path / "run")]) == 2
    assert "dis-ssm: error: out of memory: use smaller batches" in capsys.readouterr().err


def test_a_diverged_run_is_one_line(run, tmp_path, monkeypatch, capsys):
    def nan(self, batch, stop=None):
        self.nonfinite_in_a_row = 10
        self.step += 1
        return Update({"loss": float("nan")}, None)

    monkeypatch.setattr(Trainer, "update", nan)
    assert main(["train", config_of(run), "--out", str(tmp_path / "run")]) == 2
    assert "dis-ssm: error: loss or gradient not finite" in capsys.readouterr().err


# ---- sample --------------------------------------------------------------------------------


def draw(run, tmp_path, *flags, name="s.npz"):
    assert main(["sample", str(run), *flags, "--out", str(tmp_path / name)]) == 0
    return np.load(tmp_path / name)


def test_an_image_is_a_function_of_seed_and_index(run, tmp_path):
    ten = draw(run, tmp_path, "--num", "10")
    assert ten["arr_0"].shape == (10, 8, 8, 1) and ten["arr_0"].dtype == np.uint8
    assert ten["arr_1"].tolist() == list(range(10))
    again = draw(run, tmp_path, "--num", "10", name="again.npz")
    assert (again["arr_0"] == ten["arr_0"]).all()
    more = draw(run, tmp_path, "--num", "13", "--batch-size", "3", name="more.npz")
    apart = more["arr_0"][:10].astype(int) - ten["arr_0"]
    assert abs(apart).max() <= 1 and more["arr_1"].tolist() == [*range(10), 0, 1, 2]
    assert (more["arr_0"][10] != more["arr_0"][0]).any()
    other = draw(run, tmp_path, "--num", "10", "--seed", "1", name="other.npz")
    assert (other["arr_0"] != ten["arr_0"]).mean() > 0.5


def test_guidance_sampler_weights_and_classes_reach_the_sampler(run, tmp_path):
    plain = draw(run, tmp_path, "--num", "10")["arr_0"]
    for i, flags in enumerate(
        (["--cfg-scale", "4"], ["--sampler", "ddpm"], ["--steps", "3"], ["--weights", "model"])
    ):
        other = draw(run, tmp_path, "--num", "10", *flags, name=f"{i}.npz")["arr_0"]
        assert (other != plain).any(), flags
    few = draw(run, tmp_path, "--classes", "7", "2", "--per-class", "3", name="few.npz")
    assert few["arr_1"].tolist() == [7, 2, 7, 2, 7, 2]


def test_the_grid_has_one_class_a_column_and_its_path_is_printed(run, capsys):
    assert main(["sample", str(run), "--per-class", "2", "--cfg-scale", "1.5"]) == 0
    path = run / "samples" / "step-2-ddim-2-cfg-1.5-num-20-seed-0.png"
    assert capsys.readouterr().out.strip() == str(path)
    side = 64 + GAP
    assert Image.open(path).size == (10 * side - GAP, 2 * side - GAP)


def test_each_request_has_a_file_of_its_own(run, capsys):
    requests = ["", "--num 5", "--weights model", "--seed 1", "--steps 3", "--sampler ddpm"]
    requests += ["--eta 0.5", "--classes 2 7", "--classes 7 2", "--cfg-scale 2"]
    requests += ["--cfg-scale 2 --cfg-channels 0", "--cfg-scale 2 --cfg-interval 0 9"]
    for request in requests:
        assert main(["sample", str(run), *request.split()]) == 0
    paths = capsys.readouterr().out.split()
    assert len(set(paths)) == len(requests) and all(map(os.path.isfile, paths))
    many = ["--classes", *["7"] * 100]
    assert main(["sample", str(run), *many]) == 2
    assert "give --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num", "0"], "0 images"),
        (["--num", "3", "--per-class", "2"], "one of them"),
        (["--classes", "3", "10"], "class 10"),
        (["--steps", "2000"], "2000"),
        (["--device", "gpu0"], "gpu0"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--cfg-scale", "nan"], "cfg_scale is nan: must be finite"),
    ],
)
def test_wrong_requests_for_samples(run, capsys, flags, words):
    assert main(["sample", str(run), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.tiff", "folder.png", "file/x.png"])
def test_an_impossible_output_is_refused_before_anything_is_drawn(
    run, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(Pipeline, "draw", lambda *_, **__: pytest.fail("drew"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert main(["sample", str(run), "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name.split("/")[0]) in error and error.count("\n") == 1


def test_a_failed_write_leaves_no_draft(tmp_path):
    with pytest.raises(ValueError, match="2 channels"):
        images.save_images(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), None, tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_latents_are_drawn_as_numbers_not_as_images(tmp_path, capsys):
    sizes = ModelConfig(hidden_size=16, depth=1, patch_size=4, num_classes=0)
    sizes = dataclasses.replace(sizes, in_channels=4, input_size=(8, 8))
    config = Config(model=sizes)
    save_checkpoint(tmp_path, 0, {"ema": build_model(config).state_dict()}, config, {}, 1)
    flags = ["sample", str(tmp_path), "--num", "3", "--steps", "2"]
    assert main([*flags, "--out", "x.png"]) == 2
    error = capsys.readouterr().err
    assert "latents of 4 channels" in error and ".npz" in error
    assert main([*flags, "--png"]) == 2
    assert "--png" in capsys.readouterr().err
    assert main(flags) == 0
    path = Path(capsys.readouterr().out.strip())
    latents = np.load(path)["arr_0"]
    assert path.suffix == ".npz" and latents.shape == (3, 4, 8, 8)
    assert latents.dtype == np.float32 and abs(latents).max() > 1.1  # neither clipped nor rounded


def test_a_damaged_run_is_not_sampled(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    file = next((tmp_path / "run").glob("checkpoints/*/ema.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


# ---- images --------------------------------------------------------------------------------


def test_uint8_survives_model_space():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_space(levels)), levels)
    assert to_model_space(levels)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0, float("nan"), 0.0])).tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_images_in_rows_enlarged_without_blur(channels):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (5, channels, 4, 6), generator=g, dtype=torch.uint8)
    grid = np.array(make_grid(images, columns=3, scale=2)).reshape(8 * 2 + GAP, -1, channels)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // 3 * (8 + GAP), i % 3 * (12 + GAP)
        cell = grid[top : top + 8, left : left + 12]
        for offset in ((0, 0), (1, 1)):
            assert (cell[offset[0] :: 2, offset[1] :: 2] == image).all()
    assert (grid[8 + GAP :, 2 * (12 + GAP) :] == 255).all()
    with pytest.raises(ValueError, match="4 channels"):
        make_grid(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 1)


def test_labels_fill_columns():
    labels, columns = label_columns(7, [4, 5, 6])
    assert labels.tolist() == [4, 5, 6, 4, 5, 6, 4] and columns == 3
    assert label_columns(10, []) == (None, 4)
    labels, columns = label_columns(9, list(range(1000)))
    assert labels.tolist() == list(range(9)) and columns == 3


# ---- the other commands --------------------------------------------------------------------


def test_info_says_which_kernels_run(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_a_run_is_scored(run, capsys):
    flags = ["--num", "20", "--steps", "2", "--bound-images", "4", "--bound-terms", "2"]
    assert main(["score", str(run), *flags]) == 0
    *table, path = capsys.readouterr().out.splitlines()
    assert any("accuracy" in line for line in table)
    scores = json.loads(Path(path).read_text())
    assert scores["num"] == 20 and scores["checkpoint_step"] == 2
    assert main(["score", str(run), *flags, "--bound-terms", "0", "--cfg-scale", "2"]) == 0
    other = capsys.readouterr().out.splitlines()[-1]
    assert other != path and json.loads(Path(path).read_text()) == scores


def test_scores_are_printed_although_they_cannot_be_written(run, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(messages, "write_json", full)
    flags = ["--num", "20", "--steps", "2", "--bound-terms", "0", "--seed", "9"]
    assert main(["score", str(run), *flags]) == 2
    captured = capsys.readouterr()
    assert "FD-pixels" in captured.out and "no space left" in captured.err


def test_every_command_is_offered(capsys):
    assert exits(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "sample", "score", "evaluate", "encode", "check"))
    assert exits(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "digits" in text and "--train.micro-batch-size" in text
    assert cli.__doc__.startswith("dis-ssm train")


def test_images_are_scored_against_a_reference(tmp_path, capsys):
    import numpy as np

    random = np.random.default_rng(0)
    for name, scale in (("a", 255), ("b", 128)):
        images = random.integers(0, scale, (64, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    assert main(["evaluate", a, b, "--extractor", "pixels"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "a-pixels.json"
    report = json.loads(path.read_text())
    assert str(path) in printed and report["scores"]["fd_pixels"]["value"] > 0
    assert main(["evaluate", a, a, "--extractor", "pixels", "--out", str(tmp_path / "o.json")]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["scores"]["fd_pixels"]["value"] < 1e-9
    capsys.readouterr()
    assert main(["evaluate", a]) == 2
    assert "is not a run: give a REFERENCE too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{a}", "{a}", "--num", "7"], "is not a run, so no images are drawn: leave out --num"),
        (["{run}"], "; for class accuracy and bits per dimension run dis-ssm score {run}"),
        (["{a}", "{b}", "--extractor", "pixels", "--batch-size", "0"], "batch_size is 0"),
        (["{a}", "{b}", "--image-size", "8"], "is used as it is"),
        (["{a}", "{b}", "--vae", "x/y", "--seed", "1"], "leave out --seed, --vae"),
        (["{run}", "{a}", "--num", "1"], "has 1 image: a distance needs 2 or more"),
        (["{run}", "{run}"], "is a run, not images: give images, such as"),
        (["{run}", "{run}/checkpoints/00000002"], "is a run, not images"),
        (["{a}", "{run}", "--image-size", "8"], "is a run, not images"),
        (["{run}", "--extractor", "pixels", "--weights", "x"], "takes no weights"),
        (["{a}", "{b}", "--out", "{a}"], "ends in .json"),
        (["{a}", "{b}", "--save-reference", "{b}"], "would overwrite an input"),
    ],
)
def test_evaluate_refuses_what_it_would_ignore_or_destroy(run, tmp_path, capsys, arguments, words):
    places = {"run": run, "a": tmp_path / "a.npz", "b": tmp_path / "b.npz"}
    for name in "ab":
        np.savez(places[name], np.zeros((4, 8, 8, 1), np.uint8))
    before = {name: places[name].read_bytes() for name in "ab"}
    assert main(["evaluate", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert words.format(**places) in error and "object at" not in error
    assert before == {name: places[name].read_bytes() for name in "ab"}


def test_reports_of_folders_are_named_after_the_whole_folder(tmp_path, capsys):
    for name in ("cfg1.5", "cfg1.25"):
        (tmp_path / name).mkdir()
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    for name in ("cfg1.5", "cfg1.25"):
        arguments = [str(tmp_path / name), str(tmp_path / "cfg1.5"), "--extractor", "pixels"]
        assert main(["evaluate", *arguments]) == 0
        assert (tmp_path / f"{name}-pixels.json").is_file()


def test_a_run_is_scored_by_one_process(run, monkeypatch, capsys):
    two = dataclasses.replace(distributed.ALONE, size=2)
    monkeypatch.setattr(score_module, "join_world", lambda _: contextlib.nullcontext(two))
    assert main(["score", str(run)]) == 2
    assert "one process scores a run, not 2" in capsys.readouterr().err


def test_folders_of_something_else_are_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert main(["train", "digits", "--out", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").rename(tmp_path / "manifest.json")
    (tmp_path / ".lock").touch()  # as in a cache of latents
    assert main(["train", "digits", "--out", str(tmp_path)]) == 2
