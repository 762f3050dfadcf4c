"""The whole ImageNet recipe, small and real, on two CPU processes; `make rehearsal` runs it.

    python experiments/rehearsal.py [--out runs/rehearsal] [--steps 300] [--vae-steps 200]

Photographs that scikit-image and scikit-learn carry -> crops in class folders -> a small
AutoencoderKL trained on them -> `dis-ssm encode` -> a latent DiS under FSDP2, killed with SIGKILL
half-way and started again -> `dis-ssm sample` -> decoded PNG. Every step is the command that one
would type, and each is checked; a failure ends it with a message and status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dis_ssm.data.images import to_model_space
from dis_ssm.data.open import open_dataset
from dis_ssm.system.extras import declare_torchvision_operators

SIDE, CROPS, PROCESSES = 64, 128, 2
PATIENCE = 900  # seconds
CONFIG = Path(__file__).parent / "configs" / "rehearsal.toml"
FAMILIAR = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")


def photographs() -> dict[str, Image.Image]:
    """Public-domain and CC0 photographs of scikit-image, and two CC BY 2.0 of scikit-learn."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = {name: getattr(skimage.data, name)() for name in FAMILIAR}
    samples = load_sample_images()
    arrays |= {Path(n).stem: a for n, a in zip(samples.filenames, samples.images, strict=True)}
    return {name: Image.fromarray(np.asarray(array)) for name, array in sorted(arrays.items())}


def write_crops(folder: Path) -> None:
    """`CROPS` random squares of each photograph, one photograph a class."""
    random = np.random.default_rng(0)
    for name, photo in photographs().items():
        (folder / name).mkdir(parents=True)
        for i in range(CROPS):
            side = int(min(photo.size) * random.uniform(0.5, 0.9))
            left, top = (int(random.integers(length - side + 1)) for length in photo.size)
            square = photo.crop((left, top, left + side, top + side))
            square = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            square.save(folder / name / f"{i:03d}.png")


def train_vae(images: Path, folder: Path, steps: int) -> float:
    """Fit a 4x AutoencoderKL and save it; the mean absolute error of its reconstructions."""
    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    dataset = open_dataset(images, image_size=SIDE)
    everything = to_model_space(dataset.batch(range(len(dataset)))[0])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    errors = []
    for _ in tqdm(range(steps), desc="AutoencoderKL", unit="step", mininterval=5):
        x = everything[torch.randint(len(everything), (16,))]
        posterior = vae.encode(x).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample()).sample, x)
        optimizer.zero_grad()
        (error + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()
        schedule.step()
        errors.append(error.item())
    with torch.no_grad():
        latents = vae.encode(everything[::8]).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder)
    return float(np.mean(errors[-20:]))


def dis_ssm(*arguments, processes: int = 1) -> list[str]:
    """The command line of `dis-ssm arguments`, on so many processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "-m", "dis_ssm", "--", *map(str, arguments)]


def run(*arguments, processes: int = 1) -> None:
    command = dis_ssm(*arguments, processes=processes)
    print("+", *command[1:], flush=True)
    subprocess.run(command, check=True)


def train_and_kill(*arguments, run_folder: Path, after: int) -> int:
    """Start training and kill all its processes once a checkpoint of step `after` is complete."""
    command = dis_ssm(*arguments, processes=PROCESSES)
    print("+", *command[1:], flush=True)
    launcher = subprocess.Popen(command)
    marker = run_folder / "checkpoints" / f"{after:08d}" / "COMPLETE"
    deadline = time.monotonic() + PATIENCE
    while not marker.exists() or last_step(run_folder) <= after:  # into steps that are lost
        check(time.monotonic() < deadline, f"no checkpoint in {PATIENCE} s")
        check(launcher.poll() is None, f"training ended by itself: {launcher.returncode}")
        time.sleep(0.1)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for process in (launcher.pid, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)
    launcher.wait()
    last = last_step(run_folder)
    print(f"killed all {PROCESSES} processes at step {last} or later", flush=True)
    return last


def last_step(run_folder: Path) -> int:
    """The last step in the log, a line that is being written aside; 0 without one."""
    path = run_folder / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"rehearsal failed: {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vae-steps", type=int, default=200)
    options = parser.parse_args()
    started, out = time.perf_counter(), options.out
    photos, vae, cache, model = (out / name for name in ("photos", "vae", "latents", "run"))
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(PROCESSES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    write_crops(photos)
    error = train_vae(photos, vae, options.vae_steps)
    print(f"AutoencoderKL: mean absolute error {error:.3f} of a range of 2", flush=True)

    shard = ["--shard-size", 256, "--image-size", SIDE, "--vae", vae]
    run("encode", photos, cache, *shard, processes=PROCESSES)
    run("check", cache)
    latents = open_dataset(cache)
    check(len(latents) == len(open_dataset(photos, image_size=SIDE)), "latents were lost")

    half = options.steps // 2
    settings = [CONFIG, "--data.source", cache, "--out", model, "--train.steps", options.steps]
    settings += ["--train.save-every", half]
    last = train_and_kill("train", *settings, run_folder=model, after=half)
    check(last > half, "no step was lost, so the kill proved nothing")
    run("train", *settings, processes=PROCESSES)
    log = [json.loads(line) for line in (model / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log]
    check(steps == sorted(set(steps)) and steps[-1] == options.steps, f"the log has steps {steps}")
    first, last = (np.mean([line["loss"] for line in part]) for part in (log[:2], log[-2:]))
    check(last < 0.8 * first, f"the loss went from {first:.3f} to {last:.3f}")

    picture = out / "samples.png"
    run("sample", model, "--per-class", 6, "--out", picture)
    with Image.open(picture) as image:
        deviation = np.asarray(image).std()
    check(deviation > 20, f"{picture} is almost blank")
    seconds = time.perf_counter() - started
    print(f"loss {first:.3f} -> {last:.3f}; {seconds:.0f} s; classes: {latents.class_names}")
    print(picture)


if __name__ == "__main__":
    main()
