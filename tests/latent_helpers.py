"""A small VAE, a source with a corrupt image, and the cache made of them, for the latent tests."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dis_ssm.encoders.encoding import encode
from dis_ssm.encoders.vae import load_vae

SIDE, COUNT, SHARD, BATCH = 32, 23, 4, 3  # the last shard and batches are short
BROKEN = 6  # index of the image that is no image
KEPT = [i for i in range(COUNT) if i != BROKEN]
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = {"image_size": SIDE, "shard_size": SHARD, "batch_size": BATCH}
FLAGS = ["--image-size", SIDE, "--shard-size", SHARD, "--batch-size", BATCH]


@pytest.fixture(autouse=True)
def restored_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def make_vae(folder, seed=0, **config):
    from dis_ssm.system.extras import declare_torchvision_operators

    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4}
    blocks |= {"down_block_types": ["DownEncoderBlock2D"] * 2}
    blocks |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**blocks | config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(vae_folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of smooth random photographs, one of which is no image."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / ("cat" if i < 12 else "dog") / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
    (folder / "cat" / f"{BROKEN:02d}.png").write_bytes(b"no image")
    return folder


def quietly(source, out, vae, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode(source, out, vae=vae, **OPTIONS | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source, vae_folder):
    """A cache that was encoded at one go by one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("latents") / "whole"
    quietly(source, folder, vae_folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "cache")


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def flip_a_byte(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])
