"""Previews and scores during training: what they are, who owes them, what a signal does."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch

from dis_ssm.build import open_run
from dis_ssm.config import Config, DataConfig, ModelConfig, SampleConfig, ScoreConfig, TrainConfig
from dis_ssm.data.open import open_dataset
from dis_ssm.metrics.frechet import frechet_of_features
from dis_ssm.metrics.pixels import pixel_features
from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.storage.checkpoint import newest_intact
from dis_ssm.system.distributed import ALONE
from dis_ssm.training import train
from dis_ssm.training.preview import PreviewSampler, Scorer
from dis_ssm.training.signals import Stopped, StopSignal
from dis_ssm.training.trainer import Trainer


def config_of(out, **score):
    return Config(
        out=out,
        model=ModelConfig(hidden_size=16, depth=3, patch_size=4, d_state=4),
        data=DataConfig(),
        train=TrainConfig(steps=2, batch_size=8, lr=1e-3, log_every=1, save_every=2),
        sample=SampleConfig(every=0, steps=2, num=20, batch_size=32),
        score=ScoreConfig(**({"every": 2, "num": 40, "extractor": "pixels"} | score)),
    )


def scores(run):
    files = sorted((run / "scores").glob("training-*.json"))
    return {int(f.stem.partition("-")[2]): json.loads(f.read_text()) for f in files}


def test_a_score_is_the_frechet_distance_of_the_averaged_model(tmp_path):
    train(config_of(tmp_path))
    (found,) = scores(tmp_path).values()
    assert {"step": 2, "num": 40, "extractor": "pixels", "steps": 2}.items() <= found.items()
    config, dataset = open_run(config_of(tmp_path))
    trainer = Trainer(config)
    previews = PreviewSampler(config, dataset, ALONE)
    trainer.restore(*newest_intact(tmp_path, ("model", "ema", "optimizer")))
    images = previews.draw(trainer.ema, 40, config.sample, StopSignal())
    reference = pixel_features(dataset.batch(range(len(dataset)))[0])
    distance = frechet_of_features(pixel_features(images), reference)
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-6)


def test_a_reference_of_its_own(tmp_path):
    heldout = open_dataset("digits", "heldout")
    images = heldout.batch(range(len(heldout)))[0].permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    np.savez(tmp_path / "heldout.npz", images.contiguous().numpy())
    train(config_of(tmp_path / "a"))
    train(config_of(tmp_path / "b", reference=str(tmp_path / "heldout.npz")))
    train(config_of(tmp_path / "c", split="heldout"))
    a, b, c = (scores(tmp_path / run)[2]["frechet_distance"] for run in "abc")
    assert a != b == c and a == pytest.approx(b, rel=0.2)


def test_an_owed_score_is_made_up_for_and_changes_nothing_else(tmp_path):
    train(config_of(tmp_path))
    before = scores(tmp_path)
    (tmp_path / "scores" / "training-000002.json").unlink()
    log = (tmp_path / "log.jsonl").read_bytes()
    train(config_of(tmp_path))
    assert scores(tmp_path) == before and (tmp_path / "log.jsonl").read_bytes() == log


def test_a_signal_while_drawing_saves_the_step_and_owes_the_picture(tmp_path, monkeypatch):
    config = config_of(tmp_path / "a", every=0)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, every=1))
    train(dataclasses.replace(config, out=tmp_path / "b"))
    draw = Pipeline.draw

    def interrupted(self, *arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return draw(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "draw", interrupted)
        outcome = train(config)
    assert (outcome.step, outcome.stopped_by) == (1, signal.SIGTERM)
    assert (tmp_path / "a" / "checkpoints" / "00000001" / "COMPLETE").exists()
    assert not (tmp_path / "a" / "samples").exists()
    train(config)
    for name in ("step-000001.png", "step-000002.png"):
        a, b = (tmp_path / run / "samples" / name for run in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_a_stop_ends_a_drawing_between_its_steps(tmp_path):
    config, dataset = open_run(config_of(tmp_path))
    trainer, previews, stop = Trainer(config), PreviewSampler(config, dataset, ALONE), StopSignal()
    stop.received = signal.SIGTERM
    with pytest.raises(Stopped) as caught:
        previews.preview(trainer.ema, stop)
    assert caught.value.signal == signal.SIGTERM


def test_what_cannot_be_scored_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="dinov2' needs weights"):
        train(config_of(tmp_path / "run", extractor="dinov2"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="num is 1"):
        config_of(tmp_path, num=1)


def test_shares_of_a_preview_make_the_whole(tmp_path):
    """Ranks of a world of three, one after another."""
    config, dataset = open_run(config_of(tmp_path))
    trainer = Trainer(config)
    with torch.no_grad():
        for average in trainer.ema.tensors.values():
            average += 0.1 * torch.randn_like(average)
    whole, columns = PreviewSampler(config, dataset, ALONE).preview(trainer.ema, StopSignal())

    class Rank(type(ALONE)):
        def gather(self, value):
            return [value]

    parts = [
        PreviewSampler(config, dataset, Rank(ALONE.device, rank, 3)).draw(
            trainer.ema, 20, config.sample, StopSignal()
        )
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [6, 7, 7] and columns == 10
    assert (torch.cat(parts).int() - whole.int()).abs().max() <= 1


def test_scorer_needs_pictures(tmp_path):
    config, dataset = open_run(config_of(tmp_path))
    previews = PreviewSampler(config, dataset, ALONE)
    previews.visible = False
    with pytest.raises(ValueError, match=r"data\.vae"):
        Scorer(config.score, config.sample, config.data, dataset, previews)
