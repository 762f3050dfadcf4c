"""What cannot be is refused by name before any work; what wrappers add is looked through."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dis_ssm import DiS, cli
from dis_ssm.config import DiffusionConfig, ModelConfig, SampleConfig, ScoreConfig, TrainConfig
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.encoders.vae import load_vae
from dis_ssm.metrics.statistics import StoredStatistics
from dis_ssm.sampling.samplers import sample
from dis_ssm.system.extras import declare_torchvision_operators
from dis_ssm.system.nearest import nearest
from dis_ssm.version import __version__

HUGE = 10**20


@pytest.mark.parametrize(
    "section, name",
    [
        (ModelConfig, "hidden_size"),
        (ModelConfig, "depth"),
        (ModelConfig, "d_state"),
        (ModelConfig, "num_classes"),
        (DiffusionConfig, "num_steps"),
        (TrainConfig, "steps"),
        (TrainConfig, "batch_size"),
        (TrainConfig, "seed"),
        (SampleConfig, "num"),
        (SampleConfig, "steps"),
        (SampleConfig, "cfg_channels"),
        (ScoreConfig, "num"),
    ],
)
def test_numbers_have_bounds_that_are_named(section, name):
    with pytest.raises(ValueError, match=rf"{name} is {HUGE}: must be at most [\d,]+"):
        section(**{name: HUGE})


def test_channels_to_guide_are_not_negative():
    with pytest.raises(ValueError, match="cfg_channels is -1"):
        SampleConfig(cfg_channels=-1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["flops", "--size", "1000000000000", "32"], "must be 1 to 65,536"),
        (["flops", "--classes", str(HUGE)], "classes 0 to 10,000,000"),
        (["trian", "digits"], "unknown command 'trian': did you mean 'train'?"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dis-ssm {__version__}\n"


def test_a_mistyped_vae_does_not_ask_the_hub(monkeypatch):
    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    def asked(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", asked)
    with pytest.raises(ValueError, match="cannot load VAE 'abc': there is no such folder"):
        load_vae("abc")


def test_noise_of_another_shape_is_refused():
    diffusion, x0, t = Diffusion(), torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"noise must have the shape of x0, \(2, 1, 4, 4\)"):
        diffusion.q_sample(x0, t, torch.zeros(1, 1, 4, 4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiS(
        input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=3, num_classes=3
    ).eval()
    with torch.no_grad():
        model.decoder.linear.weight.normal_()
        model.class_embed.weight.normal_()
    return model


@pytest.mark.parametrize("t", [5, torch.tensor(5), 5.0])
def test_one_time_is_that_of_all_images(model, t):
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    assert torch.equal(model(x, t, y), model(x, torch.full((3,), 5), y))


def test_guidance_of_an_odd_batch_says_what_is_wrong(model):
    with pytest.raises(ValueError, match="x must hold the same images twice, got 3"):
        model.forward_with_cfg(torch.zeros(3, 1, 4, 4), torch.zeros(3), torch.zeros(3).long(), 2.0)


class Diffusers(nn.Module):
    """Returns what diffusers' models return."""

    def __init__(self, model, wrap):
        super().__init__()
        self.module, self.wrap = model, wrap

    def forward(self, *inputs):
        return self.wrap(self.module(*inputs))


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda m: Diffusers(m, lambda out: SimpleNamespace(sample=out)),
        lambda m: Diffusers(m, lambda out: (out,)),
    ],
)
def test_wrapped_models_sample_and_train_as_they_are(model, wrap):
    diffusion, noise, y = Diffusion(num_steps=20), torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    options = {"steps": 3, "sampler": "ddim", "cfg_scale": 2.0}
    wrapped = wrap(model).eval()
    wanted = sample(model, diffusion, noise, y, **options)
    assert torch.equal(sample(wrapped, diffusion, noise, y, **options), wanted)
    losses = [
        diffusion.training_losses(m, noise, torch.tensor([3, 9]), y, noise)["loss"]
        for m in (model, wrapped)
    ]
    assert torch.equal(*losses)


def test_a_model_that_returns_no_tensor_is_named():
    with pytest.raises(ValueError, match="the model returned NoneType"):
        sample(lambda x, t, y: None, Diffusion(num_steps=4), torch.zeros(1, 1, 2, 2), steps=2)


def test_float32_statistics_of_few_images_are_a_covariance(tmp_path):
    import numpy as np

    features = np.random.default_rng(0).normal(size=(20, 64))
    cov = np.cov(features, rowvar=False).astype(np.float32)
    np.savez(tmp_path / "few.npz", mu=features.mean(0).astype(np.float32), sigma=cov)
    stored = StoredStatistics.load(tmp_path / "few.npz").gaussians["pool"]
    assert stored.distance(stored) == pytest.approx(0, abs=1e-3)


def test_what_is_no_covariance_is_named_with_its_file_before_any_pass(tmp_path):
    import numpy as np

    path = tmp_path / "wrong.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.diag([1.0, -0.5]))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*not a covariance"):
        StoredStatistics.load(path)


@pytest.mark.parametrize(
    "word, words, near",
    [
        ("mnist", ("digits", "fashion-mnist"), ["fashion-mnist"]),
        ("TRIAN", ("train", "info"), ["train"]),
        ("golden retriver", ("Golden Retriever", "cat"), ["Golden Retriever"]),
        ("xyz", ("digits", "train"), []),
    ],
)
def test_near_names_are_found_whatever_their_case(word, words, near):
    assert nearest(word, words) == near
