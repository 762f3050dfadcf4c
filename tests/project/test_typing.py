"""The package is typed, for those who check their own code."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest

import dis_ssm
from dis_ssm import create_model
from dis_ssm.build import load_model
from dis_ssm.config import load_config
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.sampling.samplers import sample
from dis_ssm.training import train

SCRIPT = """
import torch
from dis_ssm import DiS, create_model
from dis_ssm.build import load_model
from dis_ssm.config import Config, load_config
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.sampling.samplers import sample
from dis_ssm.training.loop import Outcome, train

model: DiS = create_model("DiS-S/2", input_size=32, in_channels=4, num_classes=10)
diffusion = Diffusion(schedule="linear", num_steps=1000, learn_sigma=True)
x, y = torch.randn(8, 4, 32, 32), torch.randint(0, 10, (8,))
t = torch.randint(0, diffusion.num_steps, (8,))
losses: dict[str, torch.Tensor] = diffusion.training_losses(model, x, t, y)
images: torch.Tensor = sample(model.eval(), diffusion, x, y, steps=50, cfg_scale=1.5)
config: Config = load_config("digits")
outcome: Outcome = train(config)
trained, saved = load_model(outcome.run)
print(losses["loss"].mean(), images.shape, trained(x, t, y).shape, saved.train.lr)
"""


@pytest.mark.parametrize(
    "function", [create_model, Diffusion.training_losses, sample, load_config, load_model, train]
)
def test_public_functions_say_what_they_return(function):
    assert "return" in typing.get_type_hints(function)


def test_mypy_is_clean_on_a_small_script(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(Path(dis_ssm.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
