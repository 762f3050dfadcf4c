"""A cache whose encoding was killed, or whose files were damaged, is repaired or named."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dis_ssm import cli
from dis_ssm.data import latents
from dis_ssm.data.latents import (
    CacheError,
    LatentDataset,
    check_cache,
    manifest_sha256,
    open_cache,
    read_manifest,
)
from dis_ssm.data.open import open_dataset
from dis_ssm.system.locks import locked
from dis_ssm.system.reading import sha256
from latent_helpers import (  # noqa: F401
    COUNT,
    FLAGS,
    KEPT,
    SIDE,
    cache,
    flip_a_byte,
    make_vae,
    quietly,
    restored_warnings,
    shards,
    source,
    truncate,
    vae,
    vae_folder,
    whole,
)

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
    with pytest.raises(CacheError, match=r"incomplete, \d of 6 shards: rerun the same `dis-ssm"):
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
    assert cli.main(["check", str(cache)]) == 2
    message = capsys.readouterr().err
    assert all(names[k] in message for k in (1, 2, 4)) and "to repair it" in message
    assert not any(names[k] in message for k in (0, 3, 5))
    before = {name: (cache / name).stat().st_mtime_ns for name in (names[0], names[3], names[5])}
    quietly(source, cache, vae_folder)
    assert before == {name: (cache / name).stat().st_mtime_ns for name in before}
    assert shards(cache) == shards(whole) and read_manifest(cache) == read_manifest(whole)
    assert cli.main(["check", str(cache)]) == 0


def test_a_shard_that_nobody_noted_is_kept(cache, whole, source, vae_folder, capsys):
    """The process died between renaming the shard and writing the manifest."""
    manifest = read_manifest(cache)
    manifest |= {"shards": manifest["shards"][:1], "complete": False}
    manifest["sha256"] = manifest_sha256(manifest)
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


@pytest.mark.parametrize(
    "change",
    [
        {"shard_size": 0},
        {"shards": [{}]},
        {"shards": None},
        {"source_images": float("inf")},
        {"source_images": 2**70},
        {"shards": []},
        {"vae": None},
        {"vae": {"shift_factor": None, "latents_mean": None, "scaling_factor": {}}},
    ],
)
def test_a_manifest_that_cannot_be_is_named(cache, change):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest | {"sha256": manifest_sha256(manifest)}))
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


def test_a_flipped_byte_of_a_manifest_is_never_used(cache):
    """Every seventh byte, in turn."""
    path = cache / "manifest.json"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flip_a_byte(path, at)
        try:
            manifest = read_manifest(cache)
        except CacheError as error:
            assert "manifest.json" in str(error)
        else:
            assert manifest == json.loads(content), at
        path.write_bytes(content)


def test_a_damaged_manifest_is_made_anew_from_the_shards(cache, whole, source, vae_folder, capsys):
    before = {name: (cache / name).stat().st_mtime_ns for name in shards(cache)}
    manifest = cache / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:500])
    assert cli.main(["check", str(cache)]) == 2
    assert "rerun the same `dis-ssm encode` to repair it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="encoded with other settings"):
        quietly(source, cache, vae_folder, precision="bf16")
    quietly(source, cache, vae_folder)
    assert "0 of 6 shards" in capsys.readouterr().out
    assert before == {name: (cache / name).stat().st_mtime_ns for name in before}
    assert read_manifest(cache) == read_manifest(whole)


def test_an_altered_shard_is_found_at_its_first_use(cache):
    names, used = list(shards(cache)), torch.tensor([False])
    assert len(open_cache(cache).stored([0], used)[0]) == 1
    flip_a_byte(cache / names[0])
    dataset = open_cache(cache)
    with pytest.raises(CacheError, match=rf"{names[0]} was altered"):
        dataset.stored([0], used)
    assert len(dataset.stored([len(KEPT) - 1], used)[0]) == 1


def test_a_shard_is_read_once_by_all_runs(cache, monkeypatch):
    read = []
    monkeypatch.setattr(latents, "sha256", lambda path: read.append(path.name) or sha256(path))
    flips = torch.zeros(len(KEPT), dtype=torch.bool)
    for _ in range(2):
        open_cache(cache).stored(range(len(KEPT)), flips)
    assert read == list(shards(cache))
    os.utime(cache / read[0])
    open_cache(cache).stored(range(len(KEPT)), flips)
    assert read[len(shards(cache)) :] == [read[0]]


def test_a_manifest_names_files_of_its_own_folder_only(cache):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../shard-00000.safetensors"
    manifest["sha256"] = manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="is no file name"):
        open_cache(cache)
