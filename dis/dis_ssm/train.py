"""Training, in one process: a step is a function of (seed, step) and of the state before it.

Everything random in step n comes from generators seeded by (seed, n) and is drawn on the CPU for
the whole global batch, so that slices of it (micro-batches) are the same images with the same
noise whatever their size, and nothing but the step number must be saved to resume bit for bit.
"""

import contextlib
import hashlib
import math
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dis_ssm.checkpoint import (
    check_tensors,
    clean_drafts,
    load_optimizer,
    load_weights,
    newest_intact,
    optimizer_tensors,
    save_checkpoint,
    versions,
    write_json,
)
from dis_ssm.config import (
    Config,
    TrainConfig,
    build_diffusion,
    build_model,
    differences,
    from_dict,
    pick_device,
    resolve,
    to_dict,
    to_toml,
)
from dis_ssm.data import ImageDataset, batch_indices, open_dataset
from dis_ssm.ema import EMA
from dis_ssm.images import draw_images, label_columns, to_model_space
from dis_ssm.runs import RunLog, StopSignal, exclusive, preview_path

PARTS = ("model", "ema", "optimizer")


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: the run, its step, and the signal that stopped it early, if one did."""

    run: Path
    step: int
    stopped_by: int | None = None


def train(config: Config) -> Outcome:
    """Train until `config.train.steps`, or continue the run in `config.out` where it stopped.

    A continued run equals an uninterrupted one bit for bit on the same device, with the same
    threads and versions; otherwise it continues with a warning. SIGTERM and SIGINT end the current
    step, save and return. Raises ValueError for settings that contradict the data or the saved run,
    FloatingPointError after `max_nonfinite` non-finite steps in a row (the state is saved first),
    CheckpointError when no checkpoint is intact.
    """
    config, dataset = _open(config)
    run, steps = config.out, config.train.steps
    trainer = Trainer(config)  # before the folder is made: what is refused leaves none
    with exclusive(run), StopSignal() as stop:
        meter = _resume(trainer, run, len(dataset))
        # a process killed between saving a step and drawing it still owes the preview
        owed = trainer.shows_step() and not preview_path(run, trainer.step).exists()
        done = trainer.step >= steps
        if done:
            print(f"{run} is done: {trainer.step} of {steps} steps")
        else:
            write_json(run / "config.json", to_dict(config))
            parameters = sum(p.numel() for p in trainer.model.parameters())
            print(
                f"{run}: {parameters:,} parameters, {len(dataset):,} images, steps "
                f"{trainer.step:,} to {steps:,} on {trainer.device}",
                flush=True,
            )
        if owed or not done:
            with RunLog(run, trainer.step, meter) as log:
                if owed:
                    log.images(trainer.step, *trainer.preview())
                if not done:
                    _train(trainer, dataset, stop, log)
    if trainer.nonfinite:
        print(f"{trainer.nonfinite:,} of {trainer.step:,} steps were not finite and were skipped")
    return Outcome(run, trainer.step, stop.received if trainer.step < steps else None)


def describe(config: Config) -> str:
    """What `train(config)` would do: the resolved config as TOML, its sizes as comments."""
    config, dataset = _open(config)
    settings, seen = config.train, config.train.steps * config.train.batch_size
    with torch.device("meta"):
        model = build_model(config)
    groups = parameter_groups(model, settings.weight_decay)
    sizes = {g["name"]: sum(p.numel() for p in g["params"]) for g in groups}
    return (
        f"{to_toml(config)}\n"
        f"# parameters: {sum(sizes.values()):,}, {sizes['matrices']:,} of them in matrices\n"
        f"# tokens: {model.pos_embed.shape[1]}\n"
        f"# steps: {settings.steps:,} of {settings.batch_size} images\n"
        f"# epochs: {seen / len(dataset):.2f} of {len(dataset):,} images\n"
        f"# device: {pick_device(settings.device)}"
    )


class Trainer:
    """Model, average, optimizer and counters of a run; `update` is one optimizer step."""

    def __init__(self, config: Config):
        settings = config.train
        self.config, self.device = config, pick_device(settings.device)
        self.step = self.nonfinite = self.nonfinite_in_a_row = 0
        torch.manual_seed(derive_seed("weights", settings.seed))
        self.model = build_model(config).to(self.device).train()
        self.model.class_dropout_prob = 0.0  # `draw_batch` has dropped the labels
        self.model.set_grad_checkpointing(settings.grad_checkpointing)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.diffusion = build_diffusion(config)
        self.ema = EMA(self.model, settings.ema_decay, settings.ema_warmup)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            fused=True if self.device.type in ("cpu", "cuda") else None,
        )

    def update(self, batch: "Batch") -> dict[str, float]:
        """One step on the mean loss of the batch; skipped and counted unless all is finite."""
        settings = self.config.train
        torch.manual_seed(derive_seed("forward", settings.seed, self.step))  # stochastic depth
        self.optimizer.zero_grad()
        metrics = self.accumulate(batch)
        limit = settings.grad_clip or math.inf
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        if all(map(math.isfinite, values)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, settings)
            self.optimizer.step()
            self.ema.update(self.model)
            self.nonfinite_in_a_row = 0
        else:
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
        self.step += 1
        return dict(zip(metrics, values, strict=True))

    def accumulate(self, batch: "Batch") -> dict[str, Tensor]:
        """Add the gradient of the mean loss, a micro-batch at a time; the mean losses."""
        total = len(batch.x)
        means: dict[str, Tensor] = {}
        for part in batch.slices(self.config.train.micro_batch_size or total, self.device):
            losses = self.diffusion.training_losses(
                self.predict, part.x, part.t, part.y, part.noise
            )
            shares = {name: loss.sum() / total for name, loss in losses.items()}
            shares["loss"].backward()
            for name, share in shares.items():
                means[name] = means.get(name, 0) + share.detach()
        return means

    def predict(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        half = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.forward(x, t, y)

    def shows_step(self) -> bool:
        """Whether the step that was reached has a preview: each `sample.every`-th and the last."""
        every, last = self.config.sample.every, self.config.train.steps
        return bool(every and self.step and (self.step % every == 0 or self.step == last))

    def preview(self) -> tuple[Tensor, int]:
        """uint8 samples of the averaged weights, and the columns of their grid."""
        model, settings = self.config.model, self.config.sample
        labels, columns = label_columns(settings.num, list(range(model.num_classes)))
        shape = (model.in_channels, *model.input_size)
        with self.ema.applied(self.model):
            self.model.eval()
            images = draw_images(self.model, self.diffusion, shape, settings.num, labels, settings)
            self.model.train()
        return images, columns

    def machine(self) -> dict[str, Any]:
        """What sums in another order when it changes."""
        return {"device": self.device.type, "threads": torch.get_num_threads()}

    def save(self, meter: dict[str, float], images: int) -> None:
        state = {
            "nonfinite": self.nonfinite,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "ema_updates": self.ema.updates,
            "images": images,
            "machine": self.machine(),
            "meter": meter,
        }
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors,
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        keep = self.config.train.keep
        save_checkpoint(self.config.out, self.step, parts, self.config, state, keep)

    def restore(self, folder: Path, saved: dict[str, Any], parts: dict[str, Any]) -> None:
        """Continue from a checkpoint that `newest_intact` returned."""
        file = {name: folder / f"{name}.safetensors" for name in PARTS}
        load_weights(self.model, parts["model"], file["model"])
        load_optimizer(self.optimizer, self.model, parts["optimizer"], file["optimizer"])
        check_tensors(self.ema.tensors, parts["ema"], file["ema"])
        self.ema.load(parts["ema"], saved["trainer"]["ema_updates"])
        self.step = saved["step"]
        self.nonfinite = saved["trainer"]["nonfinite"]
        self.nonfinite_in_a_row = saved["trainer"]["nonfinite_in_a_row"]


def learning_rate(step: int, settings: TrainConfig) -> float:
    """The rate of update `step` = 0, 1, ...: `min(1, (step + 1) / warmup_steps)` times lr, or times
    `min_lr + (lr - min_lr) (1 + cos(pi step / steps)) / 2` for the cosine schedule."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return warmup * settings.lr
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return warmup * (settings.min_lr + (settings.lr - settings.min_lr) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups that cover every trainable parameter once: "matrices", the weights of linear
    layers and convolutions, with weight decay; "others" without: biases, norms, A_log, D, position
    and class embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith("weight") and parameter.ndim > 1 and id(parameter) not in tables
            (matrices if decays else others).append(parameter)
    return [
        {"name": "matrices", "params": matrices, "weight_decay": weight_decay},
        {"name": "others", "params": others, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Batch:
    """What one step learns from: data x (B, C, H, W) in [-1, 1], labels y (B,), the dropped ones
    already null, or None, timesteps t (B,), noise like x."""

    x: Tensor
    y: Tensor | None
    t: Tensor
    noise: Tensor

    def slices(self, size: int, device: torch.device) -> Iterator["Batch"]:
        def move(value: Tensor | None, start: int) -> Tensor | None:
            return None if value is None else value[start : start + size].to(device)

        for start in range(0, len(self.x), size):
            yield Batch(*(move(v, start) for v in (self.x, self.y, self.t, self.noise)))


def draw_batch(config: Config, dataset: ImageDataset, step: int) -> Batch:
    """The global batch of `step`: a function of the arguments alone, on the CPU."""
    settings, model = config.train, config.model
    n, seed = settings.batch_size, settings.seed
    generator = torch.Generator().manual_seed(derive_seed("batch", seed, step))
    t = torch.randint(config.diffusion.num_steps, (n,), generator=generator)
    dropped, flipped = torch.rand(2, n, generator=generator)
    images, y = dataset.batch(batch_indices(len(dataset), n, seed, step))
    x = to_model_space(images)
    if config.data.flip:
        x = torch.where(flipped[:, None, None, None] < 0.5, x.flip(-1), x)
    if model.num_classes:
        y = torch.where(dropped < model.class_dropout_prob, model.num_classes, y)
    noise = torch.randn(x.shape, generator=generator)
    return Batch(x, y if model.num_classes else None, t, noise)


def derive_seed(*key: str | int) -> int:
    """A seed in [0, 2^63) that differs for every key: the head of a SHA-256 of it."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def _open(config: Config) -> tuple[Config, ImageDataset]:
    dataset = open_dataset(config.data.source, "train", config.data.image_size)
    shape = {name: getattr(dataset, name) for name in ("channels", "height", "width")}
    return resolve(config, num_classes=dataset.num_classes, **shape), dataset


def _resume(trainer: Trainer, run: Path, images: int) -> dict[str, float]:
    """Restore the newest intact checkpoint, if any; the log's running sums."""
    clean_drafts(run)
    found = newest_intact(run, PARTS)
    if found is None:
        return {}
    folder, saved, parts = found
    changed = differences(from_dict(saved["config"]), trainer.config)
    if saved["trainer"]["images"] != images:
        changed.append(f"images in data.source: {saved['trainer']['images']} -> {images}")
    if changed:
        raise ValueError(
            f"{run} was trained with other settings ({'; '.join(changed)}): give those again to "
            f"continue it, or another --out to start a new run"
        )
    before, now = saved["trainer"]["machine"] | saved["versions"], trainer.machine() | versions()
    moved = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if moved:
        warnings.warn(f"{run} continues, though not bit for bit: {', '.join(moved)}", stacklevel=2)
    trainer.restore(folder, saved, parts)
    return saved["trainer"]["meter"]


def _train(trainer: Trainer, dataset: ImageDataset, stop: StopSignal, log: RunLog) -> None:
    config, settings = trainer.config, trainer.config.train
    bar = tqdm(
        total=settings.steps,
        initial=trainer.step,
        unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
    with bar, contextlib.closing(_batches(config, dataset, trainer.step)) as batches:
        clock = time.perf_counter()
        for batch in batches:
            metrics = trainer.update(batch)
            log.add(metrics, settings.batch_size, time.perf_counter() - clock)
            done = trainer.step == settings.steps
            if done or trainer.step % settings.log_every == 0:
                epoch = trainer.step * settings.batch_size / len(dataset)
                rate = learning_rate(trainer.step - 1, settings)
                line = log.write(trainer.step, epoch, rate, trainer.nonfinite, metrics)
                bar.set_postfix({"loss": line["loss"]}, refresh=False)
            bar.update()
            diverged = trainer.nonfinite_in_a_row >= settings.max_nonfinite
            last = done or diverged or stop.received
            if last or trainer.step % settings.save_every == 0:
                log.sync()
                trainer.save(log.meter, len(dataset))
            if trainer.shows_step() and not stop.received:
                log.images(trainer.step, *trainer.preview())
            if diverged:
                raise FloatingPointError(
                    f"loss or gradient not finite in {trainer.nonfinite_in_a_row} steps in a row; "
                    f"step {trainer.step} is saved in {config.out}. Start a new run with a "
                    f"train.lr below {settings.lr}"
                )
            if last:
                return
            clock = time.perf_counter()


def _batches(config: Config, dataset: ImageDataset, first: int) -> Iterator[Batch]:
    """Batches from step `first` to the last, each drawn while the step before it computes."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(draw_batch, config, dataset, first)
        for step in range(first + 1, config.train.steps + 1):
            batch = pending.result()
            if step < config.train.steps:
                pending = pool.submit(draw_batch, config, dataset, step)
            yield batch
