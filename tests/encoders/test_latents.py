"""The latent cache: what the VAE says, whatever stops the encoding, no damage unnoticed."""

import dataclasses
import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dis_ssm import cli
from dis_ssm.build import build_model, open_run
from dis_ssm.config import Config, DataConfig, ModelConfig, SampleConfig, differences
from dis_ssm.data.images import to_model_space
from dis_ssm.data.latents import latent_scale, manifest_sha256, open_cache, read_manifest
from dis_ssm.data.open import open_dataset
from dis_ssm.encoders import vae as hf
from dis_ssm.encoders.decoding import decode, load_decoder
from dis_ssm.encoders.encoding import posterior_moments
from dis_ssm.encoders.vae import load_vae, vae_hash
from dis_ssm.sampling.grids import make_grid
from dis_ssm.storage.checkpoint import save_checkpoint
from dis_ssm.system.reading import sha256
from latent_helpers import (  # noqa: F401
    BATCH,
    BROKEN,
    COUNT,
    KEPT,
    SHARD,
    SIDE,
    WEIGHTS,
    cache,
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
        found, labels = dataset.stored(range(len(KEPT)), torch.full((len(KEPT),), side > 0))
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
    found, labels = dataset.stored(indices, flips)
    assert torch.equal(found, torch.stack([mean, std], 2)[indices, flips.long()])
    assert torch.equal(labels, label[indices])
    assert dataset.stored([], torch.zeros(0, dtype=torch.bool))[0].shape[0] == 0
    for wrong in ([22], [-1]):
        with pytest.raises(IndexError, match="0 to 21"):
            dataset.stored(wrong, torch.tensor([False]))
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
        record = {
            "name": path.name,
            "images": n,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        records.append(record | {"corrupt": {}})
    manifest |= {"shards": records, "latent_shape": [4, 32, 32], "source_images": 2 * n}
    manifest["sha256"] = manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def own_memory():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    before = own_memory()
    dataset = open_cache(folder)
    for start in range(0, n, 25):
        dataset.stored(range(start, start + 25), torch.ones(25, dtype=torch.bool))
    assert own_memory() - before < 8_000  # kB
    copy = pickle.dumps(dataset)
    assert len(copy) < 1_000 and len(pickle.loads(copy)) == 2 * n


def test_model_space_is_the_scaled_sample(whole):
    dataset = open_cache(whole)
    moments, _ = dataset.stored([0, 3], torch.tensor([False, True]))
    noise = torch.randn(2, 4, SIDE // 2, SIDE // 2)
    found = dataset.to_model_space(moments, lambda: noise)
    mean, std = moments.double().unbind(1)
    factor = dataset.manifest["vae"]["scaling_factor"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (mean + std * noise) * factor, rtol=1e-6, atol=1e-6)
    dataset.shift, dataset.scale = latent_scale(
        {"scaling_factor": 0.5, "shift_factor": 0.1, "latents_mean": None, "latents_std": None}
    )
    expected = (mean + std * noise - 0.1) * 0.5
    torch.testing.assert_close(dataset.to_model_space(moments, lambda: noise).double(), expected)
    dataset.shift, dataset.scale = latent_scale(
        {"scaling_factor": 0.5, "shift_factor": None}
        | {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    )
    expected = (mean + std * noise)[:, 3] - 4
    found = dataset.to_model_space(moments, lambda: noise)[:, 3].double()
    torch.testing.assert_close(found, expected * 0.5 / 8)


def test_decoding_undoes_the_scale(whole, vae):
    dataset = open_cache(whole)
    moments, _ = dataset.stored(range(5), torch.zeros(5, dtype=torch.bool))
    z = dataset.to_model_space(moments, lambda: torch.zeros(5, 4, SIDE // 2, SIDE // 2))
    with torch.no_grad():
        direct = torch.cat([vae.decode(m).sample for m in moments[:, 0].float().split(2)])
    expected = ((direct + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    difference = decode(vae, z, batch_size=2).int() - expected.int()
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.99
    with pytest.raises(ValueError, match="3 channels but the VAE decodes 4"):
        decode(vae, z[:, :3])


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
    from huggingface_hub import HfApi

    def model_info(self, name, **options):
        asked.append(name)
        if name != hf.DEFAULT_VAE:
            raise ConnectionError("no such host")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_hub)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(ValueError, match=f"cannot load VAE '{hf.DEFAULT_VAE}': no connection"):
        load_vae(hf.DEFAULT_VAE)
    assert asked == [True, hf.DEFAULT_VAE, False]
    asked.clear()
    with pytest.raises(ValueError, match="not on this machine, and the hub says: no such host"):
        load_vae("nobody/nothing")
    assert asked == [True, "nobody/nothing"]  # once


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


def test_sample_says_so_where_the_vae_has_gone(run, vae_folder, tmp_path, capsys):
    moved, out = tmp_path / "moved", tmp_path / "set.npz"
    arguments = ["sample", str(run), "--num", "2", "--device", "cpu", "--out", str(out)]
    vae_folder.rename(moved)
    try:
        assert cli.main(arguments) == 0
        assert "draws latents and no VAE is at hand" in capsys.readouterr().err
        assert cli.main([*arguments, "--vae", "none"]) == 0
        assert "warning" not in capsys.readouterr().err
    finally:
        moved.rename(vae_folder)


@pytest.mark.parametrize(
    "config, words",
    [
        ("x", "config.json holds no object"),
        ({"norm_num_groups": -1}, "norm_num_groups is -1"),
        ({"scaling_factor": "x"}, "scaling_factor"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
    ],
)
def test_a_vae_whose_config_cannot_be_is_refused(vae_folder, tmp_path, config, words):
    path = shutil.copytree(vae_folder, tmp_path / "vae") / "config.json"
    if isinstance(config, dict):
        config = json.loads(path.read_text()) | config
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"VAE '.*{words}"):
        load_decoder(path.parent, "digits", 4, "cpu")


@pytest.mark.parametrize(
    "image_size, latents, drawn",
    [(None, True, "float32"), (256, None, "float32"), (8, None, "uint8"), (None, False, "uint8")],
)
def test_a_run_whose_data_has_gone_draws_what_its_config_says(
    tmp_path, capsys, image_size, latents, drawn
):
    run = untrained(tmp_path / "run", source="/gone", image_size=image_size, latents=latents)
    out = tmp_path / "set.npz"
    assert cli.main(["sample", str(run), "--num", "2", "--out", str(out)]) == 0
    assert ("draws latents and no VAE" in capsys.readouterr().err) == (drawn == "float32")
    with np.load(out) as arrays:
        assert arrays["arr_0"].dtype == drawn


@pytest.mark.filterwarnings("default")
def test_a_run_is_taken_for_one_of_images_with_a_warning_where_nothing_tells(tmp_path, capsys):
    run, out = untrained(tmp_path / "run", source="/gone"), tmp_path / "set.npz"
    arguments = ["sample", str(run), "--num", "2", "--device", "cpu", "--out"]
    assert cli.main([*arguments, str(out)]) == 0
    said = capsys.readouterr().err
    assert said.count("/gone has gone") == 1 and "give --vae" in said
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, 3)
    out, vae = tmp_path / "decoded.npz", make_vae(tmp_path / "vae", latent_channels=3)
    assert cli.main([*arguments, str(out), "--vae", str(vae)]) == 0
    assert "has gone" not in capsys.readouterr().err
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (2, 16, 16, 3)


def untrained(folder, **data):
    """A run of a model that draws 3 x 8 x 8."""
    shape = {"num_classes": 0, "in_channels": 3, "input_size": (8, 8)}
    model = ModelConfig(hidden_size=16, depth=1, patch_size=4, d_state=4, **shape)
    config = Config(folder, model, data=DataConfig(**data), sample=SampleConfig(steps=2))
    weights = build_model(config).state_dict()
    parts = {"model": weights, "ema": weights, "optimizer": {}}
    save_checkpoint(folder, 1, parts, config, {}, 1)
    return folder


def test_what_was_learned_is_kept_in_the_config(whole):
    model = ModelConfig(hidden_size=16, depth=1, patch_size=4)
    config = Config(model=model, data=DataConfig(source=str(whole)))
    resolved, _ = open_run(config)
    assert resolved.data.latents is True
    assert differences(config, resolved) == [
        f"model.{name}: None -> {value}"
        for name, value in (("num_classes", 2), ("in_channels", 4), ("input_size", [16, 16]))
    ]  # a run of 0.1.0 goes on
    images = dataclasses.replace(config, data=DataConfig(source=str(whole), latents=False))
    with pytest.raises(ValueError, match="latents is False but"):
        open_run(images)


def test_evaluate_decodes_with_the_vae_that_is_given(run, vae_folder, source, tmp_path, capsys):
    images, out = tmp_path / "set.npz", tmp_path / "scores.json"
    drawing = ["--num", "6", "--seed", "0", "--device", "cpu"]
    compared = [str(source / "dog"), "--extractor", "pixels", "--out", str(out)]
    assert cli.main(["sample", str(run), *drawing, "--out", str(images)]) == 0
    assert cli.main(["evaluate", str(images), *compared]) == 0
    expected = json.loads(out.read_text())["scores"]
    assert cli.main(["evaluate", str(run), *compared, *drawing, "--vae", str(vae_folder)]) == 0
    report = json.loads(out.read_text())
    assert report["scores"] == expected and report["drawn"]["vae"] == str(vae_folder)
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), *compared, "--vae", "none"]) == 2
    assert "draws latents and no VAE decodes them: give --vae" in capsys.readouterr().err


def test_sample_warns_of_another_encoder(run, tmp_path, capsys):
    other = make_vae(tmp_path / "other", seed=1)
    arguments = ["sample", str(run), "--num", "2", "--vae", str(other), "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    assert "is not the one that" in capsys.readouterr().err


def test_the_command_asks_for_what_it_needs(capsys):
    for arguments, words in (
        (["encode"], "SOURCE"),
        (["encode", "digits"], "CACHE"),
        (["encode", "--check", "cache"], "--check: that is a command of its own, dis-ssm check"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
