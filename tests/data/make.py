"""Makes the files of version 0.1.0 that test_old_files.py opens, with that version itself.

    python tests/data/make.py [--folder /srv/dis-ssm-0.1.0]

In a new folder, which is left there, the commit of 0.1.0 is exported and imported, and beside it
are made: `run`, trained on digits for 6 steps; `released.pt`, random weights under the names of a
released checkpoint, and `converted`, the run that they became; `images`, of which one cannot be
read, `vae`, of random weights, and `latents`, the cache of the images in three shards.
`expected.json` holds what 0.1.0 itself computed from them. All but the released file replace those
in this folder, less locks and TensorBoard's files. The cache records the absolute paths of images
and VAE: choose a folder whose name says nothing about your machine. The numbers depend on the
machine and on torch, so run this only to add something, and check in what it makes as a whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

COMMIT = "71f3af2"  # version 0.1.0
HERE = Path(__file__).resolve().parent
MADE = ("run", "converted", "images", "vae", "latents", "expected.json")
STEPS, FURTHER = 6, 9
SIDE, COUNT, BROKEN = 16, 10, 6
TRAIN = "--model.hidden-size 16 --model.depth 3 --model.patch-size 4 --model.d-state 4"
TRAIN += " --model.drop-path 0.1 --data.flip --train.batch-size 8 --train.lr 2e-3 --train.keep 1"
TRAIN += " --train.lr-schedule constant --train.warmup-steps 1 --train.log-every 1"
TRAIN += " --train.save-every 3 --sample.every 0"
DRAW = "--num 4 --steps 4 --sampler ddim --cfg-scale 2"


def export(folder: Path) -> None:
    """Put version 0.1.0 into `folder`, and first on the path of imports."""
    archive = subprocess.run(["git", "archive", COMMIT], cwd=HERE.parents[1], capture_output=True)
    if archive.returncode:
        raise SystemExit(archive.stderr.decode(errors="replace"))
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="tar")
    sys.path[:0] = [str(folder / "dis"), str(folder / "tests")]
    import dis_ssm

    if not Path(dis_ssm.__file__).is_relative_to(folder):
        raise SystemExit(f"{dis_ssm.__file__} was imported instead of {folder}")


def command(*arguments) -> None:
    from dis_ssm.cli import main

    if status := main([word for text in arguments for word in str(text).split()]):
        raise SystemExit(f"{arguments} ended with status {status}")


def write_images(folder: Path) -> None:
    """Two classes of smooth random photographs, one of which is no image."""
    random = np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / ("cat" if i < COUNT // 2 else "dog") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
        if i == BROKEN:
            file.write_bytes(b"no image")


def write_vae(folder: Path) -> None:
    from dis_ssm.metrics.compat import declare_torchvision_operators

    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIDE,
    ).save_pretrained(folder)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def inputs(config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t, y for a model of this configuration: a fixed pattern, two timesteps, two classes."""
    shape = (2, config.model.in_channels, *config.model.input_size)
    x = torch.linspace(-1, 1, 2 * config.model.in_channels * shape[2] * shape[3]).reshape(shape)
    return x, torch.tensor([10, 700]), torch.tensor([0, config.model.num_classes])


def of_run(run: Path) -> dict:
    """What the model of a run is and computes, and the images that it draws."""
    from dis_ssm.checkpoint import load_model

    model, config = load_model(run)
    with torch.no_grad():
        output = model(*inputs(config))
    command("sample", run, DRAW, "--out drawn.npz")
    with np.load("drawn.npz") as archive:
        drawn, labels = archive["arr_0"], archive["arr_1"]
    return {
        "ema": digest(model.state_dict()),
        "output": output.flatten()[::8].tolist(),
        "drawn": drawn.flatten().tolist(),
        "labels": labels.tolist(),
    }


def of_cache(folder: Path) -> dict:
    """What a cache holds, and what a model would learn of it at one noise."""
    from dis_ssm.data import open_dataset

    latents = open_dataset(folder)
    indices = torch.arange(len(latents))
    sides = [latents.moments(indices, torch.full_like(indices, side)) for side in (0, 1)]
    moments, labels = sides[0]
    noise = torch.linspace(-1, 1, moments[:, 0].numel()).reshape(moments[:, 0].shape)
    return {
        "images": len(latents),
        "classes": list(latents.class_names),
        "labels": labels.tolist(),
        "moments": digest({"images": moments, "mirrored": sides[1][0]}),
        "model_space": latents.to_model_space(moments, noise).flatten()[::8].tolist(),
    }


def continued(run: Path) -> list[float]:
    """The losses of the steps after the last one of a run."""
    copy = Path(shutil.copytree(run, "further"))
    command("train", copy / "config.json", "--out", copy, f"--train.steps {FURTHER}")
    lines = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines[STEPS:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/srv/dis-ssm-0.1.0"))
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    os.chdir(folder)
    export(folder / "source")
    torch.set_num_threads(1)
    from test_convert import released_state

    run, converted, latents = Path("run"), Path("converted"), Path("latents")
    command("train digits --out", run, TRAIN, f"--train.steps {STEPS}")
    torch.save({"ema": released_state(16, 3, 2, 4, (2, 2), classes=3)}, "released.pt")
    command("convert released.pt", converted)
    write_images(Path("images"))
    write_vae(Path("vae"))
    command("encode images", latents, f"--vae vae --image-size {SIDE} --shard-size 4")
    expected = {"run": of_run(run), "converted": of_run(converted), "latents": of_cache(latents)}
    expected["run"]["further_losses"] = continued(run)
    Path("expected.json").write_text(json.dumps(expected) + "\n")

    unwanted = shutil.ignore_patterns(".lock", "tensorboard", "verified.json", "samples")
    for name in MADE:
        if Path(name).is_file():
            shutil.copy(name, HERE)
        else:
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(name, HERE / name, ignore=unwanted)


if __name__ == "__main__":
    main()
