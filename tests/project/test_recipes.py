"""Every configuration of the paper loads without its data, says what it costs, and has a recipe."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dis_ssm import DiS_models, create_model
from dis_ssm.build import build_model, start_from
from dis_ssm.cli import main
from dis_ssm.config import Config, ModelConfig, load_config, named_configs
from dis_ssm.costs.operations import forward_flops, training_memory
from dis_ssm.storage.checkpoint import CheckpointError, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAPER = {  # steps, batch, tokens, classes (arXiv 2402.05608, appendix; PAPER.md, section 4)
    "cifar10": (500_000, 128, 257, 0),
    "celeba64": (500_000, 128, 1025, 0),
    "imagenet256": (500_000, 1024, 258, 1000),
    "imagenet512": (1_000_000, 1024, 1026, 1000),
}


@pytest.mark.parametrize("name", sorted(set(named_configs()) - {"digits", "fashion-mnist"}))
def test_a_dry_run_needs_no_data(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = load_config(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    assert f"# parameters: {parameters:,}, " in printed
    assert f"# steps: {config.train.steps:,} of {config.train.batch_size} images" in printed
    assert re.search(r"# GFLOPs of one image's forward pass: [\d.]+ \(.*scan [\d.]+\)", printed)
    assert re.search(r"# memory: [\d.]+ GB for weights.* [\d.]+ MB kept for each image", printed)
    assert "# epochs: unknown, the data is not here" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name, capsys):
    config, (steps, batch, tokens, classes) = load_config(name), PAPER[name]
    settings = config.train
    assert (settings.steps, settings.batch_size, settings.lr) == (steps, batch, 1e-4)
    assert settings.lr_schedule == "cosine" and settings.weight_decay == 0 and config.data.flip
    assert (settings.ema_decay, settings.min_lr, settings.grad_clip) == (0.9999, 1e-6, 1.0)
    assert config.model.num_classes == classes
    assert (config.diffusion.schedule, config.diffusion.num_steps) == ("linear", 1000)
    assert config.diffusion.prediction == "epsilon" and config.diffusion.learn_sigma
    assert (config.sample.sampler, config.sample.steps) == ("ddpm", 250)
    assert (config.score.every, config.score.num) == (50_000, 10_000)
    with torch.device("meta"):
        assert build_model(config).pos_embed.shape[1] == tokens


def test_every_size_is_one_flag_away():
    config = load_config("imagenet256")
    for name in DiS_models:
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
        with torch.device("meta"):
            model = build_model(other)
            wanted = create_model(name, input_size=32, in_channels=4, num_classes=1000)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        assert shapes == {n: p.shape for n, p in wanted.named_parameters()}


def test_each_recipe_is_a_script_that_uses_its_configuration():
    folder = ROOT / "experiments" / "recipes"
    scripts = {path.stem: path.read_text() for path in folder.glob("*.sh")}
    assert set(PAPER) | {"imagenet512-finetune"} == set(scripts)
    for name, text in scripts.items():
        assert f"train {name} " in text and "evaluate" in text and "--num 50000" in text
        assert load_config(name).out.as_posix() in text
    bash = shutil.which("bash")
    for path in [*folder.glob("*.sh"), folder / "slurm.sbatch"]:
        assert subprocess.run([bash, "-n", path]).returncode == 0


@pytest.mark.parametrize("name", ["cifar10", "imagenet256"])
def test_the_commands_of_a_recipe_parse(name, tmp_path, monkeypatch, capsys):
    """Each runs as far as the missing data or run, past every flag."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "experiments" / "recipes" / f"{name}.sh").read_text()
    lines = re.findall(r"^ *launch ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    values = {"images": "absent", "vae": "absent", "latents": "absent", "run": "absent"}
    values |= {"archive": "absent", "reference": "absent", "cfg": "1.5", "set": "absent.npz"}
    assert len(lines) >= 3
    for line in lines:
        line = line.replace("\\\n", " ").replace('"$@"', "")
        words = re.sub(r"\$(\w+)", lambda m: values[m[1]], line.replace('"', "")).split()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("dis-ssm: error:") and "absent" in error, error
        assert len(error.splitlines()) == 1


def test_the_table_of_costs_is_computed():
    """A few rows of docs/recipes.md, against the model."""
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    table = {row[0].strip(): row[1:] for row in rows}
    for key in ("cifar10 DiS-S/2", "imagenet256 DiS-S/8", "imagenet256 DiS-B/4"):
        name, model = key.split()
        config = load_config(name)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=model))
        state, kept = training_memory(config)
        flops = sum(forward_flops(config).values())
        work = 3 * flops * config.train.steps * config.train.batch_size
        cells = [cell.strip() for cell in table[key]]
        assert cells[2] == f"{flops / 1e9:.1f}"
        assert cells[3:5] == [f"{state / 1e9:.1f} GB", f"{kept / 1e6:.0f} MB"]
        assert cells[5:] == [f"{work / 1e18:.3g}", f"{work / (0.4 * 989e12) / 3600:,.0f}"]


def tiny(input_size, **options):
    sizes = dict(hidden_size=16, depth=3, patch_size=2, d_state=4, in_channels=2, num_classes=3)
    return Config(model=ModelConfig(**(sizes | options), input_size=input_size))


def test_fine_tuning_starts_from_averaged_weights_at_another_size(tmp_path):
    small = tiny((8, 8))
    weights = build_model(small).state_dict()
    average = {name: tensor + 1 for name, tensor in weights.items()}
    rows = torch.linspace(0, 1, 4)[:, None].expand(4, 4).reshape(1, 16, 1)  # a ramp down the grid
    average["pos_embed"][:, 2:] = rows
    save_checkpoint(tmp_path, 1, {"ema": average, "model": weights}, small, {}, 1)
    large = build_model(tiny((16, 8)))
    start_from(large, tmp_path)
    for name, tensor in large.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, average[name])
    assert torch.equal(large.pos_embed[:, :2], average["pos_embed"][:, :2])
    grid = large.pos_embed[0, 2:, 0].detach().reshape(8, 4)
    assert (grid == grid[:, :1]).all() and (grid[:, 0].diff() > 0).all()
    torch.testing.assert_close(grid[:, 0].mean(), torch.tensor(0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[3:5, 0].mean(), torch.tensor(0.5), rtol=0, atol=1e-5)
    same = build_model(small)
    start_from(same, tmp_path)
    assert torch.equal(same.pos_embed, average["pos_embed"])
    with pytest.raises(CheckpointError, match="class_embed"):
        start_from(build_model(tiny((8, 8), num_classes=5)), tmp_path)
