"""Training: rates, groups, the average, accumulation, and a resume that changes no bit."""

import dataclasses
import json
import math
import os
import signal
import sys
import types
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import faults
from dis_ssm.build import build_diffusion, load_model, open_run
from dis_ssm.config import SampleConfig, to_toml
from dis_ssm.costs.operations import training_flops
from dis_ssm.data.open import open_dataset
from dis_ssm.sampling.draw import draw_images
from dis_ssm.sampling.grids import make_grid
from dis_ssm.storage.checkpoint import complete_checkpoints, newest_intact, read_part
from dis_ssm.storage.run import exclusive
from dis_ssm.system.machine import pick_device
from dis_ssm.system.seeds import derive_seed
from dis_ssm.training import train
from dis_ssm.training.batches import BatchLoader
from dis_ssm.training.log import truncate_log
from dis_ssm.training.optimizer import learning_rate
from dis_ssm.training.preview import PreviewSampler
from dis_ssm.training.trainer import PARTS, Trainer
from helpers import tiny, trainer_of
from ranks import TIMES, Ranks, lines_so_far


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@lru_cache
def digits():
    return open_dataset("digits")


def intact(run):
    folder, state = newest_intact(run, PARTS)
    return folder, state, {name: read_part(folder, state, name) for name in PARTS}


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


# ---- batches -------------------------------------------------------------------------------


def draw_batch(config, dataset, step):
    process, flip = build_diffusion(config.diffusion), config.data.flip
    loader = BatchLoader(dataset, process, config.model, config.train, flip=flip)
    return loader.finish(loader.read(step))


def test_a_batch_depends_on_seed_and_step_alone():
    config = open_run(tiny())[0]
    first = draw_batch(config, digits(), 3)
    torch.manual_seed(99)
    again = draw_batch(config, digits(), 3)
    for name in ("x", "y", "t", "noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(draw_batch(config, digits(), 4), name))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert not torch.equal(first.noise, draw_batch(other, digits(), 3).noise)


def test_batches_hold_each_image_once_an_epoch_half_mirrored_a_tenth_unlabelled():
    config = open_run(tiny(batch_size=len(digits())))[0]
    batch = draw_batch(config, digits(), 0)
    images, labels = digits().batch(range(len(digits())))
    plain = {x.numpy().tobytes(): int(y) for x, y in zip(images, labels, strict=True)}
    mirrored = dropped = 0
    seen = set()
    for x, y in zip(((batch.x + 1) * 127.5).round().byte(), batch.y.tolist(), strict=True):
        if x.numpy().tobytes() not in plain:
            x = x.flip(-1).contiguous()
            mirrored += 1
        seen.add(x.numpy().tobytes())
        assert y in (plain[x.numpy().tobytes()], 10)
        dropped += y == 10
    assert seen == set(plain)
    assert 0.42 < mirrored / len(images) < 0.58 and 0.06 < dropped / len(images) < 0.14
    assert 0 <= batch.t.min() < 10 and 990 <= batch.t.max() < 1000


def test_the_model_does_not_drop_labels_again():
    trainer = trainer_of(tiny())
    assert trainer.model.training and trainer.model.class_dropout_prob == 0
    assert trainer.model.null_class == 10


def test_seeds_of_different_keys_differ():
    keys = [(name, s, n) for name in ("batch", "forward") for s in range(20) for n in range(20)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


# ---- one step ------------------------------------------------------------------------------


def awaken(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def gradients(micro_batch_size):
    config = tiny(micro_batch_size=micro_batch_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.0))
    trainer = trainer_of(config)
    trainer.model.double()
    awaken(trainer.model)
    batch = draw_batch(trainer.config, digits(), 0)
    batch = dataclasses.replace(batch, x=batch.x.double(), noise=batch.noise.double())
    losses, _ = trainer.accumulate(batch)
    return losses, {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_large_batch(size):
    losses, whole = gradients(None)
    parts_losses, parts = gradients(size)
    for name, value in losses.items():
        torch.testing.assert_close(parts_losses[name], value, rtol=1e-10, atol=0)
    for name, grad in whole.items():
        assert grad.abs().max() > 0, name
        tolerance = 1e-9 * grad.abs().max().item() + 1e-12
        torch.testing.assert_close(parts[name], grad, rtol=0, atol=tolerance)


def test_an_update_has_the_scheduled_rate_and_enters_the_average():
    trainer = trainer_of(tiny(warmup_steps=4, ema_warmup=3))
    history = [trainer.model.pos_embed.detach().clone()]
    for step in range(2):
        trainer.update(draw_batch(trainer.config, digits(), step))
        history.append(trainer.model.pos_embed.detach().clone())
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(step, trainer.config.train)
    # the decays are 1/3 and 2/4, so the weights of the three states are 1/6, 2/6 and 3/6
    expected = (history[0] + 2 * history[1] + 3 * history[2]) / 6
    torch.testing.assert_close(trainer.ema.tensors["pos_embed"], expected, rtol=1e-5, atol=1e-7)
    fresh = trainer_of(tiny(warmup_steps=4))
    before = fresh.model.decoder.linear.bias.detach().clone()
    fresh.update(draw_batch(fresh.config, digits(), 0))
    moved = (fresh.model.decoder.linear.bias - before).abs().max().item()
    assert moved == pytest.approx(1e-3 / 4, rel=0.01)  # Adam's first step is the rate itself


def test_gradients_are_clipped_and_the_norm_before_is_logged():
    trainer = trainer_of(tiny(grad_clip=1e-3))
    metrics = trainer.update(draw_batch(trainer.config, digits(), 0)).metrics
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert metrics["grad_norm"] > 0.01 and norm == pytest.approx(1e-3, rel=1e-3)
    free = trainer_of(tiny(grad_clip=0.0))
    metrics = free.update(draw_batch(free.config, digits(), 0)).metrics
    norm = torch.stack([p.grad.norm() for p in free.model.parameters()]).norm()
    assert norm == pytest.approx(metrics["grad_norm"], rel=1e-5)


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32():
    full, half = trainer_of(tiny()), trainer_of(tiny(precision="bf16"))
    awaken(full.model), awaken(half.model)
    kinds = set()
    module = next(m for m in half.model.modules() if isinstance(m, nn.Linear))
    module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    batch = draw_batch(full.config, digits(), 0)
    exact, rounded = (trainer.update(batch).metrics["loss"] for trainer in (full, half))
    assert kinds == {torch.bfloat16} and exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        trainer = trainer_of(tiny(grad_checkpointing=flag))
        awaken(trainer.model)
        trainer.update(draw_batch(trainer.config, digits(), 0))
        grads.append([p.grad for p in trainer.model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def poison(monkeypatch, steps):
    finish = BatchLoader.finish

    def poisoned(self, host_batch):
        batch = finish(self, host_batch)
        if host_batch.step in steps:
            batch.x[0, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(BatchLoader, "finish", poisoned)


def test_a_nonfinite_step_changes_nothing_and_is_counted(tmp_path, monkeypatch, capsys):
    trainer = trainer_of(tiny())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    bad = draw_batch(trainer.config, digits(), 0)
    bad.noise[2, 0, 1, 1] = math.inf
    assert not math.isfinite(trainer.update(bad).metrics["loss"])
    assert all(torch.equal(before[n], v) for n, v in trainer.model.state_dict().items())
    assert not any(s["step"] for s in trainer.optimizer.state.values())
    assert trainer.ema.updates == 0
    assert (trainer.step, trainer.nonfinite, trainer.nonfinite_in_a_row) == (1, 1, 1)
    poison(monkeypatch, {1, 3})
    train(tiny(tmp_path, max_nonfinite=2))
    assert "2 of 6 steps were not finite and were skipped\n" in capsys.readouterr().out
    lines = read_log(tmp_path)
    assert [line["nonfinite"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False, False]


def test_nonfinite_steps_in_a_row_stop_the_run_with_its_state_saved(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5})
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*step 5.*train\.lr"):
        train(tiny(tmp_path, max_nonfinite=3))
    _, state, parts = intact(tmp_path)
    assert state["step"] == 5 and state["trainer"]["nonfinite_in_a_row"] == 3
    assert all(t.isfinite().all() for part in parts.values() for t in part.values())


# ---- whole runs ----------------------------------------------------------------------------


def assert_same_run(a, b):
    (_, state_a, parts_a), (_, state_b, parts_b) = intact(a), intact(b)
    assert state_a["step"] == state_b["step"]
    for part in PARTS:
        assert parts_a[part].keys() == parts_b[part].keys() != set()
        for name, tensor in parts_a[part].items():
            assert torch.equal(tensor, parts_b[part][name]), f"{part} {name}"
    assert untimed(read_log(a)) == untimed(read_log(b))


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = dict(save_every=3, ema_warmup=3)
    config, slow = to_toml(tiny(killed, **settings)), partial(faults.slow_steps, seconds=0.4)
    ranks = Ranks(killed, 1, config=config, fault=slow)
    try:
        train(tiny(whole, **settings))
        ranks.wait_for(lambda: len(lines_so_far(killed)) >= 4)
    finally:
        ranks.send(signal.SIGKILL)
    assert ranks.ended() == [-signal.SIGKILL]
    assert [f.name for f in complete_checkpoints(killed)] == ["00000003"]
    assert untimed(read_log(killed)[:4]) == untimed(read_log(whole)[:4])
    with (killed / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    outcome = train(tiny(killed, **settings))
    assert (outcome.step, outcome.stopped_by) == (6, None)
    assert [line["step"] for line in read_log(killed)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_can_be_continued(tmp_path, monkeypatch, number):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny(whole, log_every=3))
    update = Trainer.update

    def interrupted(self, batch, received=None):
        if self.step == 0:
            signal.raise_signal(number)
        return update(self, batch, received)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        outcome = train(tiny(stopped, log_every=3))
    assert (outcome.step, outcome.stopped_by) == (2, number)
    assert signal.getsignal(number) is handler
    assert [f.name for f in complete_checkpoints(stopped)] == ["00000002"]
    train(tiny(stopped, log_every=3))
    assert_same_run(whole, stopped)  # means over steps 1-3 too, though step 2 was the last saved


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    train(tiny(tmp_path, steps=2))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    assert train(tiny(tmp_path, steps=2)).step == 2
    assert f"{tmp_path} is done: 2 of 2 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}


def test_other_settings_are_refused_and_harmless_ones_are_not(tmp_path):
    train(tiny(tmp_path, steps=2, lr_schedule="constant"))
    with pytest.raises(
        ValueError, match=r"train\.lr: 0\.001 -> 0\.002.*train\.seed: 0 -> 1.*--out"
    ):
        train(tiny(tmp_path, steps=2, lr_schedule="constant", lr=2e-3, seed=1))
    outcome = train(tiny(tmp_path, steps=3, lr_schedule="constant", log_every=2, keep=7))
    assert outcome.step == 3
    assert json.loads((tmp_path / "config.json").read_text())["train"]["keep"] == 7


def test_a_run_that_moves_to_other_threads_says_that_bits_may_change(tmp_path):
    config = tiny(tmp_path, steps=1, lr_schedule="constant")
    train(config)
    torch.set_num_threads(2)
    longer = dataclasses.replace(config.train, steps=2)
    with pytest.warns(UserWarning, match="not bit for bit: threads 1 -> 2"):
        train(dataclasses.replace(config, train=longer))


def test_a_damaged_checkpoint_is_passed_over_aloud_and_replaced(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    train(tiny(whole, save_every=2))
    train(tiny(damaged, save_every=2))
    for name in ("00000004", "00000006"):
        file = damaged / "checkpoints" / name / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=r"optimizer\.safetensors is damaged") as caught:
        train(tiny(damaged, save_every=2))
    assert len(caught) == 2
    assert_same_run(whole, damaged)


def test_previews_are_drawn_from_fixed_seeds_and_change_no_training(tmp_path):
    config = tiny(tmp_path / "a", steps=2)
    drawn = dataclasses.replace(config, sample=SampleConfig(every=1, num=20, steps=2))
    train(drawn)
    train(dataclasses.replace(drawn, out=tmp_path / "b"))
    names = ["step-000001.png", "step-000002.png"]
    assert sorted(os.listdir(tmp_path / "a" / "samples")) == names
    a, b = ([(tmp_path / run / "samples" / n).read_bytes() for n in names] for run in "ab")
    assert a == b and a[0] != a[1]
    train(dataclasses.replace(config, out=tmp_path / "c"))
    assert_same_run(tmp_path / "a", tmp_path / "c")


def test_a_preview_is_what_the_averaged_weights_draw(tmp_path):
    config = tiny(tmp_path, lr=0.05, steps=3)
    config = dataclasses.replace(config, sample=SampleConfig(every=3, num=20, steps=2))
    train(config)
    preview = np.array(Image.open(tmp_path / "samples" / "step-000003.png"))
    grids = {}
    for weights in ("ema", "model"):
        model, config = load_model(tmp_path, weights=weights)
        labels = torch.arange(20) % 10
        arguments = (
            model,
            build_diffusion(config.diffusion),
            (1, 8, 8),
            range(20),
            labels,
            config.sample,
        )
        images = draw_images(*arguments)
        grids[weights] = np.array(make_grid(images, columns=10))
    assert (preview == grids["ema"]).all() and (preview != grids["model"]).any()


def test_a_preview_that_a_killed_process_owed_is_drawn_by_the_next(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    config = tiny(tmp_path / "a", steps=2, save_every=1)
    config = dataclasses.replace(config, sample=SampleConfig(every=1, num=4, steps=2))
    train(dataclasses.replace(config, out=tmp_path / "b"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PreviewSampler, "preview", killed)
        train(config)
    assert complete_checkpoints(tmp_path / "a") and not (tmp_path / "a" / "samples").exists()
    train(config)
    previews = [tmp_path / run / "samples" / f"step-00000{n}.png" for n in (1, 2) for run in "ab"]
    expected = [path.read_bytes() for path in previews]
    assert expected[0] == expected[1] and expected[2] == expected[3]
    previews[2].unlink()  # the last one, of a run that is done
    train(config)
    assert previews[2].read_bytes() == expected[3]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_compiled_model_is_the_one_that_trains(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    plain, fast = trainer_of(tiny()), trainer_of(tiny(compile=True))
    batch = draw_batch(plain.config, digits(), 0)
    assert compiled == [fast.model] and fast.update(batch) == plain.update(batch)
    assert "_orig_mod" not in "".join(fast.model.state_dict())


def test_a_run_has_one_process_and_a_folder_of_its_own(tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(ValueError, match="another process"):
        train(tiny(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run"):
        train(tiny(tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


@pytest.mark.parametrize("tail", ['{"step": 3, "loss"', "", '{"step": 3}\n{"step": 4}\n', "[]\n"])
def test_log_is_cut_after_the_resumed_step(tmp_path, tail):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    truncate_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_unconditional_training_ignores_labels(tmp_path):
    config = tiny(tmp_path, steps=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
    config = open_run(config)[0]
    assert draw_batch(config, digits(), 0).y is None
    assert train(config).step == 1


def test_unusable_devices_are_named():
    with pytest.raises(ValueError, match="'gpu0' cannot be used"):
        pick_device("gpu0")


def test_weights_and_biases_gets_every_line(tmp_path, monkeypatch):
    """A stand-in with the calls that wandb documents: init, log, finish, Image."""
    begun, logged = [], []

    class Page:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**options):
        begun.append(options)
        return Page()

    stand_in = types.SimpleNamespace(init=init, Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    config = tiny(tmp_path / "run", steps=2, wandb="a-project")
    config = dataclasses.replace(config, sample=SampleConfig(every=2, num=4, steps=2))
    train(config)
    (options,) = begun
    assert options["project"] == "a-project" and options["resume"] == "allow"
    assert options["config"]["train"]["lr"] == 1e-3
    scalars = [entry for entry in logged if entry != "finished" and "loss" in entry[1]]
    assert [step for step, _ in scalars] == [1, 2] and logged[-1] == "finished"
    for (_, values), line in zip(scalars, read_log(tmp_path / "run"), strict=True):
        assert values["loss"] == line["loss"] and values["lr"] == line["lr"]
    assert (2, {"samples": (262, 64)}) in logged
    (tmp_path / "run" / "samples" / "step-000002.png").unlink()
    train(config)
    assert begun[1]["id"] == options["id"]  # the same page
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"dis-ssm\[wandb\]"):
        train(tiny(tmp_path / "other", wandb="a-project"))


def test_lines_say_how_the_time_was_spent(tmp_path):
    train(tiny(tmp_path, log_every=3))
    config, _ = open_run(tiny(tmp_path))
    for line in read_log(tmp_path):
        assert 0 <= line["data_wait"] < 1 and line["memory_gb"] > 0.05 and line["mfu"] is None
        work = training_flops(config) * line["images_per_second"] / 1e12
        assert line["tflops"] == pytest.approx(work, abs=6e-5)
        quarters = [line[f"loss_q{i}"] for i in (1, 2, 3, 4)]
        assert min(quarters) < line["loss"] < max(quarters)


def test_losses_by_quarter_of_the_timesteps_make_the_whole():
    trainer = trainer_of(tiny(batch_size=32, micro_batch_size=5))
    batch = draw_batch(trainer.config, digits(), 0)
    means, quarters = trainer.accumulate(batch)
    assert quarters[1].tolist() == (batch.t * 4 // 1000).bincount(minlength=4).tolist()
    torch.testing.assert_close(quarters[0].sum() / 32, means["loss"], rtol=1e-5, atol=0)


def test_stochastic_depth_is_drawn_with_the_batch():
    config = open_run(tiny(batch_size=512))[0]
    mask = draw_batch(config, digits(), 0).block_mask
    assert mask.shape == (3, 512) and mask.dtype == torch.bool
    assert mask[0].all()
    for i, rate in ((1, 0.15), (2, 0.3)):
        assert (~mask[i]).float().mean().item() == pytest.approx(rate, abs=0.06)
    trainer = trainer_of(tiny(batch_size=4, micro_batch_size=None))
    awaken(trainer.model)
    batch = draw_batch(trainer.config, digits(), 0)
    whole = trainer.predict(batch.x, batch.t, batch.y, batch.block_mask)
    parts = [trainer.predict(p.x, p.t, p.y, p.block_mask) for p in batch.slices(1)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
