"""The latent cache: what the VAE says, whatever stops the encoding, no damage unnoticed."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dis_ssm import cli, hf
from dis_ssm.checkpoint import save_checkpoint
from dis_ssm.config import Config, DataConfig, ModelConfig, SampleConfig, build_model
from dis_ssm.data import open_dataset
from dis_ssm.encoding import encode, posterior_moments
from dis_ssm.hf import load_vae, vae_hash
from dis_ssm.images import make_grid, to_model_space
from dis_ssm.latents import (
    CacheError,
    LatentDataset,
    check_cache,
    decode,
    latent_scale,
    open_cache,
    read_manifest,
)
from dis_ssm.runs import locked

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
    from dis_ssm.metrics.compat import declare_torchvision_operators

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


# ---- what is stored ------------------------------------------------------------------------


def test_moments_are_those_of_the_vae_for_both_flips(whole, source, vae):
    dataset = open_cache(whole)
    images = open_dataset(source, "train", SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [
            images.read(range(start, stop))
            for shard in range(0, COUNT, SHARD)
            for start in range(shard, min(shard + SHARD, COUNT), BATCH)
            for stop in [min(start + BATCH, shard + SHARD, COUNT)]
        ]
    assert torch.cat([kept for *_, kept in batches]).tolist() == KEPT
    expected = []
    with torch.no_grad():
        for pixels, _, _ in batches:
            x = to_model_space(pixels)
            both = [vae.encode(view).latent_dist for view in (x, x.flip(-1))]
            expected.append(torch.stack([torch.stack([p.mean, p.std], 1) for p in both], 1))
    expected = torch.cat(expected).half()  # (n, flips, 2, C, H, W)
    for side in (0, 1):
        found, labels = dataset.moments(range(len(KEPT)), torch.full((len(KEPT),), side > 0))
        assert torch.equal(found, expected[:, side])
        assert labels.tolist() == [int(i >= 12) for i in KEPT]
    assert not torch.equal(expected[:, 0], expected[:, 1])


def test_the_manifest_says_what_was_made(whole, source, vae_folder, vae):
    manifest = read_manifest(whole)
    assert manifest["source"] == str(source) and manifest["vae"]["id"] == str(vae_folder)
    assert manifest["vae"]["scaling_factor"] == vae.config.scaling_factor
    assert {k: manifest["vae"][k] for k in ("config", "weights")} == vae_hash(vae)
    assert manifest["source_images"] == COUNT and manifest["images"] == len(KEPT)
    assert manifest["class_names"] == ["cat", "dog"] and manifest["crop"] == "center"
    corrupt = {k: v for record in manifest["shards"] for k, v in record["corrupt"].items()}
    assert list(corrupt) == [str(BROKEN)] and f"{BROKEN:02d}.png" in corrupt[str(BROKEN)]
    dataset = open_cache(whole)
    assert (dataset.channels, dataset.height, dataset.width) == (4, SIDE // 2, SIDE // 2)
    assert dataset.class_names == ("cat", "dog") and dataset.corrupt == {}
    assert not list(whole.glob(".draft*"))


def test_bfloat16_is_autocast_with_moments_in_float32(vae):
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    found = posterior_moments(vae, images, "bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parameters = vae.encode(to_model_space(images)).latent_dist.parameters
    assert parameters.dtype == torch.bfloat16
    mean, logvar = parameters.double().chunk(2, 1)
    assert torch.equal(found[0, :, 0], mean.half())
    std = (logvar / 2).exp()
    assert ((found[1, :, 0].double() - std) / std).abs().max() < 1e-3  # float16, not bfloat16
    exact = posterior_moments(vae, images)
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_moments_beyond_float16_are_refused_by_name(tmp_path, source, vae_folder):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    weights = load_file(folder / WEIGHTS)
    weights["quant_conv.bias"][0] = 1e5
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"moments of image 0 of .* not finite in float16"):
        quietly(source, tmp_path / "out", folder)


# ---- reading -------------------------------------------------------------------------------


def test_reading_gathers_any_indices_in_any_order(whole):
    dataset = open_cache(whole)
    tensors = [load_file(path) for path in sorted(whole.glob("shard-*"))]
    mean, std, label = (torch.cat([t[k] for t in tensors]) for k in ("mean", "std", "label"))
    indices = torch.tensor([21, 0, 0, 5, 6, 7, 13, 3, 4, 0])
    flips = torch.tensor([True, False, True] * 3 + [True])
    found, labels = dataset.moments(indices, flips)
    assert torch.equal(found, torch.stack([mean, std], 2)[indices, flips.long()])
    assert torch.equal(labels, label[indices])
    assert dataset.moments([], torch.zeros(0, dtype=torch.bool))[0].shape[0] == 0
    for wrong in ([22], [-1]):
        with pytest.raises(IndexError, match="0 to 21"):
            dataset.moments(wrong, torch.tensor([False]))
    with pytest.raises(ValueError, match="holds latents and no images"):
        dataset.batch([0])


def test_opening_maps_the_files_and_copies_nothing(tmp_path, whole):
    """40 MB of moments, of which only the ones asked for may enter this process's own memory."""
    manifest, n = read_manifest(whole), 625
    folder, shape = tmp_path / "large", (n, 2, 4, 32, 32)
    folder.mkdir()
    moments = torch.rand(shape).half()
    label = torch.zeros(n, dtype=torch.int64)
    records = []
    for k in (0, 1):
        path = folder / f"shard-{k:05d}.safetensors"
        save_file({"mean": moments, "std": moments + 1, "label": label}, path)
        record = {"name": path.name, "images": n, "bytes": path.stat().st_size, "sha256": ""}
        records.append(record | {"corrupt": {}})
    manifest |= {"shards": records, "latent_shape": [4, 32, 32], "source_images": 2 * n}
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def own_memory():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    before = own_memory()
    dataset = open_cache(folder)
    for start in range(0, n, 25):
        dataset.moments(range(start, start + 25), torch.ones(25, dtype=torch.bool))
    assert own_memory() - before < 8_000  # kB
    copy = pickle.dumps(dataset)
    assert len(copy) < 1_000 and len(pickle.loads(copy)) == 2 * n


def test_model_space_is_the_scaled_sample(whole):
    dataset = open_cache(whole)
    moments, _ = dataset.moments([0, 3], torch.tensor([False, True]))
    noise = torch.randn(2, 4, SIDE // 2, SIDE // 2)
    found = dataset.to_model_space(moments, noise)
    mean, std = moments.double().unbind(1)
    factor = dataset.manifest["vae"]["scaling_factor"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (mean + std * noise) * factor, rtol=1e-6, atol=1e-6)
    dataset.shift, dataset.scale = latent_scale(
        {"scaling_factor": 0.5, "shift_factor": 0.1, "latents_mean": None, "latents_std": None}
    )
    expected = (mean + std * noise - 0.1) * 0.5
    torch.testing.assert_close(dataset.to_model_space(moments, noise).double(), expected)
    dataset.shift, dataset.scale = latent_scale(
        {"scaling_factor": 0.5, "shift_factor": None}
        | {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    )
    expected = (mean + std * noise)[:, 3] - 4
    found = dataset.to_model_space(moments, noise)[:, 3].double()
    torch.testing.assert_close(found, expected * 0.5 / 8)


def test_decoding_undoes_the_scale(whole, vae):
    dataset = open_cache(whole)
    moments, _ = dataset.moments(range(5), torch.zeros(5, dtype=torch.bool))
    z = dataset.to_model_space(moments, torch.zeros(5, 4, SIDE // 2, SIDE // 2))
    with torch.no_grad():
        direct = torch.cat([vae.decode(m).sample for m in moments[:, 0].float().split(2)])
    expected = ((direct + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    difference = decode(vae, z, batch_size=2).int() - expected.int()
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.99
    with pytest.raises(ValueError, match="3 channels but the VAE decodes 4"):
        decode(vae, z[:, :3])


# ---- killed, stopped, damaged ----------------------------------------------------------------


def command(source, cache, vae_folder):
    flags = [*FLAGS, "--vae", vae_folder, "--device", "cpu"]
    return ["encode", *map(str, [source, cache, *flags])]


def rank_of_many(rank, address, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | address
    sys.exit(cli.main(arguments))


def start_ranks(arguments, size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fork = multiprocessing.get_context("fork").Process  # all is imported already
    ranks = [fork(target=rank_of_many, args=(k, address, arguments)) for k in range(size)]
    for rank in ranks:
        rank.start()
    return ranks


def kill_midway(arguments, cache, size):
    """Start `size` ranks and kill -9 them all as soon as two shards are there."""
    ranks = start_ranks(arguments, size)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("shard-*"))) < 2:
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    assert {rank.exitcode for rank in ranks} == {-signal.SIGKILL}


@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_run_again_it_is_the_cache_that_was_never_stopped(
    size, tmp_path, source, vae_folder, whole, capsys
):
    """One process is killed and two continue, two are killed and one continues."""
    cache = tmp_path / "cache"
    arguments = command(source, cache, vae_folder)
    kill_midway(arguments, cache, size)
    there = shards(cache)
    missing = shards(whole).keys() - there.keys()
    assert missing and there.items() <= shards(whole).items()
    with pytest.raises(CacheError, match=r"incomplete, \d of 6 shards: the same dis-ssm encode"):
        open_cache(cache)
    before = {name: (cache / name).stat().st_mtime_ns for name in there}
    capsys.readouterr()
    if size == 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        started = [sys.executable, *torchrun, "-m", "dis_ssm.cli", *arguments]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        again = subprocess.run(started, env=threads, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("encoded:") == 1
        printed = again.stdout
    else:
        quietly(source, cache, vae_folder)
        printed = capsys.readouterr().out
    assert f"{len(missing)} of 6 shards" in printed
    assert before == {name: (cache / name).stat().st_mtime_ns for name in there}
    assert shards(cache) == shards(whole) and check_cache(cache) == {}
    one, other = read_manifest(cache), read_manifest(whole)
    assert one == other and not list(cache.glob(".draft*"))


def test_what_is_damaged_is_named_and_only_that_is_encoded_again(
    cache, whole, source, vae_folder, capsys
):
    names = list(shards(cache))
    flip_a_byte(cache / names[1])
    assert len(open_cache(cache)) == len(KEPT)  # sizes and headers are as they were
    assert list(check_cache(cache)) == [names[1]]
    truncate(cache / names[2])
    with pytest.raises(CacheError, match=rf"{names[2]} is damaged: \d+ bytes instead of"):
        open_cache(cache)
    (cache / names[4]).unlink()
    capsys.readouterr()
    assert cli.main(["encode", "--check", str(cache)]) == 2
    message = capsys.readouterr().err
    assert all(names[k] in message for k in (1, 2, 4)) and "encode again" in message
    assert not any(names[k] in message for k in (0, 3, 5))
    before = {name: (cache / name).stat().st_mtime_ns for name in (names[0], names[3], names[5])}
    quietly(source, cache, vae_folder)
    assert before == {name: (cache / name).stat().st_mtime_ns for name in before}
    assert shards(cache) == shards(whole) and read_manifest(cache) == read_manifest(whole)
    assert cli.main(["encode", "--check", str(cache)]) == 0


def test_a_shard_that_nobody_noted_is_kept(cache, whole, source, vae_folder, capsys):
    """The process died between renaming the shard and writing the manifest."""
    manifest = read_manifest(cache)
    manifest |= {"shards": manifest["shards"][:1], "complete": False}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    (cache / ".draft-shard-00005.safetensors").write_bytes(b"cut short")
    foreign = load_file(cache / "shard-00003.safetensors")
    save_file(foreign, cache / "shard-00003.safetensors")
    quietly(source, cache, vae_folder)
    printed = capsys.readouterr().out
    assert "shard-00003.safetensors belongs to another cache" in printed
    assert "1 of 6 shards" in printed and not list(cache.glob(".draft*"))
    assert shards(cache) == shards(whole) and read_manifest(cache) == read_manifest(whole)


def test_other_settings_are_refused_and_named(cache, whole, source, vae_folder, tmp_path):
    changes = {"precision": ({"precision": "bf16"}, '"float32" -> "bf16"')}
    changes["shard_size"] = ({"shard_size": 5}, "4 -> 5")
    for name, (options, change) in changes.items():
        with pytest.raises(ValueError, match=f"{name}: {change}"):
            quietly(source, cache, vae_folder, **options)
    with pytest.raises(ValueError, match=r"vae.weights: .* -> "):
        quietly(source, cache, make_vae(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"vae.scaling_factor: 0.18215 -> 0.5"):
        quietly(source, cache, make_vae(tmp_path / "scaled", scaling_factor=0.5))
    fewer = shutil.copytree(source, tmp_path / "fewer")
    (fewer / "dog" / "20.png").unlink()
    with pytest.raises(ValueError, match="source_images: 23 -> 22"):
        quietly(fewer, cache, vae_folder)
    assert shards(cache) == shards(whole) and read_manifest(cache) == read_manifest(whole)
    moved = shutil.copytree(vae_folder, tmp_path / "moved")
    quietly(source, cache, moved)  # the same weights elsewhere are the same VAE


def test_a_full_disk_leaves_the_finished_shards(cache, whole, source, vae_folder):
    names = list(shards(cache))
    for name in names[2:4]:
        (cache / name).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (cache / names[0]).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write .*{names[2]}"):
            quietly(source, cache, vae_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(shards(cache)) == names[:2] + names[4:] and not list(cache.glob(".draft*"))
    with pytest.raises(CacheError, match="incomplete, 4 of 6 shards"):
        open_cache(cache)
    quietly(source, cache, vae_folder)
    assert shards(cache) == shards(whole)


def test_too_many_corrupt_images_are_an_error(tmp_path, source, vae_folder):
    folder = shutil.copytree(source, tmp_path / "images")
    (folder / "dog" / "20.png").write_bytes(b"no image either")
    with pytest.raises(ValueError, match=r"(?s)06\.png.*20\.png") as error:
        quietly(folder, tmp_path / "out", vae_folder, max_corrupt=1)
    assert "max_corrupt" in str(error.value)
    with pytest.raises(ValueError, match=r"2 images .* cannot be read, more than max_corrupt 1"):
        quietly(folder, tmp_path / "out", vae_folder, max_corrupt=1)  # of all calls together
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(tmp_path / "out")
    quietly(folder, tmp_path / "out", vae_folder, max_corrupt=2)
    assert len(open_cache(tmp_path / "out")) == COUNT - 2
    with pytest.raises(ValueError, match="max_corrupt 1"):
        quietly(folder, tmp_path / "out", vae_folder, max_corrupt=1)
    shutil.copy(source / "dog" / "20.png", folder / "dog" / "20.png")
    quietly(folder, tmp_path / "out", vae_folder, max_corrupt=1)
    assert len(open_cache(tmp_path / "out")) == COUNT - 1


def test_corrupt_images_count_over_all_processes(tmp_path, source, vae_folder, capfd):
    folder = shutil.copytree(source, tmp_path / "images")
    (folder / "dog" / "17.png").write_bytes(b"no image either")  # of rank 0, the other of rank 1
    arguments = [*command(folder, tmp_path / "out", vae_folder), "--max-corrupt", "1"]
    ranks = start_ranks(arguments, 2)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [2, 2]
    message = "2 images cannot be read and max_corrupt is 1"
    assert capfd.readouterr().err.count(message) == 2
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(tmp_path / "out")


def test_two_commands_do_not_share_a_folder(cache, source, vae_folder):
    with locked(cache), pytest.raises(ValueError, match="by another process"):
        quietly(source, cache, vae_folder)


def test_a_cache_is_a_data_set_of_its_split_and_size(whole):
    dataset = open_dataset(whole, "train", SIDE)
    assert isinstance(dataset, LatentDataset) and len(dataset) == len(KEPT)
    with pytest.raises(ValueError, match="heldout"):
        open_dataset(whole, "heldout")
    with pytest.raises(ValueError, match="64"):
        open_dataset(whole, "train", 64)


def test_folders_that_are_no_cache_are_left_alone(tmp_path, source, vae_folder):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and is not a cache"):
        quietly(source, tmp_path, vae_folder)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):
        quietly(source, tmp_path / "thesis.tex", vae_folder)
    with pytest.raises(CacheError, match=r"is not a cache of latents: manifest\.json is missing"):
        open_cache(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    with pytest.raises(ValueError, match="is not empty and is not a cache"):
        quietly(source, tmp_path / "run", vae_folder)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(CacheError, match=r"manifest\.json is damaged: KeyError"):
        open_cache(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "thesis.tex"]


@pytest.mark.parametrize("change", [{"shard_size": 0}, {"shards": [{}]}, {"shards": None}])
def test_a_manifest_that_cannot_be_is_named(cache, change):
    path = cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        check_cache(cache)


def test_settings_that_cannot_be_are_refused(tmp_path, source, vae_folder):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="shrinks 2 times: choose an image_size that 2 divides"):
        quietly(source, out, vae_folder, image_size=31)
    with pytest.raises(ValueError, match=r"digits has 1 channels but VAE .* takes 3"):
        quietly("digits", out, vae_folder, image_size=None)
    with pytest.raises(ValueError, match="shard_size 0 must be at least 1"):
        quietly(source, out, vae_folder, shard_size=0)
    with pytest.raises(ValueError, match="unknown precision 'fp16'"):
        quietly(source, out, vae_folder, precision="fp16")
    assert not out.exists()


# ---- the VAE ---------------------------------------------------------------------------------


def test_a_loaded_vae_is_frozen(vae_folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(vae_folder, pipeline / "vae")
    model = load_vae(pipeline, dtype=torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_vae_that_cannot_be_loaded_is_named(tmp_path, vae_folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot load VAE '.*empty': .* hub id") as error:
        load_vae(tmp_path / "empty")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot load VAE '\./nowhere': there is no such folder"):
        load_vae("./nowhere")
    cut = shutil.copytree(vae_folder, tmp_path / "cut")
    truncate(cut / WEIGHTS)
    with pytest.raises(ValueError, match=r"cannot load VAE '.*cut'"):
        load_vae(cut)
    weights = load_file(vae_folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, cut / WEIGHTS)
    with pytest.raises(ValueError, match=r"incomplete: no encoder\.conv_in\.weight"):
        load_vae(cut)

    asked = []

    def from_hub(name, local_files_only=False, **options):
        asked.append(local_files_only)
        raise OSError("no connection")

    from diffusers import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_hub)
    with pytest.raises(ValueError, match=f"cannot load VAE '{hf.DEFAULT_VAE}': no connection"):
        load_vae(hf.DEFAULT_VAE)
    assert asked == [True, False]


def test_hashes_tell_encoders_apart_and_not_decoders(vae_folder):
    model = load_vae(vae_folder)
    before = vae_hash(model)
    model.decoder.conv_out.weight.data.add_(1)
    assert vae_hash(model) == before
    model.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    after = vae_hash(model)
    assert after["weights"] != before["weights"] and after["config"] == before["config"]
    model.register_to_config(scaling_factor=1.0)
    assert vae_hash(model)["config"] != before["config"]


# ---- dis-ssm sample --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(whole, tmp_path_factory):
    """An untrained model of these latents."""
    config = Config(
        out=tmp_path_factory.mktemp("runs") / "run",
        data=DataConfig(source=str(whole)),
        model=ModelConfig(
            hidden_size=16,
            depth=1,
            patch_size=4,
            d_state=4,
            num_classes=2,
            in_channels=4,
            input_size=(SIDE // 2, SIDE // 2),
        ),
        sample=SampleConfig(steps=2),
    )
    torch.manual_seed(0)
    weights = build_model(config).state_dict()
    parts = {"model": weights, "ema": weights, "optimizer": {}}
    save_checkpoint(config.out, 1, parts, config, {}, 1)
    return config.out


def test_sample_decodes_with_the_vae_of_the_cache_or_the_one_given(
    run, vae, vae_folder, tmp_path, capsys
):
    def drawn(name, *flags):
        out = tmp_path / name
        arguments = ["sample", str(run), "--num", "6", "--device", "cpu", "--out", str(out), *flags]
        assert cli.main(arguments) == 0
        return out

    with np.load(drawn("latents.npz", "--vae", "none")) as arrays:
        latents, labels = torch.from_numpy(arrays["arr_0"]), arrays["arr_1"]
    assert latents.dtype == torch.float32 and latents.shape == (6, 4, SIDE // 2, SIDE // 2)
    expected = decode(vae, latents)
    with np.load(drawn("images.npz")) as arrays:
        assert np.array_equal(arrays["arr_0"], expected.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(arrays["arr_1"], labels)
    grid = np.array(make_grid(expected, 2))
    with Image.open(drawn("grid.png", "--vae", str(vae_folder))) as image:
        assert np.array_equal(np.array(image), grid)
    assert cli.main(["sample", str(run), "--num", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip().endswith(".png")
    three = make_vae(tmp_path / "three", latent_channels=3)
    arguments = ["sample", str(run), "--num", "2", "--vae", str(three), "--device", "cpu"]
    assert cli.main(arguments) == 2
    assert "latents have 4 channels but the VAE decodes 3" in capsys.readouterr().err


def test_sample_warns_of_another_encoder(run, tmp_path, capsys):
    other = make_vae(tmp_path / "other", seed=1)
    arguments = ["sample", str(run), "--num", "2", "--vae", str(other), "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    assert "is not the one that" in capsys.readouterr().err


def test_the_command_asks_for_what_it_needs(capsys):
    for arguments in (["encode"], ["encode", "digits"], ["encode", "digits", "x", "--check", "y"]):
        assert cli.main(arguments) == 2
        assert "give SOURCE and CACHE to encode, or --check CACHE" in capsys.readouterr().err
