import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from dis_ssm.build import build_diffusion, build_model
from dis_ssm.config import from_dict, resolve
from dis_ssm.data.datasets import TensorDataset
from dis_ssm.data.images import to_model_space
from dis_ssm.data.open import open_dataset
from dis_ssm.data.order import epoch_order
from dis_ssm.metrics import run_scores as evaluate
from dis_ssm.metrics.run_scores import (
    bits_per_dim,
    format_scores,
    score_run,
    score_samples,
    scores_path,
)
from dis_ssm.sampling.seeds import image_generators
from dis_ssm.storage.checkpoint import save_checkpoint

DIGITS = {"channels": 1, "height": 8, "width": 8, "num_classes": 10}


def tiny_config(**model):
    values = {
        "model": {"hidden_size": 16, "depth": 3, "patch_size": 4, **model},
        "diffusion": {"schedule": "cosine", "prediction": "v"},
        "sample": {"steps": 4, "batch_size": 16, "cfg_scale": 1.5 if not model else 1.0},
    }
    return resolve(from_dict(values), **DIGITS)


def write_run(run, config, step=7, ema=None, weights=None):
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():  # the zero start of the last layer would make every model alike
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {"model": weights or plain, "ema": ema or plain, "optimizer": {}}
    save_checkpoint(run, step, parts, config, {}, keep=3)
    return plain


class MeanOfClass(nn.Module):
    """Predicts v of the one image that each class is taken for; the null class is all of them."""

    null_class = 10

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion
        digits = open_dataset("digits")
        x = to_model_space(digits.images)
        means = [x[digits.labels == k].mean(0) for k in range(10)]
        self.means = nn.Parameter(torch.stack([*means, x.mean(0)]))

    def forward(self, x, t, y=None):
        x0 = self.means[torch.full_like(t, self.null_class) if y is None else y]
        noise = self.diffusion.predict(x0, x, t, "x0")[1]
        v = self.diffusion.target(x0, noise, t, "v")
        return torch.cat([v, torch.zeros_like(v)], 1)


@pytest.fixture
def oracle(monkeypatch, tmp_path):
    """A run whose model draws the mean image of the class it is asked for."""
    config = tiny_config()
    write_run(tmp_path, config)
    model = MeanOfClass(build_diffusion(config.diffusion))
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: (model, config))
    return tmp_path, model, config


def test_scores_of_real_images_are_the_real_scores():
    """Samples that are the training images the comparison uses score as those do, exactly."""
    train, heldout = open_dataset("digits"), open_dataset("digits", "heldout")
    n = len(heldout)
    images, labels = train.batch(epoch_order(len(train), seed=0, epoch=0)[:n])
    scores = score_samples(images, labels, train, heldout)
    assert scores["fd_pixels"] == scores["fd_pixels_real"] > 0
    assert scores["fd_num"] == n and scores["class_accuracy"] > 0.97
    inverted = score_samples(255 - images, (labels + 1) % 10, train, heldout)
    assert inverted["fd_pixels"] > 100 * scores["fd_pixels"]
    assert inverted["fd_pixels_real"] == scores["fd_pixels_real"]
    assert inverted["class_accuracy"] < 0.4
    assert inverted["class_accuracy_real"] == scores["class_accuracy_real"] > 0.97
    mislabelled = TensorDataset("d", train.images, (train.labels + 1) % 10, train.class_names)
    apart = score_samples(images, labels, mislabelled, heldout)
    assert apart["class_accuracy"] == scores["class_accuracy"]  # judged by held-out images alone
    assert apart["class_accuracy_real"] < 0.01
    zeros = TensorDataset("d", heldout.images, 0 * heldout.labels, heldout.class_names)
    assert score_samples(images[:50], labels[:50], train, zeros)["class_accuracy"] is None
    few = score_samples(images[:50], None, train, heldout)
    assert few["fd_num"] == 50 and few["class_accuracy"] is None
    assert few["fd_pixels_real"] > scores["fd_pixels_real"]  # its bias at small n


def test_run_of_an_oracle(oracle):
    run, model, _ = oracle
    scores = score_run(run, num=45, bound_images=20, bound_terms=4, keep=True, progress=False)
    assert scores["samples"] == "step-7-ddim-4-cfg-1.5-num-45-seed-0"
    assert scores_path(run, scores).name == f"{scores['samples']}-bound-20x4.json"
    json.dumps(scores, allow_nan=False)
    assert scores["class_accuracy"] == 1.0
    assert scores["class_accuracy_by_class"] == {str(k): 1.0 for k in range(10)}
    made = {"num": 45, "sampler": "ddim", "steps": 4, "cfg_scale": 1.5, "seed": 0}
    made |= {"checkpoint_step": 7, "weights": "ema", "device": "cpu", "bits_per_dim_images": 20}
    assert {name: scores[name] for name in made} == made
    assert scores["versions"]["torch"] == torch.__version__
    assert not model._forward_hooks
    kept = np.load(run / "samples" / f"{scores['samples']}.npz", allow_pickle=False)
    assert kept["arr_0"].shape == (45, 8, 8, 1) and kept["arr_0"].dtype == np.uint8
    assert kept["arr_1"].tolist() == [i % 10 for i in range(45)]
    means = model.means.detach()
    guided = means[10] + 1.5 * (means[:10] - means[10])  # what guidance makes of the oracle
    expected = ((guided + 1) * 127.5).round().clamp(0, 255)
    got = torch.from_numpy(kept["arr_0"]).permute(0, 3, 1, 2)
    assert (got[:10] - expected).abs().max() <= 1
    assert torch.equal(got[10:20], got[:10])


def test_options_override_the_runs(oracle):
    run, _, _ = oracle
    options = {"steps": 3, "sampler": "ddpm", "cfg_scale": 1.0, "seed": 5, "batch_size": 7}
    scores = score_run(run, num=20, bound_terms=0, progress=False, **options)
    del options["batch_size"]
    assert {name: scores[name] for name in options} == options
    assert "bits_per_dim" not in scores and "bits" not in format_scores(scores)


def test_bound_is_the_mean_of_the_whole_bound():
    """The estimate agrees with the sum over every timestep of the same images."""
    config = tiny_config()
    diffusion = dataclasses.replace(build_diffusion(config.diffusion), num_steps=40)
    model, heldout = MeanOfClass(diffusion), open_dataset("digits", "heldout")
    images, labels = heldout.batch(epoch_order(len(heldout), seed=0, epoch=0)[:64])
    generators = image_generators(1, range(64))
    whole = diffusion.variational_bound(
        model, to_model_space(images), labels, generator=generators, clip_denoised=True
    ).total
    got = bits_per_dim(model, diffusion, heldout, conditional=True, num=64, terms=16)
    assert abs(got["bits_per_dim"] - whole.mean()) < 0.2 * whole.mean()
    stderr = whole.double().std().item() / 8
    assert math.isclose(got["bits_per_dim_stderr"], stderr, rel_tol=0.3)
    assert got["bits_per_dim_images"] == 64 and got["bits_per_dim_terms"] == 16
    assert got["bits_per_dim_levels"] == 17
    assert got["bits_per_dim_decoder"] > got["bits_per_dim_prior"] > 0
    again = bits_per_dim(
        model, diffusion, heldout, conditional=True, num=64, terms=16, batch_size=9
    )
    assert math.isclose(again["bits_per_dim"], got["bits_per_dim"], rel_tol=1e-5)
    blind = bits_per_dim(model, diffusion, heldout, conditional=False, num=64, terms=16)
    assert blind["bits_per_dim"] > got["bits_per_dim"] + 3 * got["bits_per_dim_stderr"]


def test_real_model_uses_the_average_and_repeats(tmp_path):
    config = tiny_config()
    plain = write_run(tmp_path, config)
    broken = {name: tensor * float("nan") for name, tensor in plain.items()}
    write_run(tmp_path, config, step=8, weights=broken)
    options = {"num": 20, "bound_images": 8, "bound_terms": 2, "progress": False}
    first = score_run(tmp_path, **options)
    second = score_run(tmp_path, **options)
    assert first["checkpoint_step"] == 8
    varying = {"seconds"}
    assert {k: v for k, v in first.items() if k not in varying} == {
        k: v for k, v in second.items() if k not in varying
    }
    older = score_run(tmp_path / "checkpoints" / "00000007", **options)
    assert older["checkpoint_step"] == 7 and older["fd_pixels"] == first["fd_pixels"]
    assert scores_path(tmp_path, older) != scores_path(tmp_path, first)
    other = score_run(tmp_path, **options | {"seed": 1})
    assert other["fd_pixels"] != first["fd_pixels"]

    write_run(tmp_path, config, step=9, ema=broken)
    with pytest.raises(ValueError, match="pass 1 of the model is not finite"):
        score_run(tmp_path, **options)


def test_unconditional_run_has_no_class_accuracy(tmp_path):
    write_run(tmp_path, tiny_config(num_classes=0))
    options = {"num": 20, "bound_images": 8, "bound_terms": 2, "progress": False}
    scores = score_run(tmp_path, keep=True, **options)
    assert scores["class_accuracy"] is None and scores["fd_pixels"] > 0
    assert "not defined" in format_scores(scores)
    assert np.load(tmp_path / "samples" / f"{scores['samples']}.npz").files == ["arr_0"]
    with pytest.raises(ValueError, match=r"cfg_scale 2\.0 needs classes"):
        score_run(tmp_path, cfg_scale=2.0, **options)


def test_bad_requests_fail_before_sampling(tmp_path, monkeypatch):
    config = tiny_config()
    write_run(tmp_path, config)
    (tmp_path / "samples" / "step-7-ddim-4-cfg-1.5-num-600-seed-0.npz").mkdir(parents=True)
    monkeypatch.setattr(evaluate, "draw_images", lambda *_: pytest.fail("sampled first"))
    for options, message in (
        ({"num": 1}, "num is 1"),
        ({"bound_terms": 3}, "bound_terms is 3"),
        ({"bound_images": 0}, "bound_images 0"),
        ({"steps": 0}, "steps is 0"),
        ({"bound_terms": 2000}, "bound_terms is 2000: .* at most 1998"),
        ({"keep": True}, "is a folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            score_run(tmp_path, **options)
    with pytest.raises(ValueError, match="neither a run"):
        score_run(tmp_path / "nowhere")


def test_table_shows_the_numbers():
    train, heldout = open_dataset("digits"), open_dataset("digits", "heldout")
    scores = score_samples(*train.batch(range(100)), train, heldout)
    scores |= {"bits_per_dim": 2.3456, "bits_per_dim_stderr": 0.0123}
    scores |= {"bits_per_dim_images": 9, "bits_per_dim_terms": 8, "bits_per_dim_levels": 17}
    scores |= {"source": "digits", "num": 100}
    scores |= {"sampler": "ddim", "steps": 50, "cfg_scale": 1.5, "seed": 3, "weights": "ema"}
    scores |= {"checkpoint_step": 12, "device": "cpu", "seconds": 1.0}
    lines = format_scores(scores).splitlines()
    assert f"{scores['class_accuracy']:.3f}" in lines[1]
    assert (
        f"{scores['fd_pixels']:.4f}" in lines[2] and f"{scores['fd_pixels_real']:.4f}" in lines[2]
    )
    assert "2.346 ± 0.012" in lines[3]
    assert "guidance 1.5, seed 3; ema weights of step 12" in lines[4]


def test_judge_reads_no_more_than_it_needs(monkeypatch):
    """A data set of any size is scored from fixed random subsets."""
    monkeypatch.setattr(evaluate, "MAX_JUDGED", 30)
    read = []

    class Counting(TensorDataset):
        def _images(self, indices):
            read.append(len(indices))
            return super()._images(indices)

    digits = open_dataset("digits")
    sets = [Counting("d", digits.images, digits.labels, digits.class_names) for _ in range(2)]
    score_samples(digits.images[:40], digits.labels[:40], *sets)
    assert sorted(read) == [30, 30, 40, 40]


def test_a_run_is_not_scored_on_data_of_another_shape(tmp_path):
    values = {"hidden_size": 16, "depth": 1, "patch_size": 4, "num_classes": 0}
    shape = {"in_channels": 3, "input_size": (8, 8)}
    write_run(tmp_path, from_dict({"model": values | shape}))
    with pytest.raises(ValueError, match="not the data that it learned from"):
        score_run(tmp_path, num=4, bound_terms=0, progress=False)
