"""Sets of samples: the same whatever the processes and interruptions, and recorded."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.build import build_model
from dis_ssm.cli import main
from dis_ssm.config import Config, DiffusionConfig, ModelConfig, SampleConfig, sample_settings
from dis_ssm.encoders.decoding import Decoder
from dis_ssm.sampling.pipeline import Pipeline, open_pipeline
from dis_ssm.sampling.sets import SamplePlan, draw_grid, draw_labels, draw_set, plan_samples
from dis_ssm.storage.checkpoint import save_checkpoint
from dis_ssm.system.locks import locked

CONFIG = Config(
    model=ModelConfig(
        hidden_size=16,
        depth=3,
        patch_size=4,
        d_state=4,
        num_classes=3,
        in_channels=1,
        input_size=(8, 8),
    ),
    diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
    sample=SampleConfig(steps=3, batch_size=4),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = build_model(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    save_checkpoint(folder, 7, {"ema": model.state_dict()}, CONFIG, {}, 1)
    return folder


def sample(run, out, *options):
    assert main(["sample", str(run), "--out", str(out), *map(str, options)]) == 0
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_a_set_is_adms_file_with_a_record(run, tmp_path):
    out = tmp_path / "deep" / "set.npz"
    found = sample(run, out, "--num", 10, "--png", "--cfg-scale", 2)
    assert found["arr_0"].shape == (10, 8, 8, 1) and found["arr_0"].dtype == np.uint8
    assert found["arr_0"].std() > 5 and found["arr_1"].tolist() == [0, 1, 2] * 3 + [0]
    record = json.loads(out.with_suffix(".json").read_text())
    wanted = {"num": 10, "cfg_scale": 2.0, "steps": 3, "checkpoint_step": 7, "labels": "balanced"}
    assert wanted.items() <= record.items()
    assert sorted(os.listdir(out.parent)) == ["set", "set.json", "set.npz"]
    for i, image in enumerate(found["arr_0"]):
        with Image.open(out.parent / "set" / f"{i:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), image[..., 0])


def test_image_i_depends_on_seed_index_and_label_alone(run, tmp_path):
    ten = sample(run, tmp_path / "a.npz", "--num", 10)["arr_0"]
    six = sample(run, tmp_path / "b.npz", "--num", 8)["arr_0"]
    assert np.array_equal(ten[:8], six)  # the same batches of 4
    other = sample(run, tmp_path / "c.npz", "--num", 10, "--batch-size", 3)["arr_0"]
    assert np.abs(ten.astype(int) - other).max() <= 1
    seeded = sample(run, tmp_path / "d.npz", "--num", 10, "--seed", 1)["arr_0"]
    assert not np.array_equal(ten, seeded)


def test_two_processes_draw_what_one_draws(run, tmp_path):
    one = sample(run, tmp_path / "one.npz", "--num", 14)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "dis_ssm", "--", "sample", run, "--num", "14"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "two.npz"
    done = subprocess.run([*command, "--out", out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.npz") == 1  # one process speaks
    with np.load(out) as two:
        assert all(np.array_equal(one[name], two[name]) for name in one)


SLOWLY = """
import sys, time
from dis_ssm.cli import main
from dis_ssm.sampling import pipeline
draw = pipeline.Pipeline.draw
def slowly(self, *arguments, **options):
    time.sleep(0.3)
    return draw(self, *arguments, **options)
pipeline.Pipeline.draw = slowly
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_set_is_finished_without_drawing_again(run, tmp_path, monkeypatch):
    whole = sample(run, tmp_path / "whole.npz", "--num", 20)
    out = tmp_path / "killed.npz"
    arguments = ["sample", str(run), "--num", "20", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], env=environment)
    parts, deadline = tmp_path / "killed.parts", time.monotonic() + 60
    while len(list(parts.glob("part-*.npy"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*.npy")}
    assert not out.exists() and 2 <= len(kept) < 5
    assert main([*arguments, "--seed", "3"]) == 2  # other settings
    drawn, draw = [], Pipeline.draw

    def counted(self, indices, *rest, **options):
        drawn.append(indices.start // 4)
        return draw(self, indices, *rest, **options)

    monkeypatch.setattr(Pipeline, "draw", counted)
    finished = sample(run, out, "--num", 20)
    assert drawn == [k for k in range(5) if f"part-{k:06d}.npy" not in kept]
    assert all(np.array_equal(whole[name], finished[name]) for name in whole)
    assert not parts.exists()


def test_a_notebook_draws_what_the_command_draws(run, tmp_path):
    options = ["--num", 6, "--classes", 2, 0, "--labels", "random", "--cfg-scale", 2, "--png"]
    sample(run, tmp_path / "command" / "set.npz", *options)
    pipeline = open_pipeline(run, device="cpu")
    settings = sample_settings(pipeline.config, num=6, cfg_scale=2.0)
    plan = plan_samples(pipeline, settings, labels="random", classes=(2, 0), png=True)
    out = tmp_path / "notebook" / "set.npz"
    draw_set(pipeline, plan, out)
    kept = [{p.name: p.read_bytes() for p in out.parent.rglob("*.*")}]
    kept += [{p.name: p.read_bytes() for p in (tmp_path / "command").rglob("*.*")}]
    assert kept[0] == kept[1] and len(kept[0]) == 8
    grid = plan_samples(pipeline, settings)
    draw_grid(pipeline, grid, tmp_path / "notebook.png")
    command = ["sample", str(run), "--num", "6", "--cfg-scale", "2", "--out"]
    assert main([*command, str(tmp_path / "command.png")]) == 0
    records = [(tmp_path / f"{name}.png.json").read_text() for name in ("notebook", "command")]
    assert records[0] == records[1]


RECORD = """{"every": 5000, "num": 4, "sampler": "ddim", "steps": 3, "eta": 0.0, "cfg_scale": 1.5,
"cfg_channels": null, "cfg_interval": [2.0, 30.0], "clip_denoised": false, "seed": 0,
"batch_size": 4, "checkpoint_step": 7, "checkpoint": "CHECKPOINT", "run": "RUN", "weights": "ema",
"labels": "balanced", "vae": null, "classes": [1], "precision": "float32", "png": false,
"device": "cpu", "versions": VERSIONS, "bytes": 1}"""  # as 0.1.0 writes it


def test_a_set_of_the_first_version_is_whole(run, tmp_path):
    """A record with the keys and values of 0.1.0, which had no digest, is that of the same plan."""
    pipeline = open_pipeline(run, device="cpu")
    drawing = {"num": 4, "cfg_scale": 1.5, "cfg_interval": (2, 30), "batch_size": 9}
    plan = plan_samples(pipeline, sample_settings(CONFIG, **drawing), classes=[1])
    text = RECORD.replace("CHECKPOINT", plan.checkpoint).replace("RUN", str(run))
    record = json.loads(text.replace("VERSIONS", json.dumps(plan.versions)))
    out = tmp_path / "set.npz"
    out.write_bytes(b"x")
    out.with_suffix(".json").write_text(json.dumps(record))
    draw_set(pipeline, plan, out)
    assert out.read_bytes() == b"x"
    draw_set(pipeline, dataclasses.replace(plan, labels="random"), out)
    written = json.loads(out.with_suffix(".json").read_text())
    assert list(written) == [*record, "sha256"]
    changed = {key for key in record if written[key] != record[key]}
    assert changed == {"labels", "bytes"}


def test_plans_that_cannot_be_drawn_are_refused(run, tmp_path):
    pipeline = open_pipeline(run, device="cpu")
    settings = sample_settings(CONFIG, num=4)
    with pytest.raises(ValueError, match="class 3 is not one of the 3 classes of"):
        plan_samples(pipeline, settings, classes=[3])
    with pytest.raises(ValueError, match="use a pipeline of open_pipeline"):
        plan_samples(dataclasses.replace(pipeline, origin=None), settings)
    latents = dataclasses.replace(pipeline, decoder=Decoder(latents=True))
    with pytest.raises(ValueError, match=r"draws latents.*give vae"):
        plan_samples(latents, settings, png=True)
    out = tmp_path / "grid.png"
    with pytest.raises(ValueError, match="cannot show latents"):
        draw_grid(latents, plan_samples(latents, settings), out)
    for options in ({"png": True}, {"labels": "random"}):
        with pytest.raises(ValueError, match="is a grid"):
            draw_grid(pipeline, plan_samples(pipeline, settings, **options), out)
    assert not list(tmp_path.iterdir())


def test_other_settings_are_named_when_parts_are_refused(run, tmp_path, capsys):
    parts = tmp_path / "set.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"seed": 5}')
    (parts / "part-000000.npy").touch()
    arguments = ["sample", str(run), "--num", "4", "--out", str(tmp_path / "set.npz")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "seed: 5 -> 0" in error and "--out" in error


def test_a_refused_request_does_not_stand_in_the_way(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--num", "4", "--out", str(tmp_path / "set.npz")]
    assert main([*arguments, "--steps", "5000"]) == 2
    assert main(arguments) == 0
    assert "5000" in capsys.readouterr().err


def test_a_set_is_of_one_model(run, tmp_path):
    """Another model in the same folder, at the same step, draws another set."""
    mine, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "set.npz"
    first = sample(mine, out, "--num", 4)["arr_0"]
    torch.manual_seed(1)
    weights = {
        name: w + 0.3 * torch.randn_like(w) for name, w in build_model(CONFIG).named_parameters()
    }
    shutil.rmtree(mine)
    save_checkpoint(mine, 7, {"ema": weights}, CONFIG, {}, 1)
    assert not np.array_equal(sample(mine, out, "--num", 4)["arr_0"], first)


def test_pictures_are_those_of_the_set(run, tmp_path):
    out, pictures = tmp_path / "set.npz", tmp_path / "set"
    whole = sample(run, out, "--num", 6, "--png")["arr_0"]
    (pictures / "notes.png").touch()
    (pictures / "000001.png").unlink()
    sample(run, out, "--num", 6, "--png")
    assert np.array_equal(np.array(Image.open(pictures / "000001.png")), whole[1, ..., 0])
    sample(run, out, "--num", 3, "--png")
    names = ["000000.png", "000001.png", "000002.png", "notes.png"]
    assert sorted(os.listdir(pictures)) == names


@pytest.mark.parametrize("damage", ["set.npz", "set.json"])
def test_a_set_cut_short_is_drawn_again(run, tmp_path, damage):
    out = tmp_path / "set.npz"
    whole = sample(run, out, "--num", 4)["arr_0"]
    path = tmp_path / damage
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(sample(run, out, "--num", 4)["arr_0"], whole)


def test_one_process_at_a_time_draws_a_set(run, tmp_path, capsys):
    (tmp_path / "set.parts").mkdir()
    with locked(tmp_path / "set.parts"):
        assert main(["sample", str(run), "--num", "4", "--out", str(tmp_path / "set.npz")]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_random_labels_are_uniform_fixed_and_a_prefix_of_more():
    labels = draw_labels(6000, range(3), "random", seed=0)
    assert torch.equal(labels[:100], draw_labels(100, range(3), "random", seed=0))
    counts = labels.bincount(minlength=3)
    assert (counts - 2000).abs().max() < 4 * (6000 * (1 / 3) * (2 / 3)) ** 0.5
    assert counts.unique().numel() > 1  # balanced they are not
    assert not torch.equal(labels, draw_labels(6000, range(3), "random", seed=1))
    assert draw_labels(7, [4, 9], "balanced", 0).tolist() == [4, 9, 4, 9, 4, 9, 4]
    assert draw_labels(7, [], "random", 0) is None


def test_a_failed_batch_leaves_the_others(tmp_path):
    class Failing:
        num_classes = 0

        def draw(self, indices, y, settings):
            if 2 in indices:
                raise OSError("no space left on device")
            return torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8)

    out, plan = tmp_path / "set.npz", SamplePlan(SampleConfig(num=4, batch_size=2), 1, "a", "run")
    with pytest.raises(OSError, match="no space"):
        draw_set(Failing(), plan, out)
    assert not out.exists() and (tmp_path / "set.parts" / "part-000000.npy").exists()


def test_a_grid_is_of_one_process_and_balanced(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--out", str(tmp_path / "grid.png")]
    assert main([*arguments, "--labels", "random"]) == 2
    assert "a name that ends in .npz" in capsys.readouterr().err
    assert main([*arguments, "--png"]) == 2
    assert main([*arguments, "--num", "6"]) == 0


def test_bf16_is_close_and_recorded(run, tmp_path):
    full = sample(run, tmp_path / "full.npz", "--num", 4)["arr_0"].astype(int)
    half = sample(run, tmp_path / "half.npz", "--num", 4, "--precision", "bf16")["arr_0"]
    assert 0 < np.abs(full - half).mean() < 3
    assert json.loads((tmp_path / "half.json").read_text())["precision"] == "bf16"
