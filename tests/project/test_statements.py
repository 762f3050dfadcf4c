"""What documents and messages say is so: snippets run, defaults are those named, hints help."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.config import Config, ModelConfig
from dis_ssm.encoders.decoding import Decoder
from dis_ssm.encoders.encoding import encode
from dis_ssm.encoders.vae import load_vae
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.system.extras import declare_torchvision_operators, how_to_install, require

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with a small VAE, whose latents have half the side of its images."""
    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4}
    blocks |= {"down_block_types": ["DownEncoderBlock2D"] * 2}
    blocks |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**blocks).save_pretrained(folder)
    return folder


def test_the_snippet_about_latents_runs_as_written(vae, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    encode(tmp_path / "images", tmp_path / "latents", vae=str(vae), image_size=16)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/latents.md").read_text(), re.DOTALL)
    assert '"/data/latents"' in code
    names = {}
    exec(code.replace("/data/latents", str(tmp_path / "latents")), names)
    assert names["x"].shape == (3, 4, 8, 8) and names["x"].dtype == torch.float32


def test_a_pipeline_knows_the_size_of_what_it_draws(vae):
    config = Config(model=ModelConfig(in_channels=4, input_size=(4, 6)))
    decoder = Decoder(latents=True, vae=load_vae(vae))
    pipeline = Pipeline(torch.nn.Identity(), config, decoder, torch.device("cpu"))
    assert pipeline.shape == tuple(decoder.decode(torch.zeros(1, 4, 4, 6)).shape[1:])
    assert dataclasses.replace(pipeline, decoder=Decoder(latents=True)).shape == (4, 4, 6)


def test_extras_are_installed_from_a_checkout():
    with pytest.raises(ImportError, match=r"no_such_package: pip install '\.\[eval\]' in a check"):
        require("no_such_package")
    assert "once that is published" in how_to_install("eval")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"pip install '?dis[-_]ssm\[", page.read_text()), page.name


@pytest.mark.parametrize("name", ["ablations", "scaling", "guidance"])
def test_studies_leave_what_is_kept_alone(name):
    text = (EXPERIMENTS / f"{name}.py").read_text()
    assert "options.results or " in text and "RESULTS" not in text


@pytest.mark.parametrize("name", ["scan", "step", "throughput", "gpu_suite"])
def test_benchmarks_write_elsewhere(name):
    text = (EXPERIMENTS / "benchmarks" / f"{name}.py").read_text()
    assert "MEASURED / " in text and "RESULTS" not in text


def test_the_profiler_is_quiet():
    code = (
        "import harness, torch\n"
        "from torch.profiler import ProfilerActivity, profile\n"
        "with profile(activities=[ProfilerActivity.CPU]) as found:\n"
        "    torch.ones(2).sum()\n"
        "assert found.key_averages()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXPERIMENTS / "benchmarks"), str(ROOT / "dis")]
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_map_names_what_there_is():
    text = (ROOT / "docs" / "map.md").read_text()
    package = ROOT / "dis" / "dis_ssm"
    named = re.findall(r"`([\w./]+(?:/|\.py|\.cu))`", text)
    assert len(named) > 30
    assert not [name for name in named if not any((top / name).exists() for top in (package, ROOT))]
    rooms = {p.name for p in package.iterdir() if (p / "__init__.py").exists()}
    assert not [room for room in rooms if f"`{room}/`" not in text]
