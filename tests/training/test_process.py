"""Training for a process that the package has never seen: one of continuous time."""

import dataclasses
import json
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from dis_ssm.build import open_run
from dis_ssm.config import DataConfig, DiffusionConfig
from dis_ssm.storage.checkpoint import newest_intact
from dis_ssm.system.distributed import ALONE
from dis_ssm.training.batches import BatchLoader
from dis_ssm.training.log import RunLog, ThroughputMeter
from dis_ssm.training.loop import Loop
from dis_ssm.training.preview import PreviewSampler
from dis_ssm.training.signals import StopSignal
from dis_ssm.training.trainer import PARTS, QUARTERS, Trainer
from helpers import tiny


class StraightLine:
    """x_t = (1 - t) x_0 + t noise, t uniform in [0, 1); the model learns noise - x_0.

    It has what `dis_ssm.diffusion.process.Process` names and nothing else.
    """

    def draw_times(self, n, generator=None):
        return torch.rand(n, generator=generator)

    def bin_times(self, t, bins):
        return (t * bins).long()

    def training_losses(self, model, x0, t, y=None, noise=None):
        assert t.dtype == torch.float32 and t.shape == (len(x0),)
        at = t[:, None, None, None]
        found = model((1 - at) * x0 + at * noise, t, y)
        return {"loss": (found - (noise - x0)).square().flatten(1).mean(1)}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@lru_cache
def opened(out="unused", **settings):
    config = dataclasses.replace(
        tiny(out, **settings),
        data=DataConfig(flip=False),
        diffusion=DiffusionConfig(learn_sigma=False),  # the model predicts and nothing more
    )
    return open_run(config)


def prepared(out="unused", **settings):
    """A trainer of the toy process, and the batches it learns from."""
    config, dataset = opened(out, **settings)
    trainer = Trainer(config, process=StraightLine())
    return trainer, BatchLoader(dataset, trainer.process, config.model, config.train)


def test_times_of_the_process_reach_its_losses():
    trainer, loader = prepared(micro_batch_size=None)
    batch = loader.finish(loader.read(0))
    assert batch.t.dtype == torch.float32 and batch.t.min() > 0 and batch.t.max() < 1
    at = batch.t[:, None, None, None]
    noisy = (1 - at) * batch.x + at * batch.noise
    with torch.no_grad():
        found = trainer.predict(noisy, batch.t, batch.y, batch.block_mask)
    each = F.mse_loss(found, batch.noise - batch.x, reduction="none").mean((1, 2, 3))
    metrics = trainer.update(batch).metrics
    assert metrics["loss"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert metrics.keys() <= {"loss", "grad_norm", *(f"loss_q{i}" for i in range(1, 5))}
    for quarter in range(QUARTERS):
        inside = (batch.t >= quarter / 4) & (batch.t < (quarter + 1) / 4)
        name = f"loss_q{quarter + 1}"
        assert (name in metrics) == inside.any().item()
        if inside.any():
            assert metrics[name] == pytest.approx(each[inside].mean().item(), rel=1e-5)


def test_micro_batches_change_only_rounding():
    grads = []
    for size in (None, 3):
        trainer, loader = prepared(micro_batch_size=size)
        trainer.accumulate(loader.finish(loader.read(0)))
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


def run_loop(trainer, dataset, sums=None):
    """The loop of a run, as `train` has it; a log that writes to the run's folder."""
    config = trainer.config
    config.out.mkdir(parents=True, exist_ok=True)
    throughput = ThroughputMeter(1, None, trainer.device)
    previews = PreviewSampler(config, dataset, ALONE)
    with RunLog(config.out, trainer.step, sums or {}, throughput) as log:
        assert Loop(trainer, dataset, log, previews, None, StopSignal()).run() is None
    return [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_resumes_to_the_same_bits(tmp_path):
    settings = dict(steps=60, lr=1e-2, log_every=20, save_every=30, ema_decay=0.9)
    trainer, _ = prepared(tmp_path / "run", **settings)
    dataset = opened(tmp_path / "run", **settings)[1]
    log = run_loop(trainer, dataset)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[0]["vb"] is None and log[-1]["loss"] < 0.8 * log[0]["loss"]
    again, _ = prepared(tmp_path / "run", **settings)
    folder = tmp_path / "run" / "checkpoints" / "00000030"
    _, newest = newest_intact(tmp_path / "run", PARTS)
    assert newest["step"] == 60
    state = json.loads((folder / "state.json").read_text())
    again.restore(folder, state)
    run_loop(again, dataset, state["trainer"]["meter"])
    weights = trainer.model.state_dict()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
